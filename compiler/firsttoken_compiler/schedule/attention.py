"""Grouped-query attention: scores and weighted values on the matrix unit, exact softmax on the vector unit.

Work is cut into batches of query rows that share keys. For a prompt a batch is one query head and its rows are tokens;
for a single token a batch is one key head and its rows are the query heads that share it, so that the matrix unit sees
them together. Keys and values stream in tiles when they lie in DRAM; a row of scores is complete before its softmax.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from firsttoken_compiler.isa.types import Dtype, Space
from firsttoken_compiler.schedule import intrinsics, layout
from firsttoken_compiler.schedule.definitions import MASKED
from firsttoken_compiler.schedule.kernel import PIPELINE, Scheduled, annotate, fetch, spill
from firsttoken_compiler.schedule.layout import Layout, Ragged
from firsttoken_compiler.schedule.spec import NAMES, Arg, KernelSpec
from firsttoken_compiler.target.target import Target
from firsttoken_compiler.tvm.api import Schedule, te, tirx


@dataclass(frozen=True, slots=True)
class AttentionTile:
    """Extents of one tile: query rows, keys."""

    rows: int
    keys: int


@dataclass(frozen=True)
class Heads:
    """How a spec's heads become batches and rows."""

    batches: int
    rows: int
    share: int
    """Batches per key head."""
    keys: int
    width: int
    one_token: bool

    @staticmethod
    def of(spec: KernelSpec) -> Heads:
        """The batches of an attention spec."""
        heads, kv_heads = int(spec["heads"]), int(spec["kv_heads"])
        tokens, features = spec.args[0].shape
        width, shared = features // heads, heads // kv_heads
        keys = spec.args[1].shape[-2] if len(spec.args[1].shape) == 3 else spec.args[1].shape[0]
        if tokens == 1:
            return Heads(kv_heads, shared, 1, keys, width, True)
        return Heads(heads, tokens, shared, keys, width, False)


