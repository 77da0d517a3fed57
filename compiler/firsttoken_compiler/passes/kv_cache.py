"""Keys and values are kept as int8 with an fp16 scale per token and head, quantised once, when they are appended.

npu.kv_append becomes npu.kv_quantise, whose scales are a graph output of their own beside the integers, as those of the
rows before them are a graph input. Attention reads integers and scales. A prompt without rows before it reads the cache
that it has just filled, not its own exact keys and values, so that every later token sees what the prompt saw.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Final

from firsttoken_compiler.errors import OptionError
from firsttoken_compiler.passes.canonicalise import Canonical
from firsttoken_compiler.passes.concat_cache import ConcatCache
from firsttoken_compiler.passes.quantise import Quantised
from firsttoken_compiler.passes.rebuild import Rebuild, rebuild
from firsttoken_compiler.tvm import dialect
from firsttoken_compiler.tvm.api import Call, bindings_of, operator_name, relax, shape_of

SCALES: Final = ".scales"
"""Follows the name of a cache in the name of its scales."""


@dataclass(frozen=True)
class KvCache:
    """See the module's docstring. `kind` fp16 leaves types as they are; `concat` adds the copies of `ConcatCache`.

    Raises OptionError where the graph keeps no keys and values, or reads them otherwise than by attention.
    """

    kind: str
    concat: bool = False

    def run(
        self, quantised: Quantised, canonical: Canonical, inputs: dict[str, str]
    ) -> tuple[Quantised, Canonical, dict[str, str]]:
        """The typed module, the names of its outputs, and parameter → graph input, with scales."""
        if self.kind != "fp16":
            quantised, canonical, inputs = _State(quantised, canonical, inputs).run()
        return ConcatCache(self.concat).run(quantised), canonical, inputs


class _State:
    """One run: caches by the variable that appends to them."""

    def __init__(self, quantised: Quantised, canonical: Canonical, inputs: dict[str, str]) -> None:
        self.quantised, self.canonical, self.inputs = quantised, canonical, inputs
        bindings = bindings_of(quantised.module["main"])
        self.bindings = bindings[:-1]
        self.returned = list(bindings[-1].value.fields)
        self.appends = {
            b.var: b.value
            for b in self.bindings
            if operator_name(b.value) == "npu.kv_append" and b.var in self.returned
        }
        """Those that the graph returns; what else is appended for nobody goes with what is dead."""
        self.fresh = {(c.args[0], int(c.attrs["kv_heads"])): v for v, c in self.appends.items() if len(c.args) == 1}
        """(matrix, heads) → the cache that it alone fills."""
        self.made: dict[Any, tuple[Any, Any]] = {}

    def run(self) -> tuple[Quantised, Canonical, dict[str, str]]:
        self._check()
        env: dict[Any, Any] = {}
        parameters: list[Any] = []
        inputs = dict(self.inputs)
        pasts = {call.args[1] for call in self.appends.values() if len(call.args) > 1}
        for parameter in self.quantised.module["main"].params:
            env[parameter] = parameter
            parameters.append(parameter)
            if parameter in pasts:
                shape = shape_of(parameter)
                env[parameter] = relax.Var(parameter.name, relax.TensorType(list(shape), "int8"))
                scales = relax.Var(parameter.name + SCALES, relax.TensorType([*shape[:2], 1], "float16"))
                env[parameter, SCALES] = scales
                inputs[scales.name] = self.inputs[parameter.name] + SCALES
                parameters[-1:] = [env[parameter], scales]
        module, names = rebuild(self.quantised.module, parameters, env, self._visit, self._scales)
        outputs = [name + SCALES for value, name in self._outputs() if value in self.appends]
        canonical = replace(self.canonical, outputs=(*self.canonical.outputs, *outputs))
        return self.quantised.rebuilt(module, names), canonical, inputs

    def _outputs(self) -> list[tuple[Any, str]]:
        return list(zip(self.returned, self.canonical.outputs, strict=True))

    def _check(self) -> None:
        """Caches are read by attention and returned, and what they grow out of is read by nothing else."""
        if not self.appends:
            raise OptionError(
                "--kv-cache int8: the graph keeps no keys and values (no output is a cache that this run's rows are "
                "appended to); choose --kv-cache fp16, or export the graph with its cache"
            )
        grown = {call.args[1]: v for v, call in self.appends.items() if len(call.args) > 1}
        known = {**{value: value for value in self.appends}, **grown}
        names = dict(self._outputs())
        for variable in self.appends:
            if self.returned.count(variable) > 1:
                twice = f"the cache {self._named(variable, names)} is returned twice"
                raise OptionError(f"--kv-cache int8: {twice}; choose --kv-cache fp16")
        for binding in self.bindings:
            if binding.var in self.appends:
                continue
            for index, value in enumerate(binding.value.args if isinstance(binding.value, Call) else ()):
                if value in known and not (operator_name(binding.value) == "npu.attention" and index in (1, 2)):
                    raise OptionError(
                        f"--kv-cache int8: the cache {self._named(known[value], names)} is read by "
                        f"{operator_name(binding.value)}, which takes no int8 rows; choose --kv-cache fp16"
                    )

    def _named(self, variable: Any, names: dict[Any, str]) -> str:
        return repr(names.get(variable, variable.name))

    def _visit(self, state: Rebuild, variable: Any, call: Any, args: list[Any]) -> Any:
        if variable in self.appends:
            return self._cache(state, variable)[0]
        caches = self._caches_of(call) if call.op.name == "npu.attention" else None
        if caches is None:
            return state.emit(Call(call.op, args, call.attrs))
        (keys, key_scales), (values, value_scales) = (self._cache(state, cache) for cache in caches)
        operands = [args[0], keys, values, *args[3:], key_scales, value_scales]
        return state.emit(Call(call.op, operands, call.attrs))

    def _caches_of(self, call: Any) -> list[Any] | None:
        """The caches that hold what an attention reads as keys and values; None for an attention without any."""
        heads = int(call.attrs["kv_heads"])
        found = [v if v in self.appends else self.fresh.get((v, heads)) for v in call.args[1:3]]
        if found.count(None) == 1:
            raise OptionError(
                "--kv-cache int8: an attention reads a cache on one side and none on the other; choose --kv-cache fp16"
            )
        return None if found[0] is None else found

    def _cache(self, state: Rebuild, variable: Any) -> tuple[Any, Any]:
        """(integers, scales) of a cache, quantised where it is first read."""
        if variable not in self.made:
            call, before = self.appends[variable], state.current
            past = [state.env[call.args[1]], state.env[call.args[1], SCALES]] if len(call.args) > 1 else []
            attrs = {name: dialect.plain_attributes(call)[name] for name in ("kv_heads", "past")}
            state.current = variable.name
            pair = state.emit(dialect.call("npu.kv_quantise", [state.env[call.args[0]], *past], **attrs))
            self.made[variable] = (state.emit(relax.TupleGetItem(pair, 0)), state.emit(relax.TupleGetItem(pair, 1)))
            state.current = before
        return self.made[variable]

    def _scales(self, state: Rebuild) -> list[Any]:
        """The scales of the caches, in the order in which the graph returns these."""
        return [self._cache(state, value)[1] for value in self.returned if value in self.appends]
