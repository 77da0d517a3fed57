"""TE of the general vector operators: elementwise expressions, folds of rows, softmax, layer norm.

All work row by row in fp32 and narrow where they store, like the operators of `definitions`.
"""

from collections.abc import Callable
from typing import Any, Final

from firsttoken_compiler.schedule import expressions
from firsttoken_compiler.schedule.spec import NAMES, KernelSpec
from firsttoken_compiler.tvm.api import te

FOLDS: Final = {"sum": te.sum, "max": te.max, "min": te.min}
REDUCTIONS: Final = ("square", "peak", "total", "spread", "folded")
"""Stages that fold an axis, in any row-wise kernel."""


def by_rows(spec: KernelSpec) -> tuple[int, ...]:
    """Operands of an elementwise operator that have a row per row of the result; the others are read as a whole."""
    rows = spec.outs[0].shape[0]
    return tuple(i for i, arg in enumerate(spec.args) if len(arg.shape) == 2 and arg.shape[0] == rows)


def kept_elements(spec: KernelSpec) -> int:
    """Numbers per row that stay on chip in fp32 between stages, beyond a few."""
    if spec.kind == "softmax":
        return 0 if spec["log"] else spec.args[0].shape[1]
    return spec.outs[0].shape[1] if spec.kind in ("reduce", "group_sums") else 0


def stages(spec: KernelSpec) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]] | None:
    """Names of the blocks (inlined, kept on chip, results); None for a kernel of another room."""
    quantised = len(spec.outs) > 1
    if spec.kind == "map":
        return (), (), ("out",)
    if spec.kind in ("reduce", "group_sums"):
        return (), ("folded",), ("out",)
    if spec.kind == "softmax":
        return (), (("peak", "total") if spec["log"] else ("peak", "weights", "total", "inverse")), ("out",)
    if spec.kind == "layer_norm":
        statistics = ("total", "mean", "spread", "factor")
        if quantised:
            return ("normed",), (*statistics, "peak", "inverse"), ("scale", "q")
        return (), statistics, ("out",)
    return None


def _f32(value: Any) -> Any:
    return value.astype("float32")


def _store(spec: KernelSpec, value: Any) -> Any:
    dtype = NAMES[spec.outs[0].dtype]
    return value if dtype == "float32" else value.astype(dtype)


def _map(spec: KernelSpec, p: list[Any]) -> list[Any]:
    """`expr` of the operands: matrices, rows `[width]` or `[1, width]`, columns `[rows, 1]`, single numbers."""
    rows, width = spec.outs[0].shape

    def at(index: int, i: Any, j: Any) -> Any:
        shape = spec.args[index].shape
        column = j if shape[-1] == width else 0
        return _f32(p[index][column] if len(shape) == 1 else p[index][i if shape[0] == rows else 0, column])

    def element(i: Any, j: Any) -> Any:
        return _store(spec, expressions.apply(str(spec["expr"]), [at(index, i, j) for index in range(len(p))]))

    return [te.compute((rows, width), element, name="out")]


def _reduce(spec: KernelSpec, p: list[Any]) -> list[Any]:
    """Folds `expr` of each row, a matrix `[depth, inner]`, over its depth, times `scale`: `[rows, inner]`."""
    rows, inner = spec.outs[0].shape
    depth = spec.args[0].shape[1] // inner
    k = te.reduce_axis((0, depth), "k")
    fold, text = FOLDS[str(spec["fold"])], str(spec["expr"])

    def element(i: Any, j: Any) -> Any:
        return fold(expressions.apply(text, [_f32(p[0][i, k * inner + j])]), axis=k)

    folded = te.compute((rows, inner), element, name="folded")
    scale = float(spec["scale"])
    return [te.compute((rows, inner), lambda i, j: _store(spec, folded[i, j] * scale), name="out")]


def _group_sums(spec: KernelSpec, p: list[Any]) -> list[Any]:
    """Sums of `[groups, width]` of each row over the width, less the zero point of every element."""
    rows, groups = spec.outs[0].shape
    width = spec.args[0].shape[1] // groups
    k = te.reduce_axis((0, width), "k")
    folded = te.compute((rows, groups), lambda i, j: te.sum(_f32(p[0][i, j * width + k]), axis=k), name="folded")

    def element(i: Any, j: Any) -> Any:
        return _store(spec, folded[i, j] - p[1][0, 0] * float(width) if len(p) > 1 else folded[i, j])

    return [te.compute((rows, groups), element, name="out")]


def _softmax(spec: KernelSpec, p: list[Any]) -> list[Any]:
    """exp(x - max) / sum, or its logarithm."""
    rows, width = spec.args[0].shape
    x = p[0]
    k, r = te.reduce_axis((0, width), "k"), te.reduce_axis((0, width), "r")
    peak = te.compute((rows,), lambda i: te.max(_f32(x[i, k]), axis=k), name="peak")
    if spec["log"]:
        total = te.compute((rows,), lambda i: te.sum(te.exp(_f32(x[i, r]) - peak[i]), axis=r), name="total")

        def logarithm(i: Any, j: Any) -> Any:
            return _store(spec, _f32(x[i, j]) - peak[i] - te.log(total[i]))

        return [te.compute((rows, width), logarithm, name="out")]
    weights = te.compute((rows, width), lambda i, j: te.exp(_f32(x[i, j]) - peak[i]), name="weights")
    total = te.compute((rows,), lambda i: te.sum(weights[i, r], axis=r), name="total")
    inverse = te.compute((rows,), lambda i: 1.0 / total[i], name="inverse")
    return [te.compute((rows, width), lambda i, j: _store(spec, weights[i, j] * inverse[i]), name="out")]


def layer_norm(spec: KernelSpec, p: list[Any], quantise: Callable[..., list[Any]]) -> list[Any]:
    """(x - mean) / sqrt(variance + eps) * gamma [+ beta]; the variance is that of the differences.

    `quantise` makes integer rows out of fp32 ones.
    """
    x, gamma, *beta = p
    rows, width = spec.args[0].shape
    k, r = te.reduce_axis((0, width), "k"), te.reduce_axis((0, width), "r")
    total = te.compute((rows,), lambda i: te.sum(_f32(x[i, k]), axis=k), name="total")
    mean = te.compute((rows,), lambda i: total[i] * (1.0 / width), name="mean")

    def squared(i: Any) -> Any:
        return te.sum((_f32(x[i, r]) - mean[i]) * (_f32(x[i, r]) - mean[i]), axis=r)

    spread = te.compute((rows,), squared, name="spread")
    factor = te.compute((rows,), lambda i: te.rsqrt(spread[i] * (1.0 / width) + spec["eps"]), name="factor")

    def element(i: Any, j: Any) -> Any:
        value = (_f32(x[i, j]) - mean[i]) * factor[i] * _f32(gamma[j])
        return value + _f32(beta[0][j]) if beta else value

    if len(spec.outs) == 1:
        return [te.compute((rows, width), lambda i, j: _store(spec, element(i, j)), name="out")]
    return quantise(spec, te.compute((rows, width), element, name="normed"), rows, width)


DEFINITIONS: Final[dict[str, Callable[[KernelSpec, list[Any]], list[Any]]]] = {
    "map": _map, "reduce": _reduce, "group_sums": _group_sums, "softmax": _softmax,
}  # fmt: skip
