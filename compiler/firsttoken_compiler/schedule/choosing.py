"""Choices of kernels: the compiler's own, all that are possible, and refusal of those that are not.

Each kind of kernel has a `Chooser`. A choice is possible when its extents are whole units within the kernel's own, and
its tiles, with all their slots, fit the room and the accumulators by the same account that the compiler keeps.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Final, NoReturn, Protocol, cast

from firsttoken_compiler.errors import AllocationError, OptionError
from firsttoken_compiler.isa.types import Space
from firsttoken_compiler.isa.word import MAX_EXTENT
from firsttoken_compiler.schedule import (
    attention,
    block_linear,
    conv,
    normed,
    normed_tiling,
    online_attention,
    rowwise,
    tiling,
)
from firsttoken_compiler.schedule.attention import AttentionTile
from firsttoken_compiler.schedule.block_trees import Blocks
from firsttoken_compiler.schedule.choice import (
    MOST_BUFFERS,
    ORDERS,
    SOFTMAXES,
    AttentionChoice,
    Choice,
    ProductChoice,
    RowsChoice,
    kernel_key,
    kinds_of,
    product_dims,
)
from firsttoken_compiler.schedule.linear import Shape, Tile, panel_of
from firsttoken_compiler.schedule.product_bytes import linear_bytes
from firsttoken_compiler.schedule.product_cost import linear_cost
from firsttoken_compiler.schedule.spec import KernelSpec
from firsttoken_compiler.schedule.tiling import Room
from firsttoken_compiler.schedule.windows import Windows, product_of
from firsttoken_compiler.target.rates import ceil_div
from firsttoken_compiler.target.target import Target

Spaces = tuple[Space, ...]
ROWS: Final = (*tiling.FEW_ROWS, *tiling.ROWS)
PARTS: Final = (1, 2, 3, 4, 6, 8)
"""In how many parts rows and panels are cut, beside the powers of two."""


def default_choice(spec: KernelSpec, spaces: Spaces, target: Target, room: Room) -> Choice | None:
    """What the compiler chooses by itself; None for a kernel without a choice. Raises AllocationError: nothing fits."""
    chooser = chooser_of(spec, spaces, target)
    return None if chooser is None else chooser.default(room)


def legal_choices(spec: KernelSpec, spaces: Spaces, target: Target, room: Room) -> Iterator[Choice]:
    """Every choice of the search space that fits, each once; choices that mean the same code are one."""
    chooser = chooser_of(spec, spaces, target)
    return iter(()) if chooser is None else _legal(chooser, target, room)


def legal_costs(spec: KernelSpec, spaces: Spaces, target: Target, room: Room) -> Iterator[tuple[Choice, float | None]]:
    """`legal_choices`, each with what `ranked` says of it."""
    chooser = chooser_of(spec, spaces, target)
    if chooser is not None:
        yield from ((choice, chooser.cost(choice)) for choice in _legal(chooser, target, room))


def _legal(chooser: Chooser, target: Target, room: Room) -> Iterator[Choice]:
    seen: set[Choice] = set()
    for choice in chooser.candidates():
        if choice not in seen and _fits(chooser, choice, target, room):
            seen.add(choice)
            yield choice


def check(spec: KernelSpec, spaces: Spaces, target: Target, room: Room, choice: Choice) -> None:
    """Raises OptionError for extents, AllocationError for memory that a choice exceeds, naming value and limit."""
    where, chooser = f"schedule of {kernel_key(spec, spaces)}", chooser_of(spec, spaces, target)
    if chooser is None:
        raise OptionError(f"{where}: a kernel of kind {spec.kind} leaves nothing to choose: take it out")
    if not isinstance(choice, kinds_of(spec) or ()):
        raise OptionError(f"{where}: {choice.text()} is no choice for a kernel of kind {spec.kind}")
    chooser.check(choice, where)
    scratch, acc = chooser.needs(choice)
    if scratch > room.limit:
        raise AllocationError(
            f"{where}: {choice.text()} needs {scratch:,} bytes of scratchpad with all its buffers, {room.limit:,} are "
            f"free on {target.name}: make the tile smaller or buffers fewer"
        )
    if acc > target.scratchpad.accumulator_bytes:
        raise AllocationError(
            f"{where}: {choice.text()} needs {acc:,} bytes of accumulators, {target.name} has "
            f"{target.scratchpad.accumulator_bytes:,}: make rows or columns of the tile fewer"
        )


def needs(spec: KernelSpec, spaces: Spaces, target: Target, choice: Choice) -> tuple[int, int]:
    """(scratchpad, accumulator) bytes of a choice by the compiler's account."""
    return cast(Chooser, chooser_of(spec, spaces, target)).needs(choice)


