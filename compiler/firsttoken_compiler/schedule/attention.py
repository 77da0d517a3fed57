"""Grouped-query attention: scores and weighted values on the matrix unit, exact softmax on the vector unit.

Work is cut into batches of query rows that share keys. For a prompt a batch is one query head and its rows are tokens;
for a single token a batch is one key head and its rows are the query heads that share it, so that the matrix unit sees
them together. Keys and values stream in tiles when they lie in DRAM; a row of scores is complete before its softmax.

An int8 cache is multiplied as it lies in memory. The scale of a key multiplies its column of scores; the scale of a
value, over the largest one of its head, multiplies the weights of that value, which so stay at most 1 in fp16. A target
without the pair fp16 x int8 converts each tile on the vector unit, which changes no number.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Final

from firsttoken_compiler.isa.types import Dtype, Space
from firsttoken_compiler.isa.vector_kernel import LEAVING, SEEN
from firsttoken_compiler.schedule import intrinsics, layout
from firsttoken_compiler.schedule.kernel import PIPELINE, Scheduled, annotate, demand_slots, fetch, spill
from firsttoken_compiler.schedule.layout import Diagonal, Layout, Ragged
from firsttoken_compiler.schedule.spec import MASKED, NAMES, Arg, KernelSpec
from firsttoken_compiler.target.rates import pair_name
from firsttoken_compiler.target.target import Attention, Target
from firsttoken_compiler.tvm.api import Schedule, te, tirx

MARKS: Final = {f"factor_{intrinsics.SPAD}": LEAVING, "": SEEN}
"""Marks of microprograms by the buffer that they write, where a target maps attention in its own way."""


@dataclass(frozen=True, slots=True)
class AttentionTile:
    """Extents of one tile: query rows, keys."""

    rows: int
    keys: int
    buffers: int = 0
    """Tiles of keys, and of values, that exist at a time; 0: as many as the pipeline asks for."""
    online: bool = False
    """Whether scores exist a tile at a time, with running maxima and sums (`schedule.online_attention`)."""


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


def mapped(spec: KernelSpec, target: Target) -> Attention | None:
    """How the target maps this attention; None where it is like any other kernel, as that of a single token is."""
    return None if spec.args[0].shape[0] == 1 else target.attention


def value_parts(spec: KernelSpec, target: Target) -> int:
    """How often the scores of a row are made: once for every so many columns of the values."""
    own, width = mapped(spec, target), Heads.of(spec).width
    columns = own.value_columns if own is not None else 0
    return width // columns if columns and width % columns == 0 else 1


def skips_masked(spec: KernelSpec, target: Target) -> bool:
    """Whether tiles of keys that a causal mask hides from a whole tile of rows are left out."""
    own = mapped(spec, target)
    return own is None or own.skips_masked


def schedule(spec: KernelSpec, spaces: tuple[Space, ...], tile: AttentionTile, target: Target) -> Scheduled:
    """The scheduled PrimFunc of an attention; operands as `operand_names` has them, then the result."""
    heads = Heads.of(spec)
    rows, keys = (-(-n // t) * t for n, t in ((heads.rows, tile.rows), (heads.keys, tile.keys)))
    widened = quantised_cache(spec) and widens(target)
    parts = value_parts(spec, target)
    source = _definition(spec, heads, (rows, keys), widened, parts)
    s = Schedule(source)
    _Scheduling(s, spec, spaces, tile, widened, parts).run()
    diagonal = diagonal_of(spec, heads, tile, target)
    ragged = Ragged({"r": heads.rows, "t": heads.keys, "u": heads.keys}, diagonal=diagonal)
    slots = f" {tile.buffers}-buffered" if tile.buffers else ""
    layouts = layouts_of(spec, spaces, (rows, keys), target)
    return Scheduled(s.mod, layouts, ragged, f"{tile.rows} rows x {tile.keys} keys{slots}", source, s.trace)


def layouts_of(
    spec: KernelSpec, spaces: tuple[Space, ...], padded: tuple[int, int], target: Target
) -> list[Layout]:  # fmt: skip
    """Where the elements of operands and result lie, with rows and keys in whole tiles."""
    heads, parts, (rows, keys) = Heads.of(spec), value_parts(spec, target), padded
    args = (*spec.args, *spec.outs)
    q, k, v, *more, out = (layout.pitch_bits(arg, space, target) for arg, space in zip(args, spaces, strict=True))
    layouts = [_query_layout(spec.args[0], heads, rows, q)]
    layouts += [_key_layout(arg, heads, keys, pitch) for arg, pitch in zip(spec.args[1:3], (k, v), strict=True)]
    if spec["mask"]:
        layouts.append(Layout((1 if one_mask_row(spec) else rows, keys), (more[0], Dtype.F32.bits)))
    given = dict(zip(operand_names(spec), spec.args, strict=True))
    layouts += [_scale_layout(given[name], keys) for name in ("ks", "vs") if name in given]
    layouts += [layout.dense((1, 1), Dtype.F32)] if spec.get("narrow") else []
    made = replace(heads, batches=heads.batches * parts, width=heads.width // parts)
    layouts.append(_query_layout(spec.outs[0], made, rows, out))
    return layouts


def diagonal_of(spec: KernelSpec, heads: Heads, tile: AttentionTile, target: Target) -> Diagonal | None:
    """Where a tile of rows stops: keys that are masked for all of them weigh exactly 0, so nothing is done for them."""
    if not spec["causal"] or spec["mask"] or heads.one_token or not skips_masked(spec, target):
        return None
    return Diagonal("r", "t", tile.rows, int(spec["past"]))


def operand_names(spec: KernelSpec) -> list[str]:
    """Names of an attention's operands in the order of the call."""
    scales = ["ks", "vs"] if quantised_cache(spec) else []
    return ["q", "k", "v", *(["mask"] if spec["mask"] else []), *scales, *(["inverse"] if spec.get("narrow") else [])]


