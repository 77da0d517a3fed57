"""Low-precision norm caching: what each norm keeps for its consumers, and who computes what again.

`int8`/`int16`: the norm is quantised once, per token, and every product that follows reads that (q, k, v; gate, up).
`fp16`: the norm is kept in fp16; consumers that want integers quantise it themselves.
`off`: no consumer shares anything; each computes the norm, and its quantisation, again.
"""

from dataclasses import dataclass
from typing import Any

from firsttoken_compiler.passes.quantise import INTEGER, Quantised
from firsttoken_compiler.passes.rebuild import Rebuild, rebuild
from firsttoken_compiler.tvm import dialect
from firsttoken_compiler.tvm.api import Call, relax


@dataclass(frozen=True)
class NormDecision:
    """What was decided for one norm."""

    name: str
    """Variable of the norm in the canonical module."""
    cached_as: str
    consumers: int


@dataclass(frozen=True)
class CacheNorms:
    """See the module's docstring. Keeps types and names; fuses SwiGLU with the quantisation that follows it."""

    mode: str

    def run(self, quantised: Quantised) -> tuple[Quantised, tuple[NormDecision, ...]]:
        """Rewrites the typed module."""
        state = _State(self.mode, quantised)
        return state.run()


class _State:
    def __init__(self, mode: str, quantised: Quantised) -> None:
        self.mode, self.source = mode, quantised
        self.producers: dict[Any, Any] = {}
        self.fused: dict[Any, Any] = {}
        self.consumers: dict[Any, int] = {}

    def run(self) -> tuple[Quantised, tuple[NormDecision, ...]]:
        function = self.source.module["main"]
        bindings = [b for block in function.body.blocks for b in block.bindings]
        self.producers = {b.var: b.value for b in bindings}
        for binding in bindings[:-1]:
            self._count(binding.value)
        parameters = list(function.params)
        env: dict[Any, Any] = {p: p for p in parameters}
        module, names = rebuild(self.source.module, parameters, env, self._visit)
        module = _without_dead(module)
        traced = {new: self.source.names.get(old, old) for new, old in names.items()}
        decisions = tuple(
            NormDecision(self.source.names.get(norm.name, norm.name), self.mode, count)
            for norm, count in self.consumers.items()
        )
        return Quantised(module, self.source.packings, traced, self.source.plain), decisions

    def _count(self, call: Any) -> None:
        """Counts the products that read a norm, directly or through their quantisation."""
        if isinstance(call, Call) and call.op.name == "npu.linear" and not int(call.attrs["stored"]):
            norm = self._norm_behind(call.args[0])
            if norm is not None:
                self.consumers[norm] = self.consumers.get(norm, 0) + 1

    def _norm_behind(self, value: Any) -> Any | None:
        value, _ = self._quantise_behind(value)
        return value if self._is_norm(value) else None

    def _quantise_behind(self, value: Any) -> tuple[Any, Any | None]:
        """(what is quantised, the quantise variable) when `value` is a quantised matrix, else (value, None)."""
        bound = self.producers.get(value)
        if isinstance(bound, relax.TupleGetItem) and self._is(bound.tuple_value, "npu.quantise"):
            return self.producers[bound.tuple_value].args[0], bound.tuple_value
        return value, None

    def _is_norm(self, value: Any) -> bool:
        return self._is(value, "npu.rms_norm") or self._is(value, "npu.layer_norm")

    def _is(self, value: Any, name: str) -> bool:
        bound = self.producers.get(value)
        return isinstance(bound, Call) and bound.op.name == name

    def _visit(self, state: Rebuild, _variable: Any, call: Any, args: list[Any]) -> Any:
        if call.op.name != "npu.linear" or int(call.attrs["stored"]):  # what is stored quantised has types of its own
            return state.emit(Call(call.op, args, call.attrs))
        source, quantise = self._quantise_behind(call.args[0])
        attrs = dialect.plain_attributes(call)
        rest = args[3:] if quantise is not None else args[2:]
        acts = str(attrs["acts"])
        if self._is_norm(source):
            if self.mode in INTEGER and int(attrs["bits"]) != 16:
                acts = self.mode
            operands = self._normed(state, source, acts)
        elif acts in INTEGER:
            operands = self._quantised(state, source, acts)
        else:
            operands = [args[0]]
        attrs["acts"] = acts
        return state.emit(dialect.call("npu.linear", [operands[0], args[1], *operands[1:], *rest], **attrs))

    def _normed(self, state: Rebuild, norm: Any, acts: str) -> list[Any]:
        """The product's input as the mode has it: [matrix] or [matrix, scale]."""
        call = self.producers[norm]
        attrs = dialect.plain_attributes(call)
        arguments = [state.env.get(a, a) for a in call.args]
        if self.mode == "fp16":
            return self._quantised(state, norm, acts) if acts in INTEGER else [state.env[norm]]
        attrs["out"] = acts if acts in INTEGER else "float16"
        key = (norm, attrs["out"])
        if self.mode == "off" or key not in self.fused:
            before, state.current = state.current, norm.name
            made = state.emit(dialect.call(call.op.name, arguments, **attrs))
            parts = _parts(state, made) if acts in INTEGER else [made]
            state.current = before
            if self.mode == "off":
                return parts
            self.fused[key] = parts
        return list(self.fused[key])

    def _quantised(self, state: Rebuild, source: Any, acts: str) -> list[Any]:
        """Quantises one product's input; SwiGLU does it itself."""
        if self._is(source, "npu.swiglu"):
            call = self.producers[source]
            before, state.current = state.current, source.name
            made = state.emit(dialect.call("npu.swiglu", [state.env.get(a, a) for a in call.args], out=acts))
            state.current = before
        else:
            made = state.emit(dialect.call("npu.quantise", [state.env.get(source, source)], out=acts))
        return _parts(state, made)


def _parts(state: Rebuild, pair: Any) -> list[Any]:
    return [state.emit(relax.TupleGetItem(pair, 0)), state.emit(relax.TupleGetItem(pair, 1))]


def _without_dead(module: Any) -> Any:
    """The module without bindings that nothing follows from; TVM's own pass needs time in the square of them."""
    from firsttoken_compiler.tvm.api import IRModule

    function = module["main"]
    live, blocks = {function.body.body}, []
    for block in reversed(function.body.blocks):
        kept = []
        for binding in reversed(block.bindings):
            if binding.var in live:
                kept.append(binding)
                live.update(_operands(binding.value))
        blocks.append(type(block)(kept[::-1]))
    body = relax.SeqExpr(blocks[::-1], function.body.body)
    return IRModule({"main": relax.Function(function.params, body, function.ret_ty, function.is_pure, function.attrs)})


def _operands(value: Any) -> list[Any]:
    """Variables and constants that the value of a binding reads."""
    if isinstance(value, Call):
        return [argument for argument in value.args if isinstance(argument, relax.Var)]
    if isinstance(value, relax.TupleGetItem):
        return [value.tuple_value]
    return list(value.fields) if isinstance(value, relax.Tuple) else [value]
