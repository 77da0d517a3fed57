"""Merged products: the same numbers to the bit, fewer launches, names, and who stays apart and why."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chain import Chain
from students import LLAMA, QWEN2, QWEN3, UNEVEN

from firsttoken.student import StudentConfig
from firsttoken_compiler.codegen.memory_map import Compiled
from firsttoken_compiler.errors import OptionError
from firsttoken_compiler.isa.program import Program
from firsttoken_compiler.isa.types import Space
from firsttoken_compiler.options import Precision, WeightRule, resolve
from firsttoken_compiler.passes import merge
from firsttoken_compiler.pipeline import compile_onnx
from firsttoken_compiler.schedule.choice import CoreSplit, GraphChoice, Schedules, launch_key
from firsttoken_compiler.target.target import Target

SYSTOLIC, SNAPDRAGON = Target.load("systolic-128"), Target.load("snapdragon-x-elite")
LITTLE = replace(SYSTOLIC, name="little", scratchpad=replace(SYSTOLIC.scratchpad, bytes=96 << 10), provenance={})
"""Its scratchpad is too small for results, so that columns of them are read in the DRAM."""
BOTH = ("qkv", "gate_up")
FORMATS = {
    "fp16": resolve("fp16", None, "128", None),
    "int8": resolve("int8", None, "channel", None),
    "int8 rows": replace(resolve("int8", "fp16", "channel", "fp16"), norm_cache="fp16"),
    "int4": resolve("int4", None, "32", None),
    "zero points": resolve("int4", None, "32", None, asymmetric=True),
    "int8 cache": replace(resolve("int8", None, "channel", None), kv_cache="int8"),
    "off": resolve("int8", None, "channel", "off"),
    "statistics": resolve("int8", None, "channel", "statistics"),
    "auto": resolve("int4", None, "32", "auto"),
    "dram": replace(resolve("int8", None, "channel", None), norm_cache_place="dram"),
    "blocks": resolve("q8_0", None, "128", None),
}
PLAIN = FORMATS["int8"]


def schedules(*merged: str, **more: Any) -> Schedules:
    return Schedules(graph=GraphChoice(merged=merged), **more)


def chain(
    folder: Path, config: StudentConfig, precision: Precision, target: Target, given: Schedules | None,
    tokens: int = 7, past: int = 0, observe: Any = None,
) -> Chain:  # fmt: skip
    made = Chain(config, tokens, past, precision, target, folder)
    made.__dict__["program"] = compile_onnx(made.student, target, precision, schedules=given, observe=observe)
    if precision.kv_cache == "int8" and past:
        r = np.random.default_rng(3)
        for name in [name for name in made.feeds if name.startswith("past_key_values")]:
            shape = made.feeds[name].shape
            made.feeds[name] = r.integers(-127, 128, shape).astype(np.int8)
            made.feeds[f"{name}.scales"] = r.uniform(0.005, 0.02, (*shape[:-1], 1)).astype(np.float16)
    return made


def assert_equal(one: Chain, other: Chain) -> None:
    first, second = one.outputs(None), other.outputs(other.timeline.completion_order)
    assert first.keys() == second.keys()
    for name, values in first.items():
        np.testing.assert_array_equal(second[name], values, err_msg=name)


def kinds(program: Program) -> Counter[str]:
    return Counter(op.kind for op in program.ops)


@pytest.mark.parametrize("config", [LLAMA, QWEN2, UNEVEN], ids=lambda config: config.name)
@pytest.mark.parametrize(("tokens", "past"), [(7, 0), (1, 5), (3, 4)])
def test_queries_keys_and_values_are_the_same_to_the_bit(
    config: StudentConfig, tokens: int, past: int, tmp_path: Path
) -> None:
    """Panels of 128 columns, inside which the parts begin and end.

    With a single head the values of a prompt are the cache as they are, a result of the graph: that layer stays apart.
    """
    for precision in (FORMATS["int4"], FORMATS["fp16"]):
        alone = chain(tmp_path, config, precision, SYSTOLIC, None, tokens, past)
        one = chain(tmp_path, config, precision, SYSTOLIC, schedules("qkv"), tokens, past)
        assert_equal(alone, one)
        lines = one.program.meta["merged"]
        alike = [line for line in lines if "stay apart" not in line]
        assert len(lines) - len(alike) == (config is UNEVEN and not past)
        assert kinds(alone.program)["linear"] - kinds(one.program)["linear"] == 2 * len(alike)
        assert sum(op.macs for op in one.program.ops) == sum(op.macs for op in alone.program.ops)
        assert len(one.program) < len(alone.program)


@pytest.mark.parametrize("name", [name for name in FORMATS if name not in ("int4", "fp16")])
@pytest.mark.parametrize(("tokens", "past"), [(7, 0), (1, 5)])
def test_in_every_format_and_way_of_a_norm(name: str, tokens: int, past: int, tmp_path: Path) -> None:
    config = replace(QWEN2, layers=1)
    alone = chain(tmp_path, config, FORMATS[name], SNAPDRAGON, None, tokens, past)
    one = chain(tmp_path, config, FORMATS[name], SNAPDRAGON, schedules("qkv"), tokens, past)
    assert_equal(alone, one)
    assert one.program.meta["merged"] == ["layers.0.self_attn: q_proj, k_proj and v_proj are one product"]
    if name == "off":
        assert kinds(alone.program)["rms_norm"] - kinds(one.program)["rms_norm"] == 2  # made once for the one product


@pytest.mark.parametrize("name", ["fp16", "int8", "int4", "off", "statistics"])
@pytest.mark.parametrize("target", [SYSTOLIC, SNAPDRAGON], ids=lambda target: target.name)
def test_gate_and_up_are_those_of_a_swiglu_by_itself(
    name: str, target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SwiGLU is then a kernel of its own: the numbers of a program in which nothing is fused, to the bit."""
    one = chain(tmp_path, LLAMA, FORMATS[name], target, schedules("gate_up"))
    fused = chain(tmp_path, LLAMA, FORMATS[name], target, None)
    monkeypatch.setattr(merge.Merge, "run", lambda _self, *given: merge.Merged(*given))
    monkeypatch.setattr(merge, "check", lambda *_: None)
    apart = chain(tmp_path, LLAMA, FORMATS[name], target, schedules("gate_up"))
    assert_equal(apart, one)
    assert kinds(apart.program)["swiglu"] == kinds(one.program)["swiglu"] == LLAMA.layers
    assert kinds(fused.program)["swiglu"] == 0
    logits, plain = (made.outputs(None)["logits"].astype(np.float64) for made in (one, fused))
    assert np.abs(logits - plain).max() <= 0.05 * np.abs(plain).max()


