"""Images are quantised before their windows are made, where all pixels share a static scale.

The windows of a quantised image are the quantised windows of the image, padding included: zero is zero in both. Each
pixel is then quantised once, by the product that makes it where nothing else reads it, and the windows are integers,
which `fuse-windows` moves into the product that reads them. With a scale per row of windows this does not hold.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from firsttoken_compiler.passes.canonicalise import Canonical
from firsttoken_compiler.passes.quantise import Quantised
from firsttoken_compiler.passes.rebuild import Rebuild, reads, rebuild
from firsttoken_compiler.tvm import dialect
from firsttoken_compiler.tvm.api import Call, bindings_of, operator_name, relax


@dataclass(frozen=True)
class QuantiseImages:
    """See the module's docstring. `static`: whether integer activations get static scales; else nothing changes."""

    static: bool

    def run(self, quantised: Quantised, canonical: Canonical) -> tuple[Quantised, Canonical]:
        """npu.quantise(npu.windows(x)) as npu.windows(npu.quantise(x)), where nothing else reads the former windows."""
        bindings = bindings_of(quantised.module["main"])
        values = {binding.var: binding.value for binding in bindings}
        uses = Counter(part for value in values.values() for part in reads(value))
        turned = {
            variable: value.args[0]
            for variable, value in values.items()
            if operator_name(value) == "npu.quantise"
            and operator_name(values.get(value.args[0])) == "npu.windows"
            and uses[value.args[0]] == 1
        }
        if not self.static or not turned:
            return quantised, canonical
        windows = set(turned.values())

        def visit(state: Rebuild, variable: Any, call: Any, args: list[Any]) -> Any:
            if variable in windows:
                return args[0]
            made = state.emit(Call(call.op, args, call.attrs))
            if variable not in turned:
                return made
            integers, scale = (state.emit(relax.TupleGetItem(made, index)) for index in (0, 1))
            of = dialect.plain_attributes(values[turned[variable]])
            attributes = {**of, "out": dialect.plain_attributes(call)["out"]}
            return relax.Tuple([state.emit(dialect.call("npu.windows", [integers], **attributes)), scale])

        parameters = list(quantised.module["main"].params)
        module, names = rebuild(quantised.module, parameters, {p: p for p in parameters}, visit)
        return quantised.rebuilt(module, names), canonical
