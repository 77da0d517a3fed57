"""Kernels in parts for several cores: which ways there are to cut one, and what each core then computes.

Cores share the DRAM alone. A part is a kernel of its own on slices of the operands: columns of a product (`n`), terms
of its sums (`k`, which leaves sums in the DRAM that a last kernel adds), heads of an attention, or rows (tokens).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Final

from firsttoken_compiler.isa.types import Dtype, Space
from firsttoken_compiler.isa.vector_kernel import MAX_SOURCES
from firsttoken_compiler.schedule import rowwise
from firsttoken_compiler.schedule.attention import operand_names as attention_names
from firsttoken_compiler.schedule.choice import WAYS, CoreSplit
from firsttoken_compiler.schedule.definitions import linear_names
from firsttoken_compiler.schedule.linear import panel_of
from firsttoken_compiler.schedule.spec import Arg, KernelSpec
from firsttoken_compiler.schedule.windows import product_of
from firsttoken_compiler.target.target import Target

NONE: Final = WAYS[0]
WHOLE_KINDS: Final = ("host", "row", "concat", "windows", "pool", "transpose", "normed")
"""Kernels that are not cut."""
BY_COLUMN: Final = ("residual", "factor")
"""Matrices `[rows, columns]` beside a product's result."""
BY_ROW: Final = ("a", "a_scale", "a_sum", *BY_COLUMN)
SUMMED: Final = frozenset(("a", "w", "a_scale", "w_scale", "bias", "residual"))
"""Operands of products that can be cut by terms: whatever follows the sum is added."""


@dataclass(frozen=True, slots=True)
class Part:
    """What one core computes of a kernel. Parts run in the order in which they stand, side by side where they can."""

    core: int
    spec: KernelSpec
    operands: tuple[int, ...]
    """Which operand of the kernel each of its own is; a negative number -1 - i is the i-th matrix of partial sums."""
    at: tuple[int, ...]
    """Bytes from the beginning of that operand in DRAM to its own; in a scratchpad a core holds its own rows only."""

    def spaces(self, spaces: tuple[Space, ...]) -> tuple[Space, ...]:
        """Where its operands lie, from where those of the kernel lie; partial sums lie in the DRAM."""
        return tuple(spaces[index] if index >= 0 else Space.DRAM for index in self.operands)


