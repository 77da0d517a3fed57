"""Rows of tables that lie in blocks: the planes of the rows are gathered as they are, then turned into floats.

Scales and minima become a column each, a number per group of weights, in the order of operations of ggml; so a row is,
bit by bit, what dequantising its blocks gives.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from firsttoken_compiler.formats.types import BLOCK_TYPES, BlockType, Plane
from firsttoken_compiler.passes import views
from firsttoken_compiler.passes.elementwise import resolved
from firsttoken_compiler.passes.patterns import Context, Env, Match, Rule, reshaped, token_list
from firsttoken_compiler.passes.stored import Stored, Vectors, operand_call
from firsttoken_compiler.passes.views import UnsupportedView, View
from firsttoken_compiler.tvm.api import Call, relax, shape_of

LAYOUT: Final = "blocks:{kind}:{plane}"
"""See `codegen.block_weights`."""


class BlockGather(Rule):
    """Gather of rows of DequantizeBlocks."""

    def match(self, context: Context, variable: Any, value: Any) -> Match | None:
        """Captures the blocks and the ids."""
        blocks = operand_call(context, value.args[0], "npu.raw_blocks") if isinstance(value, Call) else None
        if blocks is None:
            return None
        weight, ids = resolved(context, blocks.args[0]), resolved(context, value.args[1])
        if not context.is_weight(weight):
            raise UnsupportedView("gathered blocks that are computed")
        covered = tuple(v for v in (value.args[0],) if isinstance(v, relax.Var))
        captured = {"call": blocks, "weight": weight, "ids": ids, "root": variable}
        return Match(captured, (ids,), (*covered, variable))

    def emit(self, context: Context, builder: Any, match: Match, env: Env) -> View:
        """Emits a gather of each plane, and the elementwise operators that join them."""
        call, weight = match.captured["call"], match.captured["weight"]
        base = env[weight].base
        rows = BlockRows(
            functools.partial(context.emit, builder), lambda values: context.constant(values, "shifts"), builder,
            BLOCK_TYPES[str(call.attrs["type"])], int(call.attrs["k"]), str(context.imported.weights[weight.name]),
            base, int(shape_of(base)[0]), token_list(builder, env[match.captured["ids"]]),
        )  # fmt: skip
        return views.dense(rows.floats(), shape_of(match.captured["root"]))


@dataclass(frozen=True)
class BlockRows:
    """Gathered rows of a table in blocks while they are made."""

    emit: Callable[..., Any]
    """Emits a call: (operator, operands, attributes by name)."""
    constant: Callable[[np.ndarray], Any]
    """The variable of a constant."""
    builder: Any
    kind: BlockType
    k: int
    source: str
    """The table's initialiser."""
    base: Any
    """The table's parameter."""
    height: int
    """Rows of the table."""
    ids: Any
    layout: str = LAYOUT

    @property
    def count(self) -> int:
        """Rows that are gathered."""
        return int(shape_of(self.ids)[0])

    def floats(self) -> Any:
        """`[rows, k]`."""
        kind = self.kind
        groups = self.count * self.k // kind.group
        args, text = self._joined("low", "high", kind.group)
        text = _looked_up(text, kind.codebook) if kind.codebook else _less(text, kind.zero)
        args.append(self._column(self._scales(), groups))
        text = f"mul(s{len(args) - 1}, {text})"
        minima = self._minima()
        if minima is not None:
            args.append(self._column(minima, groups))
            text = f"{'add' if kind.plane('m') else 'sub'}({text}, s{len(args) - 1})"
        base = self.emit("npu.map", args, expr=text, rows=groups, width=kind.group, out="float32")
        return reshaped(self.builder, base, (self.count, self.k))

    def _scales(self) -> Any:
        """d, or d times the scale of each group."""
        if self.kind.plane("scale") is None and self.kind.plane("scale_low") is None:
            return self._plane("d")
        low = "scale" if self.kind.plane("scale") is not None else "scale_low"
        return self._scaled(low, "scale_high", "d", self.kind.scale_zero)

    def _minima(self) -> Any | None:
        if self.kind.plane("m") is not None:
            return self._plane("m")
        return self._scaled("min_low", "min_high", "dmin", 0) if self.kind.plane("dmin") is not None else None

    def _scaled(self, low: str, high: str, factor: str, zero: int) -> Any:
        """A number per group times the number of its block."""
        width = self.kind.block // self.kind.group
        rows = self.count * self.k // self.kind.block
        args, text = self._joined(low, high, width)
        args.append(self._column(self._plane(factor), rows))
        return self._exact(args, f"mul(s{len(args) - 1}, {_less(text, zero)})", (rows, width))

    def _exact(self, args: list[Any], text: str, shape: tuple[int, int], out: str = "float32") -> Any:
        """An elementwise operator whose result keeps this type."""
        return self.emit("npu.map", args, expr=text, rows=shape[0], width=shape[1], out=out, exact=1)

    def _joined(self, low: str, high: str, width: int) -> tuple[list[Any], str]:
        """Operands of `width` columns, and the number that their bits make together."""
        plane = self.kind.plane(low)
        assert plane is not None
        args, text = [self._folded(self._plane(low), width)], "s0"
        if self.kind.plane(high) is not None:
            args.append(self._folded(self._plane(high), width))
            text = f"add(s0, mul(s1, {float(1 << plane.bits)}))"
        return args, text

    def _folded(self, values: Any, width: int) -> Any:
        rows, across = shape_of(values)
        return reshaped(self.builder, values, (rows * across // width, width))

    def _column(self, values: Any, rows: int) -> Any:
        """One number for each of so many rows."""
        return reshaped(self.builder, values, (rows, 1))

    def _plane(self, name: str) -> Any:
        """A plane of the gathered rows, an element for each number: `[rows, k / per]`."""
        plane = self.kind.plane(name)
        assert plane is not None
        across = self.k // plane.per
        packed = self._gathered(plane, across * plane.bits // 8 if plane.bits < 8 else across)
        return packed if plane.bits >= 8 else self._unpacked(packed, plane.bits, across)

    def _gathered(self, plane: Plane, width: int) -> Any:
        out = "float16" if plane.dtype == "float16" else "int8"
        layout = self.layout.format(kind=self.kind.name, plane=plane.name)
        scales = Vectors(self.source, layout, "float16") if out == "float16" else None
        table = Stored(self.source, layout, self.height, width, 8, 1, 0, scales, None)
        return self.emit(
            "npu.gather", [self.base, self.ids], out=out, exact=1, stored=table.to_text(), width=width, plane=plane.name
        )

    def _unpacked(self, packed: Any, bits: int, across: int) -> Any:
        """Numbers of less than a byte, the first one in the lowest bits; bytes are signed."""
        each, base = 8 // bits, float(1 << bits)
        factors = self.constant(shifts(bits))
        rows = self.count * across // each
        text = f"sub(floor(mul(s0, s1)), mul(floor(mul(mul(s0, s1), {1 / base})), {base}))"
        args = [self._column(packed, rows), factors]
        made = self._exact(args, text, (rows, each), "int8")
        return reshaped(self.builder, made, (self.count, across))


def shifts(bits: int) -> np.ndarray:
    """What takes each number of a byte down to the lowest bits: float32 `[1, 8 / bits]`."""
    return (float(1 << bits) ** -np.arange(8 // bits, dtype=np.float32)).astype(np.float32)[None]


def _less(text: str, zero: int) -> str:
    return f"sub({text}, {float(zero)})" if zero else text


def _looked_up(text: str, codebook: tuple[int, ...], first: int = 0) -> str:
    """The entry of a codebook, by halving."""
    if len(codebook) == 1:
        return str(float(codebook[0]))
    half = len(codebook) // 2
    low, high = _looked_up(text, codebook[:half], first), _looked_up(text, codebook[half:], first + half)
    return f"select(lt({text}, {float(first + half)}), {low}, {high})"


BLOCK_GATHER = BlockGather()
