"""Gives every operator its types: weights int4/int8/fp16, activations int8/int16 per token or fp16, the rest fp16.

The residual stream is fp32. Products that the graph returns are fp32, unless the ONNX file declares float16. With
`storage` fp32, fp16 is left to what the matrix unit reads.

After it: products name their weight's packing; integer products read `npu.quantise` of their input, one each.
"""

from dataclasses import dataclass, field, replace
from typing import Any

from firsttoken_compiler.errors import OptionError
from firsttoken_compiler.isa.program import Packing
from firsttoken_compiler.options import HALF, INTEGERS, Precision
from firsttoken_compiler.passes.canonicalise import Canonical
from firsttoken_compiler.passes.patterns import reshaped
from firsttoken_compiler.passes.rebuild import Rebuild, rebuild
from firsttoken_compiler.passes.roles import roles_of
from firsttoken_compiler.passes.stored import Part, Stored, parts
from firsttoken_compiler.passes.weight_formats import Formatted, Matrix, WeightFormats
from firsttoken_compiler.schedule.linear import panel_of
from firsttoken_compiler.target.target import Target
from firsttoken_compiler.tvm import dialect
from firsttoken_compiler.tvm.api import Call, bindings_of, dtype_of, operator_name, relax, shape_of

INTEGER = ("int8", "int16")
BESIDE = " | "
"""Between the names of matrices whose columns lie one behind another."""


@dataclass(frozen=True, slots=True)
class Kept:
    """What a parameter is a part of."""

    matrix: str
    """Of a product, by its initialiser, or a table whose rows are gathered; several have `BESIDE` between them."""
    format: str
    stored: bool = False
    """Whether that is the graph's own format."""


@dataclass
class Quantised:
    """The typed module, the recipe of every weight parameter, and names back to the canonical module."""

    module: Any
    packings: dict[str, Packing]
    names: dict[str, str]
    plain: dict[str, str] = field(default_factory=dict)
    """Parameters that are only converted (norm gammas, biases, tables): parameter → its type."""
    formats: dict[str, Kept] = field(default_factory=dict)
    """Parameters that are matrices, or parts of them; all others are vectors: norms, biases, angles."""

    def rebuilt(self, module: Any, names: dict[str, str]) -> "Quantised":
        """With a module that `rebuild` made of this one, and the names that it gave: new variable → old one."""
        return replace(self, module=module, names={new: self.names.get(old, old) for new, old in names.items()})


@dataclass(frozen=True)
class Quantise:
    """See the module's docstring. Raises OptionError when the target cannot multiply the pair."""

    precision: Precision
    target: Target
    spilled: frozenset[str] = frozenset()
    """Sums of the residual stream, by their variables, that lie in DRAM and are narrowed to fp16 there."""

    def run(self, canonical: Canonical, weights: dict[str, str]) -> Quantised:
        """`weights`: parameter name → initialiser name."""
        state = _State(self.precision, self.target, weights, canonical)
        state.spilled = self.spilled
        return state.run()


