"""Relax as exporters spell it → the canonical `npu.*` operators on matrices `[tokens, features]`.

Works from the outputs: for each needed value the largest pattern that ends there is taken, what it reads becomes
needed. After it: every binding is an `npu.*` call of 2-D operands (key and value caches are 3-D); each call knows its
ONNX nodes.
"""

import math
from dataclasses import dataclass, field
from typing import Any, Final

from firsttoken_compiler.errors import StudentError
from firsttoken_compiler.frontend.importer import Imported, close_on_error, unsupported_message
from firsttoken_compiler.frontend.widen import declared_types
from firsttoken_compiler.passes import views
from firsttoken_compiler.passes.attention_patterns import cache_parts, emit_append
from firsttoken_compiler.passes.host import HostSite, base_shape
from firsttoken_compiler.passes.patterns import Context, Match, Rule, row_major
from firsttoken_compiler.passes.rules import RULES
from firsttoken_compiler.passes.views import UnsupportedView, View
from firsttoken_compiler.tvm import dialect
from firsttoken_compiler.tvm.api import Call, IRModule, bindings_of, dtype_of, is_static, items, relax, shape_of

Plan = dict[Any, tuple[Rule, Match]]
FLOAT16 = 10
"""ONNX's element type."""


@dataclass
class Canonical:
    """The rewritten module, and the ONNX nodes behind each of its variables."""

    module: Any
    nodes: dict[str, tuple[str, ...]] = field(default_factory=dict)
    constants: dict[str, Any] = field(default_factory=dict)
    """Parameters whose values the pass made itself (rotary tables read out of constants): name → array."""
    outputs: tuple[str, ...] = ()
    """ONNX names of the outputs, in order."""
    narrow: frozenset[str] = frozenset()
    """Outputs that the ONNX graph declares as float16."""
    hosts: dict[int, HostSite] = field(default_factory=dict)
    """Calls of the host by their segment."""
    left: dict[str, str] = field(default_factory=dict)
    """ONNX nodes that no rule covers → why. The module is then good for nothing but to be tried again without them."""


@dataclass(frozen=True)
class Canonicalise:
    """See the module's docstring."""

    def run(self, imported: Imported) -> Canonical:
        """Rewrites the imported function; raises StudentError listing every operator that no pattern covers."""
        canonical = self.attempt(imported)
        if canonical.left:
            raise StudentError(unsupported_message(imported.student, canonical.left))
        return canonical

    def attempt(self, imported: Imported) -> Canonical:
        """The same, with the nodes that no pattern covers in `left`."""
        function = imported.module["main"]
        bindings = bindings_of(function)
        values = {binding.var: binding.value for binding in bindings}
        outputs = _outputs(function.body.body, values)
        left = dict(imported.unreadable)
        plan = _plan(imported, bindings, values, outputs, left)
        return _emit(imported, function, bindings, plan, outputs, left)


def _outputs(body: Any, values: dict[Any, Any]) -> list[Any]:
    while body in values and isinstance(values[body], (relax.Var, relax.Tuple)):
        body = values[body]
    fields = list(body.fields) if isinstance(body, relax.Tuple) else [body]
    return [_resolve(value, values) for value in fields]


def _resolve(value: Any, values: dict[Any, Any]) -> Any:
    while value in values and isinstance(values[value], relax.Var):
        value = values[value]
    return value


def _plan(
    imported: Imported, bindings: list[Any], values: dict[Any, Any], outputs: list[Any], left: dict[str, str]
) -> Plan:
    """Chooses a rule for every needed value, walking backwards; nodes that no rule covers go to `left`."""
    context = Context(imported, values, returned=frozenset(outputs))
    reads = {node.name: [imported.values.get(name) for name in node.input] for node in imported.student.graph.node}
    needed = set(outputs)
    plan: Plan = {}
    for binding in reversed(bindings):
        variable, value = binding.var, binding.value
        if variable not in needed:
            continue
        if isinstance(value, relax.Var):
            needed.add(value)
            continue
        try:
            found = _first_match(context, variable, value)
            reason = NO_RULE
        except FAILURES as error:
            found, reason = None, _reason(error)
        if found is None:
            node = _leave(imported, variable, reason, left)
            needed.update(operand for operand in reads[node] if isinstance(operand, relax.Var))
            continue
        plan[variable] = found
        needed.update(leaf for leaf in found[1].leaves if isinstance(leaf, relax.Var))
    return plan


NO_RULE: Final = "no NPU operator for this use"
FAILURES = (
    UnsupportedView, ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError,
)  # fmt: skip
"""What a graph that no exporter writes can provoke in a rule, besides its own refusals."""


