"""Windows move into the products that read them: npu.windows and npu.linear become npu.conv.

Integer activations with a scale per row of windows are quantised windows: these rows have to be there. With static
scales the image is quantised before its windows are made (`quantise_images`), and they move like those of fp16.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from firsttoken_compiler.passes.canonicalise import Canonical
from firsttoken_compiler.passes.quantise import Quantised
from firsttoken_compiler.passes.rebuild import Rebuild, rebuild
from firsttoken_compiler.tvm import dialect
from firsttoken_compiler.tvm.api import Call, bindings_of, operator_name


@dataclass(frozen=True)
class FuseWindows:
    """See the module's docstring. Results are the same to the bit; names are the products'."""

    def run(self, quantised: Quantised, canonical: Canonical) -> tuple[Quantised, Canonical]:
        """The rewritten module; the provenance stays, as both have the convolution's nodes."""
        bindings = bindings_of(quantised.module["main"])
        values = {binding.var: binding.value for binding in bindings}
        products = [value for value in values.values() if operator_name(value) == "npu.linear"]
        read_by_products = (product.args[0] for product in products)
        fused = {source for source in read_by_products if operator_name(values.get(source)) == "npu.windows"}
        for value in values.values():  # what anything else reads has to be there
            read = list(value.args) if isinstance(value, Call) else list(getattr(value, "fields", ()))
            fused -= {part for i, part in enumerate(read) if i > 0 or operator_name(value) != "npu.linear"}
        if not fused:
            return quantised, canonical

        def visit(state: Rebuild, variable: Any, call: Any, args: list[Any]) -> Any:
            if variable in fused:
                return args[0]
            if operator_name(call) == "npu.linear" and call.args[0] in fused:
                attributes = {**dialect.plain_attributes(values[call.args[0]]), **dialect.plain_attributes(call)}
                return state.emit(dialect.call("npu.conv", args, **attributes))
            return state.emit(Call(call.op, args, call.attrs))

        parameters = list(quantised.module["main"].params)
        module, names = rebuild(quantised.module, parameters, {p: p for p in parameters}, visit)
        return quantised.rebuilt(module, names), canonical
