"""The header of a GGUF file, read without trusting it: fields and tensors, every size checked before it is used.

Written for llama.cpp's description of versions 2 and 3. Tensors stay in the file: what is said about them is where they
lie, which `check` has found to be inside it.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from firsttoken_compiler.errors import StudentError
from firsttoken_compiler.formats.types import BLOCK_TYPES

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

MAGIC: Final = b"GGUF"
VERSIONS: Final = (2, 3)
MAX_FIELDS: Final = 10_000
MAX_TENSORS: Final = 100_000
MAX_NAME: Final = 64
"""Bytes of a tensor's name, as in ggml."""
MAX_KEY: Final = 256
MAX_TEXT: Final = 1 << 20
"""Bytes of a string."""
MAX_TEXTS: Final = 16 << 20
"""Bytes of all strings outside arrays."""
MAX_ITEMS: Final = 1 << 21
"""Elements of all arrays of fields."""
MAX_RANK: Final = 4
MAX_TENSOR_BYTES: Final = 16 << 30
"""At 4 bytes an element."""
DEFAULT_ALIGNMENT: Final = 32
MAX_ALIGNMENT: Final = 1 << 16
FLOATS: Final = {0: ("f32", 4), 1: ("f16", 2), 30: ("bf16", 2)}
"""Types of floats by their number in the file: name and bytes."""
_NUMBERS: Final = {
    0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d",
}  # fmt: skip
_STRING, _ARRAY = 8, 9
_KINDS: Final = {kind.ggml: kind for kind in BLOCK_TYPES.values()}


@dataclass(frozen=True, slots=True)
class Texts:
    """An array of strings that is decoded when it is asked for: `count` of them from byte `start` on."""

    start: int
    count: int


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """A tensor of the file: rows first, as numpy has it; `type` is a float of `FLOATS` or a key of `BLOCK_TYPES`."""

    name: str
    shape: tuple[int, ...]
    type: str
    offset: int
    nbytes: int


