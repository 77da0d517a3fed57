"""What a product takes with a tile, in cycles of one launch among others: the account by which tiles are ranked.

Three times, of which the longest counts:

- that of the DMA: every transfer at the rate of the requests in flight or of the DRAM, whichever is less, with what
  short runs and the start of descriptors add (`dram_cost`); a slot that is filled again only when its last reader is
  done delays it, and so does the hand-over to the next launch as far as the slots do not cover it;
- that of matrix and vector unit, which take turns on the tiles of the results: the sum of the busier one, and what the
  other one does before its first or behind its last tile. The next launch waits for both;
- that of the DRAM, which loads and stores share.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from firsttoken_compiler.isa.types import Dtype, Space
from firsttoken_compiler.isa.vector_kernel import Expr, VectorKernel
from firsttoken_compiler.schedule.dram_cost import Reading, latency, reading, storing, transfer
from firsttoken_compiler.schedule.linear import (
    STREAMED,
    Shape,
    Tile,
    corrected_apart,
    fetches_of,
    operand_names,
    panel_of,
)
from firsttoken_compiler.schedule.spec import KernelSpec
from firsttoken_compiler.target.rates import ceil_div, matmul_cost, matmul_scratchpad_bytes, pair_name, vector_cycles
from firsttoken_compiler.target.target import Target

_SCALE = VectorKernel(("add", "s0", ("mul", "s1", "s2")))
_CORRECTED = VectorKernel(("sub", "s0", ("mul", "s1", "s2")))
_MINIMUM_SCALE = VectorKernel(("add", "s0", ("add", ("mul", "s1", "s2"), ("mul", "s3", "s4"))))
_CORRECTED_SCALE = VectorKernel(("add", "s0", ("mul", ("sub", "s1", ("mul", "s2", "s3")), "s4")))
_EPILOGUE = VectorKernel(("add", ("mul", ("mul", "s0", "s1"), "s2"), "s3"))
_SILU = VectorKernel(("mul", ("mul", ("mul", "s0", "s1"), "s2"), ("sigmoid", ("mul", ("mul", "s0", "s1"), "s2"))))
_SOURCES = (Dtype.F32, Dtype.F32, Dtype.F32, Dtype.F32)


@dataclass(frozen=True, slots=True)
class Making:
    """What a tile of an operand takes to be in the scratchpad: DMA bytes and transfers, cycles of the vector unit."""

    nbytes: int
    transfers: int
    vector: int = 0

    def __add__(self, other: Making) -> Making:
        """Both."""
        return Making(self.nbytes + other.nbytes, self.transfers + other.transfers, self.vector + other.vector)


def linear_cost(
    spec: KernelSpec, spaces: tuple[Space, ...], tile: Tile, target: Target, weights: Making | None = None,
    scales: Making | None = None, launches: int = 2,
) -> float:  # fmt: skip
    """Cycles of a product with this tile.

    `weights` and `scales` say what a tile of weights takes, and all scales of its columns, where these are no operands
    that are loaded as they lie. `launches`: how many find room in the scratchpad side by side.
    """
    return account_of(spec, spaces, Same(target)).cost(tile, launches, weights, scales)


@dataclass(frozen=True, eq=False, slots=True)
class Same:
    """A target as a key: itself."""

    target: Target

    def __hash__(self) -> int:
        return id(self.target)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and other.target is self.target


@functools.lru_cache(maxsize=8)
def account_of(spec: KernelSpec, spaces: tuple[Space, ...], same: Same) -> Account:
    """The account of a product, kept."""
    return Account(spec, spaces, same.target)


@dataclass(frozen=True, slots=True)
class _Compute:
    """Cycles of a launch on matrix and vector unit, and of what bounds the overlap."""

    matrix: float
    vector: float
    held: float
    """While a slot of weights is read."""
    last: float
    """From the last weights to the last result."""
    both: float
    """From the first product to the last result."""


@dataclass(frozen=True, slots=True)
class _Moved:
    """Cycles of a launch's transfers: of the queue that loads, and of the DRAM."""

    link: float
    dram: float
    weight: float
    """Of one tile of weights."""
    loads: int
    activation: float
    brought: int
    """Tiles of activations that come through slots."""
    transfers: int

    def late(self, tile: Tile, compute: _Compute, wait: float, launches: int, depth: int) -> float:
        """Cycles that slots keep the queue waiting: for readers of the tiles before, and between launches."""
        slots = min(tile.buffers, self.loads)
        if self.loads <= tile.buffers:  # a launch waits for the one that had its place
            return max(0.0, (self.link + wait + compute.both) / launches - self.link)
        ring = (self.weight + wait + compute.held) / slots - self.weight
        late = max(self.loads * max(0.0, ring), self._uneven(tile, compute, depth))
        if self.brought > 1:
            ring = (self.activation + wait + compute.held) / min(tile.buffers, self.brought) - self.activation
            late = max(late, self.brought * ring)
        ahead = (slots if launches > 1 else slots - 1) * self.weight
        return late + max(0.0, wait + compute.last - ahead)

    def _uneven(self, tile: Tile, compute: _Compute, depth: int) -> float:
        """Cycles that are lost with two slots where the last tile of `depth` is shorter: it pairs with a long one."""
        deep, rest = ceil_div(depth, tile.k), depth % tile.k / depth
        if tile.buffers != STREAMED or not rest or deep < 2:
            return 0.0
        load, read, full = deep * self.weight, deep * compute.held, tile.k / depth
        pairs = max(rest * load, full * read) + max(full * load, rest * read)
        return self.loads / deep * (pairs + (deep - 2) * full * max(load, read) - load)


