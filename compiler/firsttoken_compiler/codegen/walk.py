"""Convolutions on a unit that walks windows by itself: products read the lines of the image where they lie.

The product is scheduled as any other (`schedule.linear`). In the place of a tile of the matrix of windows, which exists
nowhere, a product reads pixels of one output line at a time: its rows are the pixels, a stride of the image apart, and
its terms the channels of the taps that lie side by side. The lines lie in a frame of padding that is fetched once per
tile of pixels, or once for all of them (`Tile.whole`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from firsttoken_compiler.codegen.images import Frame
from firsttoken_compiler.codegen.loops import Access, Alloc, Buffer, Computed, Loop, MatmulCall, Nest, Statement
from firsttoken_compiler.errors import ProgramError
from firsttoken_compiler.isa.types import Space
from firsttoken_compiler.schedule import conv
from firsttoken_compiler.schedule.linear import Tile
from firsttoken_compiler.schedule.spec import KernelSpec
from firsttoken_compiler.schedule.windows import Windows


@dataclass
class Walking:
    """Puts products of windows in the place of the product of a tile that was fetched."""

    spec: KernelSpec
    space: Space
    windows: Buffer
    """The operand that stands for the matrix of windows."""
    tile: Tile

    def run(self, body: list[Statement]) -> list[Statement]:
        """The statements of the convolution; raises ProgramError for a product that does not fetch its windows once."""
        arg, self.shape = self.spec.args[0], Windows.of(self.spec)
        image = Buffer("image", "param", arg.dtype, arg.shape[0] * arg.shape[1], 0)
        part = 0 if self.tile.whole else conv.part_of(self.shape, self.tile.m)
        lines = self.shape.out[0] if self.tile.whole else conv.lines_of(self.shape, self.tile.m)
        self.frame = Frame.of(self.shape, image, self.space, lines, float(self.spec.get("outside")), part)
        fetches = list(self._fetches(body))
        if len(fetches) != 1:
            raise ProgramError(f"internal: a convolution's product fetches its windows in {len(fetches)} places")
        self.fetch = fetches[0]
        made = self._body(body)
        return [*self.frame.fetch(lambda _env: (0, self.shape.out[0], 0)), *made] if self.tile.whole else made

    def _fetches(self, body: list[Statement]) -> Iterator[Nest]:
        for statement in body:
            if isinstance(statement, Loop):
                yield from self._fetches(statement.body)
            elif isinstance(statement, Nest) and statement.value[0] == "load":
                yield from (statement,) if statement.value[1].buffer is self.windows else ()

    def _body(self, body: list[Statement]) -> list[Statement]:
        out: list[Statement] = []
        for statement in body:
            if isinstance(statement, Loop):
                out.append(self._loop(statement))
            elif isinstance(statement, MatmulCall):
                out.append(self._products(statement))
            elif statement is not self.fetch and not self._stages(statement):
                out.append(statement)
        return out

    def _stages(self, statement: Statement) -> bool:
        """Whether it makes room for the tile that is not fetched."""
        return isinstance(statement, Alloc) and statement.buffer is self.fetch.dst.buffer

    def _loop(self, loop: Loop) -> Loop:
        inner = self._body(loop.body)
        if loop.axis == "m" and loop.step and not self.tile.whole:
            inner = [*self.frame.fetch(lambda env: self._lines(env[loop.depth] * loop.step, loop.step)), *inner]
        return replace(loop, body=inner)

    def _lines(self, first: int, count: int) -> tuple[int, int, int]:
        """Output lines that a tile of pixels touches, and where in its line it starts when it is a part of one."""
        last, across = min(first + count, self.shape.pixels), self.shape.out[1]
        return first // across, (last - 1) // across + 1, first % across if self.frame.part else 0

    def _products(self, call: MatmulCall) -> Computed:
        """The products of a tile of pixels, columns and terms."""
        shape, of = self.shape, self.fetch.value[1]
        terms, width = int(self.spec["k"]), shape.out[1]
        depth = -(-terms // self.tile.k) * self.tile.k

        def make(env: list[int]) -> list[MatmulCall]:
            row, column = divmod(of.base(env), depth)
            last = min(row + self.tile.m, shape.pixels)
            top, _, left = (0, 0, 0) if self.tile.whole else self._lines(row, self.tile.m)
            lines = self.frame.lines(top, left)
            made: list[MatmulCall] = []
            for rect in shape.rows(row, last):
                for line in range(rect.top, rect.bottom):
                    for tap, channel, begin, count in self._runs(column, min(column + self.tile.k, terms)):
                        y, x = shape.origin(tap)
                        at = lines.access(
                            line * shape.stride[0] + y, rect.left * shape.stride[1] + x, channel, ()
                        )
                        made.append(replace(
                            call, m=rect.right - rect.left, k=count, axes=("", call.axes[1], ""), a=at,
                            acc=_moved(call.acc, (line * width + rect.left - row) * call.acc_stride),
                            w=_moved(call.w, (begin - column) * call.w_row_stride),
                            a_stride=shape.stride[1] * shape.channels, fresh=begin == 0,
                        ))  # fmt: skip
            return made

        return Computed(make)

    def _runs(self, first: int, last: int) -> Iterator[tuple[tuple[int, int], int, int, int]]:
        """(first tap, its channel, term, terms) of the runs of taps side by side, cut to terms `[first, last)`."""
        for tap, length in self.shape.runs():
            begin = self.shape.column(tap)
            low, high = max(begin, first), min(begin + length, last)
            if low < high:
                yield tap, low - begin, low, high - low


def _moved(access: Access, elements: int) -> Access:
    return Access(access.buffer, lambda env: access.base(env) + elements, access.coefficients)
