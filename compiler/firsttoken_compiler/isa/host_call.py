"""What the host computes for a program: an ONNX subgraph, its operands and results, and what it costs."""

from dataclasses import dataclass
from typing import Final

from firsttoken_compiler.isa.types import Dtype

AS_BITS: Final = {
    16: Dtype.U16, 17: Dtype.U8, 18: Dtype.U8, 19: Dtype.U8, 20: Dtype.U8, 23: Dtype.U8, 24: Dtype.U8, 25: Dtype.U8,
    26: Dtype.U8,
}  # fmt: skip
"""ONNX element types (bfloat16, float8, float4, int2, uint2) that lie in memory as the bits of these integers."""


def is_bits(name: str) -> bool:
    """Whether the values of a numpy type of this name lie in memory as bits, one value to an integer."""
    return name.startswith(("bfloat16", "float8", "float4", "int2", "uint2"))


COPIED: Final = -1
"""An operand that the host copies whole before it computes."""


@dataclass(frozen=True, slots=True)
class HostValue:
    """An operand or result of a call: a tensor of the subgraph, and how its elements lie in the program's memory."""

    name: str
    """Name in the subgraph."""
    elem_type: int
    """ONNX element type in the subgraph; the host converts."""
    shape: tuple[int, ...]
    dtype: Dtype
    """Element type in memory."""
    strides: tuple[int, ...]
    """In elements; 0 along repeats. Results are row-major."""
    reads: int = COPIED
    """Bytes of a weight on the host's own side that the call reads there; its load moves nothing and takes no time."""


@dataclass(frozen=True, slots=True)
class HostCall:
    """One call. `model` is a serialised ModelProto that refers to nothing outside itself."""

    name: str
    nodes: tuple[str, ...]
    """ONNX nodes that it computes."""
    reason: str
    """Why they do not run on the NPU."""
    inputs: tuple[HostValue, ...]
    outputs: tuple[HostValue, ...]
    flops: int
    """Floating-point or integer operations."""
    nbytes: int
    """Bytes that the subgraph's nodes read and write on the host."""
    model: bytes = b""
