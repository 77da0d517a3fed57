"""Encoder blocks from ONNX to numbers on the functional machine and back to onnxruntime's, on two targets."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray

from firsttoken.execution import load
from firsttoken_compiler.frontend.onnx_file import from_model
from firsttoken_compiler.isa.program import Program
from firsttoken_compiler.isa.types import Dtype
from firsttoken_compiler.options import resolve
from firsttoken_compiler.pipeline import compile_onnx
from firsttoken_compiler.target.load import load_target
from firsttoken_simulator.machine import simulate_program

TARGETS = ("systolic-128", "snapdragon-x-elite")
Arrays = dict[str, NDArray[Any]]


def written(signature: str, body: str, opset: int, **arrays: NDArray[Any]) -> onnx.ModelProto:
    text = f'<ir_version: 10, opset_import: ["" : {opset}]> written {signature} {{ {body} }}'
    model = onnx.parser.parse_model(text)
    model.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in arrays.items())
    return model


def compare(model: onnx.ModelProto, target: str, weights: str = "fp16") -> tuple[Program, float]:
    """The program and the largest error of its outputs over the largest value of onnxruntime's."""
    machine, random = load_target(target), np.random.default_rng(3)
    feeds: Arrays = {}
    for value in model.graph.input:
        shape = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        dtype = onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
        drawn = random.standard_normal(shape) if dtype == np.float32 else random.random(shape) < 0.8
        feeds[value.name] = drawn.astype(dtype)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [value.name for value in model.graph.output]
    expected = dict(zip(names, session.run(names, feeds), strict=True))
    student = from_model(model, Path(), "written")
    program = compile_onnx(student, machine, resolve(weights, None, "channel", None))
    assert program is not None
    got = load(program, simulate_program(program, machine), student, machine).run(feeds)
    errors = [np.abs(got[name].astype(np.float64) - expected[name]).max() / np.abs(expected[name]).max()
              for name in names]  # fmt: skip
    return program, max(errors)


def random_weights(**shapes: tuple[int, ...]) -> Arrays:
    r = np.random.default_rng(1)
    scaled = {name: r.standard_normal(s) / (s[0] ** 0.5 if len(s) > 1 else 1.0) for name, s in shapes.items()}
    return {name: array.astype(np.float32) for name, array in scaled.items()}


def kinds(program: Program) -> list[str]:
    return [op.kind for op in program.ops]


ACTIVATIONS = {
    "Gelu": ("y0 = Gelu(h)", 20), "tanh": ('y0 = Gelu<approximate="tanh">(h)', 20), "Relu": ("y0 = Relu(h)", 18),
    "Tanh": ("y0 = Tanh(h)", 18), "decomposed": (
        "d = Div(h, root) e = Erf(d) p = Add(e, one) m = Mul(h, p) y0 = Mul(m, half)", 18,
    ),
}  # fmt: skip


@pytest.mark.parametrize("weights", ["fp16", "int8"])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_an_activation_runs_as_its_product_leaves_the_accumulators(name: str, weights: str) -> None:
    body, opset = ACTIVATIONS[name]
    arrays = random_weights(w1=(48, 136), b1=(136,), w2=(136, 48), b2=(48,))
    arrays |= {"root": np.float32(2**0.5), "one": np.float32(1), "half": np.float32(0.5)} if "root" in body else {}
    model = written(
        "(float[1,13,48] x) => (float[1,13,48] y)",
        f"g = MatMul(x, w1) h = Add(g, b1) {body} z = MatMul(y0, w2) y = Add(z, b2)", opset, **arrays,
    )  # fmt: skip
    program, error = compare(model, TARGETS[0], weights)
    assert error < {"fp16": 2e-3, "int8": 2e-2}[weights]
    assert [kind for kind in kinds(program) if kind != "quantise"] == ["linear", "linear"]
    covered = {node for op in program.ops for node in op.onnx_nodes}
    assert covered == {node.name for node in from_model(model, Path(), "named").graph.node}


