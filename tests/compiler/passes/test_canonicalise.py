"""Canonicalisation: what exporters write means the same afterwards, every node is accounted for, the rest refused."""

import time
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import onnx
import pytest
from cases import (
    TINY,
    TORCH,
    Case,
    built_case,
    case,
    configs,
    imported_file,
    random,
    run,
    torch_case,
    written,
    written_case,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from interpret import calls, canonical_values, interpret
from on_host import interpret_split

from firsttoken.student import StudentConfig
from firsttoken_compiler.errors import StudentError
from firsttoken_compiler.frontend.importer import import_onnx
from firsttoken_compiler.frontend.onnx_file import from_model
from firsttoken_compiler.frontend.specialise import specialise
from firsttoken_compiler.passes.canonicalise import Canonical, Canonicalise
from firsttoken_compiler.passes.split import split
from firsttoken_compiler.tvm.api import Call
from firsttoken_models.onnx_graph import build_graph
from firsttoken_models.students import DECODERS

SOME = ("deepseek-r1-distill-qwen-1.5b", "smollm2-135m", "qwen3-1.7b")
"""Built-in students: biases and an own head, most layers for its size, norms of heads."""

LENGTHS = [(1, 0), (5, 0), (1, 7), (3, 4)]


def outputs(checked: Case, canonical: Canonical) -> dict[str, Any]:
    values = interpret(canonical.module, canonical_values(checked.imported, canonical, checked.feeds))
    return dict(zip(canonical.outputs, values, strict=True))


def assert_same(checked: Case, rtol: float = 2e-5) -> Canonical:
    """The canonical module gives what onnxruntime gives; fp32 sums in another order differ by less than `rtol`."""
    canonical = Canonicalise().run(checked.imported)
    actual = outputs(checked, canonical)
    assert list(actual) == list(checked.expected)
    for name, expected in checked.expected.items():
        scale = max(1.0, float(np.abs(expected).max()))
        np.testing.assert_allclose(
            actual[name].reshape(expected.shape), expected, rtol=0, atol=rtol * scale, err_msg=name
        )
    return canonical


def operators(canonical: Canonical) -> Counter[str]:
    bindings = [b.value for block in canonical.module["main"].body.blocks for b in block.bindings]
    return Counter(value.op.name.removeprefix("npu.") for value in bindings if isinstance(value, Call))


def refused(model: onnx.ModelProto) -> str:
    with pytest.raises(StudentError) as caught:
        Canonicalise().run(import_onnx(from_model(model, Path(), "written")))
    return str(caught.value)


def left(model: onnx.ModelProto) -> dict[str, str]:
    """What is left to the host, by node."""
    return Canonicalise().attempt(import_onnx(from_model(model, Path(), "written"))).left


def assert_same_split(model: onnx.ModelProto, rtol: float = 2e-5) -> Canonical:
    """With the host's help the graph gives what onnxruntime gives, and all its nodes are accounted for."""
    checked = written_case(onnx.shape_inference.infer_shapes(model, data_prop=True))
    imported, canonical = split(checked.imported.student, fallback=True)
    actual = interpret_split(imported, canonical, checked.feeds)
    assert list(actual) == list(checked.expected)
    for name, expected in checked.expected.items():
        scale = max(1.0, float(np.abs(expected).max()))
        np.testing.assert_allclose(
            actual[name].reshape(expected.shape), expected, rtol=0, atol=rtol * scale, err_msg=name
        )
    on_host = {node for segment in imported.segments for node in segment.nodes}
    on_npu = set().union(*map(set, canonical.nodes.values())) - {segment.name for segment in imported.segments}
    assert on_host | on_npu == {node.name for node in checked.imported.student.graph.node}
    assert not on_host & on_npu
    return canonical


def assert_not_mistaken(model: onnx.ModelProto, kind: str) -> None:
    """No operator of this kind, whoever computes what the graph says instead."""
    assert operators(assert_same_split(model))[kind] == 0


# What it means.


@pytest.mark.parametrize("path", TORCH, ids=lambda path: path.stem)
def test_torch_exports_mean_what_onnxruntime_says(path: Path) -> None:
    canonical = assert_same(torch_case(path))
    found = operators(canonical)
    assert [found[name] for name in ("gather", "rms_norm", "linear", "rope", "attention", "swiglu")] == [
        1,
        5,
        15,
        4,
        2,
        2,
    ]
    assert found["add"] == 0  # every residual goes with its product
    assert all(int(call.attrs["causal"]) == 1 for _, call in calls(canonical.module, "npu.attention"))


@pytest.mark.parametrize(("tokens", "past"), LENGTHS)
def test_built_students_mean_what_onnxruntime_says(tokens: int, past: int, tmp_path: Path) -> None:
    canonical = assert_same(built_case(TINY, tmp_path, tokens=tokens, past=past))
    found = operators(canonical)
    assert found["kv_append"] == 2 * TINY.layers
    assert found["row"] == (tokens > 1)
    assert found["gather"] == 3  # the embedding, and both rotary tables once for all layers
    linears = calls(canonical.module, "npu.linear")
    assert sum(int(call.attrs["bias"]) for _, call in linears) == 3 * TINY.layers
    assert sum(int(call.attrs["residual"]) for _, call in linears) == 2 * TINY.layers


@settings(max_examples=12, deadline=None)
@given(configs(), st.sampled_from(LENGTHS), st.integers(0, 1000))
def test_any_student_means_what_onnxruntime_says(
    tmp_path_factory: pytest.TempPathFactory, config: StudentConfig, lengths: tuple[int, int], seed: int
) -> None:
    tokens, past = lengths
    folder = tmp_path_factory.mktemp("student")
    assert_same(built_case(config, folder, tokens=tokens, past=past, seed=seed), rtol=1e-4)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.sampled_from(TORCH), st.integers(0, 10**6))