def _reason(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return text if isinstance(error, UnsupportedView) else f"{type(error).__name__}: {text.splitlines()[-1][-200:]}"


def _leave(imported: Imported, variable: Any, reason: str, left: dict[str, str]) -> str:
    """Leaves the variable's node to the host; raises StudentError for what is no node's."""
    node = _node_of(imported, variable)
    if node not in imported.nodes:
        raise StudentError(f"{imported.student.name}: {node!r} cannot be compiled: {reason}")
    left.setdefault(node, reason)
    return node


def _operator(value: Any) -> str:
    """Name of a call's operator, of the kind of expression for everything else."""
    called = value.op if isinstance(value, Call) else value
    return str(getattr(called, "name", type(called).__name__))


def _first_match(context: Context, variable: Any, value: Any) -> tuple[Rule, Match] | None:
    for rule in RULES.get(_operator(value), ()):
        match = rule.match(context, variable, value)
        if match is not None:
            return rule, match
    return None


def _emit(
    imported: Imported, function: Any, bindings: list[Any], plan: Plan, outputs: list[Any], left: dict[str, str]
) -> Canonical:
    """Builds the new function: parameters become matrices, rules emit their calls."""
    builder = relax.BlockBuilder()
    with close_on_error(builder):
        return _Emission(builder, imported, plan, left).run(function, bindings, outputs)


class _Emission:
    """The new function under construction."""

    def __init__(self, builder: Any, imported: Imported, plan: Plan, left: dict[str, str]) -> None:
        self.builder, self.imported, self.plan, self.left = builder, imported, plan, left
        self.env: dict[Any, View] = {}
        self.emitted: dict[str, tuple[Any, Match]] = {}

    def run(self, function: Any, bindings: list[Any], outputs: list[Any]) -> Canonical:
        imported, builder, env = self.imported, self.builder, self.env
        parameters = []
        self.values = {b.var: b.value for b in bindings}
        caches = _caches(bindings, self.values)
        for parameter in function.params:
            flat = relax.Var(parameter.name, _flat_type(parameter, parameter in caches))
            parameters.append(flat)
            env[parameter] = _parameter_view(parameter, flat)
        self.context = Context(imported, self.values, returned=frozenset(outputs))
        self.context.parameters = {p.name: p for p in parameters}
        with builder.function("main", params=parameters):
            with builder.dataflow():
                for binding in bindings:
                    self._binding(binding)
                names = [value.name for value in imported.student.graph.output]
                result = builder.emit_output(relax.Tuple(self._results(names, outputs)))
            builder.emit_func_output(result, params=None)
        module = builder.get()
        extra = self.context.constants
        if extra:
            module = _with_parameters(module, [self.context.constant_vars[name] for name in extra])
        owners = _owners(module)
        bases = {v: env[v].base.name for v in self.plan if v in env}
        nodes = _provenance(imported, self.emitted, {v: owners.get(base, base) for v, base in bases.items()})
        _trace_turns(module, nodes)
        declared = declared_types(imported.student)
        narrow = frozenset(name for name in names if declared[name] == FLOAT16)
        return Canonical(module, nodes, extra, tuple(names), narrow, self.context.hosts, self.left)

    def _binding(self, binding: Any) -> None:
        """What a rule refuses is left to the host, and its results stand in, so that all refusals show at once."""
        variable, env = binding.var, self.env
        if variable not in self.plan:
            if isinstance(binding.value, relax.Var) and binding.value in env:
                env[variable] = env[binding.value]
            elif isinstance(variable.ty, relax.TensorType) and self.left:
                env[variable] = self._stand_in(variable)
            return
        rule, match = self.plan[variable]
        try:
            view = rule.emit(self.context, self.builder, match, env)
            if isinstance(variable.ty, relax.TensorType) and view.shape != shape_of(variable):
                raise UnsupportedView(f"a result of shape {list(shape_of(variable))} laid out as {view.axes}")
        except FAILURES as error:
            lost = [] if _operator(binding.value) != "npu.raw_host" else _unreachable(binding.value, env)
            for covered in lost or (*match.covered, variable):
                _leave(self.imported, covered, _reason(error), self.left)
            view = self._stand_in(variable)
        env[variable] = view
        for name in self.context.take_emitted():
            self.emitted[name] = (variable, match)

    def _stand_in(self, variable: Any) -> View:
        """A value out of nothing in place of one that the host is going to make."""
        if not isinstance(variable.ty, relax.TensorType):
            return View(relax.Var("lost", variable.ty), "", 1, 1)
        shape = shape_of(variable) if is_static(variable) else ()
        made = self.builder.emit(dialect.raw_host([], [(base_shape(shape), dtype_of(variable))], 0))
        return views.dense(self.builder.emit(relax.TupleGetItem(made, 0)), shape)

    def _results(self, names: list[str], outputs: list[Any]) -> list[Any]:
        """What the graph returns: every output a value of its own that lies in memory as the ONNX tensor does."""
        made = {name: node.name for node in self.imported.student.graph.node for name in node.output}
        bases: list[Any] = []
        for name, value in zip(names, outputs, strict=True):
            view = self.env.get(value)
            rows = "hmd" if view is not None and len(shape_of(view.base)) == 3 else "mhd"
            if view is not None and rows == "mhd" and view.repeat == 1 and _is_cache(view):
                view = emit_append(self.context, self.builder, view)
                rows = "hmd"
                for emitted in self.context.take_emitted():
                    self.emitted[emitted] = (value, Match({}, (), ()))
            if view is not None and rows == "mhd" and view.dims is None and not view.is_laid_out("mn"):
                view = row_major(self.builder, view) if view.is_laid_out("nm") and view.repeat == 1 else view
            own = view is not None and view.base.name not in self.context.parameters and view.base not in bases
            if view is None or not own or not (view.is_laid_out(rows) or view.is_laid_out("mn")):
                if name not in made:
                    raise StudentError(f"{self.imported.student.name}: output {name!r} is computed by no node")
                what = f"laid out as {view.axes}" if view is not None and own else "that is an input or a constant"
                self.left.setdefault(made[name], f"a graph output {what}")
                view = self._stand_in(value) if view is None or not own else view
            bases.append(view.base)
        return bases


def _caches(bindings: list[Any], values: dict[Any, Any]) -> set[Any]:
    """The values that attention takes as past keys and values, or that rows are appended to."""
    calls = [b.value for b in bindings if _operator(b.value) == "npu.raw_attention"]
    starts = [(call, int(call.attrs["past_at"])) for call in calls]
    concats = [b.value for b in bindings if _operator(b.value) == "relax.concat"]
    appended = [parts for value in concats if (parts := cache_parts(values, value)) is not None]
    return {arg for call, at in starts if at for arg in call.args[at : at + 2]} | {past for past, _ in appended}


def _flat_type(parameter: Any, cache: bool) -> Any:
    """A matrix over all leading axes, `[n]` for one axis, `[heads, rows, width]` for a cache."""
    shape = shape_of(parameter)
    if cache and len(shape) == 4 and shape[0] == 1:
        shape = shape[1:]
    elif len(shape) > 2:
        shape = (math.prod(shape[:-1]), shape[-1])
    return relax.TensorType(list(shape), str(parameter.ty.dtype.dtype))


def _unreachable(call: Any, env: dict[Any, View]) -> list[Any]:
    """Operands of the host that no strides describe: what makes them joins the host."""
    found = []
    for argument in items(call.args):
        try:
            views.strides(env[argument])
        except UnsupportedView:
            found.append(argument)
        except KeyError:
            continue
    return found


def _is_cache(view: View) -> bool:
    """Keys or values by heads over a matrix by tokens, which the graph returns."""
    if len(shape_of(view.base)) != 2 or len(view.axes) != 4:
        return False
    return view.dims is None and view.heads > 1 and view.is_laid_out("hmd")


def _parameter_view(parameter: Any, flat: Any) -> View:
    shape = shape_of(parameter)
    if len(shape_of(flat)) == 3:
        return View(flat, "1hmd", shape[2], shape[1] * shape[3], shape[1])
    return views.dense(flat, shape)


def _with_parameters(module: Any, extra: list[Any]) -> Any:
    function = module["main"]
    wider = relax.Function(
        list(function.params) + extra, function.body, function.ret_ty, function.is_pure, function.attrs
    )
    return IRModule({"main": wider})


def _owners(module: Any) -> dict[str, str]:
    """The call behind each result that is one of several, and behind each that was put into other rows."""
    owners: dict[str, str] = {}
    for binding in bindings_of(module["main"]):
        if isinstance(binding.value, relax.TupleGetItem):
            source = binding.value.tuple_value.name
        elif _operator(binding.value) == "relax.reshape":
            source = getattr(binding.value.args[0], "name", "")
        else:
            continue
        owners[binding.var.name] = owners.get(source, source)
    return owners


def _node_of(imported: Imported, variable: Any) -> str:
    return imported.origin.get(variable.name, variable.name)


def _trace_turns(module: Any, nodes: dict[str, tuple[str, ...]]) -> None:
    """A transposition between operators belongs to the nodes of the first that reads it, an output's to its maker's."""
    bindings = bindings_of(module["main"])
    for turn in bindings:
        if _operator(turn.value) != "npu.transpose" or turn.var.name in nodes:
            continue
        made, nodes[turn.var.name] = {turn.var}, nodes.get(getattr(turn.value.args[0], "name", ""), ())
        for binding in bindings:
            read = binding.value.args if isinstance(binding.value, Call) else ()
            if any(part in made for part in read):
                made.add(binding.var)
                if binding.var.name in nodes:
                    nodes[turn.var.name] = nodes[binding.var.name]
                    break


def _provenance(
    imported: Imported, emitted: dict[str, tuple[Any, Match]], bases: dict[Any, str]
) -> dict[str, tuple[str, ...]]:
    """ONNX nodes of each emitted call: those whose values its pattern covered, then the views taken of its result."""
    position = {node.name: index for index, node in enumerate(imported.student.graph.node)}
    found: dict[str, set[str]] = {}
    for name, (variable, match) in emitted.items():
        found[name] = {_node_of(imported, v) for v in (*match.covered, variable)}
    claimed = set().union(*found.values()) if found else set()
    for variable, base in bases.items():
        node = _node_of(imported, variable)
        if base in found and node not in claimed:
            found[base].add(node)
    return {
        name: tuple(sorted((n for n in nodes if n in position), key=position.__getitem__))
        for name, nodes in found.items()
    }
