"""Products on blocks of GGUF: the tile of weights that a product reads is made of planes in the scratchpad.

The product is scheduled as any other (`schedule.linear`), on fp16 weights or on codes with scales. Where it would fetch
an operand that exists nowhere, its planes are fetched, and the vector unit makes the tile of them, panel by panel.
This stands among the products of the tile before, so that it runs while the matrix unit multiplies.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np

from firsttoken_compiler.codegen.loops import Access, Alloc, Buffer, Computed, Loop, Nest, Offset, Statement, Value
from firsttoken_compiler.codegen.template import SCRATCH, Template
from firsttoken_compiler.codegen.tir_reader import read
from firsttoken_compiler.codegen.unroll import Place, unroll
from firsttoken_compiler.isa.types import Space
from firsttoken_compiler.schedule import layout, linear
from firsttoken_compiler.schedule.block_linear import Choice, planes_of, slots
from firsttoken_compiler.schedule.block_trees import Blocks, Tree, leaves
from firsttoken_compiler.schedule.linear import Shape, operand_names, panel_of
from firsttoken_compiler.schedule.spec import KernelSpec
from firsttoken_compiler.target.target import Target


def build_choice(spec: KernelSpec, choice: Choice, target: Target) -> Template:
    """The template of a product on blocks by this method and tile."""
    blocks, panel = Blocks.of(spec, target), panel_of(target)
    scheduled = linear.schedule(choice.product, choice.spaces, choice.tile, target)
    body, params = read(scheduled.lowered())
    names, given = operand_names(choice.product), operand_names(spec)
    planes = [plane for plane in blocks.kind.planes if plane.name not in choice.planes.values()]
    buffers = {
        plane.name: Buffer(plane.name, "param", blocks.dtype(plane.name), blocks.k // plane.per * panel, len(names) + i)
        for i, plane in enumerate(planes)
    }
    operands = dict(zip(names, params, strict=True))
    body = _Rewriting(blocks, choice, panel, slots(choice.product, choice.tile, target), operands, buffers).run(body)
    count = -(-blocks.n // panel)
    layouts = [
        layout.panels(count, blocks.k // p.per, panel, blocks.dtype(p.name), blocks.k // p.per, blocks.n)
        for p in planes
    ]
    places = [Place(space, made) for space, made in zip(choice.spaces, scheduled.layouts, strict=True)]
    places += [Place(Space.DRAM, made) for made in layouts]
    align, tiles, name = target.alignment(Space.SPAD), target.matrix.tile_bytes, f"{scheduled.tile} {choice.method}"
    template = unroll(body, places, scheduled.ragged, align, name, tiles)
    homes = [given.index(choice.planes.get(name, name)) if name not in choice.made else 0 for name in names]
    return _renumbered(template, [*homes, *(given.index(plane.name) for plane in planes)])


def _renumbered(template: Template, homes: list[int]) -> Template:
    """The template with symbols of the spec's operands in place of the product's operands and planes."""
    symbols = np.arange(SCRATCH + 2, dtype=np.int16)
    symbols[: len(homes)] = homes
    return replace(template, symbols=np.where(template.symbols < 0, template.symbols, symbols[template.symbols]))


@dataclass
class _Rewriting:
    """Puts the making of operands in the place of their fetching."""

    blocks: Blocks
    choice: Choice
    panel: int
    slots: int
    operands: dict[str, Buffer]
    """Of the product, by name."""
    planes: dict[str, Buffer]
    fetched: dict[Buffer, str] = field(default_factory=dict)
    """What the product would fetch into which buffer."""

    def run(self, body: list[Statement]) -> list[Statement]:
        """The statements of the product on blocks."""
        self._find(body)
        return self._body(body, 0)

    def _find(self, body: list[Statement]) -> None:
        made = {buffer: name for name, buffer in self.operands.items() if name in self.choice.made}
        for statement in body:
            if isinstance(statement, Loop):
                self._find(statement.body)
            elif isinstance(statement, Nest) and statement.value[0] == "load" and statement.value[1].buffer in made:
                self.fetched[statement.dst.buffer] = made[statement.value[1].buffer]

    def _body(self, body: list[Statement], depth: int) -> list[Statement]:
        """`depth`: sequential loops around these statements."""
        out: list[Statement] = []
        for statement in body:
            if isinstance(statement, Loop):
                out.append(replace(statement, body=self._body(statement.body, statement.depth + 1)))
            elif isinstance(statement, Alloc) and self.fetched.get(statement.buffer, "a_sum") != "a_sum":
                continue  # made fresh where it is made
            elif isinstance(statement, Nest) and statement.dst.buffer in self.fetched:
                name = self.fetched[statement.dst.buffer]
                out += self._sums(statement) if name == "a_sum" else [self._making(statement, name, depth)]
            else:
                out.append(statement)
        return out

    def _making(self, nest: Nest, name: str, depth: int) -> Loop:
        """Planes of a tile are loaded, and the operand made of them, for as many panels as the tile has."""
        grain = 1 if name == "w" else self.blocks.kind.group
        tile = _Tile(self.blocks, nest, grain, self.panel, self.choice.tile.panels, self.choice.tile.k)
        stages = {plane: tile.stage(plane, name) for plane in planes_of(self.blocks, name, self.choice.method)}
        body: list[Statement] = [Alloc(nest.dst.buffer, self.slots)]
        for plane, stage in stages.items():
            body += [Alloc(stage, self.slots), Computed(tile.load(self.planes[plane], stage, plane))]
        nests: list[Statement] = []
        if name == "w" and self.choice.method == "floats":
            for staged, tree in self.blocks.staged().items():
                own = self.blocks.grain(staged)
                numbers = Buffer(staged, "spad", self.blocks.dtype(staged), tile.rows(own) * self.panel)
                made = tile.compute(numbers, own, tree, stages, depth + 1, whole=False)
                nests += [Alloc(numbers, 1), Computed(made)]
                stages[staged] = numbers
        nests.append(
            Computed(tile.compute(nest.dst.buffer, grain, self.choice.made[name], stages, depth + 1, whole=True))
        )
        body.append(Loop(depth + 1, self.choice.tile.panels, "p", 1, (), nests))
        return Loop(depth, 1, "", 0, (), body, ahead=name)

    def _sums(self, nest: Nest) -> list[Statement]:
        """Sums of the activations of each group, for a tile of rows."""
        tile, product = self.choice.tile, self.choice.product
        group, k = self.blocks.kind.group, self.blocks.k
        groups, a = k // group, self.operands["a"]
        wide = -(-k // tile.k) * tile.k
        fetch: Access = nest.value[1]

        def row(factor: int) -> Offset:
            return lambda env: fetch.base(env) // (wide // group) * factor

        out: list[Statement] = []
        source, pitch = Access(a, row(wide), ()), wide
        if self.choice.spaces[0] is Space.DRAM:
            stage = Buffer("rows", "spad", a.dtype, tile.m * k)
            load = Nest(
                (tile.m, k), ("m", ""), Access(stage, _zero, (k, 1)), ("load", replace(source, coefficients=(wide, 1)))
            )
            out += [Alloc(stage, self.slots), load]
            source, pitch = Access(stage, _zero, ()), k
        step = nest.dst.coefficients[0] if Shape.of(product).m > 1 and tile.m > 1 else groups
        dst = Access(nest.dst.buffer, nest.dst.base, (step, 1))
        out.append(Nest((tile.m, groups), ("m", ""), dst, ("const", 0.0)))
        dst = replace(dst, coefficients=(step, 1, 0))
        value: Value = ("add", ("load", dst), ("load", replace(source, coefficients=(pitch, group, 1))))
        return [*out, Nest((tile.m, groups, group), ("m", "", ""), dst, value)]


def _zero(_env: list[int]) -> int:
    return 0


@dataclass(frozen=True)
class _Tile:
    """The tile of an operand that a nest would fetch: panels of rows, each of which stands for `grain` weights."""

    blocks: Blocks
    nest: Nest
    grain: int
    panel: int
    panels: int
    k: int
    """Weights along k of a tile of the product."""

    @property
    def _depth(self) -> int:
        """Weights along k of the operand as the product sees it, whole tiles."""
        return -(-self.blocks.k // self.k) * self.k

    @property
    def _span(self) -> int:
        """Weights along k of the tile: scales are there for all of them."""
        return self.k if self.grain == 1 else self._depth

    def rows(self, grain: int) -> int:
        """Rows of a plane, or of staged numbers, in a tile."""
        return self._span // grain

    def stage(self, plane: str, name: str) -> Buffer:
        """Room for a tile of a plane."""
        elements = self.panels * self.rows(self.blocks.grain(plane)) * self.panel
        return Buffer(f"{name}_{plane}", "spad", self.blocks.dtype(plane), elements)

    def _at(self, env: list[int]) -> tuple[int, int, int]:
        """(panel, first weight along k, weights along k) of the tile."""
        panel, offset = divmod(self.nest.value[1].base(env), self._depth // self.grain * self.panel)
        first = offset // self.panel * self.grain
        return panel, first, min(self._span, self.blocks.k - first)

    def load(self, plane: Buffer, stage: Buffer, name: str) -> Callable[[list[int]], list[Nest]]:
        """Fetches the tile's part of a plane."""
        grain = self.blocks.grain(name)
        far, near = self.blocks.k // grain * self.panel, self.rows(grain) * self.panel

        def make(env: list[int]) -> list[Nest]:
            panel, first, span = self._at(env)
            start = panel * far + first // grain * self.panel
            source = Access(plane, lambda _env: start, (far, self.panel, 1))
            extents = (self.panels, span // grain, self.panel)
            return [Nest(extents, ("p", "", "j"), Access(stage, _zero, (near, self.panel, 1)), ("load", source))]

        return make

    def compute(
        self, dst: Buffer, grain: int, tree: Tree, stages: dict[str, Buffer], depth: int, *, whole: bool
    ) -> Callable[[list[int]], list[Nest]]:
        """A panel of what a tree makes, `grain` weights a row; `whole`: the buffer has a place for every panel."""
        rows, panel = self.rows(grain), self.panel
        shared = max(self.blocks.grain(name) for name in leaves(tree))

        def make(env: list[int]) -> list[Nest]:
            index, span = env[depth], self._at(env)[2]
            inner = shared // grain

            def value(part: Tree) -> Value:
                if isinstance(part, tuple):
                    return (str(part[0]), *(value(argument) for argument in part[1:]))
                if not isinstance(part, str):
                    return ("const", float(part))
                own = self.blocks.grain(part)
                start = index * self.rows(own) * panel if self.blocks.kind.plane(part) is not None else 0
                step = panel if own == grain else 0
                access = Access(stages[part], lambda _env: start, (0, shared // own * panel, step, 1))
                return ("load", access)

            base = index * rows * panel if whole else 0
            to = Access(dst, lambda _env: base, (0, inner * panel, panel, 1))
            return [Nest((1, span // shared, inner, panel), ("p", "", "", "j"), to, value(tree))]

        return make
