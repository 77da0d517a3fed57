"""Norm caching from options to programs: what is computed how often, what moves, numbers, and the choice by cost."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from students import LLAMA, QWEN2

from firsttoken import api
from firsttoken.execution import load
from firsttoken.generation import token_feeds
from firsttoken.options import RunOptions
from firsttoken.student import StudentConfig
from firsttoken.subject import Built, subject_of
from firsttoken_compiler.codegen import norm_choice, norm_ways
from firsttoken_compiler.errors import AllocationError, OptionError
from firsttoken_compiler.frontend.onnx_file import from_model
from firsttoken_compiler.isa.program import Program
from firsttoken_compiler.isa.types import Space
from firsttoken_compiler.pipeline import compile_onnx
from firsttoken_compiler.target.load import load_target
from firsttoken_compiler.target.target import Target
from firsttoken_models.students import SMOLLM2_135M
from firsttoken_models.weights import write_random_weights
from firsttoken_simulator.machine import simulate_program

WIDE = replace(SMOLLM2_135M, name="two-layers", layers=2, vocab=512)
WAYS = (("int8", "scratchpad"), ("int8", "dram"), ("statistics", "auto"), ("off", "auto"))
CHOOSE = norm_choice.choose_norms
PER_LAYER = (3, 2)
"""Products that read each norm of a layer; one more reads the last norm."""


def options(cached: str, place: str = "auto", weights: str = "int8", **more: Any) -> RunOptions:
    return RunOptions(weights=weights, norm_cache=cached, norm_cache_place=place, **more)


@pytest.fixture(scope="module")
def little(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Makes a target file out of the textbook preset, with so many KiB of scratchpad."""
    folder = tmp_path_factory.mktemp("targets")
    text = (resources.files("firsttoken_compiler.target") / "presets" / "systolic-128.toml").read_text(encoding="utf-8")

    def make(kib: int) -> Target:
        path = folder / f"little-{kib}.toml"
        changed = text.replace("bytes = { value = 4194304,", f"bytes = {{ value = {kib << 10},")
        assert changed != text or kib == 4096
        path.write_text(changed, encoding="utf-8")
        return load_target(path)

    return make


def kinds(program: Program) -> Counter[str]:
    return Counter(op.kind for op in program.ops)


@pytest.mark.parametrize(("cached", "place"), WAYS)
def test_each_norm_is_computed_as_often_as_the_way_says(cached: str, place: str) -> None:
    found = kinds(api.compile(LLAMA, "systolic-128", prompt=5, options=options(cached, place)))
    norms, readers = 2 * LLAMA.layers + 1, sum(PER_LAYER) * LLAMA.layers + 1
    split = {"norm_stats": norms, "normed": readers}
    expected = {"int8": {"rms_norm": norms}, "off": {"rms_norm": readers}, "statistics": split}[cached]
    assert {kind: found[kind] for kind in ("rms_norm", "norm_stats", "normalise", "normed")} == {
        "rms_norm": 0, "norm_stats": 0, "normalise": 0, "normed": 0, **expected
    }  # fmt: skip


def test_rows_in_the_scratchpad_are_written_once_and_never_leave_it() -> None:
    """Over all output tiles of all consumers: one vector instruction writes a row, none of its bytes moves by DMA."""
    program = api.compile(WIDE, "systolic-128", prompt=64, options=options("int8"))
    timeline = simulate_program(program, load_target("systolic-128"))
    asked = api.compile(WIDE, "systolic-128", prompt=64, options=options("int8", "scratchpad"))
    np.testing.assert_array_equal(asked.code, program.code)  # they lie there by themselves
    rows = [op for op in program.ops if op.kind == "rms_norm"]
    assert len(rows) == 2 * WIDE.layers + 1
    q = [op for op in program.ops if op.name.endswith("gate_proj")]
    assert q
    assert all(op.last - op.first > 20 for op in q)  # many tiles
    for op in rows:
        inside = slice(op.first, op.last)
        assert timeline.dram_write_bytes[inside].sum() == 0
        assert timeline.dram_read_bytes[inside].sum() == 2 * WIDE.hidden  # gamma, in fp16
        assert timeline.vector_ops[inside].sum() > 0