def test_a_changed_graph_is_computed_or_refused(path: Path, seed: int) -> None:
    """One constant or operator of an export is another: never a pattern that only looks like the known one."""
    model = onnx.load(path)
    change(model.graph, Random(seed))
    feeds = {"input_ids": np.random.default_rng(0).integers(0, 128, (1, 16))}
    try:
        imported, canonical = split(specialise(from_model(model, path.parent, "changed")), fallback=True)
    except StudentError:
        return
    try:
        expected = run(model, path.parent, feeds)["logits"]
    except Exception:  # onnxruntime's errors have no common base
        return
    if np.isfinite(expected).all():
        actual = interpret_split(imported, canonical, feeds)["logits"].reshape(expected.shape)
        np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-3 * max(1.0, float(np.abs(expected).max())))


OTHER = {
    "Cos": "Sin", "Sin": "Cos", "Add": "Sub", "Mul": "Add", "Sqrt": "Reciprocal", "Neg": "Identity", "Sigmoid": "Tanh",
    "ReduceMean": "ReduceSum", "Div": "Mul", "Reciprocal": "Sqrt", "Softmax": "Sigmoid", "Pow": "Mul",
}  # fmt: skip


def change(graph: Any, chance: Random) -> None:
    """One small mistake."""
    kind = chance.choice(["operator", "swap", "float", "integer", "integer", "attribute"])
    nodes = list(graph.node)
    small = [t for t in graph.initializer if 0 < len(t.raw_data) <= 64]
    if kind == "operator":
        node = chance.choice([n for n in nodes if n.op_type in OTHER])
        node.op_type = OTHER[node.op_type]
    elif kind == "swap":
        node = chance.choice([n for n in nodes if len(n.input) > 1])
        node.input[0], node.input[1] = node.input[1], node.input[0]
    elif kind == "attribute":
        attribute = chance.choice(
            [a for n in nodes for a in n.attribute if a.type == onnx.AttributeProto.INT] or [None]
        )
        if attribute is not None:
            attribute.i = chance.choice([0, 1, -1, 2, -2])
    else:
        types = {"float": onnx.TensorProto.FLOAT, "integer": onnx.TensorProto.INT64}
        tensor = chance.choice([t for t in small if t.data_type == types[kind]] or small)
        values = onnx.numpy_helper.to_array(tensor).copy().reshape(-1)
        values[chance.randrange(values.size)] = chance.choice([0, 1, 2, 3, -1, 4, 8, 15, 16, 32])
        tensor.raw_data = values.tobytes()


# Who is accounted for.


