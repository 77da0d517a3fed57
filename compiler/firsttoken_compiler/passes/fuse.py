"""Activations move into the products that they follow; of SwiGLU, SiLU into the gate, the multiplication into `up`.

The vector work then overlaps with the weights. Only where nothing else reads the product, and where the function names
it but a few times; a quantisation of the result stays an operator of its own, as it needs whole rows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Final

from firsttoken_compiler.passes.canonicalise import Canonical
from firsttoken_compiler.passes.quantise import INTEGER, Quantised
from firsttoken_compiler.passes.rebuild import Rebuild, reads, rebuild
from firsttoken_compiler.tvm import dialect
from firsttoken_compiler.tvm.api import Call, bindings_of, dtype_of, relax, shape_of

MOST_USES: Final = 4
"""How often an activation may name its operand: each time the product's scales and bias are applied to it again."""


@dataclass(frozen=True)
class Fuse:
    """See the module's docstring. Results keep up to the rounding of the gate to fp16, names are the products'.

    `apart`: whether the products of a SwiGLU stay without it, by the variable of its gate in the canonical module.
    """

    apart: Callable[[str], bool] = lambda _: False

    def run(self, quantised: Quantised, canonical: Canonical) -> tuple[Quantised, Canonical]:
        """The rewritten module, and the provenance with the nodes that moved on the product that now computes them."""
        state = _State(quantised, self.apart)
        module, names = state.run()
        nodes = dict(canonical.nodes)
        for product, moved in state.joined.items():
            product, moved = (quantised.names.get(name, name) for name in (product, moved))
            nodes[product] = tuple(dict.fromkeys((*nodes.get(product, ()), *nodes.get(moved, ()))))
        return quantised.rebuilt(module, names), replace(canonical, nodes=nodes)


class _State:
    def __init__(self, quantised: Quantised, apart: Callable[[str], bool]) -> None:
        self.module, self.names, self.apart = quantised.module, quantised.names, apart
        bindings = bindings_of(self.module["main"])
        self.values = {binding.var: binding.value for binding in bindings}
        self.uses = Counter(argument for binding in bindings for argument in reads(binding.value))
        self.silu = {pair[0] for value in self.values.values() if (pair := self._pair(value)) is not None}
        self.late = {pair[1] for value in self.values.values() if (pair := self._pair(value)) is not None}
        self.acts = {source: v for v, bound in self.values.items() if (source := self._activated(bound)) is not None}
        """Product → the activation of its result, of those that move."""
        self.joined: dict[str, str] = {}

    def run(self) -> tuple[Any, dict[str, str]]:
        parameters = list(self.module["main"].params)
        return rebuild(self.module, parameters, {parameter: parameter for parameter in parameters}, self._visit)

    def _pair(self, value: Any) -> tuple[Any, Any] | None:
        """(gate, up) of a SwiGLU whose operands are products of their own."""
        if not (isinstance(value, Call) and value.op.name == "npu.swiglu"):
            return None
        gate, up = value.args
        good = all(self._is_product(operand) and self.uses[operand] == 1 for operand in (gate, up))
        return (gate, up) if good and not self.apart(self.names.get(gate.name, gate.name)) else None

    def _activated(self, value: Any) -> Any | None:
        """The product whose result, read by nothing else, an elementwise operator is a function of."""
        if not (isinstance(value, Call) and value.op.name == "npu.map" and len(value.args) == 1):
            return None
        source, bound = value.args[0], self.values.get(value.args[0])
        if not (isinstance(bound, Call) and bound.op.name == "npu.linear" and self.uses[source] == 1):
            return None
        few = str(value.attrs["expr"]).count("s0") <= MOST_USES
        return source if few and shape_of(bound) == shape_of(value) else None

    def _is_product(self, value: Any) -> bool:
        bound = self.values.get(value)
        return (
            isinstance(bound, Call)
            and bound.op.name == "npu.linear"
            and not int(bound.attrs["residual"])
            and dtype_of(bound) == "float16"
        )

    def _visit(self, state: Rebuild, variable: Any, call: Any, args: list[Any]) -> Any:
        if variable in self.acts:
            act = self.values[self.acts[variable]]
            attributes = {**dialect.plain_attributes(call), "act": str(act.attrs["expr"]), "out": dtype_of(act)}
            self.joined[variable.name] = self.acts[variable].name
            return state.emit(dialect.call("npu.linear", args, **attributes))
        if len(call.args) == 1 and self.acts.get(call.args[0]) == variable:
            return args[0]
        if variable in self.silu:
            return state.emit(dialect.call("npu.linear", args, **{**dialect.plain_attributes(call), "silu": 1}))
        if variable in self.late:
            return relax.Tuple(args)  # emitted where the gate is known
        pair = self._pair(call)
        if pair is None:
            return state.emit(Call(call.op, args, call.attrs))
        gate, up = args
        swiglu, state.current = state.current, pair[1].name
        attributes = {**dialect.plain_attributes(self.values[pair[1]]), "factor": 1}
        product = state.emit(dialect.call("npu.linear", [*up.fields, gate], **attributes))
        state.current = swiglu
        out = str(call.attrs["out"])
        self.joined[pair[1].name] = swiglu
        return state.emit(dialect.call("npu.quantise", [product], out=out)) if out in INTEGER else product