def test_rows_in_dram_are_written_once_in_their_type() -> None:
    target, prompt = load_target("systolic-128"), 64
    program = api.compile(WIDE, target, prompt=prompt, options=options("int8", "dram"))
    timeline = simulate_program(program, target)
    for op in program.ops:
        if op.kind == "rms_norm":
            written_bytes = timeline.dram_write_bytes[op.first : op.last].sum()
            tokens = 1 if op.m == 1 else prompt
            assert written_bytes == tokens * WIDE.hidden  # int8; the scales stay


def logits_of(config: StudentConfig, folder: Path, target: Target, chosen: RunOptions) -> NDArray[np.float32]:
    subject = subject_of(config, None)
    assert isinstance(subject, Built)
    subject = replace(subject, weights=write_random_weights(config, folder), all_logits=True)
    program = api.compile_subject(subject, target, 7, 0, chosen)
    loaded = load(program, simulate_program(program, target), subject.open(7, 0), target)
    result: NDArray[np.float32] = loaded.run(token_feeds(range(3, 10)))["logits"]
    return result


@pytest.mark.parametrize(("config", "target"), [(LLAMA, "systolic-128"), (QWEN2, "snapdragon-x-elite")])
@pytest.mark.parametrize(("weights", "rows"), [("int4", "int8"), ("int8", "int16"), ("fp16", "fp16")])
def test_ways_and_places_change_no_bit(
    config: StudentConfig, target: str, weights: str, rows: str, tmp_path: Path
) -> None:
    machine = load_target(target)
    expected = logits_of(config, tmp_path, machine, options("off", weights=weights, acts=rows))
    assert np.ptp(expected) > 0
    for cached, place in ((rows, "scratchpad"), (rows, "dram"), ("statistics", "auto"), ("auto", "auto")):
        got = logits_of(config, tmp_path, machine, options(cached, place, weights, acts=rows))
        # Where norms lie decides on tiles, and tiles of fp16 products on the order in which fp32 sums are added up.
        if rows == "fp16":
            np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6, err_msg=f"{cached} {place}")
        else:
            np.testing.assert_array_equal(got, expected, err_msg=f"{cached} {place}")