def quantised_cache(spec: KernelSpec) -> bool:
    """Whether keys and values are int8 with a scale per row."""
    return spec.args[1].dtype is Dtype.I8


def widens(target: Target) -> bool:
    """Whether int8 keys and values become fp16 before they are multiplied."""
    return pair_name(Dtype.F16, Dtype.I8) not in target.matrix.macs_per_cycle


def pipelined(spec: KernelSpec, target: Target) -> int:
    """Tiles of keys and values that the pipeline asks for: one is read or widened while the next one comes."""
    return 3 if quantised_cache(spec) and widens(target) else 2


def scratch_bytes(spec: KernelSpec, spaces: tuple[Space, ...], tile: AttentionTile, target: Target) -> int:
    """Scratchpad bytes of a tile: scores, their exponentials, sums per row, staged operands in their slots."""
    heads = Heads.of(spec)
    keys = -(-heads.keys // tile.keys) * tile.keys
    total = tile.rows * keys * 6 + tile.rows * 16
    staged = {
        "q": tile.rows * heads.width * 2, **dict.fromkeys("kv", spec.args[1].dtype.nbytes(tile.keys * heads.width)),
        "mask": tile.rows * tile.keys * 4, "ks": keys * 2, "vs": keys * 2, "inverse": 4,
        "out": tile.rows * heads.width * spec.outs[0].dtype.bits // 8,
    }  # fmt: skip
    if quantised_cache(spec):  # the scaled weights of the values, and the factors of their columns
        total += tile.rows * keys * 2 + keys * 8
        total += 2 * tile.keys * heads.width * 2 if widens(target) else 0
    where = zip([*operand_names(spec), "out"], spaces, strict=True)
    return total + sum(3 * staged[name] for name, space in where if space is Space.DRAM) + 2048


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


def _scale_layout(arg: Arg, keys: int) -> Layout:
    """Scales `[kv_heads, keys, 1]` of a cache's rows."""
    return Layout((arg.shape[0], keys), (arg.shape[1] * arg.dtype.bits, arg.dtype.bits))


def one_mask_row(spec: KernelSpec) -> bool:
    """Whether the mask is the same for all tokens."""
    return bool(spec.args[3].shape[0] == 1)


def _definition(spec: KernelSpec, heads: Heads, padded: tuple[int, int], widened: bool, parts: int) -> Any:
    """With `parts` the batches are those of the heads times the parts of the values' columns."""
    count, width, share = heads.batches * parts, heads.width, heads.share * parts
    rows, keys = padded
    columns = width // parts
    q = te.placeholder((heads.batches, rows, width), "float16", name="q")
    stored = NAMES[spec.args[1].dtype]
    k, v = (te.placeholder((count // share, keys, width), stored, name=name) for name in "kv")
    shapes = {
        "mask": ((1 if one_mask_row(spec) else rows, keys) if spec["mask"] else (), "float32"),
        **dict.fromkeys(("ks", "vs"), ((count // share, keys), "float16")), "inverse": ((1, 1), "float32"),
    }  # fmt: skip
    p = {name: te.placeholder(*shapes[name], name=name) for name in operand_names(spec)[3:]}
    whole = replace(heads, batches=count, share=share)
    key, value = (_per_batch(x, name, whole, keys, widened) for x, name in ((k, "KH"), (v, "VH")))
    c = te.reduce_axis((0, width), "c")
    scores = te.compute(
        (count, rows, keys),
        lambda b, r, t: te.sum(q[b // parts, r, c].astype("float32") * key(b, t, c).astype("float32"), axis=c),
        name="S",
    )  # fmt: skip
    past = int(spec["past"])
    by_key = _key_factors(spec, p, whole, keys)

    def masked(b: Any, r: Any, t: Any) -> Any:
        value = scores[b, r, t] * by_key(b, t)
        if spec["mask"]:
            return value + p["mask"][0 if one_mask_row(spec) else r, t]
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
    weight, top = _scaled_weights(p, whole, weight)

    def column(b: Any, d: Any) -> Any:
        return d if parts == 1 else b % parts * columns + d

    mixed = te.compute(
        (count, rows, columns),
        lambda b, r, d: te.sum(
            weight[b, r, t3].astype("float32") * value(b, t3, column(b, d)).astype("float32"), axis=t3
        ),
        name="V",
    )
    factor = te.compute((count, rows), lambda b, r: top(b) / norm[b, r], name="factor")

    def element(b: Any, r: Any, d: Any) -> Any:
        value = mixed[b, r, d] * factor[b, r]
        value = te.round(value * p["inverse"][0, 0]) if "inverse" in p else value
        return value.astype(NAMES[spec.outs[0].dtype])

    return te.create_prim_func([q, k, v, *p.values(), te.compute((count, rows, columns), element, name="out")])


def _per_batch(source: Any, name: str, heads: Heads, keys: int, widened: bool) -> Any:
    """(batch, key, column) → element of the keys or values, in fp16 first where they are widened."""
    share = heads.share
    if not widened:
        return lambda b, t, c: source[b // share, t, c]
    half = te.compute(
        (heads.batches, keys, heads.width), lambda b, t, c: source[b // share, t, c].astype("float16"), name=name
    )
    return lambda b, t, c: half[b, t, c]


def _key_factors(spec: KernelSpec, p: dict[str, Any], heads: Heads, keys: int) -> Any:
    """(batch, key) → what scores are multiplied by: the scale, of an int8 cache times that of the key's row."""
    scale = float(spec["scale"])
    if "ks" not in p:
        return lambda _b, _t: scale
    scales, share = p["ks"], heads.share
    made = te.compute(
        (heads.batches, keys), lambda b, t: scales[b // share, t].astype("float32") * scale, name="KS"
    )
    return lambda b, t: made[b, t]


def _scaled_weights(p: dict[str, Any], heads: Heads, weight: Any) -> tuple[Any, Any]:
    """The fp16 weights that meet the values, and batch → what the sum of the values is multiplied by besides."""
    if "vs" not in p:
        return weight, lambda _b: 1.0
    scales, share, shape = p["vs"], heads.share, tuple(weight.shape)
    t = te.reduce_axis((0, shape[2]), "t4")
    top = te.compute(
        (shape[0],), lambda b: te.max(scales[b // share, t].astype("float32"), axis=t), name="top"
    )
    ratio = te.compute(
        (shape[0], shape[2]), lambda b, t: scales[b // share, t].astype("float32") / top[b], name="VS"
    )
    scaled = te.compute(
        shape, lambda b, r, t: (weight[b, r, t].astype("float32") * ratio[b, t]).astype("float16"), name="W"
    )
    return scaled, lambda b: top[b]


class _Scheduling:
    """The steps of the schedule."""

    def __init__(
        self, s: Any, spec: KernelSpec, spaces: tuple[Space, ...], tile: AttentionTile, widened: bool, parts: int
    ) -> None:
        self.s, self.spec, self.tile, self.widened = s, spec, tile, widened
        self.where = dict(zip([*operand_names(spec), "out"], spaces, strict=True))
        self.width = Heads.of(spec).width
        self.columns = self.width // parts
        self.stored = "float16" if widened else NAMES[spec.args[1].dtype]

    def run(self) -> None:
        s = self.s
        out = s.get_sblock("out")
        b, r, d = s.get_loops(out)
        r0, r1 = s.split(r, [None, self.tile.rows])
        annotate(s, {b: "b:1", r0: f"r:{self.tile.rows}", r1: "r"})
        s.reorder(b, r0, r1, d)
        for loop in (b, r0):
            s.annotate(loop, "software_pipeline_stage", PIPELINE)
        if self.where.get("inverse") is Space.DRAM:
            fetch(s, out, "inverse", None, "one,one")
        if self.where["out"] is Space.DRAM:
            spill(s, out, r0, "one,r,d", NAMES[self.spec.outs[0].dtype])
        scaled = quantised_cache(self.spec)
        kept = ["norm", "E", "peak", "M"]
        if scaled:
            kept = ["W", "VS", "top", *kept, "KS"]
        for name in ("factor", "V", *kept):
            s.compute_at(s.get_sblock(name), r0, preserve_unit_loops=True)
        for name in ("factor", *kept):
            s.set_scope(s.get_sblock(name), 0, intrinsics.SPAD)
        self._scores(r0)
        if scaled:
            self._scales(r0)
        self._softmax()
        self._values()
        if self.tile.buffers:
            demand_slots(s, (b, r0), {"k": self.tile.buffers, "v": self.tile.buffers})

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
        self._bring(scores, "k", t0)
        if self.where.get("mask") is Space.DRAM:
            fetch(s, shown, "mask", t0, "r,t")
        s.decompose_reduction(scores, s.get_loops(scores)[-4])
        a = intrinsics.SPAD if self.where["q"] is Space.DRAM else "global"
        name = intrinsics.attend(tile.rows, tile.keys, self.width, "r,t,d", True, a, self._scope("k"), self.stored)
        s.tensorize(s.get_loops(scores)[-4], name)

    def _bring(self, reader: Any, name: str, loop: Any) -> None:
        """A tile of the keys or values on chip, in the type that the matrix unit takes."""
        s = self.s
        if self.widened:
            reader = s.get_sblock(f"{name.upper()}H")
            s.set_scope(reader, 0, intrinsics.SPAD)
            s.compute_at(reader, loop, preserve_unit_loops=True)
            annotate(s, dict(zip(s.get_loops(reader)[-2:], "td", strict=True)))
        if self.where[name] is Space.DRAM:
            fetch(s, reader, name, loop, "one,t,d")

    def _scope(self, name: str) -> str:
        """Where the matrix unit finds the keys or values."""
        return intrinsics.SPAD if self.widened or self.where[name] is Space.DRAM else "global"

    def _scales(self, r0: Any) -> None:
        """Factors per key of a row of scores; the largest scale is that of the whole cache (axis u), seen or not."""
        s = self.s
        for name, reader, axis in (("ks", "KS", "t"), ("vs", "top", "u")):
            if self.where[name] is Space.DRAM:
                fetch(s, s.get_sblock(reader), name, r0, f"one,{axis}")
        for name in ("KS", "VS", "top"):
            block = s.get_sblock(name)
            loops = s.get_loops(block)[2:]
            annotate(s, {loops[1]: "u" if name == "top" else "t"})
            if name == "top":
                s.decompose_reduction(block, loops[0])

    def _softmax(self) -> None:
        s = self.s
        names = [("peak", True), ("norm", True), ("E", False), ("factor", False)]
        for name, reduces in [*names, ("W", False)] if quantised_cache(self.spec) else names:
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
        self._bring(mixed, "v", t0)
        s.decompose_reduction(mixed, t0)
        name = intrinsics.attend(
            tile.rows, self.columns, tile.keys, "r,d,t", False, intrinsics.SPAD, self._scope("v"), self.stored
        )
        s.tensorize(s.get_loops(mixed)[-4], name)