def ranked(spec: KernelSpec, spaces: Spaces, target: Target, choice: Choice) -> float | None:
    """Cycles by which the compiler ranks choices of products and attention; None for kernels that it cuts by room."""
    return cast(Chooser, chooser_of(spec, spaces, target)).cost(choice)


def _fits(chooser: Chooser, choice: Choice, target: Target, room: Room) -> bool:
    scratch, acc = chooser.needs(choice)
    return scratch <= room.limit and acc <= target.scratchpad.accumulator_bytes and chooser.extent(choice) <= MAX_EXTENT


class Chooser(Protocol):
    """What can be chosen for one kernel."""

    def default(self, room: Room) -> Choice:
        """The compiler's own choice; raises AllocationError when nothing fits."""

    def candidates(self) -> Iterator[Choice]:
        """The search space, whether it fits or not."""

    def check(self, choice: Choice, where: str) -> None:
        """Raises OptionError for extents that are not possible."""

    def extent(self, choice: Choice) -> int:
        """The largest extent or stride of an instruction that could be too large for its field."""

    def needs(self, choice: Choice) -> tuple[int, int]:
        """(scratchpad, accumulator) bytes."""

    def cost(self, choice: Choice) -> float | None:
        """Cycles, for ranking; None where there is no such account."""


def chooser_of(spec: KernelSpec, spaces: Spaces, target: Target) -> Chooser | None:
    """Of a kernel whose operands and results lie in these memories; None for one without a choice."""
    if kinds_of(spec) is None:
        return None
    if spec.kind == "conv":
        return _Conv(spec, spaces, target)
    if spec.kind == "normed":
        return _Normed(spec, spaces, target)
    if spec.kind == "attention":
        return _Attention(spec, spaces, target)
    if spec.kind == "linear":
        return _Blocks(spec, spaces, target) if spec.get("blocks") else _Linear(spec, spaces, target)
    return _Rows(spec, spaces, target)


def tile_of(choice: ProductChoice, target: Target) -> Tile:
    """The tile of a choice."""
    panels = ceil_div(choice.n, panel_of(target))
    return Tile(choice.m, panels, choice.k, choice.whole, choice.order == "rows", choice.buffers)


def choice_of(tile: Tile, target: Target, method: str = "", block: int = 0) -> ProductChoice:
    """The choice of a tile."""
    order = "rows" if tile.rows_outer else "columns"
    n = tile.panels * panel_of(target)
    return ProductChoice(tile.m, n, tile.k, tile.whole, order, tile.buffers, method, block)


