"""What must hold of an ONNX model before anything walks it: sizes, names, scopes, functions.

Everything here is linear in the file and never recurses deeper than the limits it checks, so that a hostile file is
refused before TVM, onnxruntime or ONNX's own checker sees it.
"""

from collections import Counter
from collections.abc import Iterator
from typing import Any, Final

from firsttoken_compiler.errors import StudentError

MAX_NODES: Final = 50_000
"""Nodes of all graphs, every call of a model-local function counted as the nodes it stands for."""
MAX_NESTING: Final = 16
"""Subgraphs inside one another."""
MAX_CALL_DEPTH: Final = 64
"""Model-local functions that call one another."""
MAX_NAME: Final = 1000
"""Characters of a name."""
MIN_IR, MAX_IR = 3, 14
GRAPHS: Final = (5, 10)
"""AttributeProto types GRAPH and GRAPHS."""

Function = tuple[str, str, str]
"""Domain, name and overload."""


def shown(text: str, limit: int = 80) -> str:
    """A name as a message may quote it: one line, printable, not too long."""
    return repr(text if len(text) <= limit else f"{text[:limit]}...")


def label(node: Any) -> str:
    """How messages call a node: its name, else its operator."""
    return shown(node.name) if node.name else f"of type {shown(node.op_type)}"


def check_model(model: Any, name: str) -> None:
    """Raises StudentError for sizes, names and scopes that no sound exporter writes.

    Nodes get names: see `onnx_file.from_model`.
    """
    if not MIN_IR <= model.ir_version <= MAX_IR:
        raise StudentError(
            f"{name}: ONNX IR version {model.ir_version}, supported are {MIN_IR} to {MAX_IR}: export again"
        )
    total = sum(_nested(body.node, name, 0, MAX_NODES) for body in bodies(model))
    if total > MAX_NODES:
        raise StudentError(f"{name}: {total} nodes, the limit is {MAX_NODES}: simplify the graph first")
    graph = model.graph
    if not graph.node or not graph.output:
        raise StudentError(f"{name}: the file holds no graph ({len(graph.node)} nodes): is it an ONNX model?")
    _check_names(model, name)
    if graph.sparse_initializer:
        first = graph.sparse_initializer[0].values.name
        raise StudentError(f"{name}: initialiser {shown(first)} is sparse: store it as a dense tensor")
    _check_functions(model, name)
    _normalise_nodes(graph)
    _check_scope(graph, name, (), (), frozenset())
    for function in model.functions:
        _check_function(function, name)


def subgraphs(node: Any) -> Iterator[Any]:
    """Graphs that a node holds as attributes."""
    for attribute in node.attribute:
        if attribute.type in GRAPHS or attribute.HasField("g") or attribute.graphs:
            if attribute.HasField("g"):
                yield attribute.g
            yield from attribute.graphs


def all_nodes(nodes: Any) -> Iterator[Any]:
    """The nodes and those of all their subgraphs."""
    for node in nodes:
        yield node
        for graph in subgraphs(node):
            yield from all_nodes(graph.node)


def bodies(model: Any) -> Iterator[Any]:
    """The graph and the functions: what has nodes at the top."""
    yield model.graph
    yield from model.functions


def _functions(model: Any, name: str) -> dict[Function, Any]:
    found: dict[Function, Any] = {}
    for function in model.functions:
        key = (_domain(function.domain), function.name, function.overload)
        if key in found:
            raise StudentError(f"{name}: two model-local functions are named {shown('.'.join(key[:2]))}")
        found[key] = function
    return found


def _domain(domain: str) -> str:
    return "" if domain == "ai.onnx" else domain


def _check_functions(model: Any, name: str) -> None:
    functions = _functions(model, name)
    total = _expanded(model, name, functions) if functions else 0
    if total > MAX_NODES:
        found = f"{total} nodes" if total <= 1_000_000_000 else "over 1,000,000,000 nodes"
        raise StudentError(
            f"{name}: {found}, model-local functions inlined, the limit is {MAX_NODES}: simplify the graph first"
        )


