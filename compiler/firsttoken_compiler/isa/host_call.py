"""What the host computes for a program: an ONNX subgraph, its operands and results, and what it costs."""

from dataclasses import dataclass

from firsttoken_compiler.isa.types import Dtype


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
