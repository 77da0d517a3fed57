"""Completes products by what they need of their activations besides the activations.

Zero points of weights need sums of the activations, a column per group. Weights in blocks are multiplied in fp16: int8
activations are widened to it, in which they are the same whole numbers. Products that share activations share both.
This runs once it is settled which activations each product reads.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from firsttoken_compiler.formats.types import BLOCK_TYPES
from firsttoken_compiler.passes.quantise import INTEGER, Quantised
from firsttoken_compiler.passes.rebuild import Rebuild, rebuild
from firsttoken_compiler.tvm import dialect
from firsttoken_compiler.tvm.api import Call, shape_of


@dataclass
class Complete:
    """See the module's docstring. Keeps types and names."""

    made: dict[tuple[Any, int], Any] = field(default_factory=dict)
    """(activations, groups of a sum) → their sums; 0 groups: the activations in fp16."""

    def run(self, quantised: Quantised) -> Quantised:
        """Rewrites the typed module."""
        parameters = list(quantised.module["main"].params)
        module, names = rebuild(quantised.module, parameters, {p: p for p in parameters}, self._visit)
        return quantised.rebuilt(module, names)

    def _visit(self, state: Rebuild, _variable: Any, call: Any, args: list[Any]) -> Any:
        attrs = dialect.plain_attributes(call) if call.op.name == "npu.linear" else {}
        integers = attrs.get("acts") in INTEGER
        if attrs.get("stored") == 0 and attrs.get("zeros"):
            groups = -(-shape_of(call.args[0])[1] // int(attrs["group"]))
            at = 3 if integers else 2
            operands = [*args[:at], self._sums(state, args[0], groups), *args[at:]]
            return state.emit(dialect.call("npu.linear", operands, **attrs))
        if attrs.get("blocks") and integers:
            last = 2 + len(BLOCK_TYPES[str(attrs["blocks"])].planes)
            first, scale, planes = args[1], args[2], args[3:last]
            operands = [self._wide(state, args[0]), first, *planes, scale, *args[last:]]
            return state.emit(dialect.call("npu.linear", operands, **attrs))
        return state.emit(Call(call.op, args, call.attrs))

    def _sums(self, state: Rebuild, a: Any, groups: int) -> Any:
        if (a, groups) not in self.made:
            self.made[a, groups] = state.emit(dialect.call("npu.group_sums", [a], groups=groups, out="float32"))
        return self.made[a, groups]

    def _wide(self, state: Rebuild, a: Any) -> Any:
        if (a, 0) not in self.made:
            rows, width = shape_of(a)
            call = dialect.call("npu.map", [a], expr="s0", rows=rows, width=width, out="float16")
            self.made[a, 0] = state.emit(call)
        return self.made[a, 0]