def _nested(nodes: Any, name: str, depth: int, room: int) -> int:
    """Nodes, those of subgraphs included; stops counting soon after there are too many."""
    if depth > MAX_NESTING:
        raise StudentError(f"{name}: subgraphs are nested more than {MAX_NESTING} deep: simplify the graph first")
    count = len(nodes)
    if count > room:
        return count
    for node in nodes:
        for graph in subgraphs(node):
            count += _nested(graph.node, name, depth + 1, room - count)
            if count > room:
                return count
    return count


def _expanded(model: Any, name: str, functions: dict[Function, Any]) -> int:
    """Nodes of the graph after inlining; raises StudentError for functions that call themselves, or too deeply."""
    own = {key: list(all_nodes(function.node)) for key, function in functions.items()}
    calls = {key: Counter(call for node in nodes if (call := _call(node)) in functions) for key, nodes in own.items()}
    sizes: dict[Function, int] = {}
    depths: dict[Function, int] = {}
    for key in _callees_first(calls, name):
        sizes[key] = min(len(own[key]) + sum(count * sizes[call] for call, count in calls[key].items()), 10**12)
        depths[key] = 1 + max((depths[call] for call in calls[key]), default=0)
        if depths[key] > MAX_CALL_DEPTH:
            raise StudentError(
                f"{name}: model-local function {shown(key[1])} calls others more than {MAX_CALL_DEPTH} deep: "
                "inline them first"
            )
    return sum(1 + sizes.get(_call(node), 0) for node in all_nodes(model.graph.node))


def _callees_first(calls: dict[Function, Counter[Function]], name: str) -> Iterator[Function]:
    """Every function after those that it calls."""
    done: set[Function] = set()
    for root in calls:
        path = {root: iter(calls[root])} if root not in done else {}
        while path:
            key, rest = next(reversed(path.items()))
            following = next((call for call in rest if call not in done), None)
            if following is None:
                del path[key]
                done.add(key)
                yield key
            elif following in path:
                raise StudentError(f"{name}: model-local function {shown(following[1])} calls itself: unroll it")
            else:
                path[following] = iter(calls[following])


def _call(node: Any) -> Function:
    return (_domain(node.domain), node.op_type, node.overload)


def _normalise_nodes(graph: Any) -> None:
    """Every node of the graph gets a name of its own; the domain `ai.onnx` becomes the empty one."""
    taken: set[str] = set()
    for index, node in enumerate(graph.node):
        if not node.name or node.name in taken:
            node.name = f"{node.name or node.op_type}#{index}"
        taken.add(node.name)
        if node.domain == "ai.onnx":
            node.domain = ""


def _check_names(model: Any, name: str) -> None:
    """Raises StudentError for a name that is too long; reads every name, so that none fails to decode later."""
    for kind, text in _names(model):
        if not isinstance(text, str):
            raise StudentError(f"{name}: {kind} {text[:80]!r} is not UTF-8: the file is damaged")
        if len(text) > MAX_NAME:
            raise StudentError(
                f"{name}: {kind} {shown(text)} has {len(text)} characters, the limit is {MAX_NAME}: rename it"
            )


def _names(model: Any) -> Iterator[tuple[str, Any]]:
    """Kind and text of everything that is a name; what is not UTF-8 comes as bytes."""
    for entry in model.opset_import:
        yield "operator set", entry.domain
    for entry in model.metadata_props:
        yield "metadata", entry.key
        yield "metadata", entry.value[:MAX_NAME]
    for function in model.functions:
        yield "function", function.name
        yield "function", function.domain
        yield "function", function.overload
        for value in (*function.input, *function.output, *function.attribute):
            yield "value", value
    for body in bodies(model):
        yield from _names_of(body)


