"""TE of norms in two parts: the numbers of each row, once, and the rows made from them, wherever they are read.

Both parts together do the operations of `rms_norm` and `layer_norm`, in their order, so that the rows are theirs bit by
bit. `norm` names the operator. The numbers of a row: its mean (layer norm), its factor, and the scale of integer rows.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from firsttoken_compiler.isa.types import Dtype
from firsttoken_compiler.schedule.spec import NAMES, KernelSpec
from firsttoken_compiler.tvm.api import te

RowScale = Callable[[Any, str, int, int], Any]
"""(fp32 matrix, integer type, rows, width) → the scale of each row, [rows, 1]."""


def f32(value: Any) -> Any:
    """Widened to fp32."""
    return value.astype("float32")


@dataclass(frozen=True)
class Row:
    """The numbers of row `i` of a norm, and its vectors."""

    factor: Any
    """[rows, 1]"""
    mean: Any | None
    """[rows, 1] of a layer norm."""
    gamma: Any
    beta: Any | None

    def element(self, x: Any, i: Any, j: Any) -> Any:
        """The normalised element in fp32."""
        value = f32(x[i, j])
        if self.mean is not None:
            value = value - self.mean[i, 0]
        value = value * self.factor[i, 0] * f32(self.gamma[j])
        return value if self.beta is None else value + f32(self.beta[j])


def statistics_of(norm: str, out: str) -> tuple[str, ...]:
    """Names of a row's numbers, in the order of `norm_stats`' results."""
    mean = ("mean",) if norm == "layer_norm" else ()
    return (*mean, "factor", *(("scale",) if out in ("int8", "int16") else ()))


def norm_stats(spec: KernelSpec, p: list[Any], row_scale: RowScale) -> list[Any]:
    """(x, gamma[, beta]) → a column per number of each row."""
    x, gamma, *beta = p
    rows, width = spec.args[0].shape
    k, r = te.reduce_axis((0, width), "k"), te.reduce_axis((0, width), "r")
    mean = None
    if spec["norm"] == "rms_norm":
        spread = te.compute((rows,), lambda i: te.sum(f32(x[i, k]) * f32(x[i, k]), axis=k), name="square")
    else:
        total = te.compute((rows,), lambda i: te.sum(f32(x[i, k]), axis=k), name="total")
        mean = te.compute((rows, 1), lambda i, _: total[i] * (1.0 / width), name="mean")

        def squared(i: Any) -> Any:
            return te.sum((f32(x[i, r]) - mean[i, 0]) * (f32(x[i, r]) - mean[i, 0]), axis=r)

        spread = te.compute((rows,), squared, name="spread")
    factor = te.compute((rows, 1), lambda i, _: te.rsqrt(spread[i] * (1.0 / width) + spec["eps"]), name="factor")
    results = ([] if mean is None else [mean]) + [factor]
    out = str(spec["out"])
    if "scale" in statistics_of(str(spec["norm"]), out):
        row = Row(factor, mean, gamma, beta[0] if beta else None)
        normed = te.compute((rows, width), lambda i, j: row.element(x, i, j), name="normed")
        results.append(row_scale(normed, out, rows, width))
    return results


def normalise(spec: KernelSpec, p: list[Any]) -> list[Any]:
    """(x, the row's numbers, gamma[, beta]) → rows in the type of the result."""
    names = statistics_of(str(spec["norm"]), NAMES[spec.outs[0].dtype])
    x, numbers, (gamma, *beta) = p[0], dict(zip(names, p[1:], strict=False)), p[1 + len(names) :]
    row = Row(numbers["factor"], numbers.get("mean"), gamma, beta[0] if beta else None)
    shape, dtype = spec.outs[0].shape, NAMES[spec.outs[0].dtype]
    if spec.outs[0].dtype is Dtype.F32:
        return [te.compute(shape, lambda i, j: row.element(x, i, j), name="out")]
    if "scale" not in numbers:
        return [te.compute(shape, lambda i, j: row.element(x, i, j).astype(dtype), name="out")]
    inverse = te.compute((shape[0],), lambda i: 1.0 / numbers["scale"][i, 0], name="inverse")
    return [te.compute(shape, lambda i, j: te.round(row.element(x, i, j) * inverse[i]).astype(dtype), name="out")]


def stages(spec: KernelSpec) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]] | None:
    """Names of the blocks (inlined, kept on chip, results); None for other kernels."""
    if spec.kind == "normalise":
        integer = spec.outs[0].dtype in (Dtype.I8, Dtype.I16)
        return (), ("inverse",) if integer else (), ("out",)
    if spec.kind != "norm_stats":
        return None
    results = statistics_of(str(spec["norm"]), str(spec["out"]))
    sums = ("square",) if spec["norm"] == "rms_norm" else ("total", "spread")
    return (("normed",), (*sums, "peak"), results) if "scale" in results else ((), sums, results)
