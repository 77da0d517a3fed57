"""SwiGLU moves into the products of its operands: SiLU as the gate leaves the accumulators, the product as `up` does.

The vector work then overlaps with the weights of both matrices. Only where both operands are products that nothing else
reads; a quantisation of the result stays an operator of its own, as it needs whole rows.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from firsttoken_compiler.passes.canonicalise import Canonical
from firsttoken_compiler.passes.quantise import INTEGER, Quantised
from firsttoken_compiler.passes.rebuild import Rebuild, rebuild
from firsttoken_compiler.tvm import dialect
from firsttoken_compiler.tvm.api import Call, dtype_of, relax


@dataclass(frozen=True)
class Fuse:
    """See the module's docstring. Results keep up to the rounding of the gate to fp16, names are the products'."""

    def run(self, quantised: Quantised, canonical: Canonical) -> tuple[Quantised, Canonical]:
        """The rewritten module, and the provenance with SwiGLU's nodes on the product that now computes them."""
        state = _State(quantised)
        module, names = state.run()
        traced = {new: quantised.names.get(old, old) for new, old in names.items()}
        nodes = dict(canonical.nodes)
        for up, swiglu in state.joined.items():
            up, swiglu = (quantised.names.get(name, name) for name in (up, swiglu))
            nodes[up] = tuple(dict.fromkeys((*nodes.get(up, ()), *nodes.get(swiglu, ()))))
        return replace(quantised, module=module, names=traced), replace(canonical, nodes=nodes)


class _State:
    def __init__(self, quantised: Quantised) -> None:
        self.module = quantised.module
        bindings = [binding for block in self.module["main"].body.blocks for binding in block.bindings]
        self.values = {binding.var: binding.value for binding in bindings}
        self.uses: dict[Any, int] = {}
        for binding in bindings:
            for argument in _reads(binding.value):
                self.uses[argument] = self.uses.get(argument, 0) + 1
        self.silu = {pair[0] for value in self.values.values() if (pair := self._pair(value)) is not None}
        self.late = {pair[1] for value in self.values.values() if (pair := self._pair(value)) is not None}
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
        return (gate, up) if good else None

    def _is_product(self, value: Any) -> bool:
        bound = self.values.get(value)
        return (
            isinstance(bound, Call)
            and bound.op.name == "npu.linear"
            and not int(bound.attrs["residual"])
            and dtype_of(bound) == "float16"
        )

    def _visit(self, state: Rebuild, variable: Any, call: Any, args: list[Any]) -> Any:
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


def _reads(value: Any) -> list[Any]:
    if isinstance(value, Call):
        return list(value.args)
    if isinstance(value, relax.Tuple):
        return list(value.fields)
    return [value.tuple_value] if isinstance(value, relax.TupleGetItem) else [value]