BLOCK = """
    n0 = LayerNormalization<epsilon=1e-12>(x, g0, b0)
    q0 = MatMul(n0, wq) q1 = Add(q0, bq) q2 = Reshape(q1, heads) q = Transpose<perm=[0,2,1,3]>(q2)
    k0 = MatMul(n0, wk) k1 = Add(k0, bk) k2 = Reshape(k1, heads) k = Transpose<perm=[0,2,3,1]>(k2)
    v0 = MatMul(n0, wv) v1 = Add(v0, bv) v2 = Reshape(v1, heads) v = Transpose<perm=[0,2,1,3]>(v2)
    s0 = MatMul(q, k) s1 = Div(s0, root) {masked} p = Softmax<axis=-1>(s) a = MatMul(p, v)
    a1 = Transpose<perm=[0,2,1,3]>(a) a2 = Reshape(a1, flat) o0 = MatMul(a2, wo) o1 = Add(o0, bo) r = Add(o1, n0)
    n1 = LayerNormalization<epsilon=1e-12>(r, g1, b1)
    f0 = MatMul(n1, w1) f1 = Add(f0, c1) f2 = Gelu(f1) f3 = MatMul(f2, w2) f4 = Add(f3, c2) t = Add(f4, n1)
    y = LayerNormalization<epsilon=1e-12>(t, g2, b2)
    pooled = ReduceMean<keepdims=0>(y, one)
"""


def block(masked: str, mask: str) -> onnx.ModelProto:
    h, i = 48, 96
    arrays = random_weights(
        g0=(h,), b0=(h,), g1=(h,), b1=(h,), g2=(h,), b2=(h,), wq=(h, h), bq=(h,), wk=(h, h), bk=(h,), wv=(h, h),
        bv=(h,), wo=(h, h), bo=(h,), w1=(h, i), c1=(i,), w2=(i, h), c2=(h,),
    )  # fmt: skip
    arrays |= {
        "heads": np.array([1, 12, 4, 12]), "flat": np.array([1, 12, 48]), "one": np.array([1]),
        "root": np.float32(12**0.5),
    }  # fmt: skip
    numbers = {"far": np.float32(-10000), "unit": np.float32(1), "nought": np.float32(0)}
    arrays |= {name: number for name, number in numbers.items() if name in masked}
    signature = f"(float[1,12,48] x{mask}) => (float[1,12,48] y, float[1,48] pooled)"
    return written(signature, BLOCK.format(masked=masked), 20, **arrays)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("weights", ["fp16", "int8"])
def test_an_encoder_block_is_all_the_npus(target: str, weights: str) -> None:
    program, error = compare(block("s = Identity(s1)", ""), target, weights)
    assert error < {"fp16": 4e-3, "int8": 4e-2}[weights]
    assert not program.hosts
    assert kinds(program).count("attention") == 1
    assert kinds(program).count("layer_norm") >= 3


@pytest.mark.parametrize(
    ("masked", "mask"),
    [
        ("s = Add(s1, mask)", ", float[1,1,1,12] mask"),
        ("s = Add(s1, mask)", ", float[1,1,12,12] mask"),
        ("m0 = Sub(unit, keep) m = Mul(m0, far) s = Add(s1, m)", ", float[1,1,1,12] keep"),
        ("k9 = Cast<to=1>(keep) m0 = Sub(unit, k9) m = Mul(m0, far) s = Add(s1, m)", ", int64[1,1,1,12] keep"),
        ("k9 = Cast<to=9>(keep) m = Where(k9, nought, far) s = Add(s1, m)", ", int64[1,1,1,12] keep"),
        ("both = And(keep, here) m = Where(both, nought, far) s = Add(s1, m)",
         ", bool[1,1,1,12] keep, bool[1,1,12,1] here"),
    ],
)  # fmt: skip
def test_masks_of_encoders(masked: str, mask: str) -> None:
    """A row of numbers for all queries, a matrix, BERT's (1 - keep) * far, integers and truth values."""
    program, error = compare(block(masked, mask), TARGETS[0])
    assert error < 4e-3
    assert not program.hosts


