"""Relax as exporters spell it → the canonical `npu.*` operators on matrices `[tokens, features]`.

Works from the outputs: for each needed value the largest pattern that ends there is taken, what it reads becomes
needed. After it: every binding is an `npu.*` call of 2-D operands (key and value caches are 3-D); each call knows its
ONNX nodes.
"""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from firsttoken_compiler.errors import StudentError
from firsttoken_compiler.frontend.importer import Imported, close_on_error, unsupported_message
from firsttoken_compiler.passes import views
from firsttoken_compiler.passes.patterns import Context, Match, Rule, UnsupportedView
from firsttoken_compiler.passes.rules import RULES
from firsttoken_compiler.passes.views import View
from firsttoken_compiler.tvm.api import Call, IRModule, relax, shape_of

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


@dataclass(frozen=True)
class Canonicalise:
    """See the module's docstring. Raises StudentError listing every operator that no pattern covers."""

    def run(self, imported: Imported) -> Canonical:
        """Rewrites the imported function."""
        function = imported.module["main"]
        bindings = [binding for block in function.body.blocks for binding in block.bindings]
        values = {binding.var: binding.value for binding in bindings}
        outputs = _outputs(function.body.body, values)
        plan = _plan(imported, bindings, values, outputs)
        return _emit(imported, function, bindings, plan, outputs)


def _outputs(body: Any, values: dict[Any, Any]) -> list[Any]:
    while body in values and isinstance(values[body], (relax.Var, relax.Tuple)):
        body = values[body]
    fields = list(body.fields) if isinstance(body, relax.Tuple) else [body]
    return [_resolve(value, values) for value in fields]


def _resolve(value: Any, values: dict[Any, Any]) -> Any:
    while value in values and isinstance(values[value], relax.Var):
        value = values[value]
    return value


def _plan(imported: Imported, bindings: list[Any], values: dict[Any, Any], outputs: list[Any]) -> Plan:
    """Chooses a rule for every needed value, walking backwards; collects what no rule covers."""
    context = Context(imported, values)
    needed = set(outputs)
    plan: Plan = {}
    unknown: dict[str, list[str]] = {}
    for binding in reversed(bindings):
        variable, value = binding.var, binding.value
        if variable not in needed:
            continue
        if isinstance(value, relax.Var):
            needed.add(value)
            continue
        with _blamed_on(imported, variable):
            found = _first_match(context, variable, value)
        if found is None:
            name = _operator(value)
            unknown.setdefault(_onnx_operator(imported, variable, name), []).append(_node_of(imported, variable))
            continue
        plan[variable] = found
        needed.update(leaf for leaf in found[1].leaves if isinstance(leaf, relax.Var))
    if unknown:
        raise StudentError(unsupported_message(imported.student.name, unknown))
    return plan


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


def _emit(imported: Imported, function: Any, bindings: list[Any], plan: Plan, outputs: list[Any]) -> Canonical:
    """Builds the new function: parameters become matrices, rules emit their calls."""
    builder = relax.BlockBuilder()
    with close_on_error(builder):
        return _emit_into(builder, imported, function, bindings, plan, outputs)


def _emit_into(
    builder: Any, imported: Imported, function: Any, bindings: list[Any], plan: Plan, outputs: list[Any]
) -> Canonical:
    env: dict[Any, View] = {}
    parameters = []
    caches = _caches(bindings)
    for parameter in function.params:
        flat = relax.Var(parameter.name, _flat_type(parameter, parameter in caches))
        parameters.append(flat)
        env[parameter] = _parameter_view(parameter, flat)
    context = Context(imported, {b.var: b.value for b in bindings})
    context.parameters = {p.name: p for p in parameters}
    emitted: dict[str, tuple[Any, Match]] = {}
    with builder.function("main", params=parameters):
        with builder.dataflow():
            for binding in bindings:
                if binding.var not in plan:
                    if isinstance(binding.value, relax.Var) and binding.value in env:
                        env[binding.var] = env[binding.value]
                    continue
                rule, match = plan[binding.var]
                env[binding.var] = _apply(imported, rule, context, builder, match, env, binding.var)
                for name in context.take_emitted():
                    emitted[name] = (binding.var, match)
            names = [value.name for value in imported.student.graph.output]
            results = [_output(imported, name, value, env) for name, value in zip(names, outputs, strict=True)]
            result = builder.emit_output(relax.Tuple(results))
        builder.emit_func_output(result, params=None)
    module = builder.get()
    extra = context.constants
    if extra:
        module = _with_parameters(module, [context.constant_vars[name] for name in extra])
    nodes = _provenance(imported, emitted, {v: env[v].base.name for v in plan if v in env})
    declared = {value.name: value.type.tensor_type.elem_type for value in imported.student.graph.output}
    narrow = frozenset(name for name in names if declared[name] == FLOAT16)
    return Canonical(module, nodes, extra, tuple(names), narrow)


def _output(imported: Imported, name: str, value: Any, env: dict[Any, View]) -> Any:
    """The matrix or cache behind a graph output, which must lie in memory as the ONNX tensor does."""
    view = env.get(value)
    rows = "hmd" if view is not None and len(shape_of(view.base)) == 3 else "mhd"
    if view is None or not (view.is_laid_out(rows) or view.is_laid_out("mn")):
        what = f"output {name} laid out as {view.axes}" if view else f"constant output {name}"
        raise StudentError(unsupported_message(imported.student.name, {what: [getattr(value, "name", name)]}))
    return view.base


def _apply(
    imported: Imported, rule: Rule, context: Context, builder: Any, match: Match, env: dict[Any, View], variable: Any
) -> View:
    with _blamed_on(imported, variable):
        view = rule.emit(context, builder, match, env)
        if isinstance(variable.ty, relax.TensorType) and view.shape != shape_of(variable):
            raise UnsupportedView(f"a result of shape {list(shape_of(variable))} laid out as {view.axes}")
        return view


@contextlib.contextmanager
def _blamed_on(imported: Imported, variable: Any) -> Iterator[None]:
    """Turns whatever a graph that no exporter writes can provoke into a StudentError that names the node."""
    node, student = _node_of(imported, variable), imported.student.name
    try:
        yield
    except UnsupportedView as error:
        raise StudentError(unsupported_message(student, {str(error): [node]})) from None
    except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise StudentError(f"{student}: node {node!r} cannot be compiled: {str(error).strip()[-300:]}") from error


def _caches(bindings: list[Any]) -> set[Any]:
    """The values that attention takes as past keys and values."""
    calls = [b.value for b in bindings if _operator(b.value) == "npu.raw_attention"]
    starts = [(call, int(call.attrs["past_at"])) for call in calls]
    return {arg for call, at in starts if at for arg in call.args[at : at + 2]}


def _flat_type(parameter: Any, cache: bool) -> Any:
    """A matrix over all leading axes, `[n]` for one axis, `[heads, rows, width]` for a cache."""
    shape = shape_of(parameter)
    if cache and len(shape) == 4 and shape[0] == 1:
        shape = shape[1:]
    elif len(shape) > 2:
        shape = (math.prod(shape[:-1]), shape[-1])
    return relax.TensorType(list(shape), str(parameter.ty.dtype.dtype))


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


def _node_of(imported: Imported, variable: Any) -> str:
    return imported.origin.get(variable.name, variable.name)


def _onnx_operator(imported: Imported, variable: Any, fallback: str) -> str:
    name = imported.origin.get(variable.name)
    for node in imported.student.graph.node:
        if node.name == name:
            return str(node.op_type)
    return fallback


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