class _State:
    """One run: collects the new parameters while the body is rebuilt."""

    def __init__(self, precision: Precision, target: Target, weights: dict[str, str], canonical: Canonical) -> None:
        self.precision, self.target, self.weights, self.canonical = precision, target, weights, canonical
        self.packings: dict[str, Packing] = {}
        self.plain: dict[str, str] = {}
        self.parameters: dict[str, Any] = {}
        self.chosen = WeightFormats(precision, target, roles_of(canonical))
        self.formats: dict[str, Kept] = {}
        self.own: dict[str, Formatted] = {}
        """Float weights of products, by parameter."""
        self.spilled: frozenset[str] = frozenset()

    def run(self) -> Quantised:
        function = self.canonical.module["main"]
        bindings = bindings_of(function)
        outputs = zip(bindings[-1].value.fields, self.canonical.outputs, strict=True)
        self.results = {value for value, name in outputs if name not in self.canonical.narrow}
        self.residual = {value for value in residual_stream(bindings) if value.name not in self.spilled}
        self.angles = {a for b in bindings if operator_name(b.value) == "npu.rope" for a in b.value.args[1:3]}
        self.uses = _uses(bindings)
        items = [binding for binding in bindings if isinstance(binding.value, relax.TupleGetItem)]
        self.items = {(item.value.tuple_value, int(item.value.index)): item.var for item in items}
        env: dict[Any, Any] = {}
        for parameter in function.params:
            if parameter.name not in self.weights and parameter.name not in self.canonical.constants:
                env[parameter] = self._parameter(parameter.name, parameter, self._input_type(parameter, bindings))
        self._declare_weights(bindings, env)
        self.chosen.check()
        env.update({p: self.parameters[p.name] for p in function.params if p.name in self.plain})
        parameters = list(self.parameters.values())
        module, names = rebuild(self.canonical.module, parameters, env, self._visit)
        return Quantised(module, self.packings, names, self.plain, self.formats)

    def _parameter(self, name: str, like: Any, dtype: str, shape: Any | None = None) -> Any:
        if name not in self.parameters:
            self.parameters[name] = relax.Var(name, relax.TensorType(list(shape or shape_of(like)), dtype))
        return self.parameters[name]

    def _input_type(self, parameter: Any, bindings: list[Any]) -> str:
        """Float inputs are fp16, as activations and caches are; masks and rotary angles fp32; token ids int64."""
        dtype = str(parameter.ty.dtype.dtype)
        if self.uses.get(parameter) == {"npu.host"}:
            return dtype
        masks = (list(b.value.args[3:]) for b in bindings if operator_name(b.value) == "npu.attention")
        if not dtype.startswith("float") or parameter in self.angles or any(parameter in mask for mask in masks):
            return dtype
        uses = self.uses.get(parameter, set())
        if uses & VECTOR and uses <= WIDE and self.precision.residual_spill == "fp32":
            return dtype
        return self._type(parameter)

    def _is_between(self, variable: Any, name: str) -> bool:
        """Whether a vector operator's result goes nowhere but to vector operators, the host or out of the graph."""
        uses = self.uses.get(variable, set())
        if name not in VECTOR | {"npu.add", "npu.rms_norm"} or not uses or not uses <= WIDE:
            return False
        if "output" in uses and self.precision.residual_spill == "fp16":
            return False
        return name in VECTOR or bool(uses & (VECTOR | {"output"}))

    def _type(self, value: Any) -> str:
        """How a float lies in memory: what matrix unit or cache read is fp16, everything else as `storage` says."""
        exact = self.precision.storage == "fp32" and not self.uses.get(value, set()) & MATRIX
        return "float32" if exact else "float16"

    def _declare_weights(self, bindings: list[Any], env: dict[Any, Any]) -> None:
        """One parameter per use of a weight: packed for products, converted for everything else."""
        for binding in bindings[:-1]:
            call, name = binding.value, operator_name(binding.value)
            for index, argument in enumerate(call.args if hasattr(call, "args") else ()):
                if not isinstance(argument, relax.Var) or argument in env:
                    continue
                if argument.name in self.weights or argument.name in self.canonical.constants:
                    if name == "npu.linear" and index == 1 and "stored" in call.attrs:
                        self._declare_stored(call, argument)
                    elif name == "npu.linear" and index == 1:
                        self._declare_packed(call, argument)
                    elif name == "npu.gather" and index == 0 and "stored" in call.attrs:
                        self._declare_rows(call, argument)
                    elif name == "npu.gather" and "turned" in call.attrs:
                        self._declare_turned(argument)
                    else:
                        self._declare_plain(argument, argument in self.angles or binding.var in self.angles)
                        if name == "npu.gather" and index == 0 and binding.var not in self.angles:
                            self._declare_table(argument)

    def _declare_plain(self, argument: Any, rotary: bool) -> None:
        """fp16; tables of rotary angles, told by their use, are fp32: long prompts need more than 11 bits."""
        dtype = "float32" if rotary or argument.name in self.canonical.constants else self._type(argument)
        if not dtype_of(argument).startswith("float"):
            dtype = dtype_of(argument)
        if self.plain.setdefault(argument.name, dtype) != dtype:
            raise OptionError(
                f"weight {self.weights[argument.name]} is used both as rotary angles and as something else"
            )
        self._parameter(argument.name, argument, dtype)

    def _declare_table(self, argument: Any) -> None:
        """Floats some of whose rows are gathered; rules may be about them."""
        source, dtype = self.weights.get(argument.name, argument.name), self.plain[argument.name]
        self.chosen.of(argument.name, source, shape_of(argument)[-1])
        self.formats[argument.name] = Kept(f"{source} rows", _FLOATS.get(dtype, dtype))

    def _declare_turned(self, argument: Any) -> None:
        """The transpose of a table, made when the weights are packed."""
        dtype, name = self._type(argument), f"{argument.name}.turned"
        bits = 32 if dtype == "float32" else 16
        self.packings[name] = Packing(self.weights[argument.name], "plain", 0, 0, 0, bits, 0, True)
        self.formats[name] = Kept(f"{self.weights[argument.name]} rows", _FLOATS[dtype])
        self._parameter(name, argument, dtype, shape_of(argument)[::-1])

    def _declare_packed(self, call: Any, argument: Any) -> None:
        """The tensors of a float weight of a product, in the format that options and role give it."""
        attrs, source = call.attrs, self.weights[argument.name]
        matrix = Matrix(
            argument.name, source, int(attrs["k"]), int(attrs["n"]), bool(int(attrs["transposed"])), "kernel" in attrs
        )
        made = self.chosen.made(matrix)
        if self.own.setdefault(argument.name, made) != made:
            raise OptionError(f"weight {source} is used both as stored and transposed: use one orientation")
        for name, part in made.parts.items():
            self._declare_part(_own_name(argument, name), part, Kept(source, self._spelt(made)))

    def _spelt(self, made: Formatted) -> str:
        """A format with what else decides its bytes."""
        if made.format not in INTEGERS:
            return made.format
        groups = "per channel" if self.precision.group == "channel" else f"group {self.precision.group}"
        return f"{made.format} {groups}{' with zero points' * self.precision.asymmetric}"

    def _declare_part(self, name: str, part: Part, kept: Kept) -> None:
        self.packings[name] = part.packing
        self.formats[name] = kept
        self._parameter(name, None, part.dtype, part.shape)

    def _declare_stored(self, call: Any, argument: Any) -> None:
        """What is stored quantised keeps its integers, scales and zero points, whatever the options say."""
        stored = Stored.from_text(str(call.attrs["stored"]))
        for name, part in parts(stored, panel_of(self.target), bool(int(call.attrs["asymmetric"]))).items():
            kept = Kept(stored.source, stored.blocks or _stored_format(stored), True)
            self._declare_part(f"{argument.name}.{name}{stored.group}", part, kept)

    def _declare_rows(self, call: Any, argument: Any) -> None:
        """A table whose rows are gathered as they are stored: one panel as wide as a row."""
        stored = Stored.from_text(str(call.attrs["stored"]))
        own, made = _rows_name(call, argument), parts(stored, stored.n, False)
        scales = stored.scales is not None and stored.scales.layout != "one"
        self.packings[own] = made["w_scale" if scales else "w"].packing
        ours = stored.layout.startswith("rows:")
        if ours:
            self.chosen.of(argument.name, stored.source, shape_of(argument)[-1])
        self.formats[own] = Kept(f"{stored.source} rows", _rows_format(call, stored), not ours)
        self._parameter(own, argument, str(call.attrs["out"]), (stored.k, int(call.attrs["width"])))

    def _stored(self, state: Rebuild, variable: Any, call: Any, args: list[Any]) -> Any:
        """A product on stored weights: its types are those of the graph."""
        attrs = dialect.plain_attributes(call)
        stored = Stored.from_text(str(attrs.pop("stored")))
        names = parts(stored, panel_of(self.target), bool(attrs["asymmetric"]))
        weights = [self.parameters[f"{call.args[1].name}.{name}{stored.group}"] for name in names]
        late = len(args) - int(attrs["bias"]) - int(attrs["residual"])
        uses = self.uses.get(variable, set())
        wide = variable in self.results or variable in self.residual or bool(uses & VECTOR and uses <= WIDE)
        wide = wide and variable.name not in self.spilled
        if stored.blocks:
            attrs["blocks"] = stored.blocks
        attrs.update(bits=stored.bits, group=stored.group, stored=1, out="float32" if wide else self._type(variable))
        del attrs["transposed"]
        operands = [args[0], weights[0], *args[2:late], *weights[1:], *args[late:]]
        return state.emit(dialect.call("npu.linear", operands, **attrs))

    def _visit(self, state: Rebuild, variable: Any, call: Any, args: list[Any]) -> Any:
        name = call.op.name
        if call.attrs is not None and "exact" in call.attrs:
            attrs = dialect.plain_attributes(call)
            del attrs["exact"]
            if attrs.pop("stored", None):
                args = [self.parameters[_rows_name(call, call.args[0])], *args[1:]]
                attrs.pop("plane", None)
            return state.emit(dialect.call(name, args, **attrs))
        if not name.startswith("npu."):
            return self._reshape(state, args[0], shape_of(call)) if name == "relax.reshape" else state.emit(call)
        attrs = dialect.plain_attributes(call)
        if name == "npu.host":
            return self._host(state, variable, args, attrs)
        if name == "npu.linear":
            return self._linear(state, variable, call, args, attrs)
        between = self._is_between(variable, name) and variable.name not in self.spilled
        wide = variable in self.angles or variable in self.residual or between
        if attrs.get("out") != "bool":
            attrs["out"] = "float32" if wide else self._type(variable)
        if name in ("npu.row", "npu.columns"):
            attrs["out"] = dtype_of(args[0])
        if attrs.pop("turned", 0):
            args = [self.parameters[f"{call.args[0].name}.turned"], *args[1:]]
        return state.emit(dialect.call(name, args, **attrs))

    def _reshape(self, state: Rebuild, source: Any, shape: tuple[int, ...]) -> Any:
        """A reshape of what is no reshape itself: TVM would make one kernel of two."""
        bound = state.builder.lookup_binding(source)
        while isinstance(bound, Call) and bound.op.name == "relax.reshape":
            source = bound.args[0]
            bound = state.builder.lookup_binding(source)
        return reshaped(state, source, shape)

    def _host(self, state: Rebuild, variable: Any, args: list[Any], attrs: dict[str, Any]) -> Any:
        """The host converts: floats that the NPU goes on with arrive in its types, everything else as ONNX has it."""
        results = dialect.decode_results(str(attrs["results"]))
        typed = []
        for index, (shape, dtype) in enumerate(results):
            item = self.items.get((variable, index))
            uses = self.uses.get(item, set())
            if dtype in ("float32", "float16") and uses - {"npu.host", "output"}:
                dtype = "float32" if uses <= WIDE or item in self.angles else self._type(item)
            typed.append((shape, dtype))
        return state.emit(dialect.call("npu.host", args, **{**attrs, "results": dialect.encode_results(typed)}))

    def _linear(self, state: Rebuild, variable: Any, call: Any, args: list[Any], attrs: dict[str, Any]) -> Any:
        if "stored" in attrs:
            return self._stored(state, variable, call, args)
        weight = call.args[1]
        made = self.own[weight.name]
        first, *others = [self.parameters[_own_name(weight, name)] for name in made.parts]
        acts = self.precision.acts if made.format != HALF else HALF
        operands = [args[0], first]
        if acts in INTEGER:
            quantised = state.emit(dialect.call("npu.quantise", [args[0]], out=acts))
            operands[0] = state.emit(relax.TupleGetItem(quantised, 0))
            operands.append(state.emit(relax.TupleGetItem(quantised, 1)))
        wide = variable in self.results or variable in self.residual
        attrs.update(acts=acts, stored=0, **made.attributes)
        attrs["out"] = "float32" if wide else self._type(variable)
        del attrs["transposed"]
        attrs.pop("kernel", None)
        return state.emit(dialect.call("npu.linear", [*operands, *others, *args[2:]], **attrs))


