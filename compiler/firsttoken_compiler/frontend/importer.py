"""ONNX → Relax through TVM's importer: weights stay parameters without data, every value remembers its node.

TVM's importer has no extension points, so this subclasses it, and replaces its conversion table while it runs.
"""

import contextlib
import functools
import io
import math
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, Final

import numpy as np

from firsttoken_compiler.errors import StudentError
from firsttoken_compiler.frontend.check_graph import GRAPHS
from firsttoken_compiler.frontend.check_operators import check_nodes
from firsttoken_compiler.frontend.converters import CONVERTERS
from firsttoken_compiler.frontend.onnx_file import OnnxStudent
from firsttoken_compiler.frontend.partition import OPERATOR, Segment
from firsttoken_compiler.frontend.values import TensorType, read_names, value_types
from firsttoken_compiler.isa.host_call import AS_BITS
from firsttoken_compiler.tvm import dialect
from firsttoken_compiler.tvm.api import Call, GenericConst, is_static, onnx_frontend, relax, shape_of, tvm

CONSTANT_ELEMENTS: Final = 1
"""Embedded initialisers up to this size become constants (shapes, axes, epsilons); larger ones stay parameters."""
STORED: Final = ("int8", "uint8", "int16", "uint16", "int4", "uint4")
"""Integers that weights are stored in: parameters, as floats are. TVM holds no constants of four bits."""
RESERVED: Final = re.compile(r"(lv|gv|vector_|rotary_)\d*")
MAX_FOLDED_ELEMENTS: Final = 1 << 24
CONTROL: Final = ("If", "Loop", "Scan", "SequenceMap")
MISREAD: Final = {"LpNormalization": "rows of zeros stay zeros, where a division makes NaN of them"}
"""Operators that TVM's importer makes something else of."""
MEMORY_TYPES: Final = (
    "float32", "float16", "float64", "int64", "int32", "int16", "int8", "uint8", "uint16", "uint32", "uint64", "bool",
    "int4", "uint4",
)  # fmt: skip
"""Types of values that NPU and host exchange."""


@dataclass
class Imported:
    """The Relax module and what ties it to the ONNX file."""

    module: Any
    student: OnnxStudent
    weights: dict[str, str] = field(default_factory=dict)
    """Relax parameter name → initialiser name."""
    origin: dict[str, str] = field(default_factory=dict)
    """Relax variable name → ONNX node name."""
    inputs: tuple[str, ...] = ()
    """ONNX names of the graph inputs, in parameter order."""
    segments: tuple[Segment, ...] = ()
    """What the host computes."""
    values: dict[str, Any] = field(default_factory=dict)
    """ONNX value name → Relax expression."""
    unreadable: dict[str, str] = field(default_factory=dict)
    """Nodes that the importer cannot convert → why; their results stand in the module as results of the host."""
    pairs: frozenset[str] | None = None
    """Types that the target multiplies, such as `int8xint4`; None: any."""

    @functools.cached_property
    def nodes(self) -> frozenset[str]:
        """Names of the graph's nodes."""
        return frozenset(node.name for node in self.student.graph.node)


