"""A program: encoded instructions, microprograms, memory map and provenance, and the file they are kept in."""

import inspect
import io
import json
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Final, TypeVar

import numpy as np

from firsttoken_compiler.errors import ProgramError
from firsttoken_compiler.isa import word
from firsttoken_compiler.isa.host_call import HostCall, HostValue
from firsttoken_compiler.isa.instruction import Instruction
from firsttoken_compiler.isa.opcodes import decode, parse
from firsttoken_compiler.isa.types import Dtype, Space
from firsttoken_compiler.isa.vector_kernel import VectorKernel

FORMAT: Final = "firsttoken-program"
FORMAT_VERSION: Final = 3
MAX_FILE_BYTES: Final = 1 << 30
MALFORMED: Final = (
    zipfile.BadZipFile, zlib.error, LookupError, ValueError, TypeError, AttributeError, ArithmeticError, RuntimeError,
    OSError, EOFError, MemoryError,
)  # fmt: skip
"""What zipfile, json and numpy raise on bytes that nobody's `encode` wrote."""

MATRIX_FORMS: Final = ("panels", "stored")
"""Forms of packed weights that are the operand of a matrix unit."""

_Record = TypeVar("_Record")

TENSOR_KINDS = ("input", "output", "weight", "constant", "kv", "activation", "scratch")
"""`activation`: a value between operators. `scratch`: what one operator works in."""


@dataclass(frozen=True, slots=True)
class Packing:
    """How a weight tensor is derived from the student's: the recipe, not the bytes.

    The packed form is panels of `panel` columns, each panel `[k, panel]` row-major, int4 two to a byte along the
    columns, the last panel narrower when `panel` does not divide n. Scales are fp16 `[groups, n]` in the same panels.
    """

    source: str
    """Name of the ONNX initialiser."""
    form: str
    """`panels` (the matrix), `scales` and `zeros` (its scales and zero points), `plain` (row-major, only converted).

    Of weights that are stored quantised: `stored` (their integers, in panels), `vectors` (scales or zero points, a row
    per group), `sums` (fp32 sums of the integers of each group and column). Of weights in blocks of GGUF: `planes` (a
    plane of the blocks that the source holds) and `quantised` (one of the blocks that its floats are quantised to).
    """
    k: int
    n: int
    panel: int
    bits: int
    group: int
    """Rows of k that share a scale; k itself for per-channel; 0 for float."""
    transposed: bool
    """The initialiser is stored `[n, k]`."""
    layout: str = ""
    """How a `stored`, `vectors` or `sums` source lies in the file; see `codegen.stored_weights`. Of blocks, their type
    and plane, `q4_k:low`.

    Of `panels`, `scales` and `zeros`: `conv` for the weight of a convolution, `[n, channels, kernel]`; k counts tap by
    tap. Of `plain`: nothing, or `times:` and a number that floats are multiplied by. A number behind a colon, such as
    `:128`: rows that share a scale, of which the recipe's groups are parts.
    """
    shift: int = 0
    """Subtracted from stored integers and zero points: the middle of an unsigned range. Weights that are quantised by
    the recipe have zero points where it is not 0."""
    sources: tuple[str, ...] = ()
    """Of a matrix that is put together: the initialisers whose columns lie one behind another, `source` the first."""
    columns: tuple[int, ...] = ()
    """Columns of each of `sources`; n is their sum. Of a `plain` vector they are its elements."""

    @property
    def parts(self) -> tuple["Packing", ...]:
        """The recipe of each source by itself; this one where there is only one."""
        pairs = zip(self.sources, self.columns, strict=True)
        return tuple(replace(self, source=s, n=n, sources=(), columns=()) for s, n in pairs) or (self,)