def test_columns_are_read_in_the_dram_alike(tmp_path: Path) -> None:
    config, places = replace(QWEN2, hidden=128), list[Space]()

    def observe(compiled: Compiled, _: Any) -> None:
        windows = [v for launch in compiled.launches.launches for v in launch.args if v.arg.whole]
        places.extend(compiled.placement.space(value) for value in windows)

    alone = chain(tmp_path, config, PLAIN, LITTLE, None, 64)
    one = chain(tmp_path, config, PLAIN, LITTLE, schedules("qkv"), 64, observe=observe)
    assert Space.DRAM in places
    assert_equal(alone, one)


@pytest.mark.parametrize("prefer", ["n", "k", "heads", "rows"])
def test_several_cores_share_merged_products(prefer: str, tmp_path: Path) -> None:
    target = replace(SYSTOLIC, name="four", cores=4, provenance={})
    config, splits = replace(QWEN2, layers=1, hidden=256), {}

    def observe(compiled: Compiled, _: Any) -> None:
        from firsttoken_compiler.schedule.parts import ways

        for launch in compiled.launches.launches:
            possible = ways(launch.spec, target, 4)
            way = next((way for way in (prefer, "heads", "rows") if way in possible), "none")
            splits[launch_key(launch.spec)] = CoreSplit(way, 1 if way == "none" else 4)

    one = chain(tmp_path, config, PLAIN, target, schedules("qkv"), 40, observe=observe)
    cut = chain(tmp_path, config, PLAIN, target, schedules("qkv", splits=tuple(splits.items())), 40)
    assert cut.program.cores == 4
    if prefer != "k":
        assert_equal(one, cut)
    else:  # sums of several cores are added in another order
        for name, values in one.outputs(None).items():
            np.testing.assert_allclose(cut.outputs(None)[name], values, rtol=1e-2, atol=2e-3)
    alone = chain(tmp_path, config, PLAIN, SYSTOLIC, None, 40)
    assert_equal(alone, chain(tmp_path, config, PLAIN, SYSTOLIC, schedules("qkv"), 40))


