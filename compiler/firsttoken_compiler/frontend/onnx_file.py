"""An ONNX file, checked and opened without reading its weights."""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import numpy as np

from firsttoken_compiler.errors import StudentError

MAX_PROTO_BYTES: Final = 2 << 30
MAX_TENSOR_BYTES: Final = 16 << 30
MAX_RANK: Final = 8
MAX_NODES: Final = 50_000
MIN_OPSET, MAX_OPSET = 11, 24


@dataclass(frozen=True, slots=True)
class Initializer:
    """A weight's description; its bytes stay where they are until `OnnxStudent.array`."""

    name: str
    shape: tuple[int, ...]
    onnx_type: int
    external: tuple[str, int, int | None] | None
    """(location, offset, length) of external data; None when the bytes are in the file."""
    stored_type: int = 0
    """Element type of the bytes where `array` converts them to `onnx_type`; 0 where it does not."""

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass
class OnnxStudent:
    """A parsed model, the folder that its external data lies in, and its initialisers by name."""

    model: Any
    folder: Path
    name: str
    initializers: dict[str, Initializer]
    _embedded: Mapping[str, Any] = field(repr=False)
    declared: Mapping[str, int] = field(default_factory=dict)
    """Element types of inputs and outputs where the file declares others than `graph`."""

    @property
    def graph(self) -> Any:
        """The GraphProto."""
        return self.model.graph

    @cached_property
    def opset(self) -> int:
        """Version of the default operator set; raises StudentError outside what the importer reads."""
        versions = {entry.version for entry in self.model.opset_import if entry.domain in ("", "ai.onnx")}
        if len(versions) != 1 or not MIN_OPSET <= min(versions) <= MAX_OPSET:
            found = " and ".join(map(str, sorted(versions))) or "none"
            raise StudentError(
                f"{self.name}: ONNX opset {found}, supported are {MIN_OPSET} to {MAX_OPSET}: "
                "export again with one of them"
            )
        return int(min(versions))

    @property
    def metadata(self) -> dict[str, str]:
        """The model's metadata_props."""
        return {entry.key: entry.value for entry in self.model.metadata_props}

    def has_data(self, name: str) -> bool:
        """Whether the initialiser's bytes can be read here."""
        entry = self.initializers[name]
        return entry.external is None or self._external_path(entry).is_file()

    def array(self, name: str) -> np.ndarray:
        """The values of an initialiser; raises StudentError if they are absent, out of range or outside the folder."""
        from onnx import numpy_helper

        entry = self.initializers[name]
        if entry.stored_type:
            stored = self._stored(name, replace(entry, onnx_type=entry.stored_type))
            return np.asarray(stored.astype(numpy_helper.helper.tensor_dtype_to_np_dtype(entry.onnx_type)))
        return self._stored(name, entry)

    def _stored(self, name: str, entry: Initializer) -> np.ndarray:
        """The values in the type that their bytes have."""
        from onnx import numpy_helper

        if entry.external is None:
            try:
                return np.asarray(numpy_helper.to_array(self._embedded[name])).reshape(entry.shape)
            except (ValueError, TypeError, KeyError, MemoryError) as error:
                raise StudentError(
                    f"{self.name}: weight {name} of shape {list(entry.shape)}, type {entry.onnx_type}, does not fit "
                    f"its data ({error}): export the model again"
                ) from error
        dtype = numpy_helper.helper.tensor_dtype_to_np_dtype(entry.onnx_type)
        needed = entry.elements * dtype.itemsize
        _, offset, length = entry.external
        path = self._external_path(entry)
        if not path.is_file():
            raise StudentError(
                f"{self.name}: weight {name} is kept in {path.name}, which is not beside the model: "
                "copy it there (timing alone does not need it)"
            )
        if (length is not None and length != needed) or offset < 0 or offset + needed > path.stat().st_size:
            raise StudentError(
                f"{self.name}: weight {name} has shape {list(entry.shape)} and needs {needed} bytes, but {path.name} "
                f"({path.stat().st_size} bytes) is said to hold {length} at {offset}: export the model again"
            )
        return np.memmap(path, dtype, "r", offset, entry.shape) if entry.elements else np.zeros(entry.shape, dtype)

    def _external_path(self, entry: Initializer) -> Path:
        assert entry.external is not None
        try:
            folder = self.folder.resolve()
            path = (folder / entry.external[0]).resolve()
            path.is_file()
        except (OSError, ValueError, RuntimeError) as error:  # too long, NUL inside, a loop of links
            raise StudentError(
                f"{self.name}: weight {entry.name} points to {entry.external[0][:80]!r}, which is no file name: {error}"
            ) from error
        if folder not in path.parents:
            raise StudentError(
                f"{self.name}: weight {entry.name} points to {entry.external[0]!r}, outside the model's folder: "
                "put external data beside the model"
            )
        return path