class _Importer(onnx_frontend.ONNXGraphImporter):
    """TVM's importer with lazy weights and a record of which node made which variable."""

    def __init__(self, student: OnnxStudent, segments: tuple[Segment, ...]) -> None:
        super().__init__(None, "float32", keep_params_in_input=False)
        self._student, self._segments = student, segments
        self._types: dict[str, TensorType] | None = None
        self.unreadable: dict[str, str] = {}
        self._returned = {value.name for value in student.graph.output}
        self._untyped: set[str] = set()
        """Results without a static shape, which only nodes of the same call of the host can read."""
        self.weights: dict[str, str] = {}
        self.origin: dict[str, str] = {}
        self.node = ""
        """The node being converted."""
        self._lazy: dict[str, Any] = {}

    def _sanitize_name(self, name: str) -> str:
        """TVM's, but never a name that the block builder or a pass gives to a value of its own."""
        return str(super()._sanitize_name(f"onnx_{name}" if RESERVED.fullmatch(name) else name))

    def _parse_graph_initializers(self, graph: Any) -> None:
        for name, entry in self._student.initializers.items():
            small = entry.external is None and entry.elements <= CONSTANT_ELEMENTS
            dtype = np.dtype(onnx_dtype(entry.onnx_type, name))
            if entry.onnx_type in AS_BITS:
                bits = AS_BITS[entry.onnx_type].numpy
                self._nodes[name] = relax.const(tvm.runtime.tensor(self._student.array(name).copy().view(bits)))
                continue
            stored = dtype.name in STORED and not (small and dtype.kind in "iu")
            if not stored and (small or dtype.kind in "iub"):
                # a plain numpy array would be narrowed to int32
                array = np.ascontiguousarray(self._student.array(name)).reshape(entry.shape)
                self._nodes[name] = relax.const(tvm.runtime.tensor(array))
                continue
            variable = self._new_var(self._sanitize_name(name), shape=list(entry.shape), dtype=dtype.name)
            self._nodes[name] = variable
            self._lazy[name] = variable
            self.weights[variable.name] = name

    def _parse_graph_input(self, graph: Any) -> None:
        super()._parse_graph_input(_with_bits(graph))
        for name in list(self._inputs):
            if name in self._student.initializers:  # files before IR version 4 list weights as inputs too
                del self._inputs[name]
        self.names = tuple(self._inputs)
        self._inputs.update(self._lazy)
        self._given = {value.name for value in self._inputs.values()}

    def _check_for_unsupported_ops(self, graph: Any) -> None:
        """What no converter reads is left to the host."""

    def _construct_nodes(self, graph: Any) -> None:
        """TVM's, node by node: what one of them cannot be is recorded, its results become results of the host."""
        for node in graph.node:
            self.node = node.name
            if node.op_type == OPERATOR:
                self._host(node, self._segments[node.attribute[0].i].types)
                continue
            reason = _unreadable(node) or self._odd(node)
            if reason is None:
                try:
                    super()._construct_nodes(SimpleNamespace(node=[node]))
                    reason = self._mistyped(node)
                    if reason is None:
                        continue
                except StudentError as error:
                    reason = str(error)
                except Exception as error:  # TVM checks little of what it reads, so a damaged graph may raise anything
                    reason = (str(error).strip() or type(error).__name__).splitlines()[-1][-300:]
            self.unreadable[node.name] = reason
            self._host(node, self.types)

    def _odd(self, node: Any) -> str | None:
        """Names a shape or an element type that only the host can have; None where there is none."""
        for name in read_names(node):
            if name in self._untyped:
                return f"the shape of {name!r} depends on data"
        for name in (*node.input, *node.output):
            if name in self.types and self.types[name].elem_type in AS_BITS:
                return f"no unit of the NPU computes with {onnx_dtype(self.types[name].elem_type, name).name}"
        return None

    @property
    def types(self) -> dict[str, TensorType]:
        """Types of all values that have a static shape."""
        if self._types is None:
            self._types = value_types(self._student)
        return self._types

    def _mistyped(self, node: Any) -> str | None:
        """What is wrong with the results that TVM made of a node, by the types that the graph declares; else None.

        Records which node the results belong to.
        """
        for name in node.output:
            value = self._nodes.get(name)
            if not isinstance(value, relax.Expr):
                continue
            if name in self._returned and not (
                isinstance(value, relax.Var) and isinstance(value.ty, relax.TensorType)
            ):
                return f"{name!r} is known when the graph is compiled, and the graph returns it"
            if isinstance(value, relax.Var) and value.name not in self._given:
                self.origin.setdefault(value.name, node.name)
            declared = self.types.get(name)
            if declared is None or not isinstance(value.ty, relax.TensorType):
                continue
            if not is_static(value) or shape_of(value) != declared.shape:
                return f"the shape of {name!r} as {node.op_type} is imported is not {list(declared.shape)}"
        return None

    def _host(self, node: Any, types: Mapping[str, TensorType]) -> None:
        """Stands in for nodes of the host: one call that makes all results."""
        operands = [self._nodes[name] for name in node.input if name in self._nodes]
        operands = [value for value in operands if isinstance(value.ty, relax.TensorType)]
        names = [name for name in node.output if name in types]
        untyped = {name for name in node.output if name} - set(names)
        returned = sorted(untyped & self._returned)
        if returned:
            raise StudentError(
                f"{self._student.name}: node {node.name!r} cannot run on the NPU "
                f"({self.unreadable.get(node.name, 'see above')}), and its result {returned[0]!r}, which the graph "
                "returns, has no static shape: give every dimension a value, or remove the operator whose shape "
                "depends on data"
            )
        self._untyped |= untyped
        if not names:
            return
        made = [(types[name].shape, host_dtype(types[name].elem_type, name)) for name in names]
        results = self.bb.emit(dialect.raw_host(operands, made, int(node.op_type == OPERATOR and node.attribute[0].i)))
        for index, name in enumerate(names):
            item = self.bb.emit(relax.TupleGetItem(results, index))
            self._nodes[name] = item
            self.origin[item.name] = node.name
        self.origin[results.name] = node.name

    def _convert_operator(self, op_name: str, inputs: Any, attrs: Any, opset: int) -> Any:
        attrs["tvm_custom"]["name"] = name = self.node
        attrs["tvm_custom"]["opset"] = opset
        elements = _folded_elements(op_name, inputs)
        if elements > MAX_FOLDED_ELEMENTS:
            raise StudentError(
                f"{self._student.name}: node {name!r} makes a constant of {elements} elements, the limit is "
                f"{MAX_FOLDED_ELEMENTS}: make it smaller or store it as a weight"
            )
        result = super()._convert_operator(op_name, inputs, attrs, opset)
        if isinstance(result, Call) and isinstance(result.ty, relax.TensorType):
            result = self.bb.emit(result)  # a variable of its own, so that its name can carry the node
        for value in result.fields if isinstance(result, relax.Tuple) else (result,):
            if isinstance(value, relax.Var):
                self.origin.setdefault(value.name, name)
        return result


