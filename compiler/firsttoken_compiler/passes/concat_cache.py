"""A graph that concatenates its cache: rows before and rows of this run are copied together, attention reads the copy.

Keys and values are still appended in place, which is what the next run is given. The copies live from their layer's
append to its attention, in the scratchpad where they fit, else in DRAM.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from firsttoken_compiler.passes.quantise import Quantised
from firsttoken_compiler.passes.rebuild import Rebuild, rebuild
from firsttoken_compiler.tvm import dialect
from firsttoken_compiler.tvm.api import Call, dtype_of, operator_name, relax, shape_of

APPENDS = ("npu.kv_append", "npu.kv_quantise")


@dataclass(frozen=True)
class ConcatCache:
    """See the module's docstring; without `wanted`, or without rows before this run's, everything stays as it is."""

    wanted: bool

    def run(self, quantised: Quantised) -> Quantised:
        """The module with a copy of every cache that an attention reads."""
        grown = _grown(quantised.module) if self.wanted else set()
        if not grown:
            return quantised

        def visit(state: Rebuild, _variable: Any, call: Any, args: list[Any]) -> Any:
            if call.op.name == "npu.attention":
                caches = [
                    _copy(state, a) if old in grown else a for old, a in zip(call.args[1:3], args[1:3], strict=True)
                ]
                args = [args[0], *caches, *args[3:]]
            return state.emit(Call(call.op, args, call.attrs))

        parameters = list(quantised.module["main"].params)
        return quantised.rebuilt(*rebuild(quantised.module, parameters, {p: p for p in parameters}, visit))


def _grown(module: Any) -> set[Any]:
    """Variables that hold keys or values behind rows of earlier runs; scales are not among them."""
    bindings = [binding for block in module["main"].body.blocks for binding in block.bindings]
    made = {b.var for b in bindings if operator_name(b.value) in APPENDS and int(b.value.attrs["past"]) > 0}
    integers = {
        b.var
        for b in bindings
        if isinstance(b.value, relax.TupleGetItem) and b.value.tuple_value in made and b.value.index == 0
    }
    return made | integers


def _copy(state: Rebuild, cache: Any) -> Any:
    """All rows of all heads, one below the other, in memory of their own."""
    shape = shape_of(cache)
    rows = state.emit(relax.op.reshape(cache, [shape[0] * shape[1], shape[2]]))
    copied = state.emit(dialect.call("npu.concat", [rows], axis=0, out=dtype_of(cache)))
    return state.emit(relax.op.reshape(copied, list(shape)))
