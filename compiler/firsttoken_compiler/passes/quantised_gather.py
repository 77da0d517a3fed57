"""Rows of tables that are stored quantised: the integers are gathered as they are, then turned into floats."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Final

from firsttoken_compiler.passes import views
from firsttoken_compiler.passes.elementwise import resolved
from firsttoken_compiler.passes.patterns import Context, Env, Match, Rule, reshaped, token_list
from firsttoken_compiler.passes.stored import BITS, Stored, Vectors, float_type, number, operand_call, source_of
from firsttoken_compiler.passes.views import UnsupportedView, View
from firsttoken_compiler.tvm.api import Call, dtype_of, relax, shape_of

FLOAT: Final = "mul(sub(s0, s2), s1)"


@dataclass(frozen=True)
class Table:
    """A table of `rows` x `width` integers with scales per block of a row, or one for all of it."""

    weight: Any
    layout: str
    """See `codegen.stored_weights.VALUES`."""
    rows: int
    width: int
    bits: int
    shift: int
    """The middle of the range of unsigned integers."""
    scale: Any
    zero: Any | None
    block: int
    """Elements of a row that share a scale; 0: all of the table."""
    default: int = 0
    """The zero point where there is none."""


class StoredGather(Rule):
    """Gather of dequantised rows, of rows that are dequantised next, and GatherBlockQuantized."""

    def match(self, context: Context, variable: Any, value: Any) -> Match | None:
        """Captures table and ids."""
        if not isinstance(value, Call):
            return None
        name, inner = value.op.name, []
        table: Table | None
        if name == "npu.raw_block_gather":
            table, ids, inner = _block_table(context, value), value.args[1], [value.args[0]]
        elif name == "relax.take":
            call = operand_call(context, value.args[0], "npu.raw_dequantise")
            table, ids, inner = _table(context, call), value.args[1], [value.args[0]]
        else:
            take = operand_call(context, value.args[0], "relax.take")
            if take is None or not context.is_weight(resolved(context, take.args[0])):
                return None
            table, ids, inner = _table(context, value, take.args[0]), take.args[1], [value.args[0]]
        if table is None:
            return None
        ids = resolved(context, ids)
        covered = tuple(v for v in inner if isinstance(v, relax.Var) and not context.is_weight(v))
        return Match({"table": table, "ids": ids, "root": variable}, (ids,), (*covered, variable))

    def emit(self, context: Context, builder: Any, match: Match, env: Env) -> View:
        """Emits the gather of integers and scales, and the elementwise operator that joins them."""
        table: Table = match.captured["table"]
        ids = token_list(builder, env[match.captured["ids"]])
        values = _gathered(context, builder, env, table, ids)
        args = _parameters(context, builder, env, table, ids)
        rows = shape_of(values)[0] * (table.width // table.block if table.block else 1)
        width = table.block or table.width
        blocks = reshaped(builder, values, (rows, width))
        base = context.emit(builder, "npu.map", [blocks, *args], expr=FLOAT, rows=rows, width=width, out="float32")
        whole = (shape_of(values)[0], table.width)
        return views.dense(reshaped(builder, base, whole), shape_of(match.captured["root"]))


def _table(context: Context, call: Any | None, weight: Any | None = None) -> Table | None:
    """The table behind DequantizeLinear: of all of it, or of gathered rows of `weight`."""
    rows_first = weight is not None
    weight = resolved(context, weight if weight is not None else call.args[0]) if call is not None else None
    if call is None or not context.is_weight(weight) or len(shape_of(weight)) != 2 or dtype_of(weight) not in BITS:
        return None
    (rows, width), dtype = shape_of(weight), dtype_of(weight)
    scale, zero = call.args[1], call.args[2] if len(call.args) > 2 else None
    axis, block = int(call.attrs["axis"]) % len(shape_of(call)), int(call.attrs["block"])
    if math.prod(shape_of(scale)) == 1:
        block = 0
    elif rows_first:
        raise UnsupportedView("gathered integers with more than one scale")
    elif axis == 0 and not block:
        block = width
    elif axis != 1 or not block or width % block:
        raise UnsupportedView("a table with scales by columns, or with blocks that do not divide its rows")
    bits = BITS[dtype]
    return Table(weight, "kn", rows, width, bits, 1 << (bits - 1) if dtype[0] == "u" else 0, scale, zero, block)


def _block_table(context: Context, call: Any) -> Table:
    weight = resolved(context, call.args[0])
    rows = shape_of(weight)[0]
    flat = operand_call(context, weight, "relax.reshape")  # of a head's packed weights
    weight = weight if flat is None else resolved(context, flat.args[0])
    bits, width, block = (int(call.attrs[name]) for name in ("bits", "width", "block"))
    dtype = dtype_of(weight)
    if not context.is_weight(weight) or bits not in (4, 8) or (dtype not in BITS) or width % block:
        raise UnsupportedView(f"rows of {width} numbers of {bits} bits in blocks of {block}, stored as {dtype}")
    packed = dtype == "uint8" and bits == 4
    middle = 1 << (bits - 1)
    zero = call.args[3] if len(call.args) > 3 else None
    return Table(
        weight, "rows" if packed else "kn", rows, width, bits, middle if dtype[0] == "u" else 0,
        call.args[2], zero, block, middle if dtype == "uint8" else 0,
    )  # fmt: skip


def _gathered(context: Context, builder: Any, env: Env, table: Table, ids: Any) -> Any:
    """Rows of integers, a byte each, less the middle of their range."""
    if table.bits == 4 and table.width % 2:
        raise UnsupportedView(f"rows of {table.width} numbers of four bits")
    source = str(context.imported.weights[table.weight.name])
    scales = Vectors(source, "one", "float32")
    stored = Stored(source, table.layout, table.rows, table.width, table.bits, 1, table.shift, scales, None)
    bytes_ = _gather(context, builder, env, table.weight, ids, stored.to_text(), table.width * table.bits // 8)
    if table.bits == 8:
        return bytes_
    return context.emit(builder, "npu.unpack", [bytes_], out="int8", exact=1)


def _parameters(context: Context, builder: Any, env: Env, table: Table, ids: Any) -> list[Any]:
    """Scale and zero point: one number each, or a column over all blocks of all rows."""
    zero = float(table.default - table.shift)
    if not table.block:
        given = [number(context, table.scale), zero if table.zero is None else number(context, table.zero)]
        if given[0] is None or given[1] is None:
            raise UnsupportedView("a table whose scale is computed")
        shift = 0 if table.zero is None else table.shift
        return [context.number(given[0], "quantisation"), context.number(given[1] - shift, "quantisation")]
    blocks = table.width // table.block
    scales = _column(context, builder, env, table, ids, table.scale, float_type(context, table.scale), 0)
    if table.zero is None:
        return [scales, context.number(zero, "quantisation")]
    packed = math.prod(shape_of(table.zero)) != table.rows * blocks
    return [scales, _column(context, builder, env, table, ids, table.zero, "int8", table.shift, packed)]


def _column(
    context: Context, builder: Any, env: Env, table: Table, ids: Any, value: Any, dtype: str, shift: int,
    packed: bool = False,
) -> Any:  # fmt: skip
    """Scales or zero points of the gathered rows, one to a block."""
    source, weight = source_of(context, value), resolved(context, value)
    if source is None or not isinstance(weight, relax.Var):
        raise UnsupportedView("a table whose scales or zero points are computed")
    blocks = table.width // table.block
    vectors = Vectors(source, "rows4" if packed else "gn", dtype, shift)
    stored = Stored(source, "kn", table.rows, blocks, 8, 1, 0, vectors, None)
    rows = _gather(context, builder, env, weight, ids, stored.to_text(), blocks, dtype)
    return builder.emit(relax.op.reshape(rows, (shape_of(ids)[0] * blocks, 1)))


def _gather(
    context: Context, builder: Any, env: Env, weight: Any, ids: Any, stored: str, width: int, dtype: str = "int8"
) -> Any:
    return context.emit(
        builder, "npu.gather", [env[weight].base, ids], out=dtype, exact=1, stored=stored, width=width
    )


STORED_GATHER = StoredGather()
