"""Rebuilding a straight-line Relax function call by call: the loop that the precision passes share."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from firsttoken_compiler.tvm.api import Call, bindings_of, items, relax

Visit = Callable[["Rebuild", Any, Any, list[Any]], Any]
"""(rebuild, old variable, old call, new arguments) → new expression bound in its place."""


@dataclass
class Rebuild:
    """A function under construction; `env` maps old variables to new expressions."""

    builder: Any
    env: dict[Any, Any]
    names: dict[str, str] = field(default_factory=dict)
    """New variable name → name of the old variable that it stands for."""
    current: str = ""

    def emit(self, call: Any) -> Any:
        """Emits a call on behalf of the old variable being visited."""
        variable = self.builder.emit(call)
        self.names[variable.name] = self.current
        return variable


def reads(value: Any) -> list[Any]:
    """What a bound expression reads, in order."""
    if isinstance(value, Call):
        return items(value.args)
    if isinstance(value, relax.Tuple):
        return items(value.fields)
    return [value.tuple_value] if isinstance(value, relax.TupleGetItem) else [value]


def rebuild(
    module: Any, parameters: list[Any], env: dict[Any, Any], visit: Visit,
    more: Callable[[Rebuild], list[Any]] = lambda _: [],
) -> tuple[Any, dict[str, str]]:  # fmt: skip
    """A module whose `main` has `parameters` and the visited bindings of the old one, and its names.

    `env` starts with what the old parameters became. `more`: what is returned behind the results of the old module.
    """
    function = module["main"]
    state = Rebuild(relax.BlockBuilder(), env)
    bindings = bindings_of(function)
    outputs = bindings[-1].value.fields
    with state.builder.function("main", params=parameters):
        with state.builder.dataflow():
            for binding in bindings[:-1]:
                state.current = binding.var.name
                value = binding.value
                if isinstance(value, Call):
                    arguments = [env.get(a, a) for a in items(value.args)]
                    state.env[binding.var] = visit(state, binding.var, value, arguments)
                elif isinstance(value, relax.TupleGetItem):
                    pair = env.get(value.tuple_value, value.tuple_value)
                    known = isinstance(pair, relax.Tuple)
                    item = pair.fields[value.index] if known else state.emit(relax.TupleGetItem(pair, value.index))
                    state.env[binding.var] = item
                else:
                    state.env[binding.var] = env.get(value, value)
            result = state.builder.emit_output(relax.Tuple([env[value] for value in outputs] + more(state)))
        state.builder.emit_func_output(result)
    return state.builder.get(), state.names