def test_values_seen_in_other_rows_stay_dense() -> None:
    """A matrix that is also read as one long row must not have a pitch, however small and often used it is."""
    arrays = random_weights(w=(40, 40)) | {"one": np.array([1])}
    model = written(
        "(float[1,24,40] x) => (float[1,24,40] y, float[1,40] z)",
        "a = MatMul(x, w) b = Exp(a) c = Neg(b) z = ReduceSum<keepdims=0>(c, one) d = Tanh(b) y = MatMul(d, w)", 18,
        **arrays,
    )  # fmt: skip
    for target in TARGETS:
        _, error = compare(model, target)
        assert error < 2e-3


@pytest.mark.parametrize("target", TARGETS)
def test_truth_values_come_and_go(target: str) -> None:
    """They lie in memory between operators that read them twice, and leave the graph."""
    model = written(
        "(float[1,9,40] x, bool[1,9,40] b, int64[1,9,1] n) => (float[1,9,40] y, bool[1,9,40] c)",
        "f = Cast<to=1>(n) e = Exp(x) g = Sigmoid(x) h = Mul(e, g) l = Less(h, f) c = And(l, b)"
        " w = Where(c, x, e) m = MatMul(w, v) y = Where(c, m, x)", 18, v=random_weights(v=(40, 40))["v"],
    )  # fmt: skip
    program, error = compare(model, target)
    assert not program.hosts
    assert error < 2e-3
    assert any(op.kind == "map" and program.tensor("c").dtype is Dtype.BOOL for op in program.ops)


DEGENERATE = [
    "z = Sub(x, x) y = Exp(z)", "z = Mul(x, zero) y = Add(z, one)", "c = Equal(x, x) y = Where(c, x, one)",
    "c = Less(x, x) y = Where(c, x, one)", "c = IsNaN(x) y = Where(c, one, x)", "z = Div(zero, x) y = Add(z, one)",
    "c = Less(one, zero) y = Where(c, x, one)", "z = Max(x, x) y = Sub(z, x)", "z = Pow(x, zero) y = Neg(z)",
    "c = IsInf<detect_negative=0>(x) d = Not(c) y = Where(d, x, one)", "c = Less(x, one) y = Where(c, one, one)",
    "c = Less(x, one) d = And(c, no) y = Where(d, x, one)", "c = LessOrEqual(x, x) y = Cast<to=1>(c)",
]  # fmt: skip


@pytest.mark.parametrize("body", DEGENERATE)
def test_what_a_simplifier_takes_for_a_constant(body: str) -> None:
    """NaN and infinity included, which nothing may take for granted; a constant is written like any result."""
    arrays: Arrays = {"zero": np.float32(0), "one": np.float32(1), "no": np.array(False)}  # type: ignore[dict-item]
    model = written(
        "(float[3,5] x) => (float[3,5] y)", body, 18, **{n: a for n, a in arrays.items() if n in body.replace("(", " ")}
    )
    x = np.random.default_rng(0).standard_normal((3, 5)).astype(np.float32)
    x[0, :3], x[1, 0] = [np.nan, np.inf, -np.inf], 0
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    machine, student = load_target(TARGETS[0]), from_model(model, Path(), "written")
    program = compile_onnx(student, machine, resolve("fp16", None, "channel", None))
    assert program is not None
    got = load(program, simulate_program(program, machine), student, machine).run({"x": x})
    np.testing.assert_allclose(got["y"], session.run(["y"], {"x": x})[0], rtol=1e-6)


def test_a_layer_norm_with_its_statistics() -> None:
    arrays = random_weights(g=(40,), b=(40,))
    signature = "(float[1,6,40] x) => (float[1,6,40] y, float[1,6,1] mean, float[1,6,1] scale)"
    model = written(signature, "y, mean, scale = LayerNormalization(x, g, b)", 18, **arrays)
    program, error = compare(model, TARGETS[0])
    assert not program.hosts
    assert error < 1e-3