def _stored_format(stored: Stored) -> str:
    """Integers of the graph, in words."""
    groups = f"group {stored.group}" if stored.group < stored.k else "per channel"
    return f"int{stored.bits} {groups}{' with zero points' * (stored.zeros is not None)}"


def _rows_format(call: Any, stored: Stored) -> str:
    """The format of a gathered table, of which this is all or a plane."""
    kind = stored.layout.split(":")
    return kind[1] if len(kind) > 1 else str(call.attrs["out"])


_FLOATS = {"float16": "fp16", "float32": "fp32"}


def _own_name(weight: Any, operand: str) -> str:
    """The parameter of a tensor of a float weight."""
    return f"{weight.name}.{_OWN.get(operand, operand)}"


_OWN = {"w": "packed", "w_scale": "scales", "w_zero": "zeros"}


def _rows_name(call: Any, table: Any) -> str:
    """The parameter of a table, or of a plane of its blocks, whose rows are gathered as they are stored."""
    plane = f".{call.attrs['plane']}" if "plane" in call.attrs else ""
    return f"{table.name}{plane}.rows"


VECTOR = frozenset(("npu.map", "npu.reduce", "npu.softmax", "npu.layer_norm"))
"""Vector operators that read and write either float type."""
WIDE = VECTOR | {"npu.add", "npu.rms_norm", "mask", "residual", "npu.host", "output"}
"""Uses that take fp32: sums, norms, masks that are added to scores."""
MATRIX = frozenset(("npu.linear", "npu.attention", "npu.kv_append", "npu.windows"))
"""Uses that take fp16 at most: operands of products, keys and values."""