def assert_all_nodes_belong(imported: Any, canonical: Canonical) -> None:
    position = {node.name: index for index, node in enumerate(imported.student.graph.node)}
    assert set().union(*map(set, canonical.nodes.values())) == set(position)
    emitted = {
        variable.name for block in canonical.module["main"].body.blocks for variable in (b.var for b in block.bindings)
    }
    assert set(canonical.nodes) <= emitted
    for nodes in canonical.nodes.values():
        assert nodes
        assert list(nodes) == sorted(nodes, key=position.__getitem__)


@pytest.mark.parametrize("path", [p for p in TORCH if "opset18" in p.name], ids=lambda path: path.stem)
def test_every_node_of_an_export_belongs_to_a_call(path: Path) -> None:
    imported = imported_file(path)
    canonical = Canonicalise().run(imported)
    assert_all_nodes_belong(imported, canonical)
    weights = {
        call.args[1].name: canonical.nodes[variable.name] for variable, call in calls(canonical.module, "npu.linear")
    }
    assert len(weights) == 15
    assert all(any("linear" in node or "matmul" in node.lower() for node in nodes) for nodes in weights.values())


@pytest.mark.parametrize(("tokens", "past"), [(64, 0), (1, 128)])
@pytest.mark.parametrize("config", [DECODERS[name] for name in SOME], ids=lambda config: config.name)
def test_large_students_take_less_than_a_second(config: StudentConfig, tokens: int, past: int) -> None:
    imported = import_onnx(from_model(build_graph(config, tokens=tokens, past=past), Path("/nonexistent"), config.name))
    start = time.process_time()
    canonical = Canonicalise().run(imported)
    assert time.process_time() - start < 1.0
    assert_all_nodes_belong(imported, canonical)
    found = operators(canonical)
    assert (found["linear"], found["attention"]) == (7 * config.layers + 1, config.layers)
    head = calls(canonical.module, "npu.linear")[-1]
    assert ("/lm_head/Transpose" in canonical.nodes[head[0].name]) == config.tie_embeddings
    assert int(head[1].attrs["transposed"]) == config.tie_embeddings


def test_nodes_without_names_are_accounted_for_too() -> None:
    model = onnx.load(TORCH[0])
    for node in model.graph.node:
        node.name = "" if node.op_type == "MatMul" else "same"
    imported = import_onnx(from_model(model, Path(), "nameless"))
    assert_all_nodes_belong(imported, Canonicalise().run(imported))


def test_names_of_weights_may_be_those_of_values() -> None:
    """Variables of the modules are called lv, lv1, gv, vector_0, rotary_0: so may weights be."""
    model = onnx.load(TORCH[0])
    names = [t.name for t in model.graph.initializer if t.data_type == onnx.TensorProto.FLOAT]
    fresh = ["lv", "gv", "rotary_0", "rotary_1", "vector_0", *(f"lv{i}" for i in range(1, 200)), "input_ids_1"]
    renamed = dict(zip(names, fresh, strict=False))
    for tensor in model.graph.initializer:
        tensor.name = renamed.get(tensor.name, tensor.name)
    for node in model.graph.node:
        node.input[:] = [renamed.get(name, name) for name in node.input]
    ids = np.random.default_rng(3).integers(0, 128, (1, 16))
    assert_same(case(model, Path(), {"input_ids": ids}))


# Rules, one by one.

NORM = "p = Pow(x, two) q = ReduceMean<keepdims=1>(p, last) e = Add(q, eps) s = Sqrt(e)"
NORM_WEIGHTS = {
    "two": np.float32(2), "last": np.array([-1]), "eps": np.float32(1e-3), "one": np.float32(1),
    "gamma": random(8) + np.float32(1),
}  # fmt: skip


@pytest.mark.parametrize(
    "tail",
    [
        "r = Reciprocal(s) n = Mul(x, r) y = Mul(gamma, n)",
        "r = Reciprocal(s) n = Mul(r, x) y = Mul(n, gamma)",
        "n = Div(x, s) y = Mul(gamma, n)",
        "r = Div(one, s) n = Mul(x, r) y = Mul(gamma, n)",
    ],
)
def test_decomposed_norms(tail: str) -> None:
    model = written("(float[1,4,8] x) => (float[1,4,8] y)", f"{NORM} {tail}", **NORM_WEIGHTS)
    canonical = assert_same(written_case(model))
    assert operators(canonical) == {"rms_norm": 1}
    assert [float(call.attrs["eps"]) for _, call in calls(canonical.module, "npu.rms_norm")] == [pytest.approx(1e-3)]


