"""Products with weights: the tiled definition in the weights' panel layout, and its schedule.

Loops: panels of columns (p0), rows (m0), k (k0); the first two in either order. Weight tiles stream through the
scratchpad, activations are read where they are, sums stay in the accumulators; with grouped scales the sums of a group
move on, scaled, after each group.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

from firsttoken_compiler.isa.types import Dtype, Space
from firsttoken_compiler.isa.vector_kernel import MAX_SOURCES
from firsttoken_compiler.schedule import expressions, intrinsics, layout
from firsttoken_compiler.schedule.definitions import linear_names, scaled_sum, without_zero_points
from firsttoken_compiler.schedule.kernel import PIPELINE, Scheduled, annotate, demand_slots, fetch, spill
from firsttoken_compiler.schedule.layout import Layout, Ragged
from firsttoken_compiler.schedule.spec import NAMES, Arg, KernelSpec
from firsttoken_compiler.target.target import Target
from firsttoken_compiler.tvm.api import Schedule, te

STREAMED: Final = 2
"""Tiles of a streamed operand: the next one comes while the matrix unit reads one."""


@dataclass(frozen=True, slots=True)
class Tile:
    """Extents of one tile: rows, panels of columns, rows of k (a multiple of the group)."""

    m: int
    panels: int
    k: int
    whole: bool = False
    """Activations that lie in DRAM are fetched once, all of them, instead of tile by tile."""
    rows_outer: bool = False
    """The loop over rows is outside of the one over panels: a tile of activations stays, if it spans k."""
    buffers: int = STREAMED
    """Tiles of weights, and of activations that come tile by tile, that exist at a time."""

    def text(self, panel: int) -> str:
        """`m x n x k` for reports."""
        order = " rows-outer" if self.rows_outer else ""
        slots = f" {self.buffers}-buffered" if self.buffers != STREAMED else ""
        return f"{self.m}x{self.panels * panel}x{self.k}{order}{slots}"


@dataclass(frozen=True)
class Shape:
    """What a linear spec multiplies."""

    m: int
    n: int
    k: int
    group: int
    """Rows of k per scale where sums must be scaled group by group; 0 otherwise."""
    a: Dtype
    w: Dtype
    scales: int
    """Rows of the scale operand; 0 without one."""
    one_scale: bool = False
    """One activation scale for all tokens."""

    @staticmethod
    @lru_cache(maxsize=4096)
    def of(spec: KernelSpec) -> Shape:
        """The shape of a spec."""
        m, k = spec.args[0].shape
        group = int(spec["group"])
        scales = -(-k // group) if group else 0
        one = spec["acts"] in ("int8", "int16") and spec.args[2].shape[0] == 1 and m > 1
        a, w = spec.args[0].dtype, spec.args[1].dtype
        return Shape(m, int(spec["n"]), k, group if scales > 1 else 0, a, w, scales, one)

    def panels(self, panel: int) -> int:
        """Panels of columns."""
        return -(-self.n // panel)

    @property
    def acc(self) -> str:
        """Type of the sums."""
        return "float32" if self.a in (Dtype.F16, Dtype.F32) else "int32"


def fetches_of(shape: Shape, tile: Tile, panel: int) -> tuple[int, int]:
    """How often a tile of weights and one of activations in DRAM are fetched in all; the latter once if all at once."""
    across, down = -(-shape.panels(panel) // tile.panels), -(-shape.m // tile.m)
    deep = -(-shape.k // tile.k)
    weights = across * deep * (down if deep > 1 or tile.rows_outer else 1)
    stays = tile.rows_outer and deep == 1
    return weights, 1 if tile.whole else down * deep * (1 if stays else across)


def slots_of(shape: Shape, tile: Tile, panel: int) -> dict[str, int]:
    """Tiles of weights and activations that exist at a time, where each has more than one."""
    fetches = zip("wa", fetches_of(shape, tile, panel), strict=True)
    return {name: min(tile.buffers, count) for name, count in fetches if count > 1}


def panel_of(target: Target) -> int:
    """Columns of a weight panel: those of the matrix unit, up to a multiple of 8 so that rows of bits fill bytes."""
    return -(-target.matrix.columns // 8) * 8


def operand_names(spec: KernelSpec) -> list[str]:
    """Names of the operands in the order of the call, and of the result."""
    return [*linear_names(spec), "out"]


ZERO_POINTS: Final = ("a_zero", "a_sum", "w_zero", "w_min", "w_sum")
"""Operands that take zero points off the sums, or add minima."""


@lru_cache(maxsize=4096)
def corrected_apart(spec: KernelSpec) -> bool:
    """Whether zero points are taken off by an instruction of its own, as one cannot read all operands."""
    names = operand_names(spec)
    grouped = Shape.of(spec).group > 0
    return not grouped and not {"w_zero", "w_sum"}.isdisjoint(names) and len(names) - 2 > MAX_SOURCES


def schedule(spec: KernelSpec, spaces: tuple[Space, ...], tile: Tile, target: Target) -> Scheduled:
    """The scheduled PrimFunc of a product; `spaces` says where operands and result lie."""
    shape = Shape.of(spec)
    if shape.group and tile.k % shape.group:
        raise ValueError(f"a tile of {tile.k} rows of k cuts through groups of {shape.group}; use a multiple")
    source = unscheduled(spec, tile, target)
    s = Schedule(source)
    apply(s, spec, spaces, tile, target)
    layouts, ragged = memory(spec, spaces, tile, target)
    return Scheduled(s.mod, layouts, ragged, tile.text(panel_of(target)), source, s.trace)


def unscheduled(spec: KernelSpec, tile: Tile, target: Target) -> Any:
    """The PrimFunc of a product over whole tiles, before any schedule."""
    return _definition(spec, operand_names(spec), _Padded(Shape.of(spec), tile, panel_of(target)))


def apply(s: Any, spec: KernelSpec, spaces: tuple[Space, ...], tile: Tile, target: Target) -> None:
    """Schedules what `unscheduled` made; tiles that divide its extents will do."""
    shape, where = Shape.of(spec), dict(zip(operand_names(spec), spaces, strict=True))
    padded = _Padded(shape, tile, panel_of(target))
    align = layout.fetch_bytes(shape.a, target) * 8 // shape.a.bits
    if tile.m == 1 or tile.k < align:
        align = 0
    _Scheduling(s, spec, shape, where, padded, align, target.scratchpad.accumulator_slots).run()


def memory(spec: KernelSpec, spaces: tuple[Space, ...], tile: Tile, target: Target) -> tuple[list[Layout], Ragged]:
    """Where the elements of operands and result lie, over whole tiles, and how far they really go."""
    panel, shape, names = panel_of(target), Shape.of(spec), operand_names(spec)
    padded = _Padded(shape, tile, panel)
    args = (*spec.args, *spec.outs)
    pitches = [layout.pitch_bits(arg, space, target) for arg, space in zip(args, spaces, strict=True)]
    layouts = [padded.layout(name, arg, pitch) for name, arg, pitch in zip(names, args, pitches, strict=True)]
    return layouts, Ragged({"m": shape.m, "k": shape.k, "g": max(shape.scales, 1)}, shape.n, panel)


@dataclass(frozen=True)
class _Padded:
    """Extents rounded up to whole tiles."""

    shape: Shape
    tile: Tile
    panel: int

    @property
    def m(self) -> int:
        return -(-self.shape.m // self.tile.m) * self.tile.m

    @property
    def p(self) -> int:
        return -(-self.shape.panels(self.panel) // self.tile.panels) * self.tile.panels

    @property
    def k(self) -> int:
        return -(-self.shape.k // self.tile.k) * self.tile.k

    @property
    def groups(self) -> int:
        return self.k // self.shape.group if self.shape.group else max(1, self.shape.scales)

    def extents(self, name: str) -> tuple[int, ...]:
        """Logical shape of an operand."""
        return {
            "a": (self.m, self.k), "w": (self.p, self.k, self.panel),
            "a_scale": (1 if self.shape.one_scale else self.m, 1), "a_zero": (1, 1), "inverse": (1, 1),
            "r_scale": (1, 1),
            "a_sum": (self.m, self.groups),
            "w_scale": (self.p, self.groups, self.panel), "w_zero": (self.p, self.groups, self.panel),
            "w_min": (self.p, self.groups, self.panel), "w_sum": (self.p, self.groups, self.panel),
            "bias": (self.p, self.panel),
            "residual": (self.m, self.p, self.panel), "factor": (self.m, self.p, self.panel),
            "out": (self.m, self.p, self.panel),
        }[name]  # fmt: skip

    def layout(self, name: str, arg: Arg, pitch: int) -> Layout:
        """Layout of an operand in memory; `pitch` is what its rows are apart, in bits."""
        shape, dtype = self.shape, arg.dtype
        if name == "w":
            return layout.panels(self.p, self.k, self.panel, dtype, arg.whole or shape.k, shape.n)
        if name in ("w_scale", "w_zero", "w_min", "w_sum"):
            return layout.panels(self.p, self.groups, self.panel, dtype, arg.whole or shape.scales, shape.n)
        if name in ("residual", "factor", "out"):
            return layout.by_panel(self.m, self.p, self.panel, dtype, pitch)
        if name in ("a", "a_sum"):
            return Layout(self.extents(name), (pitch, dtype.bits))
        return layout.dense(self.extents(name), dtype)


def _dtype(spec: KernelSpec, index: int) -> Dtype:
    return (*spec.args, *spec.outs)[index].dtype


def _definition(spec: KernelSpec, names: list[str], padded: _Padded) -> Any:
    p = {n: te.placeholder(padded.extents(n), NAMES[_dtype(spec, i)], name=n) for i, n in enumerate(names[:-1])}
    a, w, shape, wide = p["a"], p["w"], padded.shape, padded.shape.acc
    grid = padded.extents("out")
    if shape.group:
        group, groups = shape.group, padded.groups
        r, g = te.reduce_axis((0, group), "r"), te.reduce_axis((0, groups), "g")
        sums = te.compute(
            (groups, *grid),
            lambda q, i, c, j: te.sum(a[i, q * group + r].astype(wide) * w[c, q * group + r, j].astype(wide), axis=r),
            name="C",
        )
        total = te.compute(
            grid,
            lambda i, c, j: te.sum(
                scaled_sum(p, sums[g, i, c, j].astype("float32"), i, g, (c, g, j)), axis=g
            ),
            name="O",
        )
    else:
        r = te.reduce_axis((0, padded.k), "r")
        total = te.compute(
            grid, lambda i, c, j: te.sum(a[i, r].astype(wide) * w[c, r, j].astype(wide), axis=r), name="C"
        )
    apart = corrected_apart(spec)
    if apart:
        raw = total
        total = te.compute(
            grid, lambda i, c, j: without_zero_points(p, raw[i, c, j].astype("float32"), i, 0, (c, 0, j)), name="Z"
        )

    def element(i: Any, c: Any, j: Any) -> Any:
        value = total[i, c, j].astype("float32")
        if not shape.group and not apart:
            value = without_zero_points(p, value, i, 0, (c, 0, j))
        if "a_scale" in p:
            value = value * p["a_scale"][0 if shape.one_scale else i, 0]
        if "w_scale" in p and not shape.group:
            value = value * p["w_scale"][c, 0, j].astype("float32")
        if "bias" in p:
            value = value + p["bias"][c, j].astype("float32")
        if "residual" in p:
            residual = p["residual"][i, c, j].astype("float32")
            value = value + (residual * p["r_scale"][0, 0] if "r_scale" in p else residual)
        if spec.get("silu"):
            value = value * te.sigmoid(value)
        if spec.get("act"):
            value = expressions.apply(str(spec["act"]), [value])
        if "factor" in p:
            value = value * p["factor"][i, c, j].astype("float32")
        if "inverse" in p:
            value = te.round(value * p["inverse"][0, 0])
        if spec.get("requantised"):
            value = te.round(value)
        return value.astype(NAMES[spec.outs[0].dtype])

    out = te.compute(grid, element, name="out")
    return te.create_prim_func([*(p[name] for name in names[:-1]), out])


class _Scheduling:
    """The steps of the schedule, outermost loop first."""

    def __init__(
        self, s: Any, spec: KernelSpec, shape: Shape, where: dict[str, Space], padded: _Padded, align: int, sums: int
    ) -> None:
        self.align, self.sums = align, sums
        self.s, self.spec, self.shape, self.where, self.padded = s, spec, shape, where, padded
        self.names = list(where)
        self.tile, self.panel = padded.tile, padded.panel

    def run(self) -> None:
        s, out = self.s, self.s.get_sblock("out")
        sums = s.get_sblock("C")
        s.set_scope(sums, 0, intrinsics.ACC)
        p0, m0, inner = self._outer(out)
        total = sums
        if self.shape.group:
            total = s.get_sblock("O")
            s.set_scope(total, 0, intrinsics.SPAD)
        corrected = total if self.shape.group else out
        if corrected_apart(self.spec):
            corrected = s.get_sblock("Z")
            s.set_scope(corrected, 0, intrinsics.SPAD)
            s.compute_at(corrected, inner, preserve_unit_loops=True)
            annotate(s, dict(zip(s.get_loops(corrected)[-3:], ("m", "p", "j"), strict=True)))
        s.compute_at(total, inner, preserve_unit_loops=True)
        self._operands(total, corrected, out, p0, m0)
        k0 = self._grouped(sums, total) if self.shape.group else self._plain(sums)
        self._weights(sums, p0, k0)
        self._activations(sums, m0, k0)
        self._products(sums)
        self._buffers((p0, m0, k0))

    def _outer(self, out: Any) -> tuple[Any, Any, Any]:
        """Loops over tiles of columns and of rows, and the inner one of them."""
        s, tile = self.s, self.tile
        i, c, j = s.get_loops(out)
        p0, p1 = s.split(c, [None, tile.panels])
        m0, m1 = s.split(i, [None, tile.m])
        outer, inner = (m0, p0) if tile.rows_outer else (p0, m0)
        s.reorder(outer, inner, m1, p1, j)
        annotate(s, {p0: f"p:{tile.panels}", m0: f"m:{tile.m}", m1: "m", p1: "p", j: "j"})
        for loop in (outer, inner):
            s.annotate(loop, "software_pipeline_stage", PIPELINE)
        if self.where["out"] is Space.DRAM:
            spill(s, out, inner, "m,p,j", NAMES[self.spec.outs[0].dtype])
        return p0, m0, inner

    def _operands(self, total: Any, corrected: Any, out: Any, p0: Any, m0: Any) -> None:
        """Brings scales, zero points, bias, residual and factor on chip: once, per tile of columns, rows, or both."""
        one, both = self.shape.one_scale, p0 if self.tile.rows_outer else m0
        for name, axes, at in (
            ("w_scale", "p,g,j", p0), ("w_zero", "p,g,j", p0), ("w_min", "p,g,j", p0), ("w_sum", "p,g,j", p0),
            ("bias", "p,j", p0),
            ("a_scale", "one,one" if one else "m,one", None if one else m0), ("a_zero", "one,one", None),
            ("a_sum", "m,g", m0), ("residual", "m,p,j", both), ("factor", "m,p,j", both), ("inverse", "one,one", None),
            ("r_scale", "one,one", None),
        ):  # fmt: skip
            if self.where.get(name) is Space.DRAM:
                reader = corrected if name in ZERO_POINTS else out
                fetch(self.s, total if name == "w_scale" and self.shape.group else reader, name, at, axes)

    def _plain(self, sums: Any) -> Any:
        """Sums over all of k in the accumulators."""
        s = self.s
        i, c, j, r = s.get_loops(sums)[-4:]
        k0, k1 = s.split(r, [None, self.tile.k])
        s.reorder(k0, i, c, j, k1)
        annotate(s, {k0: f"k:{self.tile.k}"})
        s.annotate(k0, "software_pipeline_stage", PIPELINE)
        s.decompose_reduction(sums, k0)
        return k0

    def _grouped(self, sums: Any, total: Any) -> Any:
        """Per group: sums in the accumulators, then scaled and added up in the scratchpad."""
        s, per_tile = self.s, self.tile.k // self.shape.group
        i, c, j, g = s.get_loops(total)[-4:]
        g0, g1 = s.split(g, [None, per_tile])
        s.reorder(g0, g1, i, c, j)
        annotate(s, {g0: f"k:{self.tile.k}", g1: f"k:{self.shape.group}", i: "m", c: "p", j: "j"})
        for loop in (g0, g1):
            s.annotate(loop, "software_pipeline_stage", PIPELINE)
        s.compute_at(sums, g1, preserve_unit_loops=True)
        s.decompose_reduction(total, g0)
        s.decompose_reduction(sums, s.get_loops(sums)[-4])
        return g0

    def _weights(self, sums: Any, p0: Any, k0: Any) -> None:
        """One tile of weights at a time; fetched once for all rows when it spans k."""
        whole = self.tile.k >= self.padded.k
        fetch(self.s, sums, "w", p0 if whole else k0, "p,k,j", scope=intrinsics.WEIGHTS)

    def _activations(self, sums: Any, m0: Any, k0: Any) -> None:
        """All of them once, a tile for all columns that pass it, or tile by tile."""
        if self.where["a"] is Space.DRAM:
            stays = self.tile.rows_outer and self.tile.k >= self.padded.k
            at = None if self.tile.whole else m0 if stays else k0
            fetch(self.s, sums, "a", at, "m,k", align=self.align)

    def _buffers(self, loops: tuple[Any, ...]) -> None:
        """Demands slots where they are not those that the pipeline asks for."""
        slots = {"C": self.sums} if self.sums else {}
        if self.tile.buffers != STREAMED:
            slots |= slots_of(self.shape, self.tile, self.panel)
        demand_slots(self.s, loops, slots)

    def _products(self, sums: Any) -> None:
        spec, tile, shape = self.spec, self.tile, self.shape
        k = shape.group or tile.k
        scope = intrinsics.SPAD if self.where["a"] is Space.DRAM else "global"
        name = intrinsics.matmul(
            tile.m, tile.panels, k, self.panel, NAMES[spec.args[0].dtype], NAMES[spec.args[1].dtype], shape.acc, scope
        )
        self.s.tensorize(self.s.get_loops(sums)[-4], name)
