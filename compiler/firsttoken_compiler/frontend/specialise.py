"""ONNX → ONNX: every shape static, everything that follows from the file and the lengths computed.

One walk over the nodes in order. Each gets its types (`infer`); it disappears when its value is known (`fold`), when it
changes nothing (`alias`), or when nobody reads it. What survives keeps its names. Weights are not read: of the
initialisers only small ones take part in folding, and what is quantised stays quantised.
"""

import math
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from firsttoken_compiler.errors import StudentError
from firsttoken_compiler.frontend import fold
from firsttoken_compiler.frontend.alias import unchanged
from firsttoken_compiler.frontend.bind import bound
from firsttoken_compiler.frontend.branch import Branches
from firsttoken_compiler.frontend.check_graph import label
from firsttoken_compiler.frontend.check_operators import check_values
from firsttoken_compiler.frontend.check_quantised import check_quantised
from firsttoken_compiler.frontend.infer import Types
from firsttoken_compiler.frontend.inline import inline, renamed
from firsttoken_compiler.frontend.onnx_file import Initializer, OnnxStudent, with_nodes
from firsttoken_compiler.frontend.partition import operations
from firsttoken_compiler.frontend.reorder import in_order
from firsttoken_compiler.frontend.values import TensorType, copied, read_names
from firsttoken_compiler.frontend.widen import widen