@pytest.mark.parametrize(
    ("body", "change"),
    [
        (f"{NORM} r = Div(one, s) n = Mul(x, r) y = Mul(gamma, n)", {"one": np.float32(2)}),
        (f"{NORM} n = Div(x, s) y = Mul(gamma, n)", {"two": np.float32(3)}),
        (f"{NORM} n = Div(x, s) y = Mul(gamma, n)", {"last": np.array([1])}),
        (f"{NORM} n = Div(x, s) y = Mul(gamma, n)", {"last": np.array([1, 2])}),
        (f"{NORM} n = Div(s, x) y = Mul(gamma, n)", {}),
    ],
)
def test_what_only_looks_like_a_norm_is_none(body: str, change: dict[str, Any]) -> None:
    model = written("(float[1,8,8] x) => (float[1,8,8] y)", body, **{**NORM_WEIGHTS, **change})
    assert_not_mistaken(model, "rms_norm")


def test_a_norm_over_heads_is_a_norm_of_more_rows() -> None:
    """Qwen3 norms queries per head."""
    body = "s = Reshape(x, split) y = RMSNormalization(s, gamma)"
    arrays = {"split": np.array([1, 4, 2, 4]), "gamma": random(4)}
    canonical = assert_same(written_case(written("(float[1,4,8] x) => (float[1,4,2,4] y)", body, opset=23, **arrays)))
    assert operators(canonical)["rms_norm"] == 1


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("y = MatMul(x, w)", (0, 0, 0)),
        ("t = Transpose<perm=[1,0]>(v) y = MatMul(x, t)", (1, 0, 0)),
        ("p = MatMul(x, w) y = Add(p, b)", (0, 1, 0)),
        ("p = MatMul(x, w) y = Add(b, p)", (0, 1, 0)),
        ("p = MatMul(x, w) y = Add(z, p)", (0, 0, 1)),
        ("t = Transpose<perm=[1,0]>(v) p = MatMul(x, t) q = Add(p, b) y = Add(q, z)", (1, 1, 1)),
    ],
)
def test_products_take_bias_and_residual_with_them(body: str, expected: tuple[int, int, int]) -> None:
    arrays = {"w": random(8, 6), "v": random(6, 8), "b": random(6)}
    used = {name: array for name, array in arrays.items() if f"{name})" in body or f"{name}," in body}
    canonical = assert_same(written_case(written("(float[1,4,8] x, float[1,4,6] z) => (float[1,4,6] y)", body, **used)))
    assert operators(canonical) == {"linear": 1}
    ((_, call),) = calls(canonical.module, "npu.linear")
    assert tuple(int(call.attrs[name]) for name in ("transposed", "bias", "residual")) == expected


def test_a_transposed_input_of_a_product_is_turned() -> None:
    body = "t = Transpose<perm=[0,2,1]>(x) y = MatMul(t, w)"
    canonical = assert_same(written_case(written("(float[1,8,4] x) => (float[1,4,6] y)", body, w=random(8, 6))))
    assert operators(canonical) == {"transpose": 1, "linear": 1}


def test_sums_and_swiglu() -> None:
    body = "g = MatMul(x, w) u = MatMul(x, v) s = Sigmoid(g) t = Mul(g, s) z = Mul(t, u) y = Add(z, x)"
    model = written("(float[1,4,8] x) => (float[1,4,8] y)", body, w=random(8, 8), v=random(8, 8, seed=2))
    assert operators(assert_same(written_case(model))) == {"linear": 2, "swiglu": 1, "add": 1}
    other = "g = MatMul(x, w) s = Sigmoid(g) t = Mul(g, s) y = Mul(t, r)"
    model = written("(float[1,4,8] x, float[1,1,8] r) => (float[1,4,8] y)", other, w=random(8, 8))
    assert_not_mistaken(model, "swiglu")


def test_sums_of_two_layouts_are_not_sums_of_their_matrices() -> None:
    body = "a = Reshape(x, s) t = Transpose<perm=[0,2,1,3]>(a) y = Add(a, t)"
    model = written("(float[1,4,16] x) => (float[1,4,4,4] y)", body, s=np.array([1, 4, 4, 4]))
    assert_not_mistaken(model, "add")