@dataclass(frozen=True, slots=True)
class Tensor:
    """A named range of memory. `packing` says how a weight's bytes are made; constants carry theirs in the program.

    Activations and scratch live from operator `first` to operator `last`, both included; their bytes are another
    tensor's before and after. All others live as long as the program is loaded: `last` is -1.
    """

    name: str
    kind: str
    space: Space
    address: int
    nbytes: int
    dtype: Dtype
    shape: tuple[int, ...]
    packing: Packing | None = None
    first: int = 0
    last: int = -1

    @property
    def lasting(self) -> bool:
        """Whether its bytes are its own all the time."""
        return self.last < 0


@dataclass(frozen=True, slots=True)
class OpInfo:
    """One operator of the lowered graph and where it came from. Instruction i belongs to `ops[code[i, word.OP]]`."""

    name: str
    kind: str
    """`linear`, `attention`, `rms_norm`, ... ; the npu dialect's name."""
    onnx_nodes: tuple[str, ...]
    module: str
    """Module path without the operator, e.g. `layers.3.mlp`; empty outside the layers."""
    first: int
    last: int
    """Instruction range `[first, last)`."""
    m: int = 0
    n: int = 0
    k: int = 0
    batch: int = 1
    w_bits: int = 0
    a_bits: int = 0
    macs: int = 0
    """Multiply-accumulates that the operator's ONNX nodes define."""
    tile: str = ""


@dataclass(frozen=True)
class Program:
    """Everything the two machines need. `meta` holds the student, the target's name and hash, and the options."""

    code: np.ndarray
    """int64 `[instructions, word.WIDTH]`."""
    kernels: tuple[VectorKernel, ...]
    tensors: tuple[Tensor, ...]
    ops: tuple[OpInfo, ...]
    constants: dict[str, np.ndarray] = field(default_factory=dict)
    """Bytes (uint8) of tensors of kind `constant`."""
    dram_bytes: int = 0
    spad_bytes: int = 0
    """Highest scratchpad address in use, per core."""
    acc_bytes: int = 0
    cores: int = 1
    meta: dict[str, Any] = field(default_factory=dict)
    hosts: tuple[HostCall, ...] = ()
    """What the host computes; host instructions name them by their position."""

    def __len__(self) -> int:
        """Number of instructions."""
        return len(self.code)

    def instructions(self) -> Iterator[Instruction]:
        """The decoded instructions in program order."""
        return (decode(row) for row in self.code)

    def tensor(self, name: str) -> Tensor:
        """The tensor of that name; raises ProgramError naming it when absent."""
        for tensor in self.tensors:
            if tensor.name == name:
                return tensor
        raise ProgramError(f"the program has no tensor {name!r}")

    def of_kind(self, kind: str) -> tuple[Tensor, ...]:
        """All tensors of one of `TENSOR_KINDS`."""
        return tuple(tensor for tensor in self.tensors if tensor.kind == kind)

    def __str__(self) -> str:
        """The listing: microprograms, then one instruction a line."""
        lines = [f".kernel {index} {kernel}" for index, kernel in enumerate(self.kernels)]
        return "\n".join(lines + [str(instruction) for instruction in self.instructions()]) + "\n"

    def encode(self) -> bytes:
        """The binary file: a zip of `program.json`, `code.npy` and the constants; equal programs give equal bytes."""
        document = {
            "format": FORMAT, "version": FORMAT_VERSION, "meta": self.meta, "cores": self.cores,
            "dram_bytes": self.dram_bytes, "spad_bytes": self.spad_bytes, "acc_bytes": self.acc_bytes,
            "kernels": [str(kernel) for kernel in self.kernels],
            "tensors": [_record(tensor) for tensor in self.tensors],
            "ops": [asdict(op) for op in self.ops],
            "constants": sorted(self.constants),
            "hosts": [{**asdict(call), "model": ""} for call in self.hosts],
        }  # fmt: skip
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
            _write(archive, "program.json", json.dumps(document, sort_keys=True).encode())
            _write(archive, "code.npy", _npy(self.code))
            for index, name in enumerate(sorted(self.constants)):
                _write(archive, f"constant{index}.npy", _npy(self.constants[name]))
            for index, call in enumerate(self.hosts):
                _write(archive, f"host{index}.onnx", call.model)
        return buffer.getvalue()

    @staticmethod
    def decode(data: bytes) -> "Program":
        """Inverse of `encode`; raises ProgramError on anything that is not a program of this version."""
        try:
            with zipfile.ZipFile(io.BytesIO(data)) as archive:
                total = sum(entry.file_size for entry in archive.infolist())
                if total > MAX_FILE_BYTES:
                    raise ProgramError(f"program file unpacks to {total} bytes, the limit is {MAX_FILE_BYTES}")
                document = json.loads(_read(archive, "program.json"))
                if document.get("format") != FORMAT or document.get("version") != FORMAT_VERSION:
                    raise ProgramError(
                        f"program file has format {document.get('format')!r} version {document.get('version')!r}; "
                        f"this release reads {FORMAT!r} version {FORMAT_VERSION}: compile the student again"
                    )
                return _from_document(document, archive)
        except MALFORMED as error:
            reason = f"{type(error).__name__}: {error}"
            raise ProgramError(f"not a program file ({reason}); write one with 'firsttoken compile'") from error

    def save(self, path: Path) -> None:
        """Writes the binary file."""
        path.write_bytes(self.encode())

    @staticmethod
    def load(path: Path) -> "Program":
        """Reads a binary file; raises ProgramError when it is missing or malformed."""
        if not path.is_file():
            raise ProgramError(f"no such program file: {path}; write one with 'firsttoken compile'")
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ProgramError(f"{path} has {path.stat().st_size} bytes, the limit is {MAX_FILE_BYTES}")
        return Program.decode(path.read_bytes())

    def with_code(self, code: np.ndarray) -> "Program":
        """The same program with other instructions."""
        return replace(self, code=code)


