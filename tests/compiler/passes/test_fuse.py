"""SwiGLU in its products: what is rewritten, what is left alone, names, and the numbers that come out."""

from pathlib import Path

import numpy as np
import pytest
from cases import TINY, TORCH, Case, built_case, torch_case
from interpret import calls, canonical_values, interpret, quantised_values

from firsttoken_compiler.options import Precision
from firsttoken_compiler.passes.cache_norms import CacheNorms
from firsttoken_compiler.passes.canonicalise import Canonical, Canonicalise
from firsttoken_compiler.passes.fuse import Fuse
from firsttoken_compiler.passes.quantise import Quantise, Quantised
from firsttoken_compiler.target.load import load_target
from firsttoken_compiler.tvm import dialect
from firsttoken_compiler.tvm.api import relax

FP16 = Precision("fp16", "fp16", "128", "fp16")
INT8 = Precision("int8", "int8", "channel", "int8")
GATE_STEP = 2.0**-11
"""The one rounding that fusing adds: the gate after SiLU, to fp16."""


def fused(checked: Case, precision: Precision) -> tuple[Canonical, Quantised, Canonical, Quantised]:
    """(canonical, typed) before the pass and after it."""
    canonical = Canonicalise().run(checked.imported)
    typed = Quantise(precision, load_target("systolic-128")).run(canonical, checked.imported.weights)
    typed, _ = CacheNorms.of(precision.norm_cache).run(typed)
    after, provenance = Fuse().run(typed, canonical)
    return canonical, typed, provenance, after


@pytest.mark.parametrize("precision", [FP16, INT8], ids=["fp16", "int8"])
def test_swiglu_disappears_into_its_products(tmp_path: Path, precision: Precision) -> None:
    _, before, provenance, after = fused(built_case(TINY, tmp_path, tokens=5, past=0), precision)
    assert len(calls(before.module, "npu.swiglu")) == TINY.layers
    assert not calls(after.module, "npu.swiglu")
    products = [call for _, call in calls(after.module, "npu.linear")]
    assert len(products) == len(calls(before.module, "npu.linear"))
    assert sum(int(dict(call.attrs).get("silu", 0)) for call in products) == TINY.layers
    late = [(var, call) for var, call in calls(after.module, "npu.linear") if int(dict(call.attrs).get("factor", 0))]
    assert len(late) == TINY.layers
    for layer, (variable, _) in enumerate(late):
        nodes = provenance.nodes[after.names[variable.name]]
        assert f"/model/layers.{layer}/mlp/up_proj/MatMul" in nodes
        assert f"/model/layers.{layer}/mlp/Mul" in nodes


@pytest.mark.parametrize("precision", [FP16, INT8], ids=["fp16", "int8"])
@pytest.mark.parametrize("source", ["built", "torch"])
def test_numbers_stay_but_for_the_gates_rounding(tmp_path: Path, precision: Precision, source: str) -> None:
    checked = built_case(TINY, tmp_path, tokens=5, past=3) if source == "built" else torch_case(TORCH[0])
    canonical, before, _, after = fused(checked, precision)
    values = canonical_values(checked.imported, canonical, checked.feeds)
    first, second = (
        interpret(typed.module, quantised_values(checked.imported, typed, values)) for typed in (before, after)
    )
    steps = 6 * (2.0**-7 if precision is INT8 else GATE_STEP)
    for a, b in zip(first, second, strict=True):
        assert np.abs(a.astype(np.float64) - b).max() <= steps * np.abs(a.astype(np.float64)).max()


def test_a_gate_that_something_else_reads_is_left_alone() -> None:
    tensor = dialect.tensor
    x, w = relax.Var("x", tensor([4, 8], "float16")), relax.Var("w", tensor([8, 8], "float16"))
    attributes = {
        "n": 8, "k": 8, "bias": 0, "residual": 0, "acts": "fp16", "bits": 16, "group": 0, "out": "float16",
    }  # fmt: skip
    builder = relax.BlockBuilder()
    with builder.function("main", params=[x, w]):
        with builder.dataflow():
            gate, up = (builder.emit(dialect.call("npu.linear", [x, w], **attributes)) for _ in range(2))
            product = builder.emit(dialect.call("npu.swiglu", [gate, up], out="float16"))
            total = builder.emit(dialect.call("npu.add", [product, gate], out="float16"))
            result = builder.emit_output(relax.Tuple([total]))
        builder.emit_func_output(result)
    typed = Quantised(builder.get(), {}, {})
    after, _ = Fuse().run(typed, Canonical(typed.module))
    assert len(calls(after.module, "npu.swiglu")) == 1
    assert not any(int(dict(call.attrs).get("silu", 0)) for _, call in calls(after.module, "npu.linear"))


def activated(expr: str, width: int = 8, shared: bool = False) -> tuple[Quantised, Canonical]:
    """The module of a product and a function of it, after the pass, and its provenance."""
    x, w = relax.Var("x", dialect.tensor([4, 8], "float16")), relax.Var("w", dialect.tensor([8, 8], "float16"))
    attributes = {
        "n": 8, "k": 8, "bias": 0, "residual": 0, "acts": "fp16", "bits": 16, "group": 0, "out": "float16",
    }  # fmt: skip
    builder = relax.BlockBuilder()
    with builder.function("main", params=[x, w]):
        with builder.dataflow():
            product = builder.emit(dialect.call("npu.linear", [x, w], **attributes))
            source = product if width == 8 else builder.emit(relax.op.reshape(product, (32 // width, width)))
            call = dialect.call("npu.map", [source], expr=expr, rows=32 // width, width=width, out="float32")
            mapped = builder.emit(call)
            result = builder.emit_output(relax.Tuple([mapped, product] if shared else [mapped]))
        builder.emit_func_output(result)
    nodes = {product.name: ("matmul",), mapped.name: ("activation",)}
    return Fuse().run(Quantised(builder.get(), {}, {}), Canonical(builder.get(), nodes))


def test_an_activation_moves_into_its_product() -> None:
    after, provenance = activated("max(s0, 0.0)")
    [(variable, call)] = calls(after.module, "npu.linear")
    assert not calls(after.module, "npu.map")
    assert (str(call.attrs["act"]), str(call.attrs["out"])) == ("max(s0, 0.0)", "float32")
    assert provenance.nodes[after.names[variable.name]] == ("matmul", "activation")


@pytest.mark.parametrize(
    ("expr", "width", "shared"),
    [("max(s0, 0.0)", 16, False), ("max(s0, 0.0)", 8, True), ("mul(s0, mul(s0, mul(s0, mul(s0, s0))))", 8, False)],
)
def test_an_activation_stays(expr: str, width: int, shared: bool) -> None:
    """Of other rows, of a product that is read elsewhere, of too many uses of its operand."""
    after, _ = activated(expr, width, shared)
    assert len(calls(after.module, "npu.map")) == 1