@pytest.mark.parametrize(
    ("start", "end", "row"),
    [(3, 4, 3), (-1, 2**62, 3), (1, 2, 1), (-3, -2, 1)],
    ids=["last", "from -1", "middle", "negative"],
)
def test_one_row_of_the_tokens(start: int, end: int, row: int) -> None:
    arrays = {"b": np.array([start]), "e": np.array([end]), "a": np.array([1]), "w": random(8, 6)}
    model = written("(float[1,4,8] x) => (float[1,1,6] y)", "r = Slice(x, b, e, a) y = MatMul(r, w)", **arrays)
    canonical = assert_same(written_case(model))
    assert [int(call.attrs["index"]) for _, call in calls(canonical.module, "npu.row")] == [row]
    two = {**arrays, "b": np.array([1]), "e": np.array([3])}
    model = written("(float[1,4,8] x) => (float[1,2,6] y)", "r = Slice(x, b, e, a) y = MatMul(r, w)", **two)
    assert_not_mistaken(model, "row")


def test_gathered_rows() -> None:
    body = "g = Gather(table, ids) y = MatMul(g, w)"
    arrays = {"table": random(9, 8), "w": random(8, 6)}
    for shape, result in (("1,5", "1,5,6"), ("5", "5,6"), ("1,1", "1,1,6")):
        canonical = assert_same(written_case(written(f"(int64[{shape}] ids) => (float[{result}] y)", body, **arrays)))
        assert operators(canonical)["gather"] == 1
    assert "Gather#0" in refused(written("(int64[2,5] ids) => (float[2,5,6] y)", body, **arrays))
    assert "int32" in refused(written("(int32[1,5] ids) => (float[1,5,6] y)", body, **arrays))


HEADS = (
    "qh = Reshape(q, sq) qt = Transpose<perm=[0,2,1,3]>(qh) kh = Reshape(k, sk) kt = Transpose<perm=[0,2,3,1]>(kh) "
    "vh = Reshape(v, sk) vt = Transpose<perm=[0,2,1,3]>(vh) "
)
REST = "c = MatMul(w, vt) ct = Transpose<perm=[0,2,1,3]>(c) cf = Reshape(ct, sf) y = MatMul(cf, o)"


def attention_model(middle: str, tokens: int = 5, **arrays: Any) -> onnx.ModelProto:
    """Two heads of 4 over projected q, k and v; `middle` makes the weights `w` of qt and kt."""
    heads = {"sq": np.array([1, tokens, 2, 4]), "sk": np.array([1, tokens, 2, 4]), "sf": np.array([1, tokens, 8])}
    weights = {name: random(8, 8, seed=seed) for seed, name in enumerate(("wq", "wk", "wv", "o"))}
    projections = "q = MatMul(x, wq) k = MatMul(x, wk) v = MatMul(x, wv) "
    signature = f"(float[1,{tokens},8] x) => (float[1,{tokens},8] y)"
    return written(signature, projections + HEADS + middle + REST, **heads, **weights, **arrays)


CAUSAL = np.triu(np.full((5, 5), -np.inf, np.float32), 1)[None, None]


@pytest.mark.parametrize(
    ("middle", "arrays", "causal", "scale"),
    [
        ("s = MatMul(qt, kt) w = Softmax<axis=-1>(s) ", {}, 0, 1.0),
        ("s = MatMul(qt, kt) t = Mul(s, f) w = Softmax<axis=-1>(t) ", {"f": np.float32(0.5)}, 0, 0.5),
        ("s = MatMul(qt, kt) t = Div(s, f) w = Softmax<axis=3>(t) ", {"f": np.float32(2)}, 0, 0.5),
        ("a = Mul(qt, f) b = Mul(kt, f) s = MatMul(a, b) w = Softmax<axis=-1>(s) ", {"f": np.float32(0.5)}, 0, 0.25),
        ("s = MatMul(qt, kt) t = Add(s, m) w = Softmax<axis=-1>(t) ", {"m": CAUSAL}, 1, 1.0),
        ("s = MatMul(qt, kt) t = Add(s, m) u = Softmax<axis=-1>(t) n = IsNaN(u) w = Where(n, z, u) ",
         {"m": CAUSAL, "z": np.float32(0)}, 1, 1.0),
    ],
)  # fmt: skip
def test_spellings_of_attention(middle: str, arrays: dict[str, Any], causal: int, scale: float) -> None:
    canonical = assert_same(written_case(attention_model(middle, **arrays)))
    ((_, call),) = calls(canonical.module, "npu.attention")
    assert (int(call.attrs["causal"]), float(call.attrs["scale"])) == (causal, pytest.approx(scale))
    assert int(call.attrs["heads"]) == int(call.attrs["kv_heads"]) == 2


