"""Precision and norm caching: types, recipes and names, which product reads what, and the numbers that come out.

The typed module is interpreted and compared with the canonical one on the weights that quantisation leaves, so that
what remains is the rounding of activations: fp16 values (2^-11 of relative error each) or integers per token.
"""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cases import TINY, TORCH, Case, built_case, random, torch_case, written, written_case
from interpret import calls, canonical_values, interpret, quantised_in, quantised_matrix, quantised_values

from firsttoken_compiler.codegen import weights
from firsttoken_compiler.errors import OptionError
from firsttoken_compiler.isa.program import Packing
from firsttoken_compiler.options import Precision, WeightRule
from firsttoken_compiler.passes.cache_norms import CacheNorms, NormDecision
from firsttoken_compiler.passes.canonicalise import Canonical, Canonicalise
from firsttoken_compiler.passes.quantise import Quantise, Quantised
from firsttoken_compiler.passes.roles import Roles
from firsttoken_compiler.passes.weight_formats import Matrix, WeightFormats, layer_of
from firsttoken_compiler.target.load import load_target
from firsttoken_compiler.target.target import Target
from firsttoken_compiler.tvm.api import Call, dtype_of, relax, shape_of

TARGET: Target = load_target("systolic-128")
# About 30 independent roundings in a row add up to some six steps: of fp16 (2^-11 of the value), or of int8 (2^-7 of
# the largest value of the token).
FP16_STEPS, INT8_STEPS = 6 * 2.0**-11, 6 * 2.0**-7
FP16 = Precision("fp16", "fp16", "128", "fp16")
PRECISIONS = [
    FP16,
    Precision("fp16", "fp16", "128", "off"),
    Precision("int8", "int8", "channel", "int8"),
    Precision("int8", "int16", "64", "int16"),
    Precision("int4", "int8", "32", "int8"),
    Precision("int4", "int8", "32", "off"),
    Precision("int4", "int8", "32", "fp16"),
    Precision("int4", "int8", "32", "int16"),
    Precision("int4", "fp16", "128", "fp16"),
    Precision("int4", "fp16", "128", "int8"),
    Precision("int8", "fp16", "channel", "off"),
]
ASYMMETRIC = [
    Precision("int4", "int8", "128", "int8", asymmetric=True),
    Precision("int4", "fp16", "channel", "fp16", asymmetric=True),
    Precision("int8", "int16", "channel", "off", asymmetric=True),
]


def name_of(precision: Precision) -> str:
    asymmetric = "-asymmetric" * precision.asymmetric
    return f"{precision.weights}-{precision.acts}-{precision.group}-{precision.norm_cache}{asymmetric}"


def typed(checked: Case, precision: Precision) -> tuple[Canonical, Quantised, Quantised, tuple[NormDecision, ...]]:
    """(canonical, quantised, norms cached, decisions)."""
    canonical = Canonicalise().run(checked.imported)
    quantised = Quantise(precision, TARGET).run(canonical, checked.imported.weights)
    return canonical, quantised, *CacheNorms.of(precision.norm_cache).run(quantised)


@pytest.fixture(scope="module", params=["prefill", "decode", "tied", "torch"])
def student(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp("student")
    if request.param == "torch":
        return torch_case(TORCH[0])
    config = replace(TINY, tie_embeddings=request.param == "tied")
    return built_case(config, folder, tokens=3, past=4 if request.param == "decode" else 0)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return built_case(TINY, tmp_path_factory.mktemp("tiny"), tokens=3, past=4)


# The numbers.


def quantised_weights(checked: Case, canonical: Canonical, quantised: Quantised) -> dict[str, Any]:
    """Values of the canonical module with the matrices as they are after packing."""
    values = canonical_values(checked.imported, canonical, checked.feeds)
    for name, packing in quantised.packings.items():
        if packing.form == "panels" and packing.bits != 16:
            parameter = name.removesuffix(".packed")
            matrix = values[parameter].T if packing.transposed else values[parameter]
            q, scales, *zeros = quantised_matrix(packing, matrix)
            of = quantised_in(packing)
            wide = q - np.repeat(zeros[0].astype(np.float32), of, axis=0)[: len(q)] if zeros else q
            rounded = weights.dequantise(wide, scales, of)
            values[parameter] = rounded.T if packing.transposed else rounded
    return values


@pytest.mark.parametrize("precision", PRECISIONS + ASYMMETRIC, ids=name_of)
def test_only_activations_are_rounded(student: Case, precision: Precision) -> None:
    canonical, quantised, cached, _ = typed(student, precision)
    values = quantised_weights(student, canonical, quantised)
    expected = interpret(canonical.module, values)[0]
    integer = {precision.acts, precision.norm_cache} & {"int8"}
    tolerance = (INT8_STEPS if integer else FP16_STEPS) * float(np.abs(expected).max())
    for module in (quantised, cached):
        actual = interpret(module.module, quantised_values(student.imported, module, values))[0]
        np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance)


