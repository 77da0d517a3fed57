"""An ONNX file, checked and opened without reading its weights."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import numpy as np

from firsttoken_compiler.errors import StudentError
from firsttoken_compiler.frontend.blocks import check_blocks
from firsttoken_compiler.frontend.check_graph import check_model, shown
from firsttoken_compiler.frontend.check_operators import (
    check_interface,
    check_nodes,
    check_operators,
    check_types,
    check_values,
)  # fmt: skip
from firsttoken_compiler.frontend.check_quantised import check_quantised
from firsttoken_compiler.frontend.check_tensors import check_tensors, external_of, inner_tensors, stored_bytes
from firsttoken_compiler.frontend.wire import check_wire

MAX_PROTO_BYTES: Final = 2 << 30
MAX_INNER_BYTES: Final = 64 << 20
"""External data of subgraphs and attributes."""
MIN_OPSET, MAX_OPSET = 11, 28


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
    order: tuple[int, int, int] | None = None
    """(a, b, c) where the rows lie as [a, b, c], and `array` returns them as [a, c, b]."""

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
    specialised: bool = False
    """Whether `specialise` made it: every shape that does not depend on data is static."""
    decided_by: frozenset[str] = frozenset()
    """Initialisers outside the file whose values `specialise` read: the graph follows from them too."""

    @property
    def graph(self) -> Any:
        """The GraphProto."""
        return self.model.graph

    @cached_property
    def opset(self) -> int:
        """Version of the default operator set; raises StudentError outside what the importer reads.

        A model that imports none has operators of other domains only: the newest.
        """
        versions = {entry.version for entry in self.model.opset_import if entry.domain in ("", "ai.onnx")}
        if not versions and all(node.domain not in ("", "ai.onnx") for node in self.graph.node):
            return MAX_OPSET
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

    def with_initializers(self, entries: Mapping[str, Initializer], tensors: Mapping[str, Any]) -> "OnnxStudent":
        """The student with further initialisers, whose TensorProtos hold their bytes."""
        return replace(
            self, initializers={**self.initializers, **entries}, _embedded={**self._embedded, **tensors}
        )  # fmt: skip

    def embedded(self, name: str) -> Any:
        """The TensorProto of an initialiser whose bytes are in the file."""
        return self._embedded[name]

    def require_data(self) -> None:
        """Raises StudentError unless the bytes of every initialiser can be read here."""
        for name, entry in self.initializers.items():
            if not self.has_data(name):
                raise self._absent(entry)

    def _absent(self, entry: Initializer) -> StudentError:
        return StudentError(
            f"{self.name}: weight {entry.name} is kept in {self._external_path(entry).name}, which is not beside the "
            "model: copy it there (timing alone does not need it: --weights-absent)"
        )

    def array(self, name: str) -> np.ndarray:
        """The values of an initialiser; raises StudentError if they are absent, out of range or outside the folder."""
        from onnx import numpy_helper

        entry = self.initializers[name]
        if entry.stored_type:
            stored = self._stored(name, replace(entry, onnx_type=entry.stored_type))
            values = np.asarray(stored.astype(numpy_helper.helper.tensor_dtype_to_np_dtype(entry.onnx_type)))
        else:
            values = self._stored(name, entry)
        if entry.order is None:
            return values
        return values.reshape(*entry.order, *entry.shape[1:]).swapaxes(1, 2).reshape(entry.shape)

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
        path, offset, needed = self._check_range(entry)
        if not path.is_file():
            raise self._absent(entry)
        dtype = numpy_helper.helper.tensor_dtype_to_np_dtype(entry.onnx_type)
        if needed != entry.elements * dtype.itemsize:  # elements that share bytes
            from onnx import TensorProto

            packed = TensorProto(data_type=entry.onnx_type, dims=entry.shape)
            packed.raw_data = np.memmap(path, np.uint8, "r", offset, (needed,)).tobytes() if needed else b""
            return np.asarray(numpy_helper.to_array(packed))
        return np.memmap(path, dtype, "r", offset, entry.shape) if entry.elements else np.zeros(entry.shape, dtype)

    def _check_range(self, entry: Initializer) -> tuple[Path, int, int]:
        """File, offset and bytes of external data; raises StudentError where the file is there and has not as many."""
        assert entry.external is not None
        needed = stored_bytes(entry.onnx_type, entry.elements)
        _, offset, length = entry.external
        path = self._external_path(entry)
        size = path.stat().st_size if path.is_file() else None
        short = size is not None and offset + needed > size
        if (length is not None and length != needed) or offset < 0 or short:
            raise StudentError(
                f"{self.name}: weight {entry.name} has shape {list(entry.shape)} and needs {needed} bytes, but "
                f"{path.name} ({'absent' if size is None else f'{size} bytes'}) is said to hold {length} at {offset}: "
                "export the model again"
            )
        return path, offset, needed

    def _external_path(self, entry: Initializer) -> Path:
        assert entry.external is not None
        try:
            folder = self.folder.resolve()
            path = (folder / entry.external[0]).resolve()
            path.is_file()
        except (OSError, ValueError, RuntimeError) as error:  # too long, NUL inside, a loop of links
            loop = "a loop of links" if isinstance(error, RuntimeError) else str(error)[:80]
            raise StudentError(
                f"{self.name}: weight {shown(entry.name)[1:-1]} points to {shown(entry.external[0])}, which is no file "
                f"name ({getattr(error, 'strerror', None) or loop}): export the model again"
            ) from error
        if folder not in path.parents:
            raise StudentError(
                f"{self.name}: weight {shown(entry.name)[1:-1]} points to {shown(entry.external[0])}, outside "
                "the model's folder: put external data beside the model"
            )
        return path


def with_nodes(student: OnnxStudent, nodes: list[Any]) -> OnnxStudent:
    """The student with other nodes. Its model then holds no initialisers; `OnnxStudent.initializers` has them all."""
    from onnx import ModelProto

    model, old = ModelProto(), student.model
    model.ir_version = old.ir_version
    model.opset_import.extend(old.opset_import)
    if all(entry.domain not in ("", "ai.onnx") for entry in old.opset_import):
        model.opset_import.add(domain="", version=MAX_OPSET)  # the new nodes may be of the default domain
    model.functions.extend(old.functions)
    model.metadata_props.extend(old.metadata_props)
    graph = model.graph
    graph.name = old.graph.name
    graph.input.extend(old.graph.input)
    graph.output.extend(old.graph.output)
    graph.value_info.extend(old.graph.value_info)
    graph.node.extend(nodes)
    return replace(student, model=model)


def require_file(path: Path) -> None:
    """Raises StudentError unless there is a file."""
    if not path.is_file():
        raise StudentError(
            f"no such student: {path} is neither a file nor a built-in name ('firsttoken students')"
        )


def open_student(path: Path) -> OnnxStudent:
    """Parses an ONNX file; raises StudentError when it is missing, too large, truncated or not ONNX."""
    import onnx
    from google.protobuf.message import DecodeError

    require_file(path)
    size = path.stat().st_size
    if not 0 < size <= MAX_PROTO_BYTES:
        raise StudentError(
            f"{path}: {size} bytes; an ONNX file has 1 to {MAX_PROTO_BYTES}, larger weights go outside it"
        )
    try:
        check_wire(path)
        model = onnx.load(str(path), format="protobuf", load_external_data=False)
    except (DecodeError, ValueError, OSError) as error:
        raise StudentError(
            f"{path}: not a readable ONNX file ({error}): it may be truncated; export it again"
        ) from error
    student = from_model(model, path.parent, path.stem)
    for value in student.graph.input:
        extents = [dim.dim_value for dim in value.type.tensor_type.shape.dim if dim.HasField("dim_value")]
        cache = "past" in value.name or "cache" in value.name
        if 0 in extents and not cache and value.name not in student.initializers:
            raise StudentError(
                f"{student.name}: input {shown(value.name)} of shape {extents} is empty: export it with a length of 1 "
                "or more (only a cache may be empty)"
            )
    return student


def from_model(model: Any, folder: Path, name: str) -> OnnxStudent:
    """Checks a parsed model and lists its initialisers; raises StudentError naming the node or tensor at fault.

    Nodes of `model` without a name, or with the name of an earlier one, are named after their operator and position:
    everything that is said about a node later is said by its name. The domain `ai.onnx` becomes the empty one.
    """
    check_model(model, name)
    check_tensors(model, name)
    embedded = {tensor.name: tensor for tensor in model.graph.initializer}
    student = OnnxStudent(model, folder, name, {key: describe(t, name) for key, t in embedded.items()}, embedded)
    check_operators(model, name, student.opset)
    check_interface(student)
    check_nodes(student)
    check_types(model, name)
    for entry in student.initializers.values():
        if entry.external is not None:
            student._check_range(entry)
    _embed_inner(student)
    check_values(student)
    check_quantised(student)
    check_blocks(student)
    return student


def _embed_inner(student: OnnxStudent) -> None:
    """Reads external data of subgraphs and attributes into the model: whoever runs a subgraph looks for no files."""
    room = MAX_INNER_BYTES
    for where, tensor in inner_tensors(student.model):
        if tensor.data_location != tensor.EXTERNAL:
            continue
        entry = replace(describe(tensor, student.name), name=where)
        path, offset, needed = student._check_range(entry)
        room -= needed
        if not path.is_file() or room < 0:
            reason = "which is not beside the model" if room >= 0 else f"and is beyond {MAX_INNER_BYTES} bytes in all"
            raise StudentError(f"{student.name}: {where} is kept in {path.name}, {reason}: store it in the ONNX file")
        with path.open("rb") as file:
            file.seek(offset)
            data = file.read(needed)
        del tensor.external_data[:]
        tensor.data_location = tensor.DEFAULT
        tensor.raw_data = data


def describe(tensor: Any, student: str) -> Initializer:
    """What a TensorProto says about its values; raises StudentError for a bad place of external data."""
    external = external_of(tensor, student, f"weight {shown(tensor.name)[1:-1]}")
    place = None if external is None else (external.location, external.offset, external.length)
    return Initializer(tensor.name, tuple(int(extent) for extent in tensor.dims), int(tensor.data_type), place)
