"""Attention with online softmax: never more scores than those of one tile of keys.

Milakov & Gimelshein 2018 found the running sum, Dao et al. 2022 the attention over tiles (FlashAttention).

A tile of rows keeps a running maximum, a running sum and the sums of its values. Where a tile of keys raises the
maximum, what was summed before is multiplied by the exponential of the difference. The scores of the next tile of keys
are multiplied before the softmax of this one ends, and sums of values are rescaled after the softmax of the next one,
so that matrix and vector unit work at the same time.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod
from typing import Final

from firsttoken_compiler.codegen.loops import Access, Alloc, Buffer, Loop, MatmulCall, Nest, Offset, Statement, Value
from firsttoken_compiler.codegen.template import Template
from firsttoken_compiler.codegen.unroll import Place, unroll
from firsttoken_compiler.isa.types import Dtype, Space
from firsttoken_compiler.schedule import attention
from firsttoken_compiler.schedule.attention import AttentionTile, Heads
from firsttoken_compiler.schedule.kernel import PIPELINE
from firsttoken_compiler.schedule.layout import Ragged
from firsttoken_compiler.schedule.spec import MASKED, KernelSpec
from firsttoken_compiler.target.target import Target

LOWEST: Final = -3.4028234663852886e38
"""The running maximum before the first tile: a finite number, whose difference to any score has the exponential 0."""
BATCH, DOWN, ACROSS = 0, 1, 2
"""Depths of the loops over batches, tiles of rows and tiles of keys."""


def statements(
    spec: KernelSpec, spaces: tuple[Space, ...], tile: AttentionTile, target: Target
) -> tuple[list[Statement], list[Buffer]]:
    """The loops of an attention by an online tile, and its operands, the result last."""
    made = _online(spec, spaces, tile, target)
    return made.run(), list(made.operands.values())


def _online(spec: KernelSpec, spaces: tuple[Space, ...], tile: AttentionTile, target: Target) -> _Online:
    widened = attention.quantised_cache(spec) and attention.widens(target)
    return _Online(spec, spaces, tile, Heads.of(spec), widened)


def build(spec: KernelSpec, spaces: tuple[Space, ...], tile: AttentionTile, target: Target) -> Template:
    """The template of an attention by an online tile."""
    heads, made = Heads.of(spec), _online(spec, spaces, tile, target)
    layouts = attention.layouts_of(spec, spaces, (made.rows, made.keys), target)
    places = [Place(space, layout) for space, layout in zip(spaces, layouts, strict=True)]
    ragged = Ragged(
        {"r": heads.rows, "t": heads.keys, "u": heads.keys}, diagonal=attention.diagonal_of(spec, heads, tile, target)
    )
    slots = f" {tile.buffers}-buffered" if tile.buffers else ""
    text = f"{tile.rows} rows x {tile.keys} keys{slots} online"
    return unroll(made.run(), places, ragged, target.alignment(Space.SPAD), text, target.matrix.tile_bytes)


@dataclass
class _Online:
    """The loops of one attention; accesses are over rows and keys, or rows and columns, of a tile."""

    spec: KernelSpec
    spaces: tuple[Space, ...]
    tile: AttentionTile
    heads: Heads
    widened: bool
    buffers: dict[str, Buffer] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Padded extents, and the operands."""
        self.rows = -(-self.heads.rows // self.tile.rows) * self.tile.rows
        self.keys = -(-self.heads.keys // self.tile.keys) * self.tile.keys
        args = (*self.spec.args, *self.spec.outs)
        names = [*attention.operand_names(self.spec), "out"]
        self.operands = {
            name: Buffer(f"p{index}", "param", arg.dtype, arg.nbytes * 8 // arg.dtype.bits, index)
            for index, (name, arg) in enumerate(zip(names, args, strict=True))
        }
        self.where = dict(zip(names, self.spaces, strict=True))
        self.scaled = attention.quantised_cache(self.spec)

    def run(self) -> list[Statement]:
        """The statements of the kernel."""
        once, before = self._once(), [*self._row_operands(), *self._state()]
        across = Loop(ACROSS, self.keys // self.tile.keys, "t", self.tile.keys, tuple(PIPELINE), [
            Loop(ACROSS + 1, 1, "", 0, (), self._scores(), skew=-1),
            *self._softmax(), *self._values(),
            Loop(ACROSS + 1, 1, "", 0, (), self._rescaled(), skew=1),
        ])  # fmt: skip
        body = [*before, across, *self._result()]
        down = Loop(DOWN, self.rows // self.tile.rows, "r", self.tile.rows, tuple(PIPELINE), body)
        return [*once, Loop(BATCH, self.heads.batches, "b", 1, tuple(PIPELINE), [down])]

    # --- buffers and accesses ---------------------------------------------------------------------------------------

    def _local(self, name: str, dtype: Dtype, elements: int, slots: int = 0, scope: str = "spad") -> Alloc:
        made = self.buffers[name] = Buffer(name, scope, dtype, elements)
        return Alloc(made, slots)

    def _at(self, name: str, *steps: int) -> Access:
        """A local buffer from its first element on."""
        return Access(self.buffers[name], lambda _env: 0, steps)

    def _rows_at(self, name: str) -> Access:
        """Queries or results of the tile, over rows and columns."""
        rows, width, step = self.rows, self.heads.width, self.tile.rows
        return Access(
            self.operands[name], lambda env: (env[BATCH] * rows + env[DOWN] * step) * width, (width, 1)
        )  # fmt: skip

    def _keys_base(self, width: int) -> Offset:
        keys, share, step = self.keys, self.heads.share, self.tile.keys
        return lambda env: (env[BATCH] // share * keys + env[ACROSS] * step) * width

    def _fetched(
        self, name: str, source: Access, extents: tuple[int, ...], axes: tuple[str, ...], slots: int = 0
    ) -> tuple[list[Statement], Access]:
        """(statements that bring an operand to the scratchpad, where it lies then)."""
        if self.where[name] is not Space.DRAM:
            return [], source
        alloc = self._local(f"{name}_tile", source.buffer.dtype, prod(extents), slots)
        near = self._at(f"{name}_tile", *((extents[-1], 1) if len(extents) == 2 else (1,)))
        return [alloc, Nest(extents, axes, near, ("load", source))], near

    def _cache(self, name: str) -> tuple[list[Statement], Access]:
        """A tile of keys or values in the type that the matrix unit takes."""
        shape, width = (self.tile.keys, self.heads.width), self.heads.width
        source = Access(self.operands[name], self._keys_base(width), (width, 1))
        made, near = self._fetched(name, source, shape, ("t", "d"), self.tile.buffers)
        if not self.widened:
            return made, near
        alloc = self._local(f"{name}_wide", Dtype.F16, shape[0] * shape[1], self._slots)
        wide = self._at(f"{name}_wide", width, 1)
        return [*made, alloc, Nest(shape, ("t", "d"), wide, ("load", near))], wide

    @property
    def _slots(self) -> int:
        """Of what one tile of keys makes while the one before is still read."""
        return 2 if self.keys > self.tile.keys else 1

    # --- statements -------------------------------------------------------------------------------------------------

    def _once(self) -> list[Statement]:
        if "inverse" not in self.operands:
            return []
        source = Access(self.operands["inverse"], lambda _env: 0, (1,))
        made, self.inverse = self._fetched("inverse", source, (1,), ("",))
        return made

    def _row_operands(self) -> list[Statement]:
        """Queries of the tile of rows; of an int8 cache the scales of all values, and the largest of them."""
        width = self.heads.width
        made, self.queries = self._fetched("q", self._rows_at("q"), (self.tile.rows, width), ("r", "d"))
        if not self.scaled:
            return made
        keys, share = self.keys, self.heads.share
        source = Access(self.operands["vs"], lambda env: env[BATCH] // share * keys, (1,))
        more, self.value_scales = self._fetched("vs", source, (keys,), ("u",))
        top = self._local("top", Dtype.F32, 1)
        return [
            *made, *more, top, Nest((), (), self._at("top"), ("const", LOWEST)),
            Nest((keys,), ("u",), self._at("top", 0), ("max", ("load", self._at("top", 0)),
                                                       ("load", self.value_scales))),
        ]  # fmt: skip

    def _state(self) -> list[Statement]:
        """What a tile of rows carries from one tile of keys to the next one."""
        rows, width = self.tile.rows, self.heads.width
        allocs = [self._local(name, Dtype.F32, rows) for name in ("peak", "norm")]
        allocs.append(self._local("sums", Dtype.F32, rows * width))
        return [
            *allocs, Nest((rows,), ("r",), self._at("peak", 1), ("const", LOWEST)),
            Nest((rows,), ("r",), self._at("norm", 1), ("const", 0.0)),
            Nest((rows, width), ("r", "d"), self._at("sums", width, 1), ("const", 0.0)),
        ]  # fmt: skip

    def _scores(self) -> list[Statement]:
        """Scores of a tile, and what the softmax of the tile reads besides."""
        rows, keys, width = self.tile.rows, self.tile.keys, self.heads.width
        alloc = self._local("scores", Dtype.F32, rows * keys, self._slots, "acc")
        made, near = self._cache("k")
        scores = self._at("scores", keys, 1)
        product = MatmulCall(
            rows, keys, width, ("r", "t", "d"), scores, self.queries, near, keys, width, 0, width, 0, fresh=True
        )
        out: list[Statement] = [alloc, *made, product]
        if self.spec["mask"]:
            more, self.mask = self._masked_by()
            out += more
        if self.scaled:
            source = Access(self.operands["ks"], self._keys_base(1), (1,))
            more, self.key_scales = self._fetched("ks", source, (keys,), ("t",))
            out += more
        return out

    def _masked_by(self) -> tuple[list[Statement], Access]:
        """The mask over rows and keys of the tile."""
        rows, keys, all_keys = self.tile.rows, self.tile.keys, self.keys
        if attention.one_mask_row(self.spec):
            source = Access(self.operands["mask"], lambda env: env[ACROSS] * keys, (1,))
            made, near = self._fetched("mask", source, (keys,), ("t",))
            return made, Access(near.buffer, near.base, (0, 1))
        source = Access(
            self.operands["mask"], lambda env: env[DOWN] * rows * all_keys + env[ACROSS] * keys, (all_keys, 1)
        )
        return self._fetched("mask", source, (rows, keys), ("r", "t"))

    def _shown(self) -> Value:
        """A score times its scale, masked."""
        rows, keys, past = self.tile.rows, self.tile.keys, int(self.spec["past"])
        scale: Value = ("load", self._at("key_factors", 0, 1)) if self.scaled else ("const", float(self.spec["scale"]))
        value: Value = ("mul", ("load", self._at("scores", keys, 1)), scale)
        if self.spec["mask"]:
            return ("add", value, ("load", self.mask))
        if self.spec["causal"] and not self.heads.one_token:
            key: Value = ("index", lambda env: env[ACROSS] * keys, (0, 1))
            row: Value = ("index", lambda env: env[DOWN] * rows + past, (1, 0))
            return ("select", ("le", key, row), value, ("const", MASKED))
        return value

    def _softmax(self) -> list[Statement]:
        """The weights of a tile, from the maximum of all tiles so far, and what earlier tiles are multiplied by."""
        rows, keys = self.tile.rows, self.tile.keys
        tile, axes = (rows, keys), ("r", "t")
        out: list[Statement] = []
        if self.scaled:
            out.append(self._local("key_factors", Dtype.F32, keys))
            factor: Value = ("mul", ("load", self.key_scales), ("const", float(self.spec["scale"])))
            out.append(Nest((keys,), ("t",), self._at("key_factors", 1), factor))
        out += [
            self._local("shown", Dtype.F32, rows * keys), self._local("before", Dtype.F32, rows),
            self._local("again", Dtype.F32, rows, self._slots),
            self._local("weights", Dtype.F16, rows * keys, 1 if self.scaled else self._slots),
        ]  # fmt: skip
        shown, weights, row = self._at("shown", keys, 1), self._at("weights", keys, 1), self._at("peak", 1, 0)
        peak, norm, again = (self._at(name, 1) for name in ("peak", "norm", "again"))
        exponent = ("exp", ("sub", ("load", shown), ("load", row)))
        out += [
            Nest(tile, axes, shown, self._shown()),
            Nest((rows,), ("r",), self._at("before", 1), ("load", peak)),
            Nest(tile, axes, row, ("max", ("load", row), ("load", shown))),
            Nest((rows,), ("r",), again, ("exp", ("sub", ("load", self._at("before", 1)), ("load", peak)))),
            Nest(tile, axes, weights, exponent),
            Nest((rows,), ("r",), norm, ("mul", ("load", norm), ("load", again))),
            Nest(tile, axes, self._at("norm", 1, 0), ("add", ("load", self._at("norm", 1, 0)), ("load", weights))),
        ]
        return [*out, *self._scaled_weights()]

    def _scaled_weights(self) -> list[Statement]:
        """Of an int8 cache: weights times the scales of their values, over the largest one."""
        self.factors = "weights"
        if not self.scaled:
            return []
        rows, keys, near = self.tile.rows, self.tile.keys, self.value_scales
        scale = Access(near.buffer, lambda env: near.base(env) + env[ACROSS] * keys, (1,))
        made: list[Statement] = [
            self._local("ratio", Dtype.F32, keys),
            Nest((keys,), ("t",), self._at("ratio", 1), ("div", ("load", scale), ("load", self._at("top", 0)))),
            self._local("products", Dtype.F16, rows * keys, self._slots),
        ]
        value = ("mul", ("load", self._at("weights", keys, 1)), ("load", self._at("ratio", 0, 1)))
        self.factors = "products"
        return [*made, Nest((rows, keys), ("r", "t"), self._at("products", keys, 1), value)]

    def _values(self) -> list[Statement]:
        """Weighted values of the tile."""
        rows, keys, width = self.tile.rows, self.tile.keys, self.heads.width
        made, near = self._cache("v")
        alloc = self._local("mixed", Dtype.F32, rows * width, self._slots, "acc")
        mixed, weights = self._at("mixed", width, 1), self._at(self.factors, keys, 1)
        return [*made, alloc, MatmulCall(
            rows, width, keys, ("r", "d", "t"), mixed, weights, near, width, keys, 0, width, width, fresh=True
        )]  # fmt: skip

    def _rescaled(self) -> list[Statement]:
        """Sums of the values of all tiles so far."""
        shape, width = (self.tile.rows, self.heads.width), self.heads.width
        sums = self._at("sums", width, 1)
        before = ("mul", ("load", sums), ("load", self._at("again", 1, 0)))
        return [Nest(shape, ("r", "d"), sums, ("add", before, ("load", self._at("mixed", width, 1))))]

    def _result(self) -> list[Statement]:
        """The sums over the running sum of the weights."""
        shape, width, axes = (self.tile.rows, self.heads.width), self.heads.width, ("r", "d")
        top: Value = ("load", self._at("top", 0)) if self.scaled else ("const", 1.0)
        alloc = self._local("factor", Dtype.F32, shape[0])
        value: Value = ("mul", ("load", self._at("sums", width, 1)), ("load", self._at("factor", 1, 0)))
        if "inverse" in self.operands:
            value = ("round", ("mul", value, ("load", Access(self.inverse.buffer, self.inverse.base, (0, 0)))))
        factor: list[Statement] = [
            alloc,
            Nest((shape[0],), ("r",), self._at("factor", 1), ("div", top, ("load", self._at("norm", 1)))),
        ]
        if self.where["out"] is not Space.DRAM:
            return [*factor, Nest(shape, axes, self._rows_at("out"), value)]
        alloc = self._local("out_tile", self.spec.outs[0].dtype, shape[0] * width)
        near = self._at("out_tile", width, 1)
        return [
            *factor, alloc, Nest(shape, axes, near, value), Nest(shape, axes, self._rows_at("out"), ("load", near)),
        ]  # fmt: skip
