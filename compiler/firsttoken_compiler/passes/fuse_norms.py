"""Rows that one product makes out of a norm's numbers move into it: npu.normalise and npu.linear become npu.normed.

Only where nothing else reads these rows; they then lie in the product's working memory.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from firsttoken_compiler.passes.canonicalise import Canonical
from firsttoken_compiler.passes.quantise import Quantised
from firsttoken_compiler.passes.rebuild import Rebuild, reads, rebuild
from firsttoken_compiler.tvm import dialect
from firsttoken_compiler.tvm.api import Call, bindings_of, operator_name


def _takes_norms(value: Any) -> bool:
    """Whether a reader is a product that makes its rows; products on blocks make their weights already."""
    return operator_name(value) == "npu.linear" and "blocks" not in value.attrs


@dataclass(frozen=True)
class FuseNorms:
    """See the module's docstring. Results are the same to the bit; names are the products'."""

    def run(self, quantised: Quantised, canonical: Canonical) -> tuple[Quantised, Canonical]:
        """The rewritten module, and the provenance with the norm's nodes on the products that now compute it."""
        bindings = bindings_of(quantised.module["main"])
        made = {b.var: b.value for b in bindings if operator_name(b.value) == "npu.normalise"}
        readers: dict[Any, list[tuple[Any, int]]] = {}
        for binding in bindings:
            for index, part in enumerate(reads(binding.value)):
                if part in made:
                    readers.setdefault(part, []).append((binding, index))
        fused = {
            rows: found[0][0].var
            for rows, found in readers.items()
            if len(found) == 1 and found[0][1] == 0 and _takes_norms(found[0][0].value)
        }
        if not fused:
            return quantised, canonical

        def visit(state: Rebuild, variable: Any, call: Any, args: list[Any]) -> Any:
            if variable in fused:
                return variable  # its only reader takes the operands instead
            rows = call.args[0] if call.args else None
            if fused.get(rows) != variable:
                return state.emit(Call(call.op, args, call.attrs))
            norm = made[rows]
            own = {"operands": len(norm.args), "norm": str(norm.attrs["norm"]), "rows": str(norm.attrs["out"])}
            operands = [state.env.get(argument, argument) for argument in norm.args]
            return state.emit(
                dialect.call("npu.normed", [*operands, *args[1:]], **dialect.plain_attributes(call), **own)
            )

        parameters = list(quantised.module["main"].params)
        module, names = rebuild(quantised.module, parameters, {p: p for p in parameters}, visit)
        nodes = dict(canonical.nodes)
        for rows, product in fused.items():
            norm, product = (quantised.names.get(v.name, v.name) for v in (rows, product))
            nodes[product] = tuple(dict.fromkeys((*nodes.get(product, ()), *nodes.get(norm, ()))))
        return quantised.rebuilt(module, names), replace(canonical, nodes=nodes)