@pytest.mark.parametrize(
    ("middle", "arrays"),
    [
        ("s = MatMul(qt, kt) w = Softmax<axis=2>(s) ", {}),
        ("s = MatMul(qt, kt) t = Add(s, m) w = Softmax<axis=-1>(t) ", {"m": CAUSAL.transpose(0, 1, 3, 2).copy()}),
        ("s = MatMul(qt, kt) t = Add(s, m) w = Softmax<axis=-1>(t) ", {"m": np.tile(CAUSAL, (1, 2, 1, 1))}),
        ("s = MatMul(qt, kt) t = Add(s, m) w = Softmax<axis=-1>(t) ", {"m": random(1, 1, 5, 5)}),
        ("s = MatMul(qt, kt) t = Mul(s, f) w = Softmax<axis=-1>(t) ", {"f": random(1, 2, 1, 1)}),
        ("s = MatMul(qt, kt) w = Sigmoid(s) ", {}),
    ],
    ids=["axis", "upper mask", "mask per head", "bias", "scale per head", "sigmoid"],
)
def test_what_only_looks_like_attention_is_none(middle: str, arrays: dict[str, Any]) -> None:
    canonical = assert_same_split(attention_model(middle, **arrays))
    assert all("m" in arrays and not int(call.attrs["causal"]) for _, call in calls(canonical.module, "npu.attention"))


def test_attention_over_wrongly_transposed_heads_is_refused() -> None:
    """With as many tokens as heads every shape fits, and only the layout tells."""
    model = attention_model("s = MatMul(qt, kt) w = Softmax<axis=-1>(s) ", tokens=2)
    assert_same(written_case(model))
    for node in model.graph.node:
        if node.op_type == "Transpose" and node.input[0] in ("qh", "vh"):
            node.attribute[0].ints[:] = [0, 1, 2, 3]
    assert "expected hmd" in refused(model)


def test_masks_that_are_not_added_are_refused() -> None:
    body = "y, pk, pv = Attention<q_num_heads=2, kv_num_heads=2>(x, x, x, m)"
    signature = "(float[1,3,8] x, {}[1,1,3,3] m) => (float[1,3,8] y)"
    assert_same(written_case(written(signature.format("float"), body, opset=23)))
    assert "bool mask" in refused(written(signature.format("bool"), body, opset=23))


# Outputs.


def test_an_output_may_be_used_inside_and_named_twice() -> None:
    body = "h = MatMul(x, w) n = RMSNormalization(h, g) y = MatMul(n, v) z = Identity(y) k = Identity(h)"
    signature = "(float[1,4,8] x) => (float[1,4,8] h, float[1,4,6] y, float[1,4,6] z, float[1,4,8] k, float[1,4,8] n)"
    arrays = {"w": random(8, 8), "v": random(8, 6), "g": random(8)}
    model = written(signature, body, opset=23, **arrays)
    again = "a graph output that is an input or a constant"
    assert left(model) == {"Identity#3": again, "Identity#4": again}
    canonical = assert_same_split(model)
    assert operators(canonical) == {"linear": 2, "rms_norm": 1, "host": 1}
    assert canonical.outputs == ("h", "y", "z", "k", "n")


def test_an_output_inside_a_pattern_is_computed_beside_it() -> None:
    body = "p = MatMul(x, w) y = Add(p, x)"
    model = written("(float[1,4,8] x) => (float[1,4,8] y, float[1,4,8] p)", body, w=random(8, 8))
    assert operators(assert_same(written_case(model)))["linear"] == 2