def with_nodes(student: OnnxStudent, nodes: list[Any]) -> OnnxStudent:
    """The student with other nodes. Its model then holds no initialisers; `OnnxStudent.initializers` has them all."""
    from onnx import ModelProto

    model, old = ModelProto(), student.model
    model.ir_version = old.ir_version
    model.opset_import.extend(old.opset_import)
    model.functions.extend(old.functions)
    model.metadata_props.extend(old.metadata_props)
    graph = model.graph
    graph.name = old.graph.name
    graph.input.extend(old.graph.input)
    graph.output.extend(old.graph.output)
    graph.value_info.extend(old.graph.value_info)
    graph.node.extend(nodes)
    return replace(student, model=model)


def open_student(path: Path) -> OnnxStudent:
    """Parses an ONNX file; raises StudentError when it is missing, too large, truncated or not ONNX."""
    import onnx
    from google.protobuf.message import DecodeError

    if not path.is_file():
        raise StudentError(
            f"no such student: {path} is neither an ONNX file nor a built-in name ('firsttoken students')"
        )
    size = path.stat().st_size
    if not 0 < size <= MAX_PROTO_BYTES:
        raise StudentError(
            f"{path}: {size} bytes; an ONNX file has 1 to {MAX_PROTO_BYTES}, larger weights go outside it"
        )
    try:
        model = onnx.load(str(path), format="protobuf", load_external_data=False)
    except (DecodeError, ValueError, OSError) as error:
        raise StudentError(
            f"{path}: not a readable ONNX file ({error}): it may be truncated; export it again"
        ) from error
    return from_model(model, path.parent, path.stem)


def from_model(model: Any, folder: Path, name: str) -> OnnxStudent:
    """Checks a parsed model and lists its initialisers; raises StudentError naming the node or tensor at fault.

    Nodes of `model` without a name, or with the name of an earlier one, are named after their operator and position:
    everything that is said about a node later is said by its name. The domain `ai.onnx` becomes the empty one.
    """
    graph = model.graph
    if not graph.node or not graph.output:
        raise StudentError(f"{name}: the file holds no graph ({len(graph.node)} nodes): is it an ONNX model?")
    if len(graph.node) > MAX_NODES:
        raise StudentError(f"{name}: {len(graph.node)} nodes, the limit is {MAX_NODES}: simplify the graph first")
    embedded = {tensor.name: tensor for tensor in graph.initializer}
    student = OnnxStudent(model, folder, name, {key: _describe(t, name) for key, t in embedded.items()}, embedded)
    _ = student.opset
    _normalise_nodes(graph)
    _check_wiring(student)
    first_use = {entry.external[0]: entry for entry in student.initializers.values() if entry.external}
    for entry in first_use.values():
        student._external_path(entry)
    return student


def _normalise_nodes(graph: Any) -> None:
    taken: set[str] = set()
    for index, node in enumerate(graph.node):
        if not node.name or node.name in taken:
            node.name = f"{node.name or node.op_type}#{index}"
        taken.add(node.name)
        if node.domain == "ai.onnx":
            node.domain = ""


def _describe(tensor: Any, student: str) -> Initializer:
    shape = tuple(int(extent) for extent in tensor.dims)
    entry = {e.key: e.value for e in tensor.external_data}
    external = None
    if tensor.data_location == tensor.EXTERNAL:
        try:
            length = int(entry["length"]) if "length" in entry else None
            external = (entry["location"], int(entry.get("offset", "0")), length)
        except (KeyError, ValueError) as error:
            raise StudentError(f"{student}: weight {tensor.name} has malformed external data ({error})") from error
    described = Initializer(tensor.name, shape, int(tensor.data_type), external)
    if any(extent < 0 for extent in shape) or described.elements * 4 > MAX_TENSOR_BYTES or len(shape) > MAX_RANK:
        raise StudentError(
            f"{student}: weight {tensor.name} declares shape {list(shape)}, beyond {MAX_TENSOR_BYTES} bytes"
        )
    return described


def _check_wiring(student: OnnxStudent) -> None:
    """Every value is made once, before the nodes that read it; every output of the graph is made."""
    graph = student.graph
    for kind, values in (("initialiser", graph.initializer), ("input", graph.input), ("output", graph.output)):
        repeated = next((n for n, count in Counter(value.name for value in values).items() if count > 1 or not n), None)
        if repeated is not None:
            raise StudentError(f"{student.name}: two graph {kind}s are named {repeated!r}, or it has no name")
    known = {value.name for value in graph.input} | set(student.initializers) | {""}
    for node in graph.node:
        for value in node.input:
            if value not in known:
                raise StudentError(
                    f"{student.name}: node {node.name!r} reads {value!r}, which no earlier node, input or "
                    "initialiser makes: the file is damaged or not in topological order"
                )
        for value in node.output:
            if value and value in known:
                raise StudentError(f"{student.name}: node {node.name!r} makes {value!r}, which is made before it")
            known.add(value)
        if not any(node.output):
            raise StudentError(f"{student.name}: node {node.name!r} has no output")
    for output in graph.output:
        if output.name not in known:
            raise StudentError(f"{student.name}: graph output {output.name!r} is made by no node")