def bounds(total: int, parts: int, unit: int = 1) -> list[tuple[int, int]]:
    """At most `parts` ranges of nearly the same size that begin on multiples of `unit`, none of them empty."""
    units = -(-total // unit)
    count = min(parts, units)
    edges = [min(total, (units * i // count) * unit) for i in range(count + 1)]
    return list(pairwise(edges))


def row_bounds(rows: int, cores: int) -> list[tuple[int, int]]:
    """Ranges of rows. They begin on multiples of up to 16, as far as no core gets an eighth more than the others."""
    share, unit = rows // cores, 1
    while unit < 16 and unit * 16 <= share:
        unit *= 2
    return bounds(rows, cores, unit)


def ways(spec: KernelSpec, target: Target, cores: int) -> tuple[str, ...]:
    """The ways in which a kernel can be cut into at least two parts, `none` first."""
    possible = (way for way in WAYS[1:] if len(cut(spec, CoreSplit(way, cores), target)) > 1)
    return (NONE, *possible)


def cut(spec: KernelSpec, split: CoreSplit, target: Target) -> tuple[Part, ...]:
    """The parts of a kernel; one for core 0 where it cannot be cut so."""
    count = len(rowwise.kernel_operands(spec, (*spec.args, *spec.outs)))
    whole = (Part(0, spec, tuple(range(count)), (0,) * count),)
    if split.by == NONE or split.cores < 2 or spec.kind in WHOLE_KINDS:
        return whole
    product = spec.kind in ("linear", "conv")
    made: tuple[Part, ...] = ()
    if split.by == "n" and product:
        made = tuple(_columns(spec, split.cores, panel_of(target)))
    elif split.by == "k" and spec.kind == "linear":
        made = tuple(_terms(spec, split.cores, target))
    elif split.by == "heads" and spec.kind == "attention":
        made = tuple(_heads(spec, split.cores))
    elif split.by == "rows" and spec.kind != "conv":
        made = tuple(_rows(spec, split.cores))
        if any(rows_at(part.spec) != rows_at(spec) for part in made):
            made = ()  # so few rows that an operand without rows looks as if it had some
    return made if len(made) > 1 else whole


def partial_bytes(parts: tuple[Part, ...]) -> int:
    """Bytes of one matrix of partial sums; 0 where there are none."""
    return max((part.spec.outs[0].nbytes for part in parts if part.operands[-1] < 0), default=0)


def partial_count(parts: tuple[Part, ...]) -> int:
    """Matrices of partial sums."""
    return sum(part.operands[-1] < 0 for part in parts)


def _with(spec: KernelSpec, args: list[Arg], outs: list[Arg], **params: Any) -> KernelSpec:
    """The spec with other operands and attributes."""
    changed = {**dict(spec.params), **params}
    return KernelSpec(spec.kind, tuple(sorted(changed.items())), tuple(args), tuple(outs))


def _columns_of(arg: Arg, width: int) -> Arg:
    """`width` columns of a matrix."""
    return Arg((arg.shape[0], width), arg.dtype, 0 if width == arg.shape[1] else arg.whole or arg.shape[1])


def _rows_of(arg: Arg, rows: int) -> Arg:
    return replace(arg, shape=(rows, *arg.shape[1:]))


def _row_bytes(arg: Arg) -> int:
    """Bytes in DRAM from one row to the next."""
    if arg.whole and len(arg.shape) == 2:
        return arg.dtype.nbytes(arg.whole)
    return Arg(arg.shape[1:], arg.dtype).nbytes


def _columns(spec: KernelSpec, cores: int, panel: int) -> Iterator[Part]:
    """Each core gets its panels: of packed operands a stretch, of matrices beside the result columns."""
    names = linear_names(spec if spec.kind == "linear" else product_of(spec))
    shared = ("a", "a_scale", "a_zero", "a_sum", "r_scale", "inverse")
    n = int(spec["n"])
    for core, (first, last) in enumerate(bounds(n, cores, panel)):
        args, at = [], []
        for name, arg in zip(names, spec.args, strict=True):
            if name in shared:
                args.append(arg)
                at.append(0)
            elif name in BY_COLUMN:
                args.append(_columns_of(arg, last - first))
                at.append(arg.dtype.nbytes(first))
            elif name == "bias":
                args.append(Arg((last - first,), arg.dtype))
                at.append(arg.dtype.nbytes(first))
            else:
                args.append(Arg((arg.shape[0], last - first), arg.dtype))
                at.append(first // panel * arg.shape[0] * arg.dtype.nbytes(panel))
        out = spec.outs[0]
        made = _with(spec, args, [_columns_of(out, last - first)], n=last - first)
        yield Part(core, made, tuple(range(len(names) + 1)), (*at, out.dtype.nbytes(first)))


def _terms(spec: KernelSpec, cores: int, target: Target) -> Iterator[Part]:
    """Each core sums its terms into a matrix in DRAM, the first one with what is added to the sum; then they are added.

    Not for products whose result goes through more than a sum, for blocks, and for columns that fill no panel.
    """
    names = linear_names(spec)
    k, n, group, panel = int(spec["k"]), int(spec["n"]), int(spec["group"]), panel_of(target)
    applied = any(spec.get(name) for name in ("act", "silu", "factor", "narrow", "requantised", "blocks"))
    if applied or not SUMMED.issuperset(names) or n % panel or cores > MAX_SOURCES:
        return
    unit = max(target.matrix.rows, 32)
    if 0 < group < k:
        unit = math.lcm(unit, group) if math.lcm(unit, group) * cores <= k else group
    ranges = bounds(k, cores, unit)
    if len(ranges) < 2:
        return
    sums = Arg(spec.outs[0].shape, Dtype.F32)
    for core, (first, last) in enumerate(ranges):
        args, at, operands = [], [], []
        for index, (name, arg) in enumerate(zip(names, spec.args, strict=True)):
            if core and name in ("bias", "residual"):
                continue
            made, offset = _terms_of(name, arg, (first, last), group if group < k else 0, panel)
            args.append(made)
            at.append(offset)
            operands.append(index)
        added = {name: int(spec[name]) if not core else 0 for name in ("bias", "residual")}
        part = _with(spec, args, [sums], k=last - first, group=min(group, last - first), out="float32", **added)
        yield Part(core, part, (*operands, -1 - core), (*at, 0))
    yield from _additions(spec, len(ranges), len(names), cores)


def _terms_of(name: str, arg: Arg, terms: tuple[int, int], group: int, panel: int) -> tuple[Arg, int]:
    """The terms `[first, last)` of an operand of a product, and the byte at which they begin."""
    first, last = terms
    if name == "a":
        return _columns_of(arg, last - first), arg.dtype.nbytes(first)
    if name == "w" or (name == "w_scale" and group):
        grain = group if name == "w_scale" else 1
        begin, end = first // grain, -(-last // grain)
        return Arg((end - begin, arg.shape[1]), arg.dtype, arg.shape[0]), begin * arg.dtype.nbytes(panel)
    return arg, 0


def _additions(spec: KernelSpec, count: int, result: int, cores: int) -> Iterator[Part]:
    """The sum of `count` partial sums, its rows cut; `result` is the number of the product's result."""
    out = spec.outs[0]
    rows, width = out.shape
    expr = "s0"
    for index in range(1, count):
        expr = f"add({expr}, s{index})"
    sources = tuple(-1 - index for index in range(count))
    for core, (first, last) in enumerate(row_bounds(rows, cores)):
        params = (("expr", expr), ("out", spec["out"]), ("rows", last - first), ("width", width))
        args = (Arg((last - first, width), Dtype.F32),) * count
        made = KernelSpec("map", params, args, (_rows_of(out, last - first),))
        yield Part(core, made, (*sources, result), (*(first * width * 4,) * count, first * _row_bytes(out)))


def _heads(spec: KernelSpec, cores: int) -> Iterator[Part]:
    """Each core gets key heads with all query heads that share them; with more cores than key heads, part of these."""
    heads, kv_heads = int(spec["heads"]), int(spec["kv_heads"])
    share, names = heads // kv_heads, attention_names(spec)
    width, out = spec.args[0].shape[1] // heads, spec.outs[0]
    for core, (first, last) in enumerate(_head_ranges(heads, kv_heads, cores)):
        key, count = first // share, max(1, (last - first) // share)
        args, at = [], []
        for name, arg in zip(names, spec.args, strict=True):
            if name == "q":
                args.append(_columns_of(arg, (last - first) * width))
                at.append(arg.dtype.nbytes(first * width))
            elif name in ("k", "v", "ks", "vs"):
                if len(arg.shape) == 3:
                    args.append(_rows_of(arg, count))
                    at.append(key * _row_bytes(arg))
                else:
                    args.append(_columns_of(arg, count * width))
                    at.append(arg.dtype.nbytes(key * width))
            else:
                args.append(arg)
                at.append(0)
        made = _with(spec, args, [_columns_of(out, (last - first) * width)], heads=last - first, kv_heads=count)
        yield Part(core, made, tuple(range(len(names) + 1)), (*at, out.dtype.nbytes(first * width)))


def _head_ranges(heads: int, kv_heads: int, cores: int) -> list[tuple[int, int]]:
    """Ranges of query heads: whole groups that share a key head, or equal parts of such a group."""
    share = heads // kv_heads
    if cores <= kv_heads or share == 1:
        return bounds(heads, cores, share)
    parts = max((p for p in range(1, cores // kv_heads + 1) if share % p == 0), default=1)
    return bounds(heads, kv_heads * parts, share // parts)


def _rows(spec: KernelSpec, cores: int) -> Iterator[Part]:
    """Each core gets its rows of whatever has a row per row of the result."""
    total = rowwise.rows_of(spec)
    values = rowwise.kernel_operands(spec, (*spec.args, *spec.outs))
    ranges, has_rows = row_bounds(total, cores), rows_at(spec)
    if spec.kind == "attention" and min(last - first for first, last in ranges) < 2:
        return  # one token is another kernel: its rows are heads
    for core, (first, last) in enumerate(ranges):
        at = [first * _row_bytes(arg) if index in has_rows else 0 for index, arg in enumerate(values)]
        cut_args = [_rows_of(a, last - first) if i in has_rows else a for i, a in enumerate(spec.args)]
        outs = [_rows_of(out, last - first) for out in spec.outs]
        params: dict[str, Any] = {"rows": last - first} if spec.get("rows") else {}
        if spec.kind in rowwise.KINDS_IN_PLACE:
            outs = list(spec.outs)  # rows of every head: what is appended begins further down
            for index, out in enumerate(spec.outs):
                at[1 + index] = first * out.dtype.nbytes(out.shape[2])
        elif spec.kind == "attention":
            params["past"] = int(spec["past"]) + first
        yield Part(core, _with(spec, cut_args, outs, **params), tuple(range(len(values))), tuple(at))


def rows_at(spec: KernelSpec) -> frozenset[int]:
    """Which of a kernel's operands and results have a row per row of the result."""
    count = len(spec.args)
    if spec.kind in rowwise.KINDS_IN_PLACE:
        return frozenset((0,))
    results = range(count, count + len(spec.outs))
    if spec.kind == "linear":
        names = linear_names(spec)
        rows = spec.outs[0].shape[0]
        found = [i for i, (n, a) in enumerate(zip(names, spec.args, strict=True)) if n in BY_ROW and a.shape[0] == rows]
        return frozenset((*found, *results))
    if spec.kind == "attention":
        rows = spec.outs[0].shape[0]
        mask = [3] if spec["mask"] and spec.args[3].shape[0] == rows > 1 else []
        return frozenset((0, *mask, *results))
    return frozenset((*rowwise.by_rows(spec), *results))