def _names_of(body: Any) -> Iterator[tuple[str, Any]]:
    """Names of a graph or function and of all subgraphs."""
    for field in ("input", "output", "value_info", "initializer"):
        for value in getattr(body, field, ()):
            yield "value", value if isinstance(value, str) else value.name
            if not isinstance(value, str) and hasattr(value, "type"):
                for dim in value.type.tensor_type.shape.dim:
                    yield "dimension", dim.dim_param
    for node in body.node:
        for kind, text in (
            ("node", node.name), ("operator", node.op_type), ("domain", node.domain), ("overload", node.overload),
        ):  # fmt: skip
            yield kind, text
        for text in (*node.input, *node.output):
            yield "value", text
        for attribute in node.attribute:
            yield "attribute", attribute.name
            yield "attribute", attribute.ref_attr_name
            if attribute.HasField("t"):
                yield "tensor", attribute.t.name
        for graph in subgraphs(node):
            yield from _names_of(graph)


def _check_function(function: Any, name: str) -> None:
    where = f"function {shown(function.name)}"
    repeated = _repeated([*function.input])
    if repeated is not None:
        raise StudentError(f"{name}: {where} has two inputs {shown(repeated)}, or one without a name")
    known = {*function.input, ""}
    attributes = frozenset((*function.attribute, *(default.name for default in function.attribute_proto)))
    _check_nodes(function.node, name, (known,), (where,), attributes)
    for output in function.output:
        if output not in known:
            raise StudentError(f"{name}: output {shown(output)} of {where} is made by no node")


def _repeated(names: list[str]) -> str | None:
    return next((text for text, count in Counter(names).items() if count > 1 or not text), None)


def _check_scope(
    graph: Any, name: str, outside: tuple[set[str], ...], path: tuple[str, ...], attributes: frozenset[str]
) -> None:
    """Every value is made once, before the nodes that read it; every output of the graph is made.

    `outside` are the values that a subgraph may read, `path` the nodes that hold it.
    """
    where = f" of the subgraph of {' in '.join(reversed(path))}" if path else ""
    for kind, values in (("initialiser", graph.initializer), ("input", graph.input), ("output", graph.output)):
        repeated = _repeated([value.name for value in values])
        if repeated is not None and not (path and kind == "output" and repeated):
            raise StudentError(f"{name}: two graph {kind}s{where} are named {shown(repeated)}, or it has no name")
    known = {value.name for value in graph.input} | {value.name for value in graph.initializer}
    shadowed = min((value for value in known if _made(value, outside)), default=None)
    if shadowed is not None:
        raise StudentError(f"{name}: input or initialiser {shown(shadowed)}{where} hides a value outside it: rename it")
    known.add("")
    scopes = (*outside, known)
    _check_nodes(graph.node, name, scopes, path, attributes)
    for output in graph.output:
        if not _made(output.name, scopes):
            raise StudentError(f"{name}: graph output {shown(output.name)}{where} is made by no node")


def _made(value: str, scopes: tuple[set[str], ...]) -> bool:
    return any(value in scope for scope in scopes)


def _check_nodes(
    nodes: Any, name: str, scopes: tuple[set[str], ...], path: tuple[str, ...], attributes: frozenset[str]
) -> None:
    """Adds what the nodes make to the last scope; `attributes` are those that a function gets from its callers."""
    for node in nodes:
        for value in node.input:
            if not _made(value, scopes):
                raise StudentError(
                    f"{name}: node {label(node)} reads {shown(value)}, which no earlier node, input or "
                    "initialiser makes: the file is damaged or not in topological order"
                )
        for attribute in node.attribute:
            if attribute.ref_attr_name and attribute.ref_attr_name not in attributes:
                raise StudentError(
                    f"{name}: attribute {shown(attribute.name)} of node {label(node)} refers to "
                    f"{shown(attribute.ref_attr_name)}, which no function around it has"
                )
        for graph in subgraphs(node):
            _check_scope(graph, name, scopes, (*path, f"node {label(node)}"), attributes)
        for value in node.output:
            if value and _made(value, scopes):
                raise StudentError(f"{name}: node {label(node)} makes {shown(value)}, which is made before it")
            scopes[-1].add(value)
        if not any(node.output):
            raise StudentError(f"{name}: node {label(node)} has no output")
