"""Products that make their normalised rows themselves, out of a norm's input and the numbers of its rows.

The rows lie in the kernel's working memory: they take none of the residents' room, and no other kernel sees them.
"""

from __future__ import annotations

from typing import Final

from firsttoken_compiler.isa.types import Space
from firsttoken_compiler.schedule.spec import DTYPES, Arg, KernelSpec

OWN: Final = ("operands", "norm", "rows")
"""Attributes beyond the product's: how many operands make the rows, by which norm, and the rows' type."""


def rows_of(spec: KernelSpec) -> Arg:
    """The normalised rows."""
    return Arg(spec.args[0].shape, DTYPES[str(spec["rows"])])


def normalise_of(spec: KernelSpec) -> KernelSpec:
    """The kernel that makes the rows."""
    params = (("norm", spec["norm"]), ("out", spec["rows"]))
    return KernelSpec("normalise", params, spec.args[: int(spec["operands"])], (rows_of(spec),))


def product_of(spec: KernelSpec) -> KernelSpec:
    """The product of the rows."""
    params = tuple((name, value) for name, value in spec.params if name not in OWN)
    return KernelSpec("linear", params, (rows_of(spec), *spec.args[int(spec["operands"]) :]), spec.outs)


def spaces_of(spec: KernelSpec, spaces: tuple[Space, ...]) -> tuple[tuple[Space, ...], tuple[Space, ...]]:
    """Where operands and results of `normalise_of` and `product_of` lie."""
    count = int(spec["operands"])
    return (*spaces[:count], Space.SPAD), (Space.SPAD, *spaces[count:])