def test_an_output_may_be_an_input() -> None:
    model = written(
        "(float[1,4,8] x) => (float[1,4,8] y, float[1,4,8] k)", "y = MatMul(x, w) k = Identity(x)", w=random(8, 8)
    )
    assert left(model) == {"Identity#1": "a graph output that is an input or a constant"}
    assert operators(assert_same_split(model)) == {"linear": 1, "host": 1}


def test_outputs_in_another_layout_are_brought_into_order() -> None:
    transposed = written(
        "(float[1,4,8] x) => (float[1,6,4] y)", "p = MatMul(x, w) y = Transpose<perm=[0,2,1]>(p)", w=random(8, 6)
    )
    assert_same_split(transposed)
    heads = "p = MatMul(x, w) h = Reshape(p, s) y = Transpose<perm=[0,2,1,3]>(h)"
    arrays = {"w": random(8, 8), "s": np.array([1, 4, 2, 4])}
    assert_same_split(written("(float[1,4,8] x) => (float[1,2,4,4] y)", heads, **arrays))
    apart = written("(float[1,4,8] x) => (float[1,4,2,4] y)", "p = MatMul(x, w) y = Reshape(p, s)", **arrays)
    assert_same(written_case(apart))


def test_a_constant_output_is_made_by_the_host() -> None:
    signature, body = "(float[1,4,8] x) => (float[1,4,8] y, float[1] c)", "y = MatMul(x, w) c = Identity(k)"
    model = written(signature, body, w=random(8, 8), k=np.ones(1, np.float32))
    assert list(left(model)) == ["Identity#1"]
    assert operators(assert_same_split(model)) == {"linear": 1, "host": 1}


def test_an_output_that_no_node_makes_is_an_error() -> None:
    model = written("(float[1,4,8] x) => (float[1,4,8] y)", "y = MatMul(x, w)", w=random(8, 8))
    model.graph.output.append(model.graph.input[0])
    assert "output 'x' is computed by no node" in refused(model)


@pytest.mark.parametrize("shape", [(2, 4, 8), (2, 1, 4, 8), (1, 2, 4, 8), (3, 8), (8,)])
def test_any_row_major_tensor_is_a_matrix(shape: tuple[int, ...]) -> None:
    """Batches, heads, and a single row: a product works on the rows of the last axis."""
    into, out = (",".join(map(str, dims)) for dims in (shape, (*shape[:-1], 6)))
    assert_same(written_case(written(f"(float[{into}] x) => (float[{out}] y)", "y = MatMul(x, w)", w=random(8, 6))))


def test_a_reshape_across_rows_keeps_the_order_of_elements() -> None:
    body = "p = MatMul(x, w) y = Reshape(p, s)"
    signature = "(float[1,4,8] x) => (float[1,8,4] y)"
    assert_same(written_case(written(signature, body, w=random(8, 8), s=np.array([1, 8, 4]))))


def test_a_transpose_across_rows_is_no_bookkeeping() -> None:
    body = "p = MatMul(x, w) t = Transpose<perm=[1,0,2]>(p) y = MatMul(t, w)"
    model = written("(float[2,4,8] x) => (float[4,2,8] y)", body, w=random(8, 8))
    assert operators(assert_same_split(model))["linear"] == 2


def test_every_node_that_is_left_is_listed_with_its_reason() -> None:
    """Through every chain of them, whoever reads their results."""
    body = "a = CumSum(x, one) b = Det(s) c = CumSum(a, one) d = Add(b, b) z = Add(d, d) y = MatMul(c, w)"
    arrays = {"w": random(8, 6), "one": np.array(1)}
    signature = "(float[1,4,8] x, float[1,8,8] s) => (float[1,4,6] y, float[1] z) <float[1] b>"
    model = written(signature, body, **arrays)
    found = left(model)
    assert {node for node in found if not node.startswith("Add")} == {"CumSum#0", "Det#1", "CumSum#2"}
    assert found["Det#1"] == "no NPU operator for Det"
    assert found["CumSum#0"] == "no NPU operator for this use"
    message = refused(model)
    assert f"written: {len(found)} nodes cannot run on the NPU" in message
    assert "CumSum (no NPU operator for this use): CumSum#2, CumSum#0" in message
    assert "remedy" in message
    assert operators(assert_same_split(model))["linear"] == 1