MAX_READ: Final = 1 << 20
"""Elements of an initialiser that folding may read."""
MAX_READ_OUTSIDE: Final = 1 << 12
"""The same outside the file."""
MAX_ALIVE: Final = 1 << 25
"""Elements of all known values at one time."""
KEPT: Final = ("Cast", "Expand", "Flatten", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze")
"""Operators that stay on matrices of the file: a weight keeps its name and its bytes."""
WEIGHT_TYPES: Final = (1, 2, 3, 10, 11, 16, 21, 22)
"""Element types of weights: floats, and what quantisers store."""
SHAPED_BY_FLOATS: Final = ("Range", "Resize", "Upsample")
_INT64, _STRING = 7, 8


def specialise(student: OnnxStudent, bindings: Mapping[str, int] | None = None) -> OnnxStudent:
    """The student with static shapes for these values of its open dimensions (`bind.bind_dims`).

    float16 and bfloat16 become float32 (`widen`). Types of all values whose shape does not depend on data are in
    `graph.value_info`. The result is never specialised again. Raises StudentError where shapes do not fit together, for
    loops that need not end, and for values that no memory holds.
    """
    if student.specialised:
        return student
    opened = in_order(widen(bound(inline(student), bindings or {})))
    result = replace(Walk(opened).result(), specialised=True)
    check_values(result, folded=True)
    if student.model.functions:  # what is inside them was not to be seen before
        check_quantised(result)
    return result


class Walk:
    """One student on its way. After `result`, `types` knows the types of all its values."""

    def __init__(self, student: OnnxStudent) -> None:
        self.student, self.types, self.branches = student, Types(student), Branches(student)
        self.outputs = {value.name for value in student.graph.output}
        self.known: dict[str, NDArray[Any]] = {}
        self.same: dict[str, str] = {}
        """Value that disappeared → the equal one that stays."""
        self.nodes: list[Any] = []
        self.readers = Counter(name for node in student.graph.node for name in read_names(node))
        self.used: set[str] = set()
        """Values that nodes which stay read."""
        self.alive = self.work = self.sessions = 0
        """Elements of known values; elements computed or read so far; nodes given to onnxruntime."""
        self.outside: set[str] = set()
        """Initialisers outside the file that were read."""
        self.empty: set[str] = set()
        """Inputs that hold nothing, such as a cache of no rows."""

    def result(self) -> OnnxStudent:
        """The specialised student."""
        for value in self.student.graph.input:
            if value.name not in self.student.initializers and self._know_empty(value.name):
                self.empty.add(value.name)
        pending = deque(self.student.graph.node)
        while pending:
            original = pending.popleft()
            node = renamed(original, self.same) if self.same else original
            pending.extendleft(reversed(self._visit(node)))
            for name in read_names(node):
                self._release(name)
        return self._assembled()

    def _visit(self, node: Any) -> list[Any]:
        """Takes the node in; returns nodes that stand in its place and are still to be visited."""
        if node.op_type == "Constant" and not node.domain and self._know_constant(node):
            self._keep_output(node)
            return []
        if node.op_type == "If" and not node.domain:
            condition = self.value(node.input[0])
            if condition is not None and condition.size == 1:
                return self._branch(node, bool(condition.reshape(-1)[0]))
        self._check_indices(node)
        self.types.visit(node, self._data(node))
        source = unchanged(node, self.types, self.value, self._unread)
        if len(node.output) == 1 and self._know_empty(node.output[0]):
            self._keep_output(node)
        elif source is not None:
            self._alias(node, source)
        elif self._fold(node):
            self._keep_output(node)
        else:
            self._keep(node)
        return []

    # what becomes of a node

    def _keep(self, node: Any) -> None:
        node = self._without_empty(node)
        self.nodes.append(node)
        self.used.update(read_names(node))

    def _keep_output(self, node: Any) -> None:
        """Results of the graph are still made by a node when they are known."""
        if any(name in self.outputs for name in node.output):
            self._keep(node)

    def _alias(self, node: Any, source: str) -> None:
        """The first result is another value."""
        from onnx import helper

        name = node.output[0]
        if name in self.outputs:
            self._keep(helper.make_node("Identity", [source], [name], name=node.name))
            return
        self.same[name] = source
        self.readers[source] += self.readers[name]

    def _unread(self, name: str) -> bool:
        return not self.readers[name] and name not in self.outputs

    def _without_empty(self, node: Any) -> Any:
        """A Concat without its operands that hold nothing; other nodes as they are."""
        if node.op_type != "Concat" or node.domain:
            return node
        full = [name for name in node.input if 0 not in (self.types.shape(name) or (1,))]
        if not full or len(full) == len(node.input):
            return node
        copy = copied(node)
        del copy.input[:]
        copy.input.extend(full)
        return copy

    def _branch(self, node: Any, condition: bool) -> list[Any]:
        nodes, tensors = self.branches.taken(node, condition, self.same)
        entries = {name: self.branches.describe(name, tensor) for name, tensor in tensors.items()}
        if entries:
            self.student = self.student.with_initializers(entries, tensors)
        for name, entry in entries.items():
            self.types.put(name, entry.onnx_type, entry.shape)
        self.readers.update(name for inner in nodes for name in read_names(inner))
        return nodes

    def _check_indices(self, node: Any) -> None:
        """Raises StudentError for a Gather that is known to reach beyond its operand."""
        if node.op_type != "Gather" or node.domain or len(node.input) != 2:
            return
        shape, indices = self.types.shape(node.input[0]), self.value(node.input[1])
        axis = next((a.i for a in node.attribute if a.name == "axis"), 0)
        if not shape or indices is None or not indices.size or not -len(shape) <= axis < len(shape):
            return
        low, high = int(indices.min()), int(indices.max())
        if low < -shape[axis] or high >= shape[axis]:
            raise StudentError(
                f"{self.student.name}: node {label(node)} reads index {high if high >= shape[axis] else low} of an "
                f"axis with {shape[axis]} entries ({node.input[0]!r}): export the model again, or for shorter lengths"
            )

    # folding

    def _fold(self, node: Any) -> bool:
        """Computes the results if they follow from what is known; whether it did."""
        if node.op_type in ("Shape", "Size") and not node.domain:
            return self._fold_shape(node)
        if not fold.foldable(node) or not node.input or not self._small(node) or self._is_weight(node):
            return False
        from onnx import helper

        made = [name for name in node.output if name]
        values = fold.evaluate(
            fold.Task(
                node, [self.value(name) if name else None for name in node.input],
                [self.types.elem(name) for name in made], [self.types.shape(name) for name in made],
                {a.name: helper.get_attribute_value(a) for a in node.attribute}, self.student.opset,
            ),
            self.sessions < fold.MAX_SESSIONS,
        )  # fmt: skip
        self.sessions += not fold.by_numpy(node)
        if values is None:
            return False
        for name, value in zip(made, values, strict=True):
            self._know(name, value)
            self.types.put(name, self.types.elem(name), value.shape)
        return True

    def _fold_shape(self, node: Any) -> bool:
        shape = self.types.shape(node.input[0])
        if shape is None:
            return False
        bounds = {a.name: a.i for a in node.attribute}
        part = shape[slice(bounds.get("start", 0), bounds.get("end", len(shape)))]
        value = np.asarray(part if node.op_type == "Shape" else math.prod(shape), np.int64)
        self._know(node.output[0], value)
        self.types.put(node.output[0], _INT64, value.shape)
        return True

    def _small(self, node: Any) -> bool:
        """Whether inputs may be read, and results and effort are known to be small before anything is computed."""
        if not all(self._readable(name) for name in node.input if name):
            return False
        shapes = {name: self.types.shape(name) for name in (*node.input, *node.output) if name}
        given = [shapes[name] for name in node.input if name]
        made = [shapes[name] for name in node.output if name]
        if None in given or (None in made and node.op_type not in fold.BOUNDED):
            return False
        largest = max((math.prod(shape) for shape in given if shape is not None), default=0)
        total = 8 * largest if None in made else sum(math.prod(shape) for shape in made if shape is not None)
        if max(total, largest) > fold.MAX_ELEMENTS or self.alive + total > MAX_ALIVE:
            return False
        kinds = {name: TensorType(1, shape or ()) for name, shape in shapes.items()}
        effort = operations(node, kinds)
        self.work += total + largest
        return effort <= fold.MAX_OPERATIONS and self.work + effort <= fold.MAX_WORK

    def _is_weight(self, node: Any) -> bool:
        """Whether the node only turns a matrix of the file, or makes one of a quantised one: a weight is kept."""
        if node.op_type in ("DequantizeLinear", "QuantizeLinear"):
            return _is_matrix(self.types.shape(node.output[0]))
        entry = self.student.initializers.get(node.input[0])
        if node.op_type not in KEPT or entry is None or entry.onnx_type not in WEIGHT_TYPES:
            return False
        return _is_matrix(entry.shape)

    # values

    def value(self, name: str) -> NDArray[Any] | None:
        """The value where it is known, or may be read."""
        if name not in self.known and self._readable(name):
            self.known[name] = self.student.array(name)
            if self.student.initializers[name].external is not None:
                self.outside.add(name)
        return self.known.get(name)

    def _readable(self, name: str) -> bool:
        """Whether the value is known, or an initialiser that may be read."""
        if name in self.known:
            return True
        entry = self.student.initializers.get(name)
        if entry is None or entry.elements > MAX_READ or entry.onnx_type == _STRING:
            return False
        inside = entry.external is None
        return inside or (entry.elements <= MAX_READ_OUTSIDE and self.student.has_data(name))

    def _know(self, name: str, value: NDArray[Any]) -> None:
        self.known[name] = value
        self.alive += value.size

    def _know_empty(self, name: str) -> bool:
        """A value without elements is known."""
        from onnx import helper

        shape, elem = self.types.shape(name), self.types.elem(name)
        if shape is None or 0 not in shape or elem in (0, _STRING):
            return False
        self._know(name, np.zeros(shape, helper.tensor_dtype_to_np_dtype(elem)))
        return True

    def _know_constant(self, node: Any) -> bool:
        """Takes in the value of a Constant; False for one that holds text or a sparse tensor."""
        from onnx import helper, numpy_helper

        attribute = node.attribute[0] if len(node.attribute) == 1 else None
        kind = _CONSTANTS.get(attribute.name) if attribute is not None else None
        if attribute is None or kind is None:
            return False
        if attribute.name == "value":
            if attribute.t.data_type in (0, _STRING) or attribute.t.data_location:
                return False
            value = numpy_helper.to_array(attribute.t)
        else:
            value = np.asarray(helper.get_attribute_value(attribute), kind)
        self._know(node.output[0], value)
        self.types.put(node.output[0], int(helper.np_dtype_to_tensor_dtype(value.dtype)), value.shape)
        return True

    def _release(self, name: str) -> None:
        """One reader of a value is done; what only folded nodes read is forgotten."""
        self.readers[name] -= 1
        if self.readers[name] > 0 or name in self.used or name in self.student.initializers:
            return
        if name in self.known:
            self.alive -= self.known.pop(name).size

    def _data(self, node: Any) -> dict[str, NDArray[Any]]:
        """Known inputs that may decide the shape of the results: whole numbers, and floats for a few operators."""
        floats = node.op_type in SHAPED_BY_FLOATS
        names = [name for name in node.input if name and (floats or self.types.elem(name) not in WEIGHT_TYPES)]
        values = {name: self.value(name) for name in names}
        return {name: value for name, value in values.items() if value is not None}

    # the graph at the end

    def _assembled(self) -> OnnxStudent:
        from onnx import numpy_helper

        nodes = self._alive_nodes()
        made = {name for node in nodes for name in node.output}
        read = {name for node in nodes for name in read_names(node)} | self.outputs
        initializers = {name: entry for name, entry in self.student.initializers.items() if name in read}
        embedded = {name: self.student._embedded[name] for name in initializers if name in self.student._embedded}
        for name in sorted(read - made - initializers.keys()):
            if name in self.known:
                tensor = numpy_helper.from_array(self.known[name], name)
                embedded[name] = tensor
                initializers[name] = Initializer(name, self.known[name].shape, int(tensor.data_type), None)
        student = with_nodes(self.student, nodes)
        self._set_values(student.graph)
        return replace(
            student, initializers=initializers, _embedded=embedded, decided_by=frozenset(self.outside)
        )  # fmt: skip

    def _alive_nodes(self) -> list[Any]:
        """Nodes that something of the results follows from."""
        needed, alive = set(self.outputs), []
        for node in reversed(self.nodes):
            if any(name in needed for name in node.output):
                alive.append(node)
                needed.update(read_names(node))
        return alive[::-1]

    def _set_values(self, graph: Any) -> None:
        """Inputs that are still values, types of all results."""
        kept = [v for v in graph.input if v.name not in self.student.initializers and v.name not in self.empty]
        inputs = [type(value).FromString(value.SerializeToString()) for value in kept]
        del graph.input[:]
        graph.input.extend(inputs)
        del graph.value_info[:]
        for node in graph.node:
            for name in node.output:
                if name and name not in self.outputs and self.types.shape(name) is not None:
                    graph.value_info.add(name=name, type=self.types.proto(name))
        for value in graph.output:
            if self.types.shape(value.name) is not None:
                value.type.CopyFrom(self.types.proto(value.name))


_CONSTANTS: Final[Mapping[str, Any]] = {
    "value": np.generic, "value_int": np.int64, "value_ints": np.int64, "value_float": np.float32,
    "value_floats": np.float32,
}  # fmt: skip
"""Attributes of Constant that hold numbers, and their types."""


def _is_matrix(shape: tuple[int, ...] | None) -> bool:
    return shape is None or sum(extent > 1 for extent in shape) > 1
