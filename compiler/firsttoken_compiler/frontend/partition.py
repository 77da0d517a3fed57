"""Nodes that the NPU cannot run become segments: ONNX subgraphs that the host computes in one call each.

A segment is as large as it can be without a cycle: nodes of the host join when no path between them leads over the NPU
and back. In the graph that goes on to the importer each segment is one node of type `OPERATOR`.
"""

import heapq
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from firsttoken_compiler.errors import StudentError
from firsttoken_compiler.frontend.check_graph import all_nodes
from firsttoken_compiler.frontend.onnx_file import OnnxStudent, with_nodes
from firsttoken_compiler.frontend.prepared import restored
from firsttoken_compiler.frontend.values import TensorType, read_names, value_types

OPERATOR: Final = "firsttoken.HostSegment"
EMBEDDED_BYTES: Final = 1 << 14
"""Initialisers up to this size travel inside a segment's model; larger ones are tensors of the program."""
MAX_CONTRACTED: Final = 1 << 50


_FLOATS: Final = (1, 10, 11, 16)
_FREE: Final = ("Cast", "Expand", "Flatten", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze")
"""Operators of floats that are views on the NPU."""


@dataclass(frozen=True)
class Segment:
    """What one call of the host computes."""

    name: str
    nodes: tuple[str, ...]
    reason: str
    inputs: tuple[str, ...]
    """Values that the graph computes, without initialisers."""
    weights: tuple[str, ...]
    """Initialisers that are not embedded, as further operands behind the inputs."""
    outputs: tuple[str, ...]
    types: Mapping[str, TensorType]
    """Of inputs, weights and outputs."""
    flops: int
    nbytes: int
    model: bytes
    reads: Mapping[str, int] = field(default_factory=dict)
    """Of weights that lie on the host's own side: bytes of them that the call reads, in place of a copy."""


@dataclass(frozen=True)
class Placed:
    """Nodes that the host computes because that was asked for, on weights that it has in a format of its own."""

    nodes: Mapping[str, str] = field(default_factory=dict)
    """Name → reason."""
    bits: float = 32
    """Of one weight, scales included."""


def extract(
    student: OnnxStudent, reasons: Mapping[str, str], placed: Placed | None = None
) -> tuple[OnnxStudent, tuple[Segment, ...]]:
    """The student with every node named in `reasons` replaced by calls of segments, and the segments.

    Nodes of `placed` are among those of `reasons`.
    Raises StudentError when a value between host and NPU has no static shape, as the memory map needs one.
    """
    if not reasons:
        return student, ()
    reasons = _absorbed(student, reasons)
    placed = placed or Placed()
    groups = _groups(student, reasons, placed)
    types = value_types(student)
    readers: dict[str, set[int]] = {}
    home = {node: index for index, members in enumerate(groups) for node in members}
    for number, node in enumerate(student.graph.node):
        for name in read_names(node):
            readers.setdefault(name, set()).add(home.get(number, -1))
    for value in student.graph.output:
        readers.setdefault(value.name, set()).add(-1)
    segments = tuple(
        _segment(student, index, members, reasons, readers, types, placed)
        for index, members in enumerate(groups)
    )
    return _replaced(student, groups, segments), segments


def _absorbed(student: OnnxStudent, reasons: Mapping[str, str]) -> dict[str, str]:
    """Nodes between nodes of the host that cost the NPU nothing join them, so that more of them are one call."""
    types, joined = value_types(student), dict(reasons)
    readers: dict[str, list[str]] = {value.name: [""] for value in student.graph.output}
    for node in student.graph.node:
        for name in read_names(node):
            readers.setdefault(name, []).append(node.name)
    for node in reversed(student.graph.node):
        followers = [reader for name in node.output for reader in readers.get(name, ())]
        floats = any(name not in types or types[name].elem_type in _FLOATS for name in node.output if name)
        between = bool(followers) and all(reader in joined for reader in followers)
        if between and node.name not in joined and (node.op_type in _FREE or not floats):
            joined[node.name] = "between nodes of the host"
    return joined


def _groups(student: OnnxStudent, reasons: Mapping[str, str], placed: Placed) -> list[list[int]]:
    """Node numbers of each segment: nodes of the host with as many changes from NPU to host before them.

    What a placed node makes of weights alone goes where it is read first, so that weights stay where they lie.
    """
    depth: dict[str, tuple[int, bool]] = {}
    groups: dict[int, list[int]] = {}
    for number, node in enumerate(student.graph.node):
        host = node.name in reasons
        level = 0
        for name in read_names(node):
            before, was_host = depth.get(name, (0, host))
            level = max(level, before + (was_host and not host))
        for name in node.output:
            depth[name] = (level, host)
        if host:
            groups.setdefault(level, []).append(number)
    first: dict[str, int] = {}
    for number, node in reversed(list(enumerate(student.graph.node))):
        level = depth[node.output[0]][0] if node.name in reasons else 0
        wanted = min((first[name] for name in node.output if name in first), default=level)
        if node.name in placed.nodes and wanted > level and set(read_names(node)) <= set(student.initializers):
            groups[level].remove(number)
            groups[wanted] = sorted([*groups[wanted], number])
            level = wanted
        if node.name in reasons:
            first |= {name: min(level, first.get(name, level)) for name in read_names(node)}
    return [groups[level] for level in sorted(groups) if groups[level]]


def _segment(
    student: OnnxStudent, index: int, members: list[int], reasons: Mapping[str, str],
    readers: Mapping[str, set[int]], types: Mapping[str, TensorType], placed: Placed,
) -> Segment:  # fmt: skip
    nodes = restored(student.graph.node[number] for number in members)
    made = {name for node in nodes for name in node.output if name}
    read = list(dict.fromkeys(name for node in nodes for name in read_names(node) if name not in made))
    outputs = [name for node in nodes for name in node.output if name and readers.get(name, set()) - {index}]
    weights = [name for name in read if name in student.initializers and not _embedded(student, name)]
    inputs = [name for name in read if name not in student.initializers]
    for name in (*inputs, *outputs):
        if name not in types:
            node = next(n.name for n in nodes if name in (*read_names(n), *n.output))
            raise StudentError(
                f"{student.name}: node {node!r} runs on the host ({reasons[node]}), and {name!r} has no static shape: "
                "only values inside one host segment may have shapes that depend on data"
            )
    given = {name: types[name] for name in (*inputs, *weights, *outputs)}
    model = _model(student, nodes, read, inputs, weights, outputs, types)
    inner = {name: types[name] for node in nodes for name in (*read_names(node), *node.output) if name in types}
    cost = cost_of(nodes, inner, student.initializers, placed)
    return Segment(
        f"host.{index}", tuple(node.name for node in nodes), _why(nodes, reasons),
        tuple(inputs), tuple(weights), tuple(outputs), given, cost.flops, cost.nbytes, model,
        {name: nbytes for name, nbytes in cost.reads.items() if name in weights},
    )  # fmt: skip


def _why(nodes: list[Any], reasons: Mapping[str, str]) -> str:
    """Every reason once, with the operators that it concerns."""
    kinds: dict[str, list[str]] = {}
    for node in nodes:
        kinds.setdefault(reasons[node.name], []).append(node.op_type)
    return "; ".join(f"{reason} ({', '.join(dict.fromkeys(types))})" for reason, types in kinds.items())


def _embedded(student: OnnxStudent, name: str) -> bool:
    entry = student.initializers[name]
    return entry.elements * 8 <= EMBEDDED_BYTES and student.has_data(name)


def _model(
    student: OnnxStudent, nodes: list[Any], read: list[str], inputs: list[str], weights: list[str], outputs: list[str],
    types: Mapping[str, TensorType],
) -> bytes:  # fmt: skip
    """The serialised subgraph. Values keep their names."""
    from onnx import ModelProto, helper, numpy_helper

    model = ModelProto()
    model.ir_version = student.model.ir_version
    model.opset_import.extend(_operator_sets(student, nodes))
    model.functions.extend(student.model.functions)
    graph = model.graph
    graph.name = "host"
    graph.node.extend(nodes)
    for name in (*inputs, *weights):
        graph.input.append(helper.make_tensor_value_info(name, types[name].elem_type, types[name].shape))
    for name in outputs:
        graph.output.append(helper.make_tensor_value_info(name, types[name].elem_type, types[name].shape))
    for name in read:
        if name in student.initializers and name not in weights:
            entry = student.initializers[name]
            if entry.external is None and not entry.stored_type:
                graph.initializer.append(student.embedded(name))
            else:
                graph.initializer.append(numpy_helper.from_array(student.array(name), name))
    return bytes(model.SerializeToString(deterministic=True))


def _operator_sets(student: OnnxStudent, nodes: list[Any]) -> list[Any]:
    """The operator sets of a subgraph: of ONNX's own the oldest in which its nodes are what they are in the student.

    Runtimes know new sets late, and most operators of a new set are those of an old one.
    """
    from onnx import defs, helper

    sets = [entry for entry in student.model.opset_import if entry.domain not in ("", "ai.onnx")]
    inside = list(all_nodes(nodes))
    unknown = {node.domain for node in inside} - {entry.domain for entry in sets} - {"", "ai.onnx"}
    sets += [helper.make_opsetid(domain, 1) for domain in sorted(unknown)]
    version = student.opset
    plain = [node for node in inside if node.domain in ("", "ai.onnx")]
    if not student.model.functions and all(defs.has(node.op_type, version) for node in plain):
        version = max((defs.get_schema(node.op_type, version).since_version for node in plain), default=version)
    return [helper.make_opsetid("", version), *sets]


@dataclass
class _Cost:
    """What a call costs the host; see `Segment`."""

    flops: int = 0
    nbytes: int = 0
    reads: dict[str, int] = field(default_factory=dict)


def cost_of(nodes: list[Any], types: Mapping[str, TensorType], weights: Collection[str], placed: Placed) -> _Cost:
    """Operations of the nodes, and bytes that they read and write.

    Weights of placed nodes are read as they are stored on the host: a gather reads its rows, other operators all. What
    is made of such weights alone (a transposition, floats out of integers) is how they are stored.
    """
    cost, behind = _Cost(), {name: {name} for name in weights}
    for node in nodes:
        read = list(read_names(node))
        if node.name not in placed.nodes:
            cost.flops += operations(node, types)
            cost.nbytes += sum(types[name].nbytes for name in (*node.input, *node.output) if name in types)
            continue
        if read and all(name in behind for name in read):
            behind |= {name: set().union(*(behind[source] for source in read)) for name in node.output}
            continue
        cost.flops += operations(node, types)
        cost.nbytes += sum(types[n].nbytes for n in (*read, *node.output) if n in types and n not in behind)
        for name in (name for name in read if name in behind and name in types):
            stored = types[node.output[0]] if node.op_type == "Gather" else types[name]
            nbytes = math.ceil(stored.elements * placed.bits / 8)
            cost.nbytes += nbytes
            for number, weight in enumerate(sorted(behind[name])):  # the first stands for its scales too
                cost.reads[weight] = cost.reads.get(weight, 0) + (0 if number else nbytes)
    return cost


def operations(node: Any, types: Mapping[str, TensorType]) -> int:
    """Arithmetic of a node: two per multiply-accumulate of a product or convolution, else one per element made."""
    made = sum(types[name].elements for name in node.output if name in types)
    shapes = [types[name].shape if name in types else () for name in node.input]
    if node.op_type in ("MatMul", "MatMulInteger", "Gemm", "QLinearMatMul", "FusedMatMul") and shapes and shapes[0]:
        depth = shapes[0][-1]
        return min(2 * made * max(1, depth), MAX_CONTRACTED)
    if node.op_type in ("Conv", "ConvInteger", "QLinearConv", "ConvTranspose") and len(shapes) > 1:
        kernel = shapes[3] if node.op_type == "QLinearConv" and len(shapes) > 3 else shapes[1]
        return min(2 * made * math.prod(kernel[1:]), MAX_CONTRACTED)
    return made


def _replaced(student: OnnxStudent, groups: list[list[int]], segments: tuple[Segment, ...]) -> OnnxStudent:
    """The graph with one node per segment, in an order in which every value is made before it is read."""
    from onnx import helper

    taken = {number for members in groups for number in members}
    units = [(number, node) for number, node in enumerate(student.graph.node) if number not in taken]
    for index, (members, segment) in enumerate(zip(groups, segments, strict=True)):
        call = helper.make_node(OPERATOR, segment.inputs, segment.outputs, name=segment.name, segment=index)
        units.append((members[0], call))
    return with_nodes(student, _ordered(units))


def _ordered(units: list[tuple[int, Any]]) -> list[Any]:
    """Topological order, by original position where that leaves a choice."""
    maker = {name: index for index, (_, node) in enumerate(units) for name in node.output if name}
    waits = [{maker[name] for name in read_names(node) if name in maker} - {i} for i, (_, node) in enumerate(units)]
    followers: dict[int, list[int]] = {}
    for index, before in enumerate(waits):
        for other in before:
            followers.setdefault(other, []).append(index)
    missing = [len(before) for before in waits]
    ready = [(units[i][0], i) for i, count in enumerate(missing) if not count]
    heapq.heapify(ready)
    ordered = []
    while ready:
        _, index = heapq.heappop(ready)
        ordered.append(units[index][1])
        for follower in followers.get(index, ()):
            missing[follower] -= 1
            if not missing[follower]:
                heapq.heappush(ready, (units[follower][0], follower))
    return ordered