class Account:
    """The account of one product; what tiles have in common is computed once."""

    def __init__(self, spec: KernelSpec, spaces: tuple[Space, ...], target: Target) -> None:
        self.spec, self.target = spec, target
        self.shape, self.panel, self.wait = Shape.of(spec), panel_of(target), latency(target)
        names = operand_names(spec)
        self.where = dict(zip(names, spaces, strict=True))
        self.dtypes = {name: arg.dtype for name, arg in zip(names, (*spec.args, *spec.outs), strict=True)}
        self.known: dict[tuple[object, ...], tuple[_Moved, _Compute]] = {}
        self.products: dict[tuple[int, int, int], float] = {}
        self.vectors: dict[tuple[int, int], float] = {}
        self.readings: dict[tuple[int, int, int], Reading] = {}

    def cost(self, tile: Tile, launches: int, weights: Making | None = None, scales: Making | None = None) -> float:
        """Cycles with a tile, with room for so many launches."""
        key = (tile.m, tile.panels, tile.k, tile.whole, tile.rows_outer, weights, scales)
        if key not in self.known:
            cut = _Cut(self, tile, weights, scales or Making(0, 2))
            self.known[key] = cut.moved(), cut.compute()
        moved, compute = self.known[key]
        if not self.target.dma.decoupled:
            waits = moved.transfers * self.target.dma.setup_cycles
            return max(moved.link, moved.dram) + waits + compute.matrix + compute.vector
        return max(moved.link + moved.late(tile, compute, self.wait, launches, self.shape.k), moved.dram, compute.both)

    def products_of(self, m: int, n: int, deep: int) -> float:
        """Cycles of the matrix unit for a tile of results, by instructions of so many rows of weights."""
        key = (m, n, deep)
        if key not in self.products:
            shape, target = self.shape, self.target
            pair, total = pair_name(shape.a, shape.w), 0.0
            for k, count in parts(shape.k, deep).items():
                read, _ = matmul_scratchpad_bytes(target, m, n, k, shape.a.bits, shape.w.bits)
                ports = read / (target.scratchpad.banks * target.scratchpad.bank_bytes)
                each = max(matmul_cost(target, m, n, k, pair).cycles, ports) + target.matrix.issue_cycles
                total += count * each
            self.products[key] = total
        return self.products[key]

    def vector_of(self, m: int, n: int) -> float:
        """Cycles of the vector unit for a tile of results."""
        if (m, n) not in self.vectors:
            spec, shape, target = self.spec, self.shape, self.target
            dims = (m, ceil_div(n, self.panel), min(n, self.panel))
            dtypes = (spec.outs[0].dtype, *_SOURCES)
            total: float = vector_cycles(target, _epilogue(spec), dims, dtypes, sums=not shape.group)
            if shape.group:
                total += ceil_div(shape.k, shape.group) * vector_cycles(target, _scaling(spec), dims)
            elif corrected_apart(spec):
                total += vector_cycles(target, _CORRECTED, dims)
            self.vectors[m, n] = total
        return self.vectors[m, n]

    def reading_of(self, run: int, stride: int, rows: int) -> Reading:
        """One load."""
        key = (run, stride, rows)
        if key not in self.readings:
            self.readings[key] = reading(self.target, run, stride, rows)
        return self.readings[key]