def test_fp16_is_close_to_onnxruntime(student: Case) -> None:
    canonical, _, cached, _ = typed(student, FP16)
    values = canonical_values(student.imported, canonical, student.feeds)
    outputs = interpret(cached.module, quantised_values(student.imported, cached, values))
    for name, actual in zip(canonical.outputs, outputs, strict=True):
        expected = student.expected[name]
        atol = FP16_STEPS * float(np.abs(expected).max())
        np.testing.assert_allclose(actual.reshape(expected.shape), expected, rtol=0, atol=atol, err_msg=name)


@pytest.mark.parametrize("weights_", ["fp16", "int8", "int4"])
def test_caching_norms_in_fp16_changes_nothing(student: Case, weights_: str) -> None:
    precision = FP16 if weights_ == "fp16" else Precision(weights_, "int8", "32", "fp16")
    canonical, quantised, cached, _ = typed(student, precision)
    values = canonical_values(student.imported, canonical, student.feeds)
    before = interpret(quantised.module, quantised_values(student.imported, quantised, values))[0]
    after = interpret(cached.module, quantised_values(student.imported, cached, values))[0]
    # SwiGLU quantises what it has in fp32 instead of what it would have stored in fp16.
    tolerance = 0.0 if weights_ == "fp16" else INT8_STEPS * float(np.abs(before).max())
    np.testing.assert_allclose(after, before, rtol=0, atol=tolerance)


@pytest.mark.parametrize("acts", ["int8", "int16", "fp16"])
def test_norms_computed_again_are_those_that_are_kept(student: Case, acts: str) -> None:
    """`off` only costs: its numbers are those of the cache of the same type, to the bit."""
    results = []
    for norm_cache in ("off", acts):
        canonical, _, cached, _ = typed(student, Precision("int8", acts, "64", norm_cache))
        values = canonical_values(student.imported, canonical, student.feeds)
        results.append(interpret(cached.module, quantised_values(student.imported, cached, values)))
    for off, kept in zip(*results, strict=True):
        np.testing.assert_array_equal(off, kept)


# Types and recipes.


def parameters(module: Any) -> dict[str, tuple[tuple[int, ...], str]]:
    return {p.name: (shape_of(p), dtype_of(p)) for p in module["main"].params}


