"""Products on weights in blocks of GGUF: how the planes become what the matrix unit reads, and what that costs.

Two methods, of which the cheaper one is taken. `floats`: the vector unit makes a tile of fp16 weights out of the
planes, rounded once, and the product is one of fp16 pairs. `codes`: the matrix unit multiplies the codes themselves
(made bytes by the vector unit where they lie in two planes, or are numbers of a codebook), and the sums of each group
are scaled; this takes work per token and group instead of per weight, so few tokens choose it.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Final

from firsttoken_compiler.errors import AllocationError
from firsttoken_compiler.isa.types import Dtype, Space
from firsttoken_compiler.isa.vector_kernel import VectorKernel
from firsttoken_compiler.schedule import tiling
from firsttoken_compiler.schedule.block_trees import Blocks, Tree, kernel_of, leaves
from firsttoken_compiler.schedule.linear import Shape, Tile, fetches_of, panel_of
from firsttoken_compiler.schedule.product_bytes import linear_bytes
from firsttoken_compiler.schedule.product_cost import Making, linear_cost
from firsttoken_compiler.schedule.spec import Arg, KernelSpec
from firsttoken_compiler.schedule.tiling import Room
from firsttoken_compiler.target.rates import ceil_div, pair_name, vector_cycles
from firsttoken_compiler.target.target import Target

METHODS: Final = ("floats", "codes")
SLACK: Final = 1 / 64
"""Of tiles that take at most so much longer than the fastest one, the one that moves the fewest DRAM bytes is taken."""
_SUMS = VectorKernel("s0", "add")


@dataclass(frozen=True)
class Choice:
    """How a product on blocks is computed."""

    method: str
    product: KernelSpec
    """The product of the matrix unit: on fp16 weights, or on codes with scales by group."""
    spaces: tuple[Space, ...]
    tile: Tile
    made: dict[str, Tree]
    """Operands of the product that the vector unit makes; `a_sum` is made of the activations."""
    planes: dict[str, str]
    """Operands of the product that are planes as they lie."""


def choose(spec: KernelSpec, spaces: tuple[Space, ...], target: Target, room: Room) -> Choice:
    """The cheapest method and tile; raises AllocationError when none fits."""
    plans = plans_of(spec, spaces, target)
    accounts = [Account(each, spec, target) for each in plans]
    accumulators = target.scratchpad.accumulator_bytes
    for limit, rows in ((room.preferred, tiling.ROWS), (room.limit, tiling.ROWS), (room.limit, tiling.FEW_ROWS)):
        costs: dict[tuple[int, Tile], float] = {}
        for index, each in enumerate(accounts):
            for tile in tiles_of(each.plan, spec, target, rows):
                scratch, acc = each.bytes(tile)
                if scratch <= limit and acc <= accumulators:
                    costs[index, tile] = each.cycles(tile)
        if costs:
            most = min(costs.values()) * (1 + SLACK)
            moved = {key: _moved(plans[key[0]], spec, key[1], target) for key, cost in costs.items() if cost <= most}
            index, tile = min(moved, key=lambda key: (moved[key], costs[key], -key[1].m, -key[1].k, -key[1].panels))
            return replace(plans[index], tile=tile)
    raise AllocationError(
        f"target {target.name}: no tile of a product of {spec.args[0].shape} by {spec['n']} columns of "
        f"{spec['blocks']} fits into {room.limit} bytes of scratchpad and {accumulators} of accumulators: raise "
        "scratchpad.bytes or scratchpad.accumulator_bytes"
    )


def _moved(plan: Choice, spec: KernelSpec, tile: Tile, target: Target) -> int:
    """Bytes of weights and activations that are read from the DRAM."""
    shape, planes = Shape.of(plan.product), len(Blocks.of(spec).kind.planes)
    again = ceil_div(shape.m, tile.m) if tile.k < shape.k else 1
    weights = sum(arg.nbytes for arg in spec.args[1 : 1 + planes]) * again
    if plan.spaces[0] is not Space.DRAM:
        return weights
    across = 1 if tile.whole else ceil_div(shape.n, tile.panels * panel_of(target))
    return weights + spec.args[0].nbytes * across


def plans_of(spec: KernelSpec, spaces: tuple[Space, ...], target: Target) -> list[Choice]:
    """The methods that there are, without tiles yet."""
    return [found for method in METHODS if (found := plan(spec, spaces, method, target)) is not None]


def tiles_of(plan: Choice, spec: KernelSpec, target: Target, rows: tuple[int, ...]) -> list[Tile]:
    """Tiles of the product that cut through no block."""
    unit = Blocks.of(spec).kind.block
    tiles = tiling.linear_tiles(plan.product, target, rows, unit)
    if plan.spaces[0] is not Space.DRAM:
        return list(tiles)
    return [other for tile in tiles for other in (tile, replace(tile, whole=True))]


def plan(spec: KernelSpec, spaces: tuple[Space, ...], method: str, target: Target) -> Choice | None:
    """The product of a method, without a tile yet; None where there is none."""
    blocks, (k, n) = Blocks.of(spec, target), (int(spec["k"]), int(spec["n"]))
    late = 1 + len(blocks.kind.planes)
    params = {name: value for name, value in spec.params if name not in ("blocks", "bits", "group", "stored")}
    made: dict[str, Tree] = {}
    planes: dict[str, str] = {}
    if method == "floats":
        args, where = [Arg((k, n), Dtype.F16)], [Space.DRAM]
        made["w"] = blocks.floats
        params.update(bits=16, group=0, stored=0)
    else:
        dtype = blocks.dtype("low") if blocks.lies_ready else Dtype.I8
        group = blocks.kind.group
        if k < 2 * group or pair_name(spec.args[0].dtype, dtype) not in target.matrix.macs_per_cycle:
            return None
        minima = blocks.kind.has_minimum
        params.update(bits=dtype.bits, group=group, stored=1, minimum=int(minima))
        groups = (k // group, n)
        args = [Arg((k, n), dtype)]
        if blocks.lies_ready:
            planes["w"] = "low"
        else:
            made["w"] = blocks.code
        if minima:
            args.append(Arg((spec.args[0].shape[0], k // group), Dtype.F32))
            made["a_sum"] = "a"
        args.append(Arg(groups, Dtype.F32 if blocks.scaled else Dtype.F16))
        if blocks.scaled:
            made["w_scale"] = blocks.scale
        else:
            planes["w_scale"] = "d"
        if minima:
            args.append(Arg(groups, Dtype.F16 if blocks.minimum is None else Dtype.F32))
            if blocks.minimum is None:
                planes["w_min"] = "m"
            else:
                made["w_min"] = ("neg", blocks.minimum)
        where = [Space.DRAM] * len(args)
    end = late + (spec["acts"] in ("int8", "int16"))  # where there is a scale of the activations, it follows w
    args = [spec.args[0], args[0], *spec.args[late:end], *args[1:], *spec.args[end:]]
    product = KernelSpec("linear", tuple(sorted(params.items())), tuple(args), spec.outs)
    places = (spaces[0], where[0], *spaces[late:end], *where[1:], *spaces[end:])
    return Choice(method, product, places, Tile(1, 1, k), made, planes)


def slots(product: KernelSpec, tile: Tile, target: Target) -> int:
    """Tiles of planes, and of what is made of them, that exist at a time: the next ones are made early."""
    shape, panel = Shape.of(product), panel_of(target)
    once = tile.m >= shape.m and tile.panels >= shape.panels(panel) and tile.k >= shape.k
    return 1 if once else max(2, min(tile.buffers, fetches_of(shape, tile, panel)[0]))


@dataclass(frozen=True, eq=False)
class Account:
    """Bytes and cycles of the tiles of a plan; what does not depend on the whole tile is made once."""

    plan: Choice
    spec: KernelSpec
    target: Target
    _known: dict[tuple[str, int], Making] = field(default_factory=dict, init=False, repr=False)

    @cached_property
    def blocks(self) -> Blocks:
        """The weights, as the target makes them."""
        return Blocks.of(self.spec, self.target)

    def bytes(self, tile: Tile) -> tuple[int, int]:
        """(scratchpad, accumulator) bytes of a tile with all its slots."""
        plan, target, align = self.plan, self.target, self.target.scratchpad.alignment_bytes
        scratch, acc = linear_bytes(plan.product, plan.spaces, tile, target)
        count = slots(plan.product, tile, target)
        for name in plan.made:
            if name == "a_sum":
                scratch += count * (tile.m * self.blocks.k * 2 + align) if plan.spaces[0] is Space.DRAM else 0
                continue
            k = tile.k if name == "w" else self.blocks.k
            for nbytes, grain in self._leaves[name]:
                scratch += count * (ceil_div(k, grain) * tile.panels * nbytes + align)
            if name == "w" and plan.method == "floats":
                scratch += self._staged(tile.k)
            scratch += count * target.matrix.tile_bytes
        return scratch, acc

    def cycles(self, tile: Tile) -> float:
        """Cycles of the product with this tile."""
        plan, blocks, shape = self.plan, self.blocks, Shape.of(self.plan.product)
        each, once = Making(0, 0, 0), Making(0, 0, 0)
        for name in ("w", "w_scale", "w_min"):
            panel = self._panel(name, tile.k if name == "w" else blocks.k)
            made = Making(panel.nbytes * tile.panels, panel.transfers, panel.vector * tile.panels)
            each, once = (each + made, once) if name == "w" else (each, once + made)
        cost = linear_cost(plan.product, plan.spaces, tile, self.target, each, once)
        if "a_sum" in plan.made:
            blocks_of_rows = ceil_div(shape.m, tile.m) * ceil_div(shape.n, tile.panels * panel_of(self.target))
            dims = (tile.m, blocks.k // shape.group, shape.group)
            cost += blocks_of_rows * vector_cycles(self.target, _SUMS, dims)
        return cost

    @cached_property
    def _leaves(self) -> dict[str, list[tuple[int, int]]]:
        """(bytes of a row of a panel, weights along k that share it) of the planes that operands are made of."""
        panel = panel_of(self.target)
        return {
            name: [(self.blocks.dtype(leaf).nbytes(panel), self.blocks.grain(leaf))
                   for leaf in planes_of(self.blocks, name, self.plan.method)]
            for name in self.plan.made if name != "a_sum"
        }  # fmt: skip

    def _staged(self, k: int) -> int:
        """Bytes of the numbers of a panel that floats are made from."""
        panel, align = panel_of(self.target), self.target.scratchpad.alignment_bytes
        return sum(dtype.nbytes(k // grain * panel) + align for dtype, grain in self._stages)

    @cached_property
    def _stages(self) -> list[tuple[Dtype, int]]:
        """Types of these numbers, and weights along k that share one."""
        return [(self.blocks.dtype(name), self.blocks.grain(name)) for name in self.blocks.staged()]

    def _panel(self, name: str, k: int) -> Making:
        """What a panel of an operand takes over k rows of weights."""
        if (name, k) not in self._known:
            plan, blocks, panel = self.plan, self.blocks, panel_of(self.target)
            names = [plan.planes[name]] if name in plan.planes else []
            names = planes_of(blocks, name, plan.method) if name in plan.made else names
            nbytes = sum(blocks.dtype(leaf).nbytes(panel) * (k // blocks.grain(leaf)) for leaf in names)
            vector = _vector(blocks, plan, name, k, panel, self.target) if name in plan.made else 0
            self._known[name, k] = Making(nbytes, len(names), vector)
        return self._known[name, k]


def planes_of(blocks: Blocks, name: str, method: str) -> list[str]:
    """The planes that an operand is made of."""
    if name == "w" and method == "floats":
        return [plane.name for plane in blocks.kind.planes]
    if name == "w":
        return leaves(blocks.code)
    return leaves(blocks.scale) if name == "w_scale" else leaves(blocks.minimum or 0.0)


def _vector(blocks: Blocks, plan: Choice, name: str, k: int, panel: int, target: Target) -> int:
    """Cycles of the vector unit for a panel of an operand over k rows of weights."""
    group, grains = blocks.kind.group, {name: blocks.grain(name) for name in blocks.staged()}
    out = {"w": plan.product.args[1].dtype}.get(name, Dtype.F32)
    trees = [(plan.made[name], (k // group, group, panel) if name == "w" else (1, k // group, panel), out)]
    if name == "w" and plan.method == "floats":
        staged = blocks.staged().items()
        trees += [(tree, (1, k // grains[own], panel), blocks.dtype(own)) for own, tree in staged]
    return sum(_cycles(blocks, tree, dims, dtype, target) for tree, dims, dtype in trees)


def _cycles(blocks: Blocks, tree: Tree, dims: tuple[int, int, int], out: Dtype, target: Target) -> int:
    return vector_cycles(target, kernel_of(tree), dims, (out, *(blocks.dtype(name) for name in leaves(tree))))