def test_names_nodes_weights_and_formats_are_of_all_parts(tmp_path: Path) -> None:
    alone = chain(tmp_path, QWEN2, FORMATS["int4"], SYSTOLIC, None).program
    one = chain(tmp_path, QWEN2, FORMATS["int4"], SYSTOLIC, schedules(*BOTH)).program
    ops = {op.name: op for op in one.ops}
    qkv, gate_up = ops["layers.1.self_attn.q_proj+k_proj+v_proj"], ops["layers.1.mlp.gate_proj+up_proj"]
    assert (qkv.n, gate_up.n) == (4 * 24 + 2 * 2 * 24, 2 * QWEN2.intermediate)
    assert (qkv.module, gate_up.module) == ("layers.1.self_attn", "layers.1.mlp")
    assert [f"/model/layers.1/self_attn/{leaf}/MatMul" in qkv.onnx_nodes for leaf in ("q_proj", "k_proj", "v_proj")]
    made = [tensor for tensor in one.tensors if tensor.packing is not None and tensor.packing.sources]
    assert {tensor.packing.form for tensor in made if tensor.packing} == {"panels", "scales", "plain"}
    assert sum(t.nbytes for t in one.of_kind("weight")) == sum(t.nbytes for t in alone.of_kind("weight"))
    assert one.meta["weight_formats"] == alone.meta["weight_formats"]
    assert Program.decode(one.encode()).tensors == one.tensors


def test_nothing_asked_changes_nothing(tmp_path: Path) -> None:
    programs = [
        chain(tmp_path, LLAMA, PLAIN, SYSTOLIC, given).program.encode()
        for given in (None, Schedules(), schedules(), schedules("none"), schedules("layers.*.mlp=none"))
    ]
    assert len(set(programs)) == 1


def test_patterns_choose_modules_and_the_first_line_decides(tmp_path: Path) -> None:
    given = schedules("layers.1.*=none", "layers.*.self_attn=qkv", "layers.0-1.mlp=gate_up")
    program = chain(tmp_path, LLAMA, PLAIN, SYSTOLIC, given).program
    names = [op.name for op in program.ops if "+" in op.name]
    assert names == ["layers.0.self_attn.q_proj+k_proj+v_proj", "layers.0.mlp.gate_proj+up_proj"]
    assert kinds(program)["swiglu"] == 1


@pytest.mark.parametrize(
    ("config", "rule", "merged", "words"),
    [
        (QWEN3, None, "qkv", r"'qkv', which merges nothing: layers.0.self_attn: q_proj, k_proj and v_proj stay apart: "
         r"q_proj is also read as a matrix of other rows \(and 1 more modules\); take the line out"),
        (LLAMA, ("attn_v", "int8"), "layers.*.self_attn=qkv", "the weights of q_proj are int4 group 32, those of "
         "v_proj int8 group 32: give them one format"),
        (LLAMA, ("ffn_up", "q8_0"), "gate_up", "the weights of gate_proj are int4 group 32, those of up_proj q8_0: "),
        (LLAMA, None, "layers.7.*=qkv", "no module that 'layers.7.*' covers and no line before it names has qkv "
         "products: there are layers.0.self_attn, layers.1.self_attn; take the line out"),
        (LLAMA, None, "layers.0.attn=gate_up", "there are layers.0.mlp, layers.1.mlp"),
    ],
)  # fmt: skip
def test_a_line_that_merges_nothing_is_refused_with_the_reason(
    config: StudentConfig, rule: tuple[str, str] | None, merged: str, words: str, tmp_path: Path
) -> None:
    rules = (WeightRule(*rule),) if rule is not None else ()
    with pytest.raises(OptionError, match=words):
        chain(tmp_path, config, replace(FORMATS["int4"], rules=rules), SYSTOLIC, schedules(merged))


def test_modules_whose_formats_differ_stay_as_they_were_beside_merged_ones(tmp_path: Path) -> None:
    mixed = replace(FORMATS["int4"], rules=(WeightRule("ffn_up", "int8", ((0, 0),)),))
    alone = chain(tmp_path, LLAMA, mixed, SYSTOLIC, None)
    one = chain(tmp_path, LLAMA, mixed, SYSTOLIC, schedules(*BOTH))
    lines = one.program.meta["merged"]
    assert "layers.1.mlp: gate_proj and up_proj are one product" in lines
    (apart,) = [line for line in lines if "stay apart" in line]
    assert apart.startswith("layers.0.mlp: gate_proj and up_proj stay apart: the weights of gate_proj are int4")
    assert kinds(one.program)["swiglu"] == 1  # that of layer 0 is in its products, as without a schedule
    tiles = [{op.name: op.tile for op in made.program.ops} for made in (alone, one)]
    assert tiles[0]["layers.0.mlp.up_proj"] == tiles[1]["layers.0.mlp.up_proj"]


@pytest.mark.parametrize("text", ["attention", "layers.*.mlp=qkvs", "=", ""])
def test_unknown_kinds_are_refused(text: str) -> None:
    with pytest.raises(OptionError, match="give NAME=KIND or KIND, a kind is qkv, gate_up, none"):
        GraphChoice(merged=(text,))