@pytest.mark.parametrize(("bits", "acts", "group"), [(4, "int8", "32"), (8, "int16", "64"), (8, "int8", "channel")])
def test_recipes_of_weights(tiny: Case, bits: int, acts: str, group: str) -> None:
    _, quantised, _, _ = typed(tiny, Precision(f"int{bits}", acts, group, "off"))
    up = {name: p for name, p in quantised.packings.items() if p.source == "model.layers.1.mlp.down_proj.weight"}
    rows = {"32": 32, "64": 64, "channel": 80}[group]
    panel = next(iter(up.values())).panel
    expected = Packing("model.layers.1.mlp.down_proj.weight", "panels", 80, 48, panel, bits, rows, False)
    assert {p.form: p for p in up.values()} == {"panels": expected, "scales": replace(expected, form="scales")}
    declared = parameters(quantised.module)
    for name, packing in up.items():
        scales = (-(-80 // rows), 48), "float16"
        assert declared[name] == (((80, 48), f"int{bits}") if packing.form == "panels" else scales)
    assert len(quantised.packings) == 2 * (7 * TINY.layers + 1)


def test_groups_are_no_longer_than_the_rows() -> None:
    model = written("(float[1,4,8] x) => (float[1,4,6] y)", "y = MatMul(x, w)", w=random(8, 6))
    _, quantised, _, _ = typed(written_case(model), Precision("int4", "int8", "128", "off"))
    assert {p.group for p in quantised.packings.values()} == {8}


def test_fp16_weights_have_no_scales(tiny: Case) -> None:
    _, quantised, _, _ = typed(tiny, FP16)
    assert {(p.form, p.bits, p.group) for p in quantised.packings.values()} == {("panels", 16, 0)}
    products = calls(quantised.module, "npu.linear")
    assert {(str(c.attrs["acts"]), int(c.attrs["bits"])) for _, c in products} == {("fp16", 16)}
    assert not calls(quantised.module, "npu.quantise")


def test_a_tied_embedding_is_packed_for_the_head_and_kept_for_the_rows(tmp_path: Path) -> None:
    checked = built_case(replace(TINY, tie_embeddings=True), tmp_path, tokens=3, past=0)
    _, quantised, _, _ = typed(checked, Precision("int4", "int8", "32", "int8"))
    head = calls(quantised.module, "npu.linear")[-1][1]
    packing = quantised.packings[head.args[1].name]
    assert (packing.source, packing.k, packing.n, packing.transposed) == ("model.embed_tokens.weight", 48, 96, True)
    table = calls(quantised.module, "npu.gather")[0][1].args[0]
    assert quantised.plain[table.name] == "float16"
    assert (shape_of(table), dtype_of(table)) == ((96, 48), "float16")


def test_types_of_values(tiny: Case) -> None:
    _, quantised, _, _ = typed(tiny, Precision("int4", "int8", "32", "int8"))
    types = {name: kind for name, (_, kind) in parameters(quantised.module).items()}
    inputs = {name: kind for name, kind in types.items() if not (name in quantised.packings or name in quantised.plain)}
    caches = {name for name in inputs if name.startswith("past_key_values")}
    assert {inputs.pop(name) for name in caches} == {"float16"}
    assert inputs == {"input_ids": "int64", "position_ids": "int64", "attention_mask": "float32"}
    (logits, *presents) = quantised.module["main"].ret_ty.fields
    assert str(logits.dtype.dtype) == "float32"
    assert {str(present.dtype.dtype) for present in presents} == {"float16"}
    for name in ("rope", "attention", "swiglu", "rms_norm", "kv_append"):
        assert {str(call.attrs["out"]) for _, call in calls(quantised.module, f"npu.{name}")} == {"float16"}


def test_rotary_tables_are_told_by_their_use(tmp_path: Path) -> None:
    """An embedding may be called what it likes, and so may the angles."""
    checked = built_case(TINY, tmp_path, tokens=3, past=0)
    model = checked.imported.student.model
    renamed = {
        "model.embed_tokens.weight": "cosmos.rotten_sin_table",
        "model.rotary_emb.cos_cache": "a",
        "model.rotary_emb.sin_cache": "b",
    }
    for tensor in model.graph.initializer:
        tensor.name = renamed.get(tensor.name, tensor.name)
    for node in model.graph.node:
        node.input[:] = [renamed.get(name, name) for name in node.input]
    _, quantised, _, _ = typed(Case(reimported(model, tmp_path), checked.feeds, checked.expected), FP16)
    assert quantised.plain["cosmos_rotten_sin_table"] == "float16"
    assert (quantised.plain["a"], quantised.plain["b"]) == ("float32", "float32")
    out = {call.args[0].name: str(call.attrs["out"]) for _, call in calls(quantised.module, "npu.gather")}
    assert out == {"cosmos_rotten_sin_table": "float16", "a": "float32", "b": "float32"}


def reimported(model: Any, folder: Path) -> Any:
    from firsttoken_compiler.frontend.importer import import_onnx
    from firsttoken_compiler.frontend.onnx_file import from_model

    return import_onnx(from_model(model, folder, "renamed"))


def test_zero_points_are_a_part_of_the_recipe_and_their_sums_are_shared(tiny: Case) -> None:
    _, _, cached, _ = typed(tiny, Precision("int8", "int8", "32", "int8", asymmetric=True))
    zeros = {name: packing for name, packing in cached.packings.items() if packing.form == "zeros"}
    declared = parameters(cached.module)
    assert len(zeros) == 7 * TINY.layers + 1
    assert {(p.bits, p.shift) for p in zeros.values()} == {(8, 128)}
    # 32 rows share a scale, and 48 and 80 are no multiples of them: sums are over parts of 16.
    up = next(name for name in zeros if "layers_1_mlp_down" in name)
    assert (zeros[up].group, zeros[up].layout, declared[up]) == (16, ":32", ((5, 48), "int8"))
    # Of q, k, v; o; gate, up; down, and the head.
    assert len(calls(cached.module, "npu.group_sums")) == 4 * TINY.layers + 1
    products = [call for _, call in calls(cached.module, "npu.linear")]
    assert {len(c.args) - int(c.attrs["bias"]) - int(c.attrs["residual"]) for c in products} == {6}


@pytest.mark.parametrize(
    ("precision", "k", "expected"),
    [
        (Precision("int8", "int8", "channel", "int8", asymmetric=True), 2048, (1024, ":2048")),
        (Precision("int4", "int8", "channel", "int8", asymmetric=True), 2048, (2048, "")),
        (Precision("int8", "int16", "channel", "off"), 1536, (512, ":1536")),
        (Precision("int4", "int16", "channel", "off"), 8960, (8960, "")),
        (Precision("int4", "int16", "channel", "off", asymmetric=True), 8960, (4480, ":8960")),
        (Precision("int8", "fp16", "channel", "off", asymmetric=True), 8960, (8960, "")),
        (Precision("int8", "int8", "channel", "off"), 8960, (8960, "")),
    ],
)
def test_sums_are_over_parts_of_groups_where_they_would_be_too_large(
    precision: Precision, k: int, expected: tuple[int, str]
) -> None:
    made = WeightFormats(precision, TARGET, Roles()).made(Matrix("w", "w", k, 8, False))
    assert {(part.packing.group, part.packing.layout) for part in made.parts.values()} == {expected}
    assert made.attributes["group"] == expected[0]


def test_groups_that_no_part_divides_are_refused() -> None:
    precision = Precision("int4", "int8", "32", "int8", asymmetric=True)
    with pytest.raises(OptionError, match=r"weight model\.w has 33 rows, which do not divide into parts of 16 to"):
        WeightFormats(precision, TARGET, Roles()).made(Matrix("w", "model.w", 33, 8, False))


def test_formats_by_role_and_layer(tiny: Case) -> None:
    rules = (WeightRule("ffn_*", "int8", ((1, 1),)), WeightRule("output", "fp16"), WeightRule("attn_v", "int8"))
    _, quantised, _, _ = typed(tiny, Precision("int4", "int8", "32", "int8", rules=rules))
    found = {(kept.matrix, kept.format) for kept in quantised.formats.values()}
    wide = {matrix for matrix, kind in found if kind == "int8 group 32"}
    attention = [f"model.layers.{i}.self_attn.v_proj.weight" for i in range(2)]
    assert wide == {*attention, *(f"model.layers.1.mlp.{part}_proj.weight" for part in ("gate", "up", "down"))}
    assert ("lm_head.weight", "fp16") in found
    assert Counter(kind for _, kind in found) == {"int4 group 32": 14 - 5, "int8 group 32": 5, "fp16": 2}


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (WeightRule("attn_q", "int8", ((2, 5),)), r"--mix, rule 1: attn_q@2-5=int8 is for none .* in layers 0 to 1"),
        (WeightRule("other", "int8"), "--mix, rule 1: other=int8 is for none of the student's float weights"),
    ],
)
def test_rules_about_nothing_are_mistakes(tiny: Case, rule: WeightRule, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        typed(tiny, Precision("int4", "int8", "32", "int8", rules=(rule,)))


def test_layer_bits(tiny: Case) -> None:
    _, quantised, _, _ = typed(tiny, Precision("int4", "int8", "32", "int8", (16, 8)))
    bits = {(layer_of(p.source), p.bits) for p in quantised.packings.values()}
    assert bits == {(0, 16), (1, 8), (None, 4)}
    acts = {(int(c.attrs["bits"]), str(c.attrs["acts"])) for _, c in calls(quantised.module, "npu.linear")}
    assert acts == {(16, "fp16"), (8, "int8"), (4, "int8")}


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("model.layers.12.mlp.up_proj.weight", 12),
        ("/model/layers.3/Add", 3),
        ("layer_0_q", 0),
        ("lm_head.weight", None),
    ],
)
def test_layers_are_read_from_names(name: str, layer: int | None) -> None:
    assert layer_of(name) == layer