def parse_listing(text: str) -> tuple[np.ndarray, tuple[VectorKernel, ...]]:
    """Code and microprograms of a listing; inverse of `str(program)`. Blank lines and `#` comments are skipped."""
    kernels: list[VectorKernel] = []
    rows: list[np.ndarray] = []
    for number, line in enumerate(text.splitlines(), 1):
        body = line.split("#", 1)[0].strip()
        try:
            if body.startswith(".kernel"):
                kernels.append(VectorKernel.parse(body.split(maxsplit=2)[2]))
            elif body:
                rows.append(parse(body).encode())
        except (ProgramError, ValueError, IndexError) as error:
            raise ProgramError(f"line {number}: {error}") from error
    code = np.stack(rows) if rows else np.zeros((0, word.WIDTH), np.int64)
    return code, tuple(kernels)


def _from_document(document: dict[str, Any], archive: zipfile.ZipFile) -> Program:
    code = _read_npy(archive, "code.npy")
    if code.dtype != np.int64 or code.ndim != 2 or code.shape[1] != word.WIDTH:
        raise ProgramError(f"code has type {code.dtype} and shape {code.shape}, expected int64 [n, {word.WIDTH}]")
    for key in ("kernels", "tensors", "ops", "constants", "hosts"):
        if type(document[key]) is not list:
            raise ProgramError(f"{key} is a {type(document[key]).__name__}, expected a list")
    constants = {name: _read_npy(archive, f"constant{i}.npy") for i, name in enumerate(document["constants"])}
    for name, data in constants.items():
        if data.dtype != np.uint8 or data.ndim != 1:
            raise ProgramError(f"constant {name!r} has type {data.dtype} and shape {data.shape}, expected uint8 [n]")
    return _typed(Program)(
        code=code,
        kernels=tuple(VectorKernel.parse(text) for text in document["kernels"]),
        tensors=tuple(_tensor(entry) for entry in document["tensors"]),
        ops=tuple(_typed(OpInfo)(**{**entry, "onnx_nodes": tuple(entry["onnx_nodes"])}) for entry in document["ops"]),
        constants=constants,
        dram_bytes=document["dram_bytes"],
        spad_bytes=document["spad_bytes"],
        acc_bytes=document["acc_bytes"],
        cores=document["cores"],
        meta=document["meta"],
        hosts=tuple(_host(entry, _read(archive, f"host{i}.onnx")) for i, entry in enumerate(document["hosts"])),
    )