@pytest.mark.parametrize("beta", [True, False], ids=["with bias", "without bias"])
def test_layer_norms_of_an_encoder(beta: bool) -> None:
    """Two norms with two and one consumers: the same bits on every way; statistics are a mean, a factor, a scale."""
    shift = ", bn" if beta else ""
    body = (
        f"n = LayerNormalization(x, gn{shift}) a0 = MatMul(n, w1) a = Add(a0, b1) c = MatMul(n, w2) t = Add(a, c) "
        f"r = Add(x, t) k = LayerNormalization(r, gk{shift.replace('bn', 'bk')}) y = MatMul(k, w3)"
    )
    names = {"w1": (48, 48), "b1": (48,), "w2": (48, 48), "w3": (48, 32), "gn": (48,), "gk": (48,)}
    names |= {"bn": (48,), "bk": (48,)} if beta else {}
    random = np.random.default_rng(0)
    text = '<ir_version: 10, opset_import: ["" : 18]> encoder (float[1,9,48] x) => (float[1,9,32] y)'
    model = onnx.parser.parse_model(f"{text} {{ {body} }}")
    for name, shape in names.items():
        array = random.standard_normal(shape).astype(np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    target, x = load_target("systolic-128"), random.standard_normal((1, 9, 48)).astype(np.float32)
    found = []
    for cached, place in WAYS:
        student = from_model(model, Path(), "encoder")
        program = compile_onnx(student, target, options(cached, place).precision())
        assert program is not None
        if cached == "statistics":
            assert kinds(program)["norm_stats"] == 2
            assert kinds(program)["normed"] == 3
            stats = next(op for op in program.ops if op.kind == "norm_stats")
            assert stats.m == 9
        found.append(load(program, simulate_program(program, target), student, target).run({"x": x})["y"])
    for other in found[1:]:
        np.testing.assert_array_equal(other, found[0])


def measured(target: Target, prompt: int, chosen: RunOptions) -> tuple[int, Program]:
    program = api.compile(WIDE, target, prompt=prompt, options=chosen)
    return simulate_program(program, target).total_cycles, program


def ways_in(program: Program) -> set[str]:
    lines = [line for line in program.meta["norm_decisions"] if "norm:" in line]
    said = {
        "in scratchpad for": "scratchpad",
        "in DRAM for": "dram",
        "from its statistics": "statistics",
        "again": "off",
    }
    return {way for line in lines for text, way in said.items() if text in line.partition("; estimated")[0]}


@pytest.mark.parametrize(("kib", "prompt"), [(256, 64), (512, 256), (4096, 64)])
def test_the_chosen_way_is_the_cheapest_that_is_measured(little: Any, kib: int, prompt: int) -> None:
    target = little(kib)
    every = {}
    for cached, place in WAYS:
        try:
            every[cached, place] = measured(target, prompt, options(cached, place))[0]
        except AllocationError:
            assert place == "scratchpad"
    chosen, program = measured(target, prompt, options("auto"))
    assert chosen <= 1.03 * min(every.values()), (every, program.meta["norm_decisions"])


@pytest.mark.parametrize(("kib", "prompt"), [(256, 64), (4096, 64)])
def test_estimates_are_close_to_what_is_measured(
    little: Any, kib: int, prompt: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, plans = little(kib), []

    def choose(*arguments: Any) -> norm_choice.Plan:
        plans.append(CHOOSE(*arguments))
        return plans[-1]

    monkeypatch.setattr(norm_choice, "choose_norms", choose)
    program = api.compile(WIDE, target, prompt=prompt, options=options("int8"))
    timeline = simulate_program(program, target)
    lowered = plans[0].lowered
    estimate = norm_ways.Costs(target, lowered.placement, templates=plans[0].templates).whole(lowered.launches)
    moved = int(timeline.dram_read_bytes.sum() + timeline.dram_write_bytes.sum())
    assert moved - estimate.dram_bytes == 3 * 8 * prompt  # indices of the rows that are gathered, of three tables
    assert abs(estimate.cycles / timeline.total_cycles - 1) < 0.15


def test_decisions_follow_the_scratchpad_and_say_so(little: Any) -> None:
    plenty, little_ = (measured(target, 64, options("auto"))[1] for target in (little(4096), little(256)))
    assert ways_in(plenty) == {"scratchpad"}
    line = plenty.meta["norm_decisions"][0]
    assert line.startswith(
        "layers.0.input_layernorm: kept as int8 in scratchpad for 3 products, 37,120 bytes; estimated: "
    )
    for other in ("rows in DRAM +", "from statistics +", "computed again +"):
        assert other in line
    assert ways_in(little_) - {"scratchpad"}
    (compared,) = [line for line in little_.meta["norm_decisions"] if line.startswith("whole program, estimated: ")]
    assert "rows where they fit" in compared


def test_rows_that_cannot_stay_are_an_error_that_names_the_remedy(little: Any) -> None:
    with pytest.raises(AllocationError, match=r"normalised rows take \d+ bytes .* choose --norm-cache-place auto"):
        api.compile(WIDE, little(96), prompt=256, options=options("int16", "scratchpad", acts="int16"))


def test_a_place_for_nothing_is_an_error() -> None:
    with pytest.raises(OptionError, match="--norm-cache off keeps no rows that could lie in dram"):
        options("off", "dram")
    with pytest.raises(OptionError, match="--norm-cache statistics keeps a scale per token"):
        options("statistics", ranges=(("x", 1.0),))
    with pytest.raises(OptionError, match="--norm-cache-place 'disk' is not one of auto, scratchpad, dram"):
        options("int8", "disk")


def test_the_residual_stream_is_narrowed_only_where_it_is_spilled_and_only_when_asked(little: Any) -> None:
    target = little(256)
    kept, narrow = (measured(target, 256, options("int8", residual_spill=spill)) for spill in ("fp32", "fp16"))
    lines = [program.meta["norm_decisions"][-1] for _, program in (kept, narrow)]
    assert lines[0] == "residual stream: 0 of 4 sums in scratchpad as fp32, 4 in DRAM as fp32"
    assert "fp16" in lines[1]

    def spilled(program: Program) -> int:
        return sum(t.nbytes for t in program.tensors if t.kind == "activation" and t.space is Space.DRAM)

    assert spilled(narrow[1]) < spilled(kept[1])
    _, plenty = measured(little(4096), 64, options("int8", residual_spill="fp16"))
    assert plenty.meta["norm_decisions"][-1] == "residual stream: 4 of 4 sums in scratchpad as fp32"