def test_errors_name_the_choice_and_the_remedy(tiny: Case) -> None:
    with pytest.raises(OptionError, match=r"bits are given for layer 2, but .* layers \[0, 1\]"):
        typed(tiny, Precision("int4", "int8", "32", "int8", (8, 0, 8)))
    canonical = Canonicalise().run(tiny.imported)
    poor = replace(TARGET, matrix=replace(TARGET.matrix, macs_per_cycle={"int8xint8": 16384}))
    for precision, pair in (
        (Precision("int4", "int8", "32", "int8"), "int8 by int4"),
        (Precision("int8", "int8", "32", "int16"), "int16 by int8"),
        (FP16, "fp16 by fp16"),
        (Precision("int8", "int8", "32", "off", (16,)), "fp16 by fp16"),
    ):
        with pytest.raises(OptionError, match=f"cannot multiply {pair}; it has int8xint8: choose"):
            Quantise(precision, poor).run(canonical, tiny.imported.weights)
    assert Quantise(Precision("int8", "int8", "32", "off"), poor).run(canonical, tiny.imported.weights).packings


def test_one_weight_in_two_orientations_is_refused() -> None:
    body = "a = MatMul(x, w) t = Transpose<perm=[1,0]>(w) y = MatMul(a, t)"
    model = written("(float[1,4,8] x) => (float[1,4,8] y)", body, w=random(8, 8))
    with pytest.raises(OptionError, match="weight w is used both as stored and transposed"):
        typed(written_case(model), FP16)


