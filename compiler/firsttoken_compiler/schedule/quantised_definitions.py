"""TE of operators on packed integers: two four-bit numbers of a byte, each in a byte of its own."""

from collections.abc import Callable
from typing import Any, Final

from firsttoken_compiler.schedule.spec import KernelSpec
from firsttoken_compiler.tvm.api import te


def _nibble(byte: Any, high: Any) -> Any:
    """The signed low or high half of a signed byte; `high` is 0 or 1, in fp32."""
    wide = byte.astype("float32")
    top = te.floor(wide * (1.0 / 16))
    low = wide - top * 16.0
    low = low - te.floor(low * (1.0 / 8)) * 16.0
    return low + (top - low) * high


def _unpack(spec: KernelSpec, p: list[Any]) -> list[Any]:
    """Bytes `[m, w]` to their halves `[m, 2 w]`, low ones first."""
    rows, width = spec.outs[0].shape

    def element(i: Any, j: Any) -> Any:
        return _nibble(p[0][i, j // 2], (j % 2).astype("float32")).astype("int8")

    return [te.compute((rows, width), element, name="out")]


def _unpack_by_half(spec: KernelSpec, p: list[Any]) -> list[Any]:
    """The same over (row, byte, half)."""
    rows, width = spec.outs[0].shape

    def element(i: Any, j: Any, half: Any) -> Any:
        return _nibble(p[0][i, j], half.astype("float32")).astype("int8")

    return [te.compute((rows, width // 2, 2), element, name="out")]


QUANTISED: Final[dict[str, Callable[[KernelSpec, list[Any]], list[Any]]]] = {"unpack": _unpack}
QUANTISED_BY_ELEMENT: Final[dict[str, Callable[[KernelSpec, list[Any]], list[Any]]]] = {"unpack": _unpack_by_half}