def schedule(spec: KernelSpec, spaces: tuple[Space, ...], tile: AttentionTile, target: Target) -> Scheduled:
    """The scheduled PrimFunc of an attention; operands q, k, v and the optional mask, then the result."""
    heads = Heads.of(spec)
    rows, keys = (-(-n // t) * t for n, t in ((heads.rows, tile.rows), (heads.keys, tile.keys)))
    s = Schedule(_definition(spec, heads, rows, keys))
    _Scheduling(s, spec, spaces, tile).run()
    args = (*spec.args, *spec.outs)
    q, k, v, *mask, out = (layout.pitch_bits(arg, space, target) for arg, space in zip(args, spaces, strict=True))
    layouts = [_query_layout(spec.args[0], heads, rows, q)]
    layouts += [_key_layout(arg, heads, keys, pitch) for arg, pitch in zip(spec.args[1:3], (k, v), strict=True)]
    if spec["mask"]:
        layouts.append(Layout((1 if _one_mask_row(spec) else rows, keys), (mask[0], Dtype.F32.bits)))
    layouts.append(_query_layout(spec.outs[0], heads, rows, out))
    ragged = Ragged({"r": heads.rows, "t": heads.keys})
    return Scheduled(s.mod, layouts, ragged, f"{tile.rows} rows x {tile.keys} keys")


def scratch_bytes(spec: KernelSpec, spaces: tuple[Space, ...], tile: AttentionTile) -> int:
    """Scratchpad bytes of a tile: scores, their exponentials, sums per row, staged operands in their slots."""
    heads = Heads.of(spec)
    keys = -(-heads.keys // tile.keys) * tile.keys
    total = tile.rows * keys * 6 + tile.rows * 16
    staged = [tile.rows * heads.width * 2, *(tile.keys * heads.width * 2,) * 2]
    staged += [tile.rows * tile.keys * 4] if spec["mask"] else []
    staged += [tile.rows * heads.width * spec.outs[0].dtype.bits // 8]
    return total + sum(3 * nbytes for nbytes, space in zip(staged, spaces, strict=True) if space is Space.DRAM) + 2048


def acc_bytes(spec: KernelSpec, tile: AttentionTile) -> int:
    """Accumulator bytes of a tile: scores and sums of values, in two slots each."""
    return 2 * tile.rows * 4 * (tile.keys + Heads.of(spec).width) + 1024


def _query_layout(arg: Arg, heads: Heads, rows: int, pitch: int) -> Layout:
    bits = arg.dtype.bits
    if heads.one_token:
        return Layout((heads.batches, rows, heads.width), (heads.rows * heads.width * bits, heads.width * bits, bits))
    return Layout((heads.batches, rows, heads.width), (heads.width * bits, pitch, bits))


def _key_layout(arg: Arg, heads: Heads, keys: int, pitch: int) -> Layout:
    """A cache `[kv_heads, keys, width]`, or a matrix `[keys, kv_heads * width]` with rows `pitch` bits apart."""
    bits = arg.dtype.bits
    count = heads.batches // heads.share
    if len(arg.shape) == 3:
        return Layout((count, keys, heads.width), (arg.shape[1] * heads.width * bits, heads.width * bits, bits))
    return Layout((count, keys, heads.width), (heads.width * bits, pitch, bits))


def _one_mask_row(spec: KernelSpec) -> bool:
    """Whether the mask is the same for all tokens."""
    return bool(spec.args[3].shape[0] == 1)


def _definition(spec: KernelSpec, heads: Heads, rows: int, keys: int) -> Any:
    count, width, share = heads.batches, heads.width, heads.share
    q = te.placeholder((count, rows, width), "float16", name="q")
    k, v = (te.placeholder((count // share, keys, width), "float16", name=name) for name in "kv")
    operands = [q, k, v]
    c = te.reduce_axis((0, width), "c")
    scores = te.compute(
        (count, rows, keys),
        lambda b, r, t: te.sum(q[b, r, c].astype("float32") * k[b // share, t, c].astype("float32"), axis=c), name="S",
    )  # fmt: skip
    if spec["mask"]:
        mask = te.placeholder((1 if _one_mask_row(spec) else rows, keys), "float32", name="mask")
        operands.append(mask)
    past = int(spec["past"])

    def masked(b: Any, r: Any, t: Any) -> Any:
        value = scores[b, r, t] * float(spec["scale"])
        if spec["mask"]:
            return value + mask[0 if _one_mask_row(spec) else r, t]
        if spec["causal"] and not heads.one_token:
            return te.if_then_else(t <= r + past, value, tirx.const(MASKED, "float32"))
        return value

    shown = te.compute((count, rows, keys), masked, name="M")
    t1, t2, t3 = (te.reduce_axis((0, keys), name) for name in ("t1", "t2", "t3"))
    peak = te.compute((count, rows), lambda b, r: te.max(shown[b, r, t1], axis=t1), name="peak")
    weight = te.compute(
        (count, rows, keys), lambda b, r, t: te.exp(shown[b, r, t] - peak[b, r]).astype("float16"), name="E"
    )
    norm = te.compute((count, rows), lambda b, r: te.sum(weight[b, r, t2].astype("float32"), axis=t2), name="norm")
    mixed = te.compute(
        (count, rows, width),
        lambda b, r, d: te.sum(weight[b, r, t3].astype("float32") * v[b // share, t3, d].astype("float32"), axis=t3),
        name="V",
    )
    factor = te.compute((count, rows), lambda b, r: 1.0 / norm[b, r], name="factor")
    out = te.compute(
        (count, rows, width),
        lambda b, r, d: (mixed[b, r, d] * factor[b, r]).astype(NAMES[spec.outs[0].dtype]),
        name="out",
    )
    return te.create_prim_func([*operands, out])


class _Scheduling:
    """The steps of the schedule."""

    def __init__(self, s: Any, spec: KernelSpec, spaces: tuple[Space, ...], tile: AttentionTile) -> None:
        self.s, self.spec, self.tile = s, spec, tile
        names = ["q", "k", "v", *(["mask"] if spec["mask"] else []), "out"]
        self.where = dict(zip(names, spaces, strict=True))
        self.width = Heads.of(spec).width

    def run(self) -> None:
        s = self.s
        out = s.get_sblock("out")
        b, r, d = s.get_loops(out)
        r0, r1 = s.split(r, [None, self.tile.rows])
        annotate(s, {b: "b:1", r0: f"r:{self.tile.rows}", r1: "r"})
        s.reorder(b, r0, r1, d)
        for loop in (b, r0):
            s.annotate(loop, "software_pipeline_stage", PIPELINE)
        if self.where["out"] is Space.DRAM:
            spill(s, out, r0, "one,r,d", NAMES[self.spec.outs[0].dtype])
        for name in ("factor", "V", "norm", "E", "peak", "M"):
            s.compute_at(s.get_sblock(name), r0, preserve_unit_loops=True)
        for name in ("factor", "norm", "E", "peak", "M"):
            s.set_scope(s.get_sblock(name), 0, intrinsics.SPAD)
        self._scores(r0)
        self._softmax()
        self._values()

    def _scores(self, r0: Any) -> None:
        s, tile = self.s, self.tile
        shown, scores = s.get_sblock("M"), s.get_sblock("S")
        batch, r, t = s.get_loops(shown)[-3:]
        t0, t1 = s.split(t, [None, tile.keys])
        s.reorder(t0, batch, r, t1)
        annotate(s, {t0: f"t:{tile.keys}", r: "r", t1: "t"})
        s.annotate(t0, "software_pipeline_stage", PIPELINE)
        s.set_scope(scores, 0, intrinsics.ACC)
        s.compute_at(scores, t0, preserve_unit_loops=True)
        if self.where["q"] is Space.DRAM:
            fetch(s, scores, "q", r0, "one,r,d")
        if self.where["k"] is Space.DRAM:
            fetch(s, scores, "k", t0, "one,t,d")
        if self.where.get("mask") is Space.DRAM:
            fetch(s, shown, "mask", t0, "r,t")
        s.decompose_reduction(scores, s.get_loops(scores)[-4])
        a, w = (intrinsics.SPAD if self.where[name] is Space.DRAM else "global" for name in "qk")
        name = intrinsics.attend(tile.rows, tile.keys, self.width, "r,t,d", True, a, w)
        s.tensorize(s.get_loops(scores)[-4], name)

    def _softmax(self) -> None:
        s = self.s
        for name, reduces in (("peak", True), ("norm", True), ("E", False), ("factor", False)):
            block = s.get_sblock(name)
            loops = s.get_loops(block)[2:]
            annotate(s, dict(zip(loops[1:], ("r", "t"), strict=False)))
            if reduces:
                s.decompose_reduction(block, loops[0])

    def _values(self) -> None:
        s, tile = self.s, self.tile
        mixed = s.get_sblock("V")
        s.set_scope(mixed, 0, intrinsics.ACC)
        batch, r, d, t = s.get_loops(mixed)[-4:]
        t0, t1 = s.split(t, [None, tile.keys])
        s.reorder(t0, batch, r, d, t1)
        annotate(s, {t0: f"t:{tile.keys}"})
        s.annotate(t0, "software_pipeline_stage", PIPELINE)
        if self.where["v"] is Space.DRAM:
            fetch(s, mixed, "v", t0, "one,t,d")
        s.decompose_reduction(mixed, t0)
        scope = intrinsics.SPAD if self.where["v"] is Space.DRAM else "global"
        name = intrinsics.attend(tile.rows, self.width, tile.keys, "r,d,t", False, intrinsics.SPAD, scope)
        s.tensorize(s.get_loops(mixed)[-4], name)
