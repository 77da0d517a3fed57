"""firsttoken.cost: the estimate, its cache, and many at once."""

from __future__ import annotations

import dataclasses
import pickle

import pytest
from stand_in import Compiler

from firsttoken import CostModel, Estimate, RunOptions, Target, api
from firsttoken.student import LayerConfig, StudentConfig, UnknownStudent
from firsttoken_compiler.errors import OptionError

TARGET = Target.load("systolic-128")


def test_exact_is_what_a_run_says(compiler: Compiler, llama: StudentConfig) -> None:
    estimate = CostModel(TARGET, prompt=3, decode=2).exact(llama)
    document = api.run(llama, TARGET, prompt=3, decode=2)
    assert (estimate.ttft_ms, estimate.energy_mj, estimate.tpot_ms) == (
        document.ttft_ms, document.energy_mj, document.tpot_ms,
    )  # fmt: skip
    assert estimate.macs == document.macs == sum(layer.macs for layer in estimate.by_layer)
    assert sum(layer.ms for layer in estimate.by_layer) + estimate.host_ms == pytest.approx(estimate.ttft_ms, rel=1e-9)
    assert [layer.name for layer in estimate.by_layer] == ["layers.0"]
    assert document.decode is not None
    assert estimate.token_energy_mj == document.decode.energy_mj
    assert document.energy_bands is not None
    assert estimate.energy_band_mj == (document.energy_bands.npu_mj.low, document.energy_bands.npu_mj.high)
    assert estimate.token_energy_band_mj is not None
    assert estimate.token_energy_band_mj[0] < estimate.token_energy_mj < estimate.token_energy_band_mj[1]
    assert CostModel(TARGET, prompt=3).exact(llama).tpot_ms is None


def test_json_round_trip(compiler: Compiler, llama: StudentConfig) -> None:
    estimate = CostModel(TARGET, prompt=3).exact(llama)
    assert Estimate.from_json(estimate.to_json()) == estimate
    assert pickle.loads(pickle.dumps(estimate)) == estimate


def test_kept_by_content(compiler: Compiler, llama: StudentConfig) -> None:
    model = CostModel(TARGET, prompt=3)
    first = model.exact(llama)
    uniform = (LayerConfig(llama.heads, llama.kv_heads, llama.intermediate),) * llama.layers
    assert model.exact(dataclasses.replace(llama, name="renamed", source="elsewhere", per_layer=uniform)) == first
    described = dataclasses.replace(TARGET, description="other words")
    assert dataclasses.replace(model, target=described).exact(llama) == first
    assert len(compiler.calls) == 1
    model.exact(dataclasses.replace(llama, per_layer=(dataclasses.replace(uniform[0], weight_bits=8), uniform[1])))
    assert len(compiler.calls) == 2
    assert compiler.calls[1][3].layer_bits == (8, 0)
    CostModel(TARGET, prompt=3, options=RunOptions(weights="int8")).exact(llama)
    CostModel(TARGET, prompt=4).exact(llama)
    assert len(compiler.calls) == 4


def test_the_model_is_picklable(llama: StudentConfig) -> None:
    model = CostModel(TARGET, prompt=3, options=RunOptions(weights="fp16"))
    assert pickle.loads(pickle.dumps(model)) == model


def test_many_in_order_and_once_each(compiler: Compiler, llama: StudentConfig, qwen2: StudentConfig) -> None:
    model = CostModel(TARGET, prompt=3)
    known = model.exact(qwen2)
    found = model.exact_many([llama, qwen2, dataclasses.replace(llama, name="again")], jobs=1)
    assert [call[0] for call in compiler.calls] == ["tiny-qwen2", "tiny-llama"]
    assert found == [model.exact(llama), known, model.exact(llama)]
    assert model.exact_many([]) == []


def test_mistakes(compiler: Compiler, llama: StudentConfig) -> None:
    with pytest.raises(UnknownStudent, match="unknown student"):
        CostModel(TARGET).exact("smolm2")
    with pytest.raises(OptionError, match="--prompt 65 exceeds"):
        CostModel(TARGET, prompt=65).exact_many([llama])
    with pytest.raises(OptionError, match="jobs is 0, must be at least 1"):
        CostModel(TARGET).exact_many([llama], jobs=0)
