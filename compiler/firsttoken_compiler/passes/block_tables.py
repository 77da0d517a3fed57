"""Float tables whose rows are kept in blocks: gathers of them become gathers of planes, as of tables in GGUF files.

It runs on the canonical module, before types are given. Tables that are gathered as columns stay floats.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Final

import numpy as np

from firsttoken_compiler.formats.types import BLOCK_TYPES
from firsttoken_compiler.options import Precision
from firsttoken_compiler.passes.block_gather import BlockRows, shifts
from firsttoken_compiler.passes.canonicalise import Canonical
from firsttoken_compiler.passes.rebuild import Rebuild, rebuild
from firsttoken_compiler.passes.roles import Roles, roles_of
from firsttoken_compiler.passes.weight_formats import WeightFormats
from firsttoken_compiler.target.target import Target
from firsttoken_compiler.tvm import dialect
from firsttoken_compiler.tvm.api import Call, bindings_of, dtype_of, operator_name, relax, shape_of

LAYOUT: Final = "rows:{kind}:{plane}"
"""See `codegen.block_weights`."""


def block_tables(canonical: Canonical, weights: dict[str, str], precision: Precision, target: Target) -> Canonical:
    """The module with the tables that are to lie in blocks; `weights`: parameter → initialiser."""
    chosen = WeightFormats(precision, target, roles_of(canonical))
    kinds = {table: kind for table in _tables(canonical, chosen.roles) if (kind := _kind(table, weights, chosen))}
    return _Tables(canonical, weights, kinds).run() if kinds else canonical


def _tables(canonical: Canonical, roles: Roles) -> list[Any]:
    """Float tables of token embeddings, of whose rows some are gathered."""
    bindings = bindings_of(canonical.module["main"])
    calls = [b.value for b in bindings if operator_name(b.value) == "npu.gather" and "stored" not in b.value.attrs]
    tables = dict.fromkeys(call.args[0] for call in calls if "turned" not in call.attrs)
    return [t for t in tables if roles.of(t.name).role in ("token_embd", "output") and dtype_of(t) == "float32"]


def _kind(table: Any, weights: dict[str, str], chosen: WeightFormats) -> str:
    """The type of blocks; empty for floats."""
    found = chosen.of(table.name, weights[table.name], shape_of(table)[1])
    return found if found in BLOCK_TYPES else ""


class _Tables:
    """The module while it is rebuilt."""

    def __init__(self, canonical: Canonical, weights: dict[str, str], kinds: dict[Any, str]) -> None:
        self.canonical, self.weights, self.kinds = canonical, weights, kinds
        self.constants: dict[str, np.ndarray] = {}
        self.variables: dict[bytes, Any] = {}

    def run(self) -> Canonical:
        """The rebuilt module; the numbers that bits are shifted by are new parameters of it."""
        for bits in (1, 2, 4):
            values = shifts(bits)
            name = f"table_shifts_{bits}"
            self.constants[name] = values
            self.variables[values.tobytes()] = relax.Var(name, relax.TensorType(list(values.shape), "float32"))
        parameters = [*self.canonical.module["main"].params, *self.variables.values()]
        module, names = rebuild(self.canonical.module, parameters, {p: p for p in parameters}, self._visit)
        nodes = {new: self.canonical.nodes[old] for new, old in names.items() if old in self.canonical.nodes}
        used = self.canonical.constants | self.constants
        return replace(self.canonical, module=module, nodes=nodes, constants=used)

    def _visit(self, state: Rebuild, _variable: Any, call: Any, args: list[Any]) -> Any:
        if operator_name(call) != "npu.gather" or call.args[0] not in self.kinds or "turned" in call.attrs:
            return state.emit(Call(call.op, args, call.attrs))
        table = call.args[0]
        height, k = shape_of(table)
        return BlockRows(
            lambda name, operands, **attrs: state.emit(dialect.call(name, operands, **attrs)),
            lambda values: self.variables[values.tobytes()], state.builder, BLOCK_TYPES[self.kinds[table]], k,
            self.weights[table.name], table, height, args[1], LAYOUT,
        ).floats()  # fmt: skip