def test_names_lead_back_to_the_canonical_module(student: Case) -> None:
    for precision in PRECISIONS:
        canonical, quantised, cached, _ = typed(student, precision)
        for module in (quantised, cached):
            for block in module.module["main"].body.blocks:
                for binding in block.bindings[:-1]:
                    if isinstance(binding.value, Call) and binding.value.op.name.startswith("npu."):
                        assert module.names[binding.var.name] in canonical.nodes, binding.var.name


# What each product reads.


def producers(module: Any) -> dict[Any, Any]:
    return {b.var: b.value for block in module["main"].body.blocks for b in block.bindings}


def input_of(module: Any, call: Any) -> tuple[str, str]:
    """(operator behind a product's input, its type)."""
    bound = producers(module)
    value = bound[call.args[0]]
    value = bound[value.tuple_value] if isinstance(value, relax.TupleGetItem) else value
    return str(value.op.name).removeprefix("npu."), str(value.attrs["out"])


COUNTS = {  # precision: (rms_norm, quantise, swiglu) per layer, and inputs of q/k/v/gate/up, of o and of down
    "fp16-fp16-128-fp16": ((2, 0, 1), ("rms_norm", "float16"), ("attention", "float16"), ("swiglu", "float16")),
    "fp16-fp16-128-off": ((5, 0, 1), ("rms_norm", "float16"), ("attention", "float16"), ("swiglu", "float16")),
    "int8-int8-channel-int8": ((2, 1, 1), ("rms_norm", "int8"), ("quantise", "int8"), ("swiglu", "int8")),
    "int8-int16-64-int16": ((2, 1, 1), ("rms_norm", "int16"), ("quantise", "int16"), ("swiglu", "int16")),
    "int4-int8-32-int8": ((2, 1, 1), ("rms_norm", "int8"), ("quantise", "int8"), ("swiglu", "int8")),
    "int4-int8-32-off": ((5, 1, 1), ("rms_norm", "int8"), ("quantise", "int8"), ("swiglu", "int8")),
    "int4-int8-32-fp16": ((2, 6, 1), ("quantise", "int8"), ("quantise", "int8"), ("swiglu", "int8")),
    "int4-int8-32-int16": ((2, 1, 1), ("rms_norm", "int16"), ("quantise", "int8"), ("swiglu", "int8")),
    "int4-fp16-128-fp16": ((2, 0, 1), ("rms_norm", "float16"), ("attention", "float16"), ("swiglu", "float16")),
    "int4-fp16-128-int8": ((2, 0, 1), ("rms_norm", "int8"), ("attention", "float16"), ("swiglu", "float16")),
    "int8-fp16-channel-off": ((5, 0, 1), ("rms_norm", "float16"), ("attention", "float16"), ("swiglu", "float16")),
}