def _record(tensor: Tensor) -> dict[str, Any]:
    """A tensor's entry; only recipes of several sources name these."""
    entry = asdict(tensor)
    if tensor.packing is not None and not tensor.packing.sources:
        del entry["packing"]["sources"], entry["packing"]["columns"]
    return entry


def _host(entry: dict[str, Any], model: bytes) -> HostCall:
    values = {
        side: tuple(
            _typed(HostValue)(
                **{**value, "dtype": Dtype(value["dtype"]), **{k: tuple(value[k]) for k in ("shape", "strides")}}
            )
            for value in entry[side]
        )
        for side in ("inputs", "outputs")
    }
    return _typed(HostCall)(**{**entry, **values, "nodes": tuple(entry["nodes"]), "model": model})


def _tensor(entry: dict[str, Any]) -> Tensor:
    packing = None
    if entry["packing"]:
        several = {name: tuple(entry["packing"].get(name, ())) for name in ("sources", "columns")}
        packing = _typed(Packing)(**{**entry["packing"], **several})
    tensor = _typed(Tensor)(
        **{
            **entry, "space": Space(entry["space"]), "dtype": Dtype(entry["dtype"]),
            "shape": tuple(entry["shape"]), "packing": packing,
        }
    )  # fmt: skip
    if tensor.kind not in TENSOR_KINDS:
        raise ProgramError(f"tensor {tensor.name!r} is of kind {tensor.kind!r}; known: {', '.join(TENSOR_KINDS)}")
    return tensor


def _typed(record: type[_Record]) -> Callable[..., _Record]:
    """The constructor of a record whose numbers, texts and tuples must have the declared type."""

    def make(**values: Any) -> _Record:
        for declared in fields(record):  # type: ignore[arg-type]
            expected = _CHECKED.get(declared.type)
            value = values.get(declared.name)
            if expected and declared.name in values and not (type(value) is expected[0] and expected[1](value)):
                kind = inspect.formatannotation(declared.type)
                raise ProgramError(f"{record.__name__} has {declared.name} {value!r}, expected {kind}")
        return record(**values)

    return make


def _all_are(kind: type) -> Callable[[Any], bool]:
    return lambda values: all(type(value) is kind for value in values)


_CHECKED: dict[Any, tuple[type, Callable[[Any], bool]]] = {
    **{kind: (kind, lambda _: True) for kind in (int, str, bool)},
    tuple[int, ...]: (tuple, _all_are(int)),
    tuple[str, ...]: (tuple, _all_are(str)),
    dict[str, Any]: (dict, lambda _: True),
}


def _write(archive: zipfile.ZipFile, name: str, data: bytes) -> None:
    archive.writestr(zipfile.ZipInfo(name), data, zipfile.ZIP_DEFLATED)  # a fixed time stamp keeps the bytes equal


def _npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.ascontiguousarray(array), allow_pickle=False)
    return buffer.getvalue()


def _read(archive: zipfile.ZipFile, name: str) -> bytes:
    """A member's bytes, never more than its entry declares: the entries were added up against the limit."""
    with archive.open(name) as member:
        return member.read(archive.getinfo(name).file_size)


def _read_npy(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    """An array as `_npy` wrote it; numpy's reader would reserve whatever the header's shape declares."""
    data = _read(archive, name)
    file = io.BytesIO(data)
    if np.lib.format.read_magic(file) != (1, 0):
        raise ValueError(f"{name} is not of .npy version 1.0")
    shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
    if fortran or dtype.kind not in "iu" or min(shape, default=0) < 0:
        raise ValueError(f"{name} is not a row-major array of integers")
    return np.frombuffer(data, dtype, offset=file.tell()).reshape(shape).copy()
