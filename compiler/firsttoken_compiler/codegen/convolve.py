"""Convolutions as implicit products: the tile of windows that a product reads is made in the scratchpad, tile by tile.

The product is scheduled as any other (`schedule.linear`); where it would fetch a tile of the matrix of windows out of
the DRAM, the vector unit gathers that tile out of the lines of the image that a tile of output pixels needs. These
lines lie in a frame of padding, fetched once per tile of pixels. The matrix of windows as a whole exists nowhere.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from firsttoken_compiler.codegen.images import Frame, Rows, gather
from firsttoken_compiler.codegen.loops import Access, Buffer, Computed, Loop, Nest, Statement
from firsttoken_compiler.codegen.template import Template
from firsttoken_compiler.codegen.tir_reader import read
from firsttoken_compiler.codegen.unroll import Place, unroll
from firsttoken_compiler.codegen.walk import Walking
from firsttoken_compiler.errors import ProgramError
from firsttoken_compiler.isa.types import Space
from firsttoken_compiler.schedule import conv, layout, linear
from firsttoken_compiler.schedule.linear import Tile
from firsttoken_compiler.schedule.spec import KernelSpec
from firsttoken_compiler.schedule.windows import Windows, product_of
from firsttoken_compiler.target.target import Target

STAGES = (0, 1, 0, 2)
"""Software pipeline over tiles of k: the vector unit's windows and the weights are there one stage before products."""


def build(spec: KernelSpec, spaces: tuple[Space, ...], target: Target, tile: Tile) -> Template:
    """The template of a convolution with this tile."""
    product, thin = product_of(spec), conv.thins(spec, spaces[0])
    fetched = tile if thin else replace(tile, whole=False)
    scheduled = linear.schedule(product, (Space.DRAM, *spaces[1:]), fetched, target)
    body, params = read(scheduled.lowered())
    if thin:
        body = _Rewriting(Windows.of(spec), spaces[0], spec, params, tile, thin).run(body)
    elif conv.walks(spec, target):
        body = Walking(spec, spaces[0], params[0], tile).run(body)
    else:
        body = _Rewriting(Windows.of(spec), spaces[0], spec, params, tile).run(body)
    image = layout.matrix(spec.args[0].shape[0], spec.args[0], layout.pitch_bits(spec.args[0], spaces[0], target))
    layouts = [image, *scheduled.layouts[1:]]
    places = [Place(space, made) for space, made in zip(spaces, layouts, strict=True)]
    align, tiles = target.alignment(Space.SPAD), target.matrix.tile_bytes
    return unroll(body, places, scheduled.ragged, align, scheduled.tile, tiles)


@dataclass
class _Rewriting:
    """Puts the gathering of windows in the place of every fetch of the first operand."""

    shape: Windows
    space: Space
    spec: KernelSpec
    params: list[Buffer]
    tile: Tile
    thin: bool = False
    """Whether tiles are fetched out of the image, pixel by pixel, as one tap meets them."""

    def run(self, body: list[Statement]) -> list[Statement]:
        """The statements of the convolution."""
        arg = self.spec.args[0]
        image = Buffer("image", "param", arg.dtype, arg.shape[0] * arg.shape[1], 0)
        part, lines = conv.part_of(self.shape, self.tile.m), conv.lines_of(self.shape, self.tile.m)
        self.frame = Frame.of(self.shape, image, self.space, lines, float(self.spec.get("outside")), part)
        if self.thin:
            self.frame = replace(self.frame, band=None)
        self.done = 0
        made = self._body(body, -1)
        if self.done != 1:
            raise ProgramError(f"internal: a convolution's product fetches its windows in {self.done} places")
        return made

    def _body(self, body: list[Statement], rows: int) -> list[Statement]:
        """`rows`: depth of the loop over tiles of pixels, -1 outside of it."""
        out: list[Statement] = []
        for statement in body:
            if isinstance(statement, Loop):
                out.append(self._loop(statement, rows))
            elif isinstance(statement, Nest) and self._fetches(statement):
                self.done += 1
                out.append(self._windows(statement))
            else:
                out.append(statement)
        return out

    def _loop(self, loop: Loop, rows: int) -> Loop:
        if loop.axis == "m" and loop.step:
            inner = self._body(loop.body, loop.depth)
            return replace(loop, body=[*self.frame.fetch(lambda env: self._lines(env, loop)), *inner])
        own = any(isinstance(statement, Nest) and self._fetches(statement) for statement in loop.body)
        stages = STAGES if own and rows >= 0 and not self.thin else loop.stages
        return replace(loop, stages=stages, body=self._body(loop.body, rows))

    def _lines(self, env: list[int], loop: Loop) -> tuple[int, int, int]:
        """Output lines that a tile of pixels touches, and where in its line it starts when it is a part of one."""
        first = env[loop.depth] * loop.step
        last = min(first + loop.step, self.shape.pixels)
        return first // self.shape.out[1], (last - 1) // self.shape.out[1] + 1, self._pixel(first)

    def _pixel(self, row: int) -> int:
        return row % self.shape.out[1] if self.frame.part else 0

    def _fetches(self, nest: Nest) -> bool:
        return nest.value[0] == "load" and nest.value[1].buffer is self.params[0]

    def _windows(self, nest: Nest) -> Computed:
        """The tile that the nest would have fetched."""
        dst: Access = nest.dst
        of: Access = nest.value[1]
        depth = -(-int(self.spec["k"]) // self.tile.k) * self.tile.k
        pitch = dst.coefficients[0] if nest.extents and nest.extents[0] > 1 else self.tile.k

        def make(env: list[int]) -> list[Nest]:
            row, column = divmod(of.base(env), depth)
            rows = row, min(row + self.tile.m, self.shape.pixels)
            columns = column, min(column + self.tile.k, int(self.spec["k"]))
            if self.tile.whole and self.thin:
                rows, columns = (0, self.shape.pixels), (0, int(self.spec["k"]))
            lines = self.frame.lines(row // self.shape.out[1], self._pixel(row))
            into = Rows(dst.buffer, pitch, row, column)
            return [
                part for rect in self.shape.rows(*rows) for part in gather(self.shape, lines, into, rect, columns)
            ]

        return Computed(make)