@pytest.mark.parametrize("precision", PRECISIONS, ids=name_of)
def test_what_each_product_reads(tiny: Case, precision: Precision) -> None:
    _, _, cached, decisions = typed(tiny, precision)
    per_layer, normed, output, down = COUNTS[name_of(precision)]
    bindings = [b.value for block in cached.module["main"].body.blocks for b in block.bindings]
    found = Counter(value.op.name for value in bindings if isinstance(value, Call))
    head = (1, 1, 0) if normed[0] == "quantise" else (1, 0, 0)  # the final norm and the head that reads it
    for name, count, more in zip(("rms_norm", "quantise", "swiglu"), per_layer, head, strict=True):
        assert found[f"npu.{name}"] == TINY.layers * count + more, name
    reads = [input_of(cached.module, call) for _, call in calls(cached.module, "npu.linear")]
    layer = [normed] * 3 + [output] + [normed] * 2 + [down]
    assert reads == layer * TINY.layers + [normed]
    assert [(d.cached_as, d.consumers) for d in decisions] == [
        *[(precision.norm_cache, 3), (precision.norm_cache, 2)] * TINY.layers, (precision.norm_cache, 1)
    ]  # fmt: skip


def test_q_k_v_share_one_norm_and_one_scale(tiny: Case) -> None:
    _, _, cached, _ = typed(tiny, Precision("int4", "int8", "32", "int8"))
    q, k, v = (call for _, call in calls(cached.module, "npu.linear")[:3])
    assert q.args[0].same_as(k.args[0])
    assert q.args[2].same_as(v.args[2])
    _, _, off, _ = typed(tiny, Precision("int4", "int8", "32", "off"))
    q, k, v = (call for _, call in calls(off.module, "npu.linear")[:3])
    assert not q.args[0].same_as(k.args[0])
    assert not k.args[2].same_as(v.args[2])


def test_a_norm_that_is_also_an_output_or_sliced_keeps_its_fp16_form() -> None:
    arrays = {"w": random(8, 8), "g": random(8), "b": np.array([3]), "e": np.array([4]), "a": np.array([1])}
    body = "n = RMSNormalization(x, g) y = MatMul(n, w) r = Slice(n, b, e, a) z = MatMul(r, w)"
    signature = "(float[1,4,8] x) => (float[1,4,8] y, float[1,1,8] z, float[1,4,8] n)"
    checked = written_case(written(signature, body, opset=23, **arrays))
    canonical, _, cached, (decision,) = typed(checked, Precision("int8", "int8", "32", "int8"))
    assert decision.consumers == 1
    assert sorted(str(c.attrs["out"]) for _, c in calls(cached.module, "npu.rms_norm")) == ["float16", "int8"]
    values = canonical_values(checked.imported, canonical, checked.feeds)
    outputs = interpret(cached.module, quantised_values(checked.imported, cached, values))
    for name, actual in zip(canonical.outputs, outputs, strict=True):
        expected = checked.expected[name]
        np.testing.assert_allclose(actual.reshape(expected.shape), expected, rtol=0, atol=0.05)