def _with_bits(graph: Any) -> Any:
    """The graph with inputs of the integer types as which their values lie in memory."""
    from onnx import helper

    if not any(value.type.tensor_type.elem_type in AS_BITS for value in graph.input):
        return graph
    copy = type(graph)()
    copy.input.extend(graph.input)
    for value in copy.input:
        tensor = value.type.tensor_type
        if tensor.elem_type in AS_BITS:
            tensor.elem_type = helper.np_dtype_to_tensor_dtype(AS_BITS[tensor.elem_type].numpy)
    return copy


def _unreadable(node: Any) -> str | None:
    """Why TVM must not see a node; None when it may try."""
    if node.op_type in MISREAD:
        return MISREAD[node.op_type]
    if ("Sequence" in node.op_type and node.op_type != "ReverseSequence") or node.op_type.startswith("Optional"):
        return f"no sequences on the NPU: {node.op_type}"
    if node.op_type in CONTROL:
        return f"no control flow on the NPU: {node.op_type}"
    if any(attribute.type in GRAPHS for attribute in node.attribute):
        return f"no subgraphs on the NPU: {node.op_type}"
    if node.op_type not in _known():
        return f"no NPU operator for {node.op_type}"
    return None


@functools.cache
def _known() -> frozenset[str]:
    """Operators with a converter; those of other domains are written with theirs."""
    return frozenset(onnx_frontend._get_convert_map()) | frozenset(CONVERTERS) | {"Constant"}


def host_dtype(elem_type: int, name: str) -> str:
    """The type in which a value of the host lies in memory; raises StudentError for one that memory cannot hold."""
    dtype = AS_BITS[elem_type].numpy.name if elem_type in AS_BITS else np.dtype(onnx_dtype(elem_type, name)).name
    if dtype not in MEMORY_TYPES:
        raise StudentError(f"value {name!r} is {dtype}: only numbers of {', '.join(MEMORY_TYPES)} leave the host")
    return dtype


@contextlib.contextmanager
def close_on_error(builder: Any) -> Iterator[None]:
    """Ends the block that an error leaves open in a block builder, about which TVM would complain on stderr."""
    try:
        yield
    except Exception:
        with contextlib.suppress(RuntimeError):
            builder._end_block()
        raise


def onnx_dtype(onnx_type: int, name: str) -> Any:
    """The numpy dtype of an ONNX element type; raises StudentError for types that have none."""
    from onnx import helper

    try:
        return helper.tensor_dtype_to_np_dtype(onnx_type)
    except KeyError:
        raise StudentError(f"tensor {name} has the unknown ONNX element type {onnx_type}") from None


def _folded_elements(op_name: str, inputs: Any) -> int:
    """Elements of what TVM computes at import, out of constants, by an operator that can make much of little."""
    if op_name not in ("ConstantOfShape", "Expand", "Range", "Tile") or not inputs:
        return 0
    if not all(isinstance(value, GenericConst) for value in inputs):
        return 0
    values = [value.value.numpy() for value in inputs]
    if op_name == "Range":
        start, limit, step = (float(value.reshape(-1)[0]) for value in values)
        return max(0, int((limit - start) / step)) if step else 0
    factors = [max(int(extent), 0) for extent in values[-1].reshape(-1).tolist()]
    return math.prod(factors) * (int(values[0].size) if len(values) > 1 else 1)


