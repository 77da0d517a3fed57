"""The template of a product that makes its normalised rows itself: the rows first, block by block, then the product.

Both are scheduled as kernels of their own; the matrix between them is a buffer of the working memory.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from firsttoken_compiler.codegen.loops import (
    Access,
    Alloc,
    Buffer,
    Loop,
    MatmulCall,
    Nest,
    Offset,
    Statement,
    Value,
)
from firsttoken_compiler.codegen.staging import over_rows
from firsttoken_compiler.codegen.template import Template
from firsttoken_compiler.codegen.tir_reader import read
from firsttoken_compiler.codegen.unroll import Place, unroll
from firsttoken_compiler.errors import ProgramError
from firsttoken_compiler.isa.types import Space
from firsttoken_compiler.schedule import layout, linear, normed, rowwise
from firsttoken_compiler.schedule.linear import Tile
from firsttoken_compiler.schedule.spec import KernelSpec
from firsttoken_compiler.target.target import Target


def build(spec: KernelSpec, spaces: tuple[Space, ...], target: Target, block: int, tile: Tile) -> Template:
    """The template, with this many rows normalised at a time and this tile of the product."""
    first, then = normed.spaces_of(spec, spaces)
    apply, product, count = normed.normalise_of(spec), normed.product_of(spec), int(spec["operands"])
    made = rowwise.schedule(apply, first, block, target)
    multiplied = linear.schedule(product, then, tile, target)
    rows = normed.rows_of(spec)
    pitch = layout.pitch_bits(rows, Space.SPAD, target) // rows.dtype.bits
    matrix = Buffer("rows", "spad", rows.dtype, rows.shape[0] * pitch)
    body, params = read(made.lowered(), outer=1)
    body = over_rows(
        body, params, list(first), rowwise.row_elements(apply), block, rowwise.rows_of(apply), 1, copies=False
    )
    width = made.layouts[count].shape[1]
    before = _Redirected(count, matrix, width, pitch, 0).body(body)
    body, _ = read(multiplied.lowered())
    after = _Redirected(0, matrix, multiplied.layouts[0].shape[1], pitch, count - 1).body(body)
    layouts = [*made.layouts[:count], *multiplied.layouts[1:]]
    places = [Place(space, made) for space, made in zip(spaces, layouts, strict=True)]
    align, tiles = target.alignment(Space.SPAD), target.matrix.tile_bytes
    return unroll([Alloc(matrix), *before, *after], places, multiplied.ragged, align, multiplied.tile, tiles)


@dataclass
class _Redirected:
    """Statements with operand `index` in `matrix`, and the number of every other operand raised by `shift`.

    The operand's rows are `width` elements apart in accesses, `pitch` in the matrix.
    """

    index: int
    matrix: Buffer
    width: int
    pitch: int
    shift: int
    known: dict[Buffer, Buffer] = field(default_factory=dict)

    def body(self, body: list[Statement]) -> list[Statement]:
        return [self._statement(statement) for statement in body]

    def _statement(self, statement: Statement) -> Statement:
        if isinstance(statement, Loop):
            return replace(statement, body=self.body(statement.body))
        if isinstance(statement, Nest):
            return replace(statement, dst=self._access(statement.dst), value=self._value(statement.value))
        if isinstance(statement, MatmulCall):
            stride = statement.a_stride
            if statement.a.buffer.param == self.index:
                stride = self._distance(stride)
            a, w, acc = (self._access(access) for access in (statement.a, statement.w, statement.acc))
            return replace(statement, a=a, w=w, acc=acc, a_stride=stride)
        if isinstance(statement, Alloc):
            return statement
        raise ProgramError(f"internal: a product of normalised rows holds a {type(statement).__name__}")

    def _value(self, value: Value) -> Value:
        if value[0] == "load":
            return ("load", self._access(value[1]))
        if value[0] in ("const", "index", "fill"):
            return value
        return (value[0], *(self._value(part) for part in value[1:]))

    def _access(self, access: Access) -> Access:
        if access.buffer.param == self.index:
            coefficients = tuple(self._distance(c) for c in access.coefficients)
            return Access(self.matrix, self._moved(access.base), coefficients)
        return replace(access, buffer=self._operand(access.buffer))

    def _operand(self, buffer: Buffer) -> Buffer:
        if buffer.param < 0 or not self.shift:
            return buffer
        return self.known.setdefault(buffer, replace(buffer, param=buffer.param + self.shift))

    def _moved(self, base: Offset) -> Offset:
        return lambda env: self._distance(base(env))

    def _distance(self, offset: int) -> int:
        row, column = divmod(offset, self.width)
        return row * self.pitch + column
