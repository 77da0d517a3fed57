"""What an ONNX file is made of, found before it is parsed: a parser makes a hundred bytes of memory out of two.

Walks the wire format of protocol buffers without copying, and never into weights.
"""

import mmap
from pathlib import Path
from typing import Final

from firsttoken_compiler.errors import StudentError

MAX_FIELDS: Final = 1_000_000
"""Fields of a file, without the values of weights."""
SMALL_BYTES: Final = 4 << 20
"""Files with no more than this outside their weights are not looked into: whatever they hold fits in memory."""
MAX_DEPTH: Final = 100
_MODEL, _GRAPH, _NODE, _ATTRIBUTE, _TENSOR, _FUNCTION, _OTHER = range(7)
_HOLDS: Final[dict[int, dict[int, int]]] = {
    _MODEL: {7: _GRAPH, 25: _FUNCTION, 8: _OTHER, 14: _OTHER, 20: _OTHER},
    _GRAPH: {1: _NODE, 5: _TENSOR, 11: _OTHER, 12: _OTHER, 13: _OTHER, 14: _OTHER, 15: _OTHER, 16: _OTHER},
    _NODE: {5: _ATTRIBUTE, 9: _OTHER},
    _ATTRIBUTE: {5: _TENSOR, 6: _GRAPH, 10: _TENSOR, 11: _GRAPH, 14: _OTHER, 15: _OTHER, 22: _OTHER, 23: _OTHER},
    _TENSOR: {13: _OTHER, 16: _OTHER},
    _FUNCTION: {7: _NODE, 9: _OTHER, 11: _ATTRIBUTE, 12: _OTHER, 14: _OTHER},
    _OTHER: {},
}
"""Messages inside messages by field number; whatever else has a length is a text or weights."""


class _Malformed(Exception):
    """The bytes are no protocol buffer, or end too early."""


class _Scan:
    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.fields = data, 0

    def varint(self, at: int, end: int) -> tuple[int, int]:
        """A number and where it ends."""
        value = shift = 0
        while at < end and shift < 70:
            byte = self.data[at]
            at += 1
            value |= (byte & 127) << shift
            if byte < 128:
                return value, at
            shift += 7
        raise _Malformed("a number has no end")

    def loose_bytes(self) -> int:
        """Bytes that belong to no weight of the graph; counts the fields of the weights."""
        loose = 0
        for number, start, end in self.entries(0, len(self.data)):
            if number != 7:
                loose += end - start
                continue
            for inner, first, last in self.entries(start, end):
                if inner == 5:
                    for field, begin, stop in self.entries(first, last):
                        loose += stop - begin if field in (1, 6, 8, 12, 13, 16) else 0
                else:
                    loose += last - first
        return loose

    def entries(self, at: int, end: int) -> list[tuple[int, int, int]]:
        """(field number, first byte, last byte + 1) of a message's fields."""
        found = []
        while at < end:
            key, at = self.varint(at, end)
            kind, start = key & 7, at
            if kind == 0:
                _, at = self.varint(at, end)
            elif kind == 1:
                at += 8
            elif kind == 5:
                at += 4
            elif kind == 2:
                length, start = self.varint(at, end)
                at = start + length
            else:
                raise _Malformed(f"a field of kind {kind}")
            if at > end:
                raise _Malformed(f"a field of {at - start} bytes has {end - start}")
            found.append((key >> 3, start, at))
            self.fields += 1
            if self.fields > MAX_FIELDS:
                raise StudentError(f"over {MAX_FIELDS} fields, the limit is {MAX_FIELDS}: simplify the graph first")
        return found

    def count(self) -> None:
        """Counts all fields, those of nested messages included."""
        self.fields = 0
        waiting = [(_MODEL, 0, len(self.data), 0)]
        while waiting:
            message, start, end, depth = waiting.pop()
            if depth > MAX_DEPTH:
                raise _Malformed(f"messages are nested more than {MAX_DEPTH} deep")
            for number, first, last in self.entries(start, end):
                inner = _HOLDS[message].get(number)
                if inner is not None and last > first:
                    waiting.append((inner, first, last, depth + 1))


def check_wire(path: Path) -> None:
    """Raises StudentError for a file that is truncated, is no protocol buffer, or would fill the memory if parsed."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        scan = _Scan(data)
        try:
            if scan.loose_bytes() > SMALL_BYTES:
                scan.count()
        except _Malformed as error:
            raise StudentError(
                f"{path}: not a readable ONNX file ({error}): it may be truncated; export it again"
            ) from error
        except StudentError as error:
            raise StudentError(f"{path}: {error}") from None