class _Cut:
    """The tiles that one tile cuts a product into; those at its edges are smaller."""

    def __init__(self, account: Account, tile: Tile, weights: Making | None, scales: Making) -> None:
        self.account, self.tile, self.weights, self.scales = account, tile, weights, scales
        self.columns = parts(account.shape.n, tile.panels * account.panel)
        self.rows = parts(account.shape.m, tile.m)
        self.across, self.down = sum(self.columns.values()), sum(self.rows.values())
        self.deep = ceil_div(account.shape.k, tile.k)
        self.loads, self.brought = fetches_of(account.shape, tile, account.panel)

    def moved(self) -> _Moved:
        """All transfers."""
        account, tile, loads, brought = self.account, self.tile, self.loads, self.brought
        shape, target = account.shape, account.target
        again = self.across * self.down if tile.rows_outer else self.across
        link, dram = self._weights()
        weight = link / loads
        once = transfer(target, self.scales.nbytes, self.scales.transfers)
        link, dram = link + again * once, dram + again * once
        activation, tiles = 0.0, 0
        transfers = loads + again * self.scales.transfers
        if account.where["a"] is Space.DRAM:
            run = shape.a.nbytes(min(tile.k, shape.k))
            each = account.reading_of(run, shape.a.nbytes(shape.k), min(tile.m, shape.m))
            activation = each.link
            often = self.down * self.deep if tile.whole else brought
            tiles = 0 if tile.whole else brought
            transfers += often
            link, dram = link + often * each.link, dram + often * each.dram
        for name in ("residual", "factor", "out"):
            if account.where.get(name) is not Space.DRAM:
                continue
            dtype = account.dtypes[name]
            transfers += self.across * self.down
            for n, across in self.columns.items():
                for m, down in self.rows.items():
                    run, pitch = dtype.nbytes(n), dtype.nbytes(shape.n)
                    if name == "out":
                        dram += across * down * storing(target.dram, run, pitch, m) * target.clock_hz / 1e9
                        continue
                    each = account.reading_of(run, pitch, m)
                    link, dram = link + across * down * each.link, dram + across * down * each.dram
        return _Moved(link, dram, weight, loads, activation, tiles, transfers)

    def _weights(self) -> tuple[float, float]:
        """(cycles of the queue, cycles of the DRAM) for all weights, as often as they come."""
        account, tile, loads = self.account, self.tile, self.loads
        shape = account.shape
        if self.weights is not None:
            each = transfer(account.target, self.weights.nbytes, self.weights.transfers)
            return loads * each, loads * each
        link = dram = 0.0
        passes = loads / (self.across * self.deep)
        row = shape.w.nbytes(account.panel)
        for n, across in self.columns.items():
            panels = ceil_div(n, account.panel)
            for k, deep in parts(shape.k, tile.k).items():
                whole = self.deep == 1
                run, runs = (panels * k * row, 1) if whole else (k * row, panels)
                one = account.reading_of(run, shape.k * row, runs)
                link, dram = link + passes * across * deep * one.link, dram + passes * across * deep * one.dram
        return link, dram

    def compute(self) -> _Compute:
        """Products, scales of groups, and what is done to the sums."""
        account, tile = self.account, self.tile
        shape, deep = account.shape, account.shape.group or tile.k
        matrix = vector = 0.0
        for n, across in self.columns.items():
            for m, down in self.rows.items():
                matrix += across * down * account.products_of(m, n, deep)
                vector += across * down * account.vector_of(m, n)
        again = self.across * self.down if tile.rows_outer else self.across
        made = self.weights.vector if self.weights is not None else 0
        vector += self.loads * made + again * self.scales.vector
        passes = 1 if self.deep > 1 or tile.rows_outer else self.down
        first = next(iter(self.rows)), next(iter(self.columns))
        edge = list(self.rows)[-1], list(self.columns)[-1]
        held = account.products_of(*first, deep) / self.deep * passes
        groups = 1
        if shape.group:
            held = max(held, account.vector_of(*first) / self.deep * passes)
            groups = ceil_div(shape.k, shape.group)
        start, tail = account.products_of(*first, deep) / groups, account.vector_of(*edge) / groups
        last = account.products_of(*edge, deep) / self.deep + tail
        if account.target.scratchpad.accumulator_slots == 1:
            both = matrix + vector
        else:
            both = made + self.scales.vector + max(matrix + tail, start + vector - made)
        return _Compute(matrix, vector, held + made, last + made, both)


def parts(extent: int, tile: int) -> dict[int, int]:
    """How many tiles of which extent, the last one as long as what is left."""
    full, rest = divmod(extent, tile)
    sizes = {tile: full} if full else {}
    return sizes | ({rest: 1} if rest else {})


def _scaling(spec: KernelSpec) -> VectorKernel:
    """What the vector unit does to the sums of a group."""
    if spec.get("minimum"):
        return _MINIMUM_SCALE
    return _CORRECTED_SCALE if spec.get("zeros") or spec.get("asymmetric") else _SCALE


@functools.lru_cache(maxsize=1024)
def _epilogue(spec: KernelSpec) -> VectorKernel:
    """What the lanes do with an element of the product: scale it, then what the spec asks for."""
    if spec.get("act"):
        return VectorKernel(_replaced(VectorKernel.parse(str(spec["act"])).expr, _EPILOGUE.expr))
    return _SILU if spec.get("silu") else _EPILOGUE


def _replaced(expr: Expr, source: Expr) -> Expr:
    """An expression with another one in place of its only operand."""
    if isinstance(expr, tuple):
        return (expr[0], *(_replaced(part, source) for part in expr[1:]))
    return source if expr == "s0" else expr