def _uses(bindings: list[Any]) -> dict[Any, set[str]]:
    """By value the operators that read it, through reshapes; `output` for what the graph returns."""
    uses: dict[Any, set[str]] = {}
    for binding in reversed(bindings):
        call = binding.value
        if not isinstance(call, Call):
            for value in getattr(call, "fields", ()):
                uses.setdefault(value, set()).add("output")
            continue
        name = operator_name(call)
        through = uses.get(binding.var, set()) if name in ("relax.reshape", "npu.row", "npu.columns") else None
        for index, argument in enumerate(call.args):
            if through is not None:
                uses.setdefault(argument, set()).update(through)
                continue
            last = index == len(call.args) - 1
            role = "mask" if name == "npu.attention" and index == 3 else name
            role = "residual" if name == "npu.linear" and last and int(call.attrs["residual"]) else role
            uses.setdefault(argument, set()).add(role)
    return uses


def residual_stream(bindings: list[Any]) -> set[Any]:
    """Sums that only norms and further sums read: they are kept in fp32, as they add up over all layers."""
    sums: set[Any] = set()
    other: set[Any] = set()
    for binding in bindings:
        call, name = binding.value, operator_name(binding.value)
        if name == "npu.add" or (name == "npu.linear" and int(call.attrs["residual"])):
            sums.add(binding.var)
        last = len(call.args) - 1 if isinstance(call, Call) else 0
        for index, argument in enumerate(call.args if isinstance(call, Call) else ()):
            added = name == "npu.linear" and index == last and int(call.attrs["residual"])
            normed = name in ("npu.rms_norm", "npu.layer_norm") and index == 0
            if not (added or normed or name in ("npu.add", "npu.row")):
                other.add(argument)
        if not isinstance(call, Call):
            other.update(getattr(call, "fields", ()))
    rows = {b.var: b.value.args[0] for b in bindings if operator_name(b.value) == "npu.row"}
    return {
        value
        for value in sums
        if value not in other and all(row not in other for row, of in rows.items() if of == value)
    }
