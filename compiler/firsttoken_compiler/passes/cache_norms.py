"""Low-precision norm caching: what each norm keeps for its consumers, and who computes what again.

`rows`: the norm is computed once, and what every product that follows reads (q, k, v; gate, up) is kept: quantised per
token (int8, int16), or in fp16, where consumers that want integers quantise for themselves.
`statistics`: a few fp32 numbers per row are kept, and every consumer makes its rows out of them.
`off`: no consumer shares anything; each computes the norm, and its quantisation, again.

All ways make the same numbers, to the bit, as long as the type of the rows is the same.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from firsttoken_compiler.passes.complete import Complete
from firsttoken_compiler.passes.quantise import INTEGER, Quantised
from firsttoken_compiler.passes.rebuild import Rebuild, rebuild
from firsttoken_compiler.schedule.norm_definitions import statistics_of
from firsttoken_compiler.tvm import dialect
from firsttoken_compiler.tvm.api import Call, IRModule, bindings_of, dtype_of, items, relax

NORMS = ("npu.rms_norm", "npu.layer_norm")


@dataclass(frozen=True, slots=True)
class NormWay:
    """What a norm keeps: `rows`, `statistics` or nothing (`off`), and where rows lie: `auto`, `scratchpad`, `dram`."""

    keeps: str
    place: str = "auto"


@dataclass(frozen=True)
class NormDecision:
    """What was decided for one norm."""

    name: str
    """Variable of the norm in the canonical module."""
    cached_as: str
    """Type of the rows that are kept, or `off`, or `statistics`."""
    consumers: int


@dataclass(frozen=True)
class CacheNorms:
    """See the module's docstring. Keeps types and names; fuses SwiGLU with the quantisation that follows it.

    `mode`: the type of the rows, or `acts` for that of the activations of each consumer. `ways`: what single norms
    keep, by their variables in the canonical module; all others go `way`.
    """

    mode: str
    way: NormWay
    ways: Mapping[str, NormWay]

    @staticmethod
    def of(norm_cache: str, place: str = "auto", ways: Mapping[str, NormWay] | None = None) -> "CacheNorms":
        """The pass as options say it; `auto` keeps rows where `ways` does not know better."""
        keeps = norm_cache if norm_cache in ("off", "statistics") else "rows"
        mode = norm_cache if norm_cache in (*INTEGER, "fp16") else "acts"
        return CacheNorms(mode, NormWay(keeps, place), ways or {})

    def run(self, quantised: Quantised) -> tuple[Quantised, tuple[NormDecision, ...]]:
        """Rewrites the typed module."""
        return _State(self, quantised).run()


class _State:
    def __init__(self, options: CacheNorms, quantised: Quantised) -> None:
        self.options, self.source = options, quantised
        self.producers: dict[Any, Any] = {}
        self.fused: dict[Any, Any] = {}
        self.consumers: dict[Any, list[str]] = {}
        """Norm → activation types of the products that read it, directly or through their quantisation."""

    def run(self) -> tuple[Quantised, tuple[NormDecision, ...]]:
        function = self.source.module["main"]
        bindings = bindings_of(function)
        self.producers = {b.var: b.value for b in bindings}
        for binding in bindings[:-1]:
            norm = self._norm_read(binding.value)
            if norm is not None:
                self.consumers.setdefault(norm, []).append(self._acts(norm, binding.value))
        parameters = list(function.params)
        env: dict[Any, Any] = {p: p for p in parameters}
        module, names = rebuild(self.source.module, parameters, env, self._visit)
        module = without_dead(module)
        decisions = tuple(
            NormDecision(self.source.names.get(norm.name, norm.name), self._cached_as(norm, acts), len(acts))
            for norm, acts in self.consumers.items()
        )
        # Which activations each product reads is settled now; what follows from it belongs to every plan for the norms.
        return Complete().run(self.source.rebuilt(module, names)), decisions

    def _way(self, norm: Any) -> NormWay:
        return self.options.ways.get(self.source.names.get(norm.name, norm.name), self.options.way)

    def _cached_as(self, norm: Any, acts: list[str]) -> str:
        keeps = self._way(norm).keeps
        if keeps != "rows":
            return keeps
        return self.options.mode if self.options.mode != "acts" else "/".join(dict.fromkeys(acts))

    def _acts(self, norm: Any, product: Any) -> str:
        """Activation type of a product that reads a norm: the mode's, where the weights are integers of ours."""
        acts, own = str(product.attrs["acts"]), not int(product.attrs["stored"]) and int(product.attrs["bits"]) != 16
        integer = self.options.mode in INTEGER and self._way(norm).keeps == "rows"
        return self.options.mode if integer and own else acts

    def _norm_read(self, value: Any) -> Any | None:
        """The norm behind the activations of a product.

        A product on weights that the graph stores quantised counts where it reads the norm as it is: else its
        activations have types of their own.
        """
        if not (isinstance(value, Call) and value.op.name == "npu.linear"):
            return None
        source, quantise = self._quantise_behind(value.args[0])
        if int(value.attrs["stored"]) and (quantise is not None or str(value.attrs["acts"]) != "fp16"):
            return None
        return source if self._is_norm(source) else None

    def _quantise_behind(self, value: Any) -> tuple[Any, Any | None]:
        """(what is quantised, the quantise variable) when `value` is a quantised matrix, else (value, None)."""
        bound = self.producers.get(value)
        if isinstance(bound, relax.TupleGetItem) and self._is(bound.tuple_value, "npu.quantise"):
            return self.producers[bound.tuple_value].args[0], bound.tuple_value
        return value, None

    def _is_norm(self, value: Any) -> bool:
        return any(self._is(value, name) for name in NORMS)

    def _is(self, value: Any, name: str) -> bool:
        bound = self.producers.get(value)
        return isinstance(bound, Call) and bound.op.name == name

    def _visit(self, state: Rebuild, variable: Any, call: Any, args: list[Any]) -> Any:
        if variable in self.consumers and self._serves(variable):
            return state.emit(dialect.call(call.op.name, args, **self._kept(variable)))
        norm = self._norm_read(call)
        if call.op.name != "npu.linear" or (norm is None and int(call.attrs["stored"])):
            return state.emit(Call(call.op, args, call.attrs))
        source, quantise = self._quantise_behind(call.args[0])
        attrs = dialect.plain_attributes(call)
        rest = args[3:] if quantise is not None else args[2:]
        acts = str(attrs["acts"])
        if norm is not None:
            acts = self._acts(norm, call)
            operands = self._normed(state, norm, acts)
        elif acts in INTEGER:
            operands = self._quantised(state, source, acts)
        else:
            operands = [args[0]]
        attrs["acts"] = acts
        return state.emit(dialect.call("npu.linear", [operands[0], args[1], *operands[1:], *rest], **attrs))

    def _serves(self, norm: Any) -> bool:
        """Whether products read the norm in its own type, or quantise it for themselves."""
        return self.options.mode == "fp16" or any(acts not in INTEGER for acts in self.consumers[norm])

    def _kept(self, norm: Any, **changes: str) -> dict[str, Any]:
        """Attributes of a norm whose rows are kept."""
        place = self._way(norm).place
        asked = {"place": place} if place != "auto" and self._way(norm).keeps == "rows" else {}
        return {**dialect.plain_attributes(self.producers[norm]), **changes, **asked}

    def _normed(self, state: Rebuild, norm: Any, acts: str) -> list[Any]:
        """The product's input as its norm keeps it: [matrix] or [matrix, scale]."""
        keeps = self._way(norm).keeps
        call = self.producers[norm]
        if keeps == "rows" and self.options.mode == "fp16" and acts in INTEGER:
            return self._quantised(state, norm, acts)
        out = acts if acts in INTEGER else "float16"
        if keeps == "rows" and out == dtype_of(norm):
            return [state.env[norm]]
        arguments = [state.env.get(a, a) for a in items(call.args)]
        before, state.current = state.current, norm.name
        if keeps == "statistics":
            parts = self._from_statistics(state, norm, arguments, out)
        elif keeps == "rows" and (norm, out) in self.fused:
            parts = self.fused[norm, out]
        else:
            made = state.emit(dialect.call(call.op.name, arguments, **self._kept(norm, out=out)))
            parts = self.fused[norm, out] = _parts(state, made) if acts in INTEGER else [made]
        state.current = before
        return list(parts)

    def _from_statistics(self, state: Rebuild, norm: Any, arguments: list[Any], out: str) -> list[Any]:
        """Rows of one consumer from the numbers that are kept: [matrix] or [matrix, scale]."""
        name = self.producers[norm].op.name.removeprefix("npu.")
        attrs = {"norm": name, "out": out, "eps": float(self.producers[norm].attrs["eps"])}
        if (norm, out) not in self.fused:
            made = state.emit(dialect.call("npu.norm_stats", arguments, **attrs))
            count = len(statistics_of(name, out))
            self.fused[norm, out] = [state.emit(relax.TupleGetItem(made, i)) for i in range(count)]
        numbers = self.fused[norm, out]
        del attrs["eps"]
        rows = state.emit(dialect.call("npu.normalise", [arguments[0], *numbers, *arguments[1:]], **attrs))
        return [rows, numbers[-1]] if out in INTEGER else [rows]

    def _quantised(self, state: Rebuild, source: Any, acts: str) -> list[Any]:
        """Quantises one product's input; SwiGLU does it itself."""
        if self._is(source, "npu.swiglu"):
            call = self.producers[source]
            before, state.current = state.current, source.name
            made = state.emit(dialect.call("npu.swiglu", [state.env.get(a, a) for a in items(call.args)], out=acts))
            state.current = before
        else:
            made = state.emit(dialect.call("npu.quantise", [state.env.get(source, source)], out=acts))
        return _parts(state, made)


def _parts(state: Rebuild, pair: Any) -> list[Any]:
    return [state.emit(relax.TupleGetItem(pair, 0)), state.emit(relax.TupleGetItem(pair, 1))]


def without_dead(module: Any) -> Any:
    """The module without bindings that nothing follows from; TVM's own pass needs time in the square of them."""
    function = module["main"]
    live, blocks = {function.body.body}, []
    for block in reversed(items(function.body.blocks)):
        kept = []
        for binding in reversed(items(block.bindings)):
            if binding.var in live:
                kept.append(binding)
                live.update(_operands(binding.value))
        blocks.append(type(block)(kept[::-1]))
    body = relax.SeqExpr(blocks[::-1], function.body.body)
    return IRModule({"main": relax.Function(function.params, body, function.ret_ty, function.is_pure, function.attrs)})


def _operands(value: Any) -> list[Any]:
    """Variables and constants that the value of a binding reads."""
    if isinstance(value, Call):
        return [argument for argument in items(value.args) if isinstance(argument, relax.Var)]
    if isinstance(value, relax.TupleGetItem):
        return [value.tuple_value]
    return list(value.fields) if isinstance(value, relax.Tuple) else [value]