@contextlib.contextmanager
def _conversion_table() -> Iterator[None]:
    """TVM's table with ours on top; built once here, where TVM builds it once per node."""
    stock = onnx_frontend._get_convert_map
    table = dict(stock())
    for name, converter in CONVERTERS.items():
        table[name] = type(f"Npu{name}", (onnx_frontend.OnnxOpConverter,), {"_impl_v1": staticmethod(converter)})
    onnx_frontend._get_convert_map = lambda: table
    try:
        yield
    finally:
        onnx_frontend._get_convert_map = stock


def unsupported_message(student: OnnxStudent, left: Mapping[str, str], shown: int = 8) -> str:
    """One line per operator and reason with the nodes concerned."""
    kinds = {node.name: f"{node.domain}::{node.op_type}".removeprefix("::") for node in student.graph.node}
    lines: dict[str, list[str]] = {}
    for node, reason in left.items():
        lines.setdefault(f"{kinds.get(node, 'operator')} ({reason})", []).append(node)
    text = []
    for operator, nodes in sorted(lines.items()):
        more = f" and {len(nodes) - shown} more" if len(nodes) > shown else ""
        text.append(f"  {operator}: {', '.join(repr(node)[1:-1] for node in nodes[:shown])}{more}")
    return (
        f"{student.name}: {len(left)} nodes cannot run on the NPU:\n" + "\n".join(text) + "\n"
        "  remedy: leave them to the host (without --no-fallback), or export the student with other operators"
    )


def _check_inputs(student: OnnxStudent) -> None:
    """Raises StudentError for an input that is not a tensor of numbers with a static shape."""
    for value in student.graph.input:
        if value.name in student.initializers:
            continue
        tensor = value.type.tensor_type
        if not value.type.HasField("tensor_type") or not tensor.HasField("shape"):
            raise StudentError(f"{student.name}: input {value.name!r} is no tensor of known rank: declare its shape")
        if np.dtype(onnx_dtype(tensor.elem_type, value.name)).kind not in "fiubV":
            raise StudentError(f"{student.name}: input {value.name!r} holds no numbers (type {tensor.elem_type})")
        loose = [d.dim_param or "?" for d in tensor.shape.dim if not d.HasField("dim_value") or d.dim_value <= 0]
        if loose:
            raise StudentError(
                f"{student.name}: input {value.name!r} has the dynamic or empty dimensions {', '.join(loose)}: "
                "export it with static shapes"
            )


def import_onnx(student: OnnxStudent, segments: tuple[Segment, ...] = ()) -> Imported:
    """The graph as a Relax function whose parameters are the inputs, then the weights (never read).

    `segments` are those of the graph's nodes of type `partition.OPERATOR`. Raises StudentError for malformed nodes,
    dynamic shapes, and graphs that TVM cannot type.
    """
    check_nodes(student, OPERATOR)
    _check_inputs(student)
    importer = _Importer(student, segments)
    noise = io.StringIO()
    with _conversion_table(), warnings.catch_warnings(), contextlib.redirect_stdout(noise):
        warnings.simplefilter("ignore")  # TVM announces every renamed value
        try:
            with close_on_error(importer.bb):
                module = importer.from_onnx(_with_domains(student.graph), student.opset)
        except StudentError:
            raise
        except Exception as error:  # TVM checks little of what it reads, so a damaged graph may raise anything
            reason = (str(error).strip() or type(error).__name__)[-300:]
            where = f"node {importer.node!r}" if importer.node else "its inputs and weights"
            raise StudentError(f"{student.name}: TVM's importer refuses {where}: {reason}") from error
    _name_inner_values(module, importer.origin)
    return Imported(
        module, student, importer.weights, importer.origin, importer.names, segments, dict(importer._nodes),
        importer.unreadable,
    )  # fmt: skip


def _with_domains(graph: Any) -> Any:
    """The graph with operators of other domains written as `domain.Operator`, since TVM ignores domains."""
    if not any(node.domain for node in graph.node):
        return graph
    renamed = type(graph)()
    renamed.CopyFrom(graph)
    for node in renamed.node:
        if node.domain:
            node.op_type = f"{node.domain}.{node.op_type}"
    return renamed


def _name_inner_values(module: Any, origin: dict[str, str]) -> None:
    """What a converter emits on the way belongs to the node whose result follows."""
    node = ""
    for block in reversed(module["main"].body.blocks):
        for binding in reversed(block.bindings):
            node = origin.get(binding.var.name, node)
            if node:
                origin[binding.var.name] = node
