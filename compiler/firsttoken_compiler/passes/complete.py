"""Completes products by what they need of their activations besides the activations.

Zero points of weights need sums of the activations, a column per group; products that share activations share them.
This runs once it is settled which activations each product reads.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from firsttoken_compiler.passes.quantise import INTEGER, Quantised
from firsttoken_compiler.passes.rebuild import Rebuild, rebuild
from firsttoken_compiler.tvm import dialect
from firsttoken_compiler.tvm.api import Call, shape_of


@dataclass
class Complete:
    """See the module's docstring. Keeps types and names."""

    sums: dict[tuple[Any, int], Any] = field(default_factory=dict)
    """(activations, groups) → their sums."""

    def run(self, quantised: Quantised) -> Quantised:
        """Rewrites the typed module."""
        parameters = list(quantised.module["main"].params)
        module, names = rebuild(quantised.module, parameters, {p: p for p in parameters}, self._visit)
        traced = {new: quantised.names.get(old, old) for new, old in names.items()}
        return replace(quantised, module=module, names=traced)

    def _visit(self, state: Rebuild, _variable: Any, call: Any, args: list[Any]) -> Any:
        own = call.op.name == "npu.linear" and not int(call.attrs["stored"])
        if not own or "zeros" not in call.attrs or not int(call.attrs["zeros"]):
            return state.emit(Call(call.op, args, call.attrs))
        attrs = dialect.plain_attributes(call)
        groups = -(-shape_of(call.args[0])[1] // int(attrs["group"]))
        key = (args[0], groups)
        if key not in self.sums:
            self.sums[key] = state.emit(dialect.call("npu.group_sums", [args[0]], groups=groups, out="float32"))
        at = 3 if attrs["acts"] in INTEGER else 2
        return state.emit(dialect.call("npu.linear", [*args[:at], self.sums[key], *args[at:]], **attrs))
