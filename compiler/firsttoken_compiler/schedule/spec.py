"""What a kernel computes, as a hashable value: equal specs are scheduled once and relocated."""

import json
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

from firsttoken_compiler.isa.types import Dtype

DTYPES = {
    "float32": Dtype.F32, "float16": Dtype.F16, "int32": Dtype.I32, "int16": Dtype.I16,
    "int8": Dtype.I8, "int4": Dtype.I4, "int64": Dtype.I64, "uint8": Dtype.U8, "bool": Dtype.BOOL,
    "float64": Dtype.F64, "uint16": Dtype.U16, "uint32": Dtype.U32, "uint64": Dtype.U64,
    "uint4": Dtype.U4, "uint2": Dtype.U2, "uint1": Dtype.U1,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}

MASKED: Final = -1e30
"""Stands for minus infinity: added to a score it leaves a weight of exactly 0, unless all of a row is masked."""


@dataclass(frozen=True, slots=True)
class Arg:
    """Shape and element type of an operand or result."""

    shape: tuple[int, ...]
    dtype: Dtype
    whole: int = 0
    """Of a part of an operand: columns of the whole matrix, or rows of the packed weights in DRAM; 0: it is no part."""

    @property
    def nbytes(self) -> int:
        """Bytes when packed row-major."""
        elements = 1
        for extent in self.shape:
            elements *= extent
        return self.dtype.nbytes(elements)


@dataclass(frozen=True)
class KernelSpec:
    """Operator (without `npu.`), its attributes, its operands and its results.

    A key of most tables of a compilation: its hash, and its attributes by name, are made once.
    """

    kind: str
    params: tuple[tuple[str, int | float | str], ...]
    args: tuple[Arg, ...]
    outs: tuple[Arg, ...]

    def __hash__(self) -> int:
        return self._hash

    def __reduce__(self) -> tuple[Any, ...]:
        # Hashes of strings differ from process to process, so none travels with the spec.
        return KernelSpec, (self.kind, self.params, self.args, self.outs)

    @cached_property
    def _hash(self) -> int:
        return hash((self.kind, self.params, self.args, self.outs))

    @cached_property
    def _values(self) -> dict[str, Any]:
        return dict(self.params)

    def __getitem__(self, name: str) -> Any:
        """An attribute by name; raises KeyError."""
        return self._values[name]

    def get(self, name: str) -> Any:
        """An attribute by name; 0 when the spec has none of that name."""
        return self._values.get(name, 0)

    @property
    def rows(self) -> int:
        """Rows of the result (tokens)."""
        return self.outs[0].shape[0]

    def to_json(self) -> str:
        """Text form, kept on the PrimFunc as attribute `npu.spec`."""
        return json.dumps(
            [
                self.kind,
                self.params,
                [(a.shape, int(a.dtype)) for a in self.args],
                [(a.shape, int(a.dtype)) for a in self.outs],
            ]
        )

    @staticmethod
    def from_json(text: str) -> "KernelSpec":
        """Inverse of `to_json`."""
        kind, params, args, outs = json.loads(text)
        args_, outs_ = (tuple(Arg(tuple(shape), Dtype(dtype)) for shape, dtype in part) for part in (args, outs))
        return KernelSpec(kind, tuple((name, value) for name, value in params), args_, outs_)