@dataclass(frozen=True)
class GgufFile:
    """The fields and tensors of a file whose header is sound."""

    path: Path
    fields: Mapping[str, Any] = field(repr=False)
    """Numbers, truth values, strings, tuples of numbers, and `Texts`."""
    tensors: Mapping[str, GgufTensor] = field(repr=False)

    def texts(self, key: str) -> list[str]:
        """An array of strings; raises StudentError where there is none of that name."""
        found = self.fields.get(key)
        if not isinstance(found, Texts):
            raise StudentError(f"{self.path}: no field {key} with strings: convert the model again")
        with self.path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            cursor = _Cursor(data, self.path, found.start)
            return [cursor.text(MAX_TEXT, key) for _ in range(found.count)]

    def bytes_of(self, name: str) -> NDArray[np.uint8]:
        """The bytes of a tensor, mapped from the file: a row of the tensor is a row."""
        import numpy as np

        tensor = self.tensors[name]
        rows = tensor.shape[0] if len(tensor.shape) > 1 else 1
        return np.memmap(self.path, np.uint8, "r", tensor.offset, (rows, tensor.nbytes // rows))


class _Cursor:
    """A place in the header; every read is checked against the end of the file."""

    def __init__(self, data: Any, path: Path, at: int = 0) -> None:
        self.data, self.path, self.at, self.size = data, path, at, len(data)
        self.items = self.texts = 0

    def fail(self, what: str) -> StudentError:
        return StudentError(f"{self.path}: {what}: download or convert the model again")

    def number(self, form: str, what: str) -> Any:
        """The next number of a form of `struct`."""
        width = struct.calcsize(form)
        self.require(width, what)
        value = struct.unpack_from(form, self.data, self.at)[0]
        self.at += width
        return value

    def require(self, nbytes: int, what: str) -> None:
        """Raises StudentError where the file ends sooner."""
        if nbytes > self.size - self.at:
            raise self.fail(
                f"the file ends at byte {self.size}, inside {what}, which needs {nbytes} bytes from {self.at} on"
            )

    def length(self, limit: int, what: str) -> int:
        """The length of a string; raises StudentError beyond `limit` or the end of the file."""
        count = int(self.number("<Q", what))
        if count > limit:
            raise self.fail(f"{what} has {count} bytes, the limit is {limit}")
        self.require(count, what)
        return count

    def text(self, limit: int, what: str) -> str:
        """The next string; bytes that are no UTF-8 are escaped."""
        count = self.length(limit, what)
        self.at += count
        return bytes(self.data[self.at - count : self.at]).decode("utf-8", "backslashreplace")

    def value(self, kind: int, key: str) -> Any:
        """The value of a field."""
        what = f"field {key!r}"
        if kind in _NUMBERS:
            return self.number(_NUMBERS[kind], what)
        if kind == _STRING:
            text = self.text(MAX_TEXT, what)
            self.texts += len(text)
            if self.texts > MAX_TEXTS:
                raise self.fail(f"{what} brings the strings to {self.texts} characters, the limit is {MAX_TEXTS}")
            return text
        if kind == _ARRAY:
            return self.array(what)
        raise self.fail(f"{what} has the unknown type {kind}")

    def array(self, what: str) -> Any:
        """The value of a field that is an array."""
        kind, count = self.number("<I", what), int(self.number("<Q", what))
        self.items += count
        if self.items > MAX_ITEMS:
            raise self.fail(f"{what} brings the elements of all arrays to {self.items}, the limit is {MAX_ITEMS}")
        if kind in _NUMBERS:
            form = f"<{count}{_NUMBERS[kind][1:]}"
            self.require(struct.calcsize(form), what)
            values = struct.unpack_from(form, self.data, self.at)
            self.at += struct.calcsize(form)
            return values
        if kind != _STRING:
            inside = "an array" if kind == _ARRAY else f"the unknown type {kind}"
            raise self.fail(f"{what} is an array of {inside}: only arrays of numbers and of strings are read")
        self.require(8 * count, what)
        start = self.at
        for _ in range(count):
            length = self.length(MAX_TEXT, what)
            self.at += length
        return Texts(start, count)


def is_gguf(path: Path) -> bool:
    """Whether the file is named or begins like a GGUF file; False where there is none."""
    if not path.is_file():
        return False
    if path.suffix.casefold() == ".gguf":
        return True
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def read(path: Path) -> GgufFile:
    """The fields and tensors of a file; raises StudentError naming the first thing that is wrong with its header."""
    size = path.stat().st_size
    if size < 24:
        raise StudentError(f"{path}: {size} bytes, a GGUF file has at least 24: download or convert the model again")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        cursor = _Cursor(data, path)
        tensors, fields = _preamble(cursor)
        found = _fields(cursor, fields)
        infos = [_info(cursor, index) for index in range(tensors)]
        return GgufFile(path, found, _placed(cursor, infos, _alignment(cursor, found)))


def _preamble(cursor: _Cursor) -> tuple[int, int]:
    """Numbers of tensors and fields, which the file is long enough for."""
    if bytes(cursor.data[:4]) != MAGIC:
        raise cursor.fail(f"begins with {bytes(cursor.data[:4])!r}, a GGUF file with {MAGIC!r}")
    cursor.at = 4
    version = cursor.number("<I", "the version")
    if version not in VERSIONS:
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
        if swapped in VERSIONS:
            raise cursor.fail(f"GGUF version {swapped} of big-endian numbers: little-endian ones are read")
        raise cursor.fail(f"GGUF version {version}, versions {VERSIONS[0]} and {VERSIONS[1]} are read")
    tensors, fields = cursor.number("<Q", "the number of tensors"), cursor.number("<Q", "the number of fields")
    for count, limit, least, what in ((tensors, MAX_TENSORS, 24, "tensors"), (fields, MAX_FIELDS, 13, "fields")):
        if count > limit:
            raise cursor.fail(f"declares {count} {what}, the limit is {limit}")
        cursor.require(count * least, f"the list of {count} {what}")
    return tensors, fields


def _fields(cursor: _Cursor, count: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for index in range(count):
        key = cursor.text(MAX_KEY, f"the name of field {index}")
        if key in found:
            raise cursor.fail(f"field {key!r} is there twice")
        found[key] = cursor.value(cursor.number("<I", f"field {key!r}"), key)
    return found


def _info(cursor: _Cursor, index: int) -> tuple[str, tuple[int, ...], int, int]:
    """Name, dimensions (innermost first), number of the type, and offset of a tensor."""
    name = cursor.text(MAX_NAME, f"the name of tensor {index}")
    what = f"tensor {name!r}"
    rank = cursor.number("<I", what)
    if not 1 <= rank <= MAX_RANK:
        raise cursor.fail(f"{what} has {rank} dimensions, tensors have 1 to {MAX_RANK}")
    dims = tuple(cursor.number("<Q", what) for _ in range(rank))
    return name, dims, cursor.number("<I", what), cursor.number("<Q", what)


def _alignment(cursor: _Cursor, fields: Mapping[str, Any]) -> int:
    given = fields.get("general.alignment", DEFAULT_ALIGNMENT)
    if type(given) is not int or not 8 <= given <= MAX_ALIGNMENT or given & (given - 1):
        raise cursor.fail(f"general.alignment is {given!r}, must be a power of two from 8 to {MAX_ALIGNMENT}")
    return given


def _placed(
    cursor: _Cursor, infos: list[tuple[str, tuple[int, ...], int, int]], alignment: int
) -> dict[str, GgufTensor]:
    """The tensors, which all lie inside the file."""
    start = -(-cursor.at // alignment) * alignment
    found: dict[str, GgufTensor] = {}
    for name, dims, number, offset in infos:
        what = f"tensor {name!r}"
        if name in found:
            raise cursor.fail(f"{what} is there twice")
        kind, nbytes = _sized(cursor, what, dims, number)
        if offset % alignment:
            raise cursor.fail(f"{what} lies at offset {offset}, which is no multiple of the alignment {alignment}")
        if start + offset + nbytes > cursor.size:
            raise cursor.fail(
                f"{what} of shape {list(dims[::-1])} needs {nbytes} bytes at {start + offset}, the file has "
                f"{cursor.size}"
            )
        found[name] = GgufTensor(name, dims[::-1], kind, start + offset, nbytes)
    return found


def _sized(cursor: _Cursor, what: str, dims: tuple[int, ...], number: int) -> tuple[str, int]:
    """Type and bytes of a tensor of these dimensions."""
    elements = 1
    for extent in dims:
        elements *= extent
        if extent < 1 or elements * 4 > MAX_TENSOR_BYTES:
            raise cursor.fail(
                f"{what} declares the dimensions {list(dims)}: each is at least 1, and {MAX_TENSOR_BYTES} bytes of "
                "floats are the limit"
            )
    if number in FLOATS:
        kind, width = FLOATS[number]
        return kind, elements * width
    if number not in _KINDS:
        known = ", ".join([*(kind for kind, _ in FLOATS.values()), *BLOCK_TYPES])
        raise StudentError(
            f"{cursor.path}: {what} is of type {_type_name(number)}; types that run are {known}: quantise the model "
            "to one of them (llama-quantize, or 'firsttoken quantise')"
        )
    blocks = _KINDS[number]
    if dims[0] % blocks.block:
        raise cursor.fail(
            f"{what} has rows of {dims[0]} weights, blocks of {blocks.name} hold {blocks.block}, which must divide them"
        )
    return blocks.name, elements // dims[0] * blocks.row_bytes(dims[0])


def _type_name(number: int) -> str:
    from gguf import GGMLQuantizationType

    try:
        return str(GGMLQuantizationType(number).name)
    except ValueError:
        return f"{number}, which ggml does not know"