@dataclass(frozen=True)
class _Linear:
    """Products; the kinds below differ in what they multiply, and in what else lies in the scratchpad."""

    spec: KernelSpec
    spaces: Spaces
    target: Target

    @property
    def product(self) -> KernelSpec:
        """What the matrix unit computes."""
        return self.spec

    @cached_property
    def shape(self) -> Shape:
        return Shape.of(self.product)

    @property
    def unit(self) -> int:
        """Weights along k that a tile must not cut."""
        return self.shape.group or min(self.shape.k, max(self.target.matrix.rows, 32))

    @property
    def streams(self) -> bool:
        """Whether activations come out of DRAM."""
        return self.spaces[0] is Space.DRAM

    def default(self, room: Room) -> Choice:
        return choice_of(tiling.choose_linear(self.spec, self.spaces, self.target, room), self.target)

    def candidates(self) -> Iterator[Choice]:
        for tile in self._variants(self._tiles()):
            yield choice_of(tile, self.target)

    def check(self, choice: Choice, where: str) -> None:
        assert isinstance(choice, ProductChoice)
        m, n, k = product_dims(self.spec) or (0, 0, 0)
        panel, unit = panel_of(self.target), self.unit
        of = {"m": (choice.m, m, 1, "rows"), "n": (choice.n, n, panel, "columns"), "k": (choice.k, k, unit, "of k")}
        for name, (value, extent, step, what) in of.items():
            most = ceil_div(extent, step) * step
            if not 1 <= value <= most:
                _refuse(f"{where}: {name} is {value}, the product has {extent} {what}: give 1 to {most}")
            whole = name == "n" or not self.shape.group  # a last group that is cut off is a whole one in the tile
            if value % step and not (whole and value == extent):
                reason = "columns of a panel of weights" if name == "n" else self._reason()
                also = f", or {extent}" if whole else f" up to {most}"
                _refuse(f"{where}: {name} is {value}, no multiple of {step}, the {reason}: give one{also}")
        if choice.order not in ORDERS:
            _refuse(f"{where}: order is {choice.order!r}: give {' or '.join(ORDERS)}")
        if not 1 <= choice.buffers <= MOST_BUFFERS:
            _refuse(f"{where}: buffers is {choice.buffers}: give 1 to {MOST_BUFFERS}")
        if choice.whole and not self.streams:
            _refuse(f"{where}: whole is true, and the activations lie in the scratchpad already: give false")
        if self.extent(choice) > MAX_EXTENT:
            _refuse(
                f"{where}: {choice.text()} makes a transfer of {self.extent(choice):,}, an instruction's extents go to "
                f"{MAX_EXTENT:,}: make n or k smaller"
            )
        self._check_more(choice, where)

    def extent(self, choice: Choice) -> int:
        assert isinstance(choice, ProductChoice)
        return tiling.extent(self.shape, self._tile(choice), self.target)

    def needs(self, choice: Choice) -> tuple[int, int]:
        return linear_bytes(self.spec, self.spaces, self._tile(choice), self.target)

    def cost(self, choice: Choice) -> float | None:
        return linear_cost(self.spec, self.spaces, self._tile(choice), self.target, launches=self._launches(choice))

    def _check_more(self, choice: ProductChoice, where: str) -> None:
        for name in ("method", "block"):
            if getattr(choice, name):
                _refuse(f"{where}: {name} is {getattr(choice, name)!r}, which this product does not have: take it out")

    def _reason(self) -> str:
        return "weights of a group" if self.shape.group else "rows that the matrix unit takes at a time"

    def _tile(self, choice: Choice) -> Tile:
        assert isinstance(choice, ProductChoice)
        return tile_of(choice, self.target)

    def _tiles(self) -> Iterator[Tile]:
        shape = self.shape
        rows = (*ROWS, *(ceil_div(shape.m, parts) for parts in PARTS))
        count = shape.panels(panel_of(self.target))
        for tile in tiling.linear_tiles(self.product, self.target, rows, self.unit):
            yield tile
            if tile.panels == count:
                yield from (replace(tile, panels=ceil_div(count, parts)) for parts in PARTS)

    def _variants(self, tiles: Iterator[Tile]) -> Iterator[Tile]:
        for plain in tiles:
            yield from tiling.variants(self.shape, plain, self.streams, self.target)

    def _launches(self, choice: Choice) -> int:
        """How many find room in the scratchpad side by side."""
        return max(1, self.target.scratchpad.bytes // max(1, self.needs(choice)[0]))


class _Blocks(_Linear):
    """Products on weights in blocks, by one of two methods."""

    @property
    def product(self) -> KernelSpec:
        return self._accounts[block_linear.METHODS[0]].plan.product

    @property
    def unit(self) -> int:
        return Blocks.of(self.spec).kind.block

    def default(self, room: Room) -> Choice:
        plan = block_linear.choose(self.spec, self.spaces, self.target, room)
        return choice_of(plan.tile, self.target, plan.method)

    def candidates(self) -> Iterator[Choice]:
        for method in self._accounts:
            for tile in self._variants(self._tiles()):
                if tile.buffers > 1:
                    yield choice_of(tile, self.target, method)

    def needs(self, choice: Choice) -> tuple[int, int]:
        return self._account(choice).bytes(self._tile(choice))

    def cost(self, choice: Choice) -> float | None:
        return self._account(choice).cycles(self._tile(choice))

    @cached_property
    def _accounts(self) -> dict[str, block_linear.Account]:
        """By method."""
        plans = block_linear.plans_of(self.spec, self.spaces, self.target)
        return {plan.method: block_linear.Account(plan, self.spec, self.target) for plan in plans}

    def _account(self, choice: Choice) -> block_linear.Account:
        assert isinstance(choice, ProductChoice)
        if choice.method not in self._accounts:
            raise OptionError(f"{self.target.name} cannot multiply {self.spec['blocks']} by method {choice.method}")
        return self._accounts[choice.method]

    def _reason(self) -> str:
        return f"weights of a block of {self.spec['blocks']}"

    def _check_more(self, choice: ProductChoice, where: str) -> None:
        if choice.method not in self._accounts:
            _refuse(f"{where}: method is {choice.method!r}: give {' or '.join(self._accounts)}")
        if choice.buffers < 2:
            _refuse(f"{where}: buffers is 1, and a tile of weights is made while the one before is read: give 2 or 3")
        if choice.block:
            _refuse(f"{where}: block is {choice.block}, and no rows are normalised here: take it out")


class _Conv(_Linear):
    """Convolutions: tiles of output pixels; the windows are made tile by tile, in the order in which they are read."""

    @property
    def product(self) -> KernelSpec:
        return product_of(self.spec)

    def default(self, room: Room) -> Choice:
        return choice_of(conv.choose(self.spec, self.spaces, self.target, room), self.target)

    def candidates(self) -> Iterator[Choice]:
        for tile in conv.tiles_of(self.product, Windows.of(self.spec), self.target):
            yield choice_of(tile, self.target)

    def needs(self, choice: Choice) -> tuple[int, int]:
        return conv.tile_bytes(self.spec, self.spaces, self._tile(choice), self.target)

    def cost(self, choice: Choice) -> float | None:
        return conv.tile_cost(self.spec, self.spaces, self._tile(choice), self.target)

    def _check_more(self, choice: ProductChoice, where: str) -> None:
        super()._check_more(choice, where)
        for name, only in (("order", "columns"), ("buffers", 2), ("whole", False)):
            if getattr(choice, name) != only:
                _refuse(f"{where}: {name} is {getattr(choice, name)!r}, a convolution has only {only!r}")


class _Normed(_Linear):
    """Products that normalise their rows first: these lie in the scratchpad."""

    @property
    def product(self) -> KernelSpec:
        return normed.product_of(self.spec)

    @property
    def streams(self) -> bool:
        return False

    def default(self, room: Room) -> Choice:
        block, tile = normed_tiling.choose(self.spec, self.spaces, self.target, room)
        return choice_of(tile, self.target, block=block)

    def candidates(self) -> Iterator[Choice]:
        rows = self.spec.args[0].shape[0]
        for block in sorted({ceil_div(rows, parts) for parts in (1, 2, 4, 8, 16, 32, 64) if parts <= rows}):
            for tile in self._variants(self._tiles()):
                yield choice_of(tile, self.target, block=block)

    def needs(self, choice: Choice) -> tuple[int, int]:
        assert isinstance(choice, ProductChoice)
        left = normed_tiling.left_of(self.spec, self.spaces, choice.block, self.target, Room(0, 0))
        _, then = normed.spaces_of(self.spec, self.spaces)
        scratch, acc = linear_bytes(self.product, then, self._tile(choice), self.target)
        return scratch - left.limit, acc

    def cost(self, choice: Choice) -> float | None:
        _, then = normed.spaces_of(self.spec, self.spaces)
        return linear_cost(self.product, then, self._tile(choice), self.target, launches=self._launches(choice))

    def _check_more(self, choice: ProductChoice, where: str) -> None:
        rows = self.spec.args[0].shape[0]
        if not 1 <= choice.block <= rows:
            _refuse(f"{where}: block is {choice.block}, there are {rows} rows to normalise: give 1 to {rows}")
        if choice.method:
            _refuse(f"{where}: method is {choice.method!r}, which this product does not have: take it out")


@dataclass(frozen=True)
class _Attention:
    spec: KernelSpec
    spaces: Spaces
    target: Target

    @property
    def heads(self) -> attention.Heads:
        return attention.Heads.of(self.spec)

    def default(self, room: Room) -> Choice:
        tile = tiling.choose_attention(self.spec, self.spaces, self.target, room)
        softmax = "online" if tile.online else "rows"
        return AttentionChoice(tile.rows, tile.keys, attention.pipelined(self.spec, self.target), softmax)

    def candidates(self) -> Iterator[Choice]:
        heads = self.heads
        powers = [1 << i for i in range(12)]
        rows = {min(heads.rows, r) for r in powers} | {ceil_div(heads.rows, parts) for parts in PARTS}
        keys = {min(heads.keys, k) for k in powers[4:]} | {ceil_div(heads.keys, parts) for parts in PARTS}
        own = attention.pipelined(self.spec, self.target)
        streams = Space.DRAM in self.spaces[1:3]
        slots = (1, 2, 3) if streams else (own,)
        for r in sorted(rows):
            for k in sorted(keys):
                yield from (AttentionChoice(r, k, buffers) for buffers in slots)
        if not online_attention.refusal(self.spec, self.target):
            for tile in online_attention.tiles(self.spec, rows, keys):
                yield from (AttentionChoice(tile.rows, tile.keys, buffers, "online") for buffers in slots)

    def check(self, choice: Choice, where: str) -> None:
        assert isinstance(choice, AttentionChoice)
        heads = self.heads
        for name, value, most in (("rows", choice.rows, heads.rows), ("keys", choice.keys, heads.keys)):
            if not 1 <= value <= most:
                _refuse(f"{where}: {name} is {value}, a head has {most} of them: give 1 to {most}")
        if not 1 <= choice.buffers <= MOST_BUFFERS:
            _refuse(f"{where}: buffers is {choice.buffers}: give 1 to {MOST_BUFFERS}")
        if choice.softmax not in SOFTMAXES:
            _refuse(f"{where}: softmax is {choice.softmax!r}: give {' or '.join(SOFTMAXES)}")
        if choice.softmax == "online" and (reason := online_attention.refusal(self.spec, self.target)):
            _refuse(f"{where}: softmax is 'online', and {reason}: give 'rows'")

    def extent(self, choice: Choice) -> int:
        assert isinstance(choice, AttentionChoice)
        return choice.keys * self.heads.width * 4

    def needs(self, choice: Choice) -> tuple[int, int]:
        tile = attention_tile(choice, self.spec, self.target)
        return tiling.attention_bytes(self.spec, self.spaces, tile, self.target), attention.acc_bytes(self.spec, tile)

    def cost(self, choice: Choice) -> float | None:
        tile = attention_tile(choice, self.spec, self.target)
        return tiling.attention_cost(self.spec, self.spaces, tile, self.target)


def attention_tile(choice: Choice, spec: KernelSpec, target: Target) -> AttentionTile:
    """The tile of a choice; the slots that the pipeline asks for anyway are not demanded."""
    assert isinstance(choice, AttentionChoice)
    own = attention.pipelined(spec, target)
    slots = 0 if choice.buffers == own else choice.buffers
    return AttentionTile(choice.rows, choice.keys, slots, choice.softmax == "online")


@dataclass(frozen=True)
class _Rows:
    spec: KernelSpec
    spaces: Spaces
    target: Target

    def default(self, room: Room) -> Choice:
        return RowsChoice(tiling.choose_rows(self.spec, self.spaces, self.target, room))

    def candidates(self) -> Iterator[Choice]:
        total = rowwise.rows_of(self.spec)
        for rows in sorted({ceil_div(total, parts) for parts in range(1, total + 1)}, reverse=True):
            yield RowsChoice(rows)

    def check(self, choice: Choice, where: str) -> None:
        assert isinstance(choice, RowsChoice)
        total = rowwise.rows_of(self.spec)
        if not 1 <= choice.rows <= total:
            _refuse(f"{where}: rows is {choice.rows}, the kernel has {total}: give 1 to {total}")

    def extent(self, choice: Choice) -> int:
        return 0

    def needs(self, choice: Choice) -> tuple[int, int]:
        assert isinstance(choice, RowsChoice)
        return tiling.row_bytes(self.spec, self.spaces, choice.rows, self.target), 0

    def cost(self, choice: Choice) -> float | None:
        return None


def _refuse(message: str) -> NoReturn:
    raise OptionError(message)
