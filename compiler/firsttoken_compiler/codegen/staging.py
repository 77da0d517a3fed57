"""Repeats a kernel for one block of rows over all blocks, and moves operands between DRAM and the scratchpad.

Operands in DRAM get a staging buffer: rows are loaded before a block's work and results stored after it.
"""

from __future__ import annotations

from dataclasses import replace

from firsttoken_compiler.codegen.loops import Access, Alloc, Buffer, GatherNest, Loop, Nest, Offset, Statement, Value
from firsttoken_compiler.isa.types import Space
from firsttoken_compiler.schedule.kernel import PIPELINE


def over_rows(
    body: list[Statement], params: list[Buffer], spaces: list[Space], row_elements: dict[int, int], rows: int,
    total: int, results: int, copies: bool, parts: int = 1, slots: int = 0,
) -> list[Statement]:  # fmt: skip
    """The kernel over all its rows.

    `body` was read with one outer loop. `row_elements`: elements per row of the operands that have rows; the last
    `results` of `params` are written. `copies`: the kernel only moves its first operand, so a DRAM operand needs no
    staging. `parts`: in how many runs a row of a result lies in memory (the heads of a cache). `slots`: blocks that are
    staged at a time; 0: as many as the pipeline asks for.
    """
    first_result = len(params) - results
    staged: dict[int, Buffer] = {}
    for index, space in enumerate(spaces):
        result = index >= first_result
        if space is Space.DRAM and (not copies or (result and spaces[0] is Space.DRAM)):
            staged[index] = replace(params[index], name=f"stage{index}", scope="spad", param=-1)
    inner = [_moved(statement, staged, row_elements, rows) for statement in body]
    loads = {i: _load(params[i], b, row_elements.get(i), rows, slots) for i, b in staged.items() if i < first_result}
    once = [statement for i, pair in loads.items() if i not in row_elements for statement in pair]
    before = [statement for i, pair in loads.items() if i in row_elements for statement in pair]
    fresh: list[Statement] = [Alloc(b, slots) for i, b in staged.items() if i >= first_result]
    after = [_copy(params[i], b, row_elements.get(i), rows, parts) for i, b in staged.items() if i >= first_result]
    loop = Loop(0, -(-total // rows), "m", rows, tuple(PIPELINE))
    loop.body = [*before, *fresh, *inner, *after]
    return [*once, loop]


def _load(param: Buffer, stage: Buffer, row: int | None, rows: int, slots: int) -> list[Statement]:
    return [Alloc(stage, slots), _copy(stage, param, row, rows)]


def _copy(to: Buffer, source: Buffer, row: int | None, rows: int, parts: int = 1) -> Nest:
    """All rows of a block, each in `parts` runs, or the whole operand when it has none."""
    store = to.param >= 0
    extents: tuple[int, ...] = (source.elements,)
    axes: tuple[str, ...] = ("",)
    steps: tuple[int, ...] = (1,)
    if row is not None:
        extents, axes, steps = (rows, parts, row // parts), ("m", "", ""), (row, row // parts, 1)
    offset = _block_offset(None, row, rows)

    def zero(_env: list[int]) -> int:
        return 0

    there, here = (offset, zero) if store else (zero, offset)
    return Nest(extents, axes, Access(to, there, steps), ("load", Access(source, here, steps)))


def _block_offset(base: Offset | None, row: int | None, rows: int) -> Offset:
    """Element offset of a block's first row, plus `base`."""
    inner = base or (lambda _env: 0)
    if row is None:
        return inner
    step = row * rows
    return lambda env: env[0] * step + inner(env)


def _moved(statement: Statement, staged: dict[int, Buffer], row: dict[int, int], rows: int) -> Statement:
    """The statement with operands in their staging buffers, or at the present block's rows."""
    if isinstance(statement, Loop):
        return replace(statement, body=[_moved(inner, staged, row, rows) for inner in statement.body])
    if isinstance(statement, Nest):
        dst = _access(statement.dst, staged, row, rows)
        return replace(statement, dst=dst, value=_value(statement.value, staged, row, rows))
    if isinstance(statement, GatherNest):
        dst, indices = (_access(a, staged, row, rows) for a in (statement.dst, statement.indices))
        return replace(statement, dst=dst, indices=indices)
    return statement


def _value(value: Value, staged: dict[int, Buffer], row: dict[int, int], rows: int) -> Value:
    if value[0] == "load":
        return ("load", _access(value[1], staged, row, rows))
    if value[0] in ("const", "index", "fill"):
        return value
    return (value[0], *(_value(part, staged, row, rows) for part in value[1:]))


def _access(access: Access, staged: dict[int, Buffer], row: dict[int, int], rows: int) -> Access:
    index = access.buffer.param
    if index < 0:
        return access
    if index in staged:
        return replace(access, buffer=staged[index])
    return replace(access, base=_block_offset(access.base, row.get(index), rows))
