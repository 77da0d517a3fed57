"""Arithmetic that makes numbers of planes of GGUF's blocks: trees over the names of the planes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from firsttoken_compiler.formats.types import BLOCK_TYPES, BlockType
from firsttoken_compiler.isa.types import PACKED, Dtype
from firsttoken_compiler.isa.vector_kernel import ENTRIES, Expr, VectorKernel
from firsttoken_compiler.schedule.spec import KernelSpec
from firsttoken_compiler.target.target import Target

Tree = Expr
"""Arithmetic on planes, by their names; `S` and `M` are the scales and minima of the groups of a panel, `C` its codes
as bytes."""


@dataclass(frozen=True)
class Blocks:
    """The weights of a product: their type, and where which plane is among the operands."""

    kind: BlockType
    k: int
    n: int
    dtypes: tuple[Dtype, ...]
    """Element types of the planes as operands."""
    tables: bool = False
    """Whether the vector unit looks numbers up."""
    in_bytes: bool = False
    """Whether it has more lanes for bytes, so that codes are made bytes before they are scaled."""

    @staticmethod
    def of(spec: KernelSpec, target: Target | None = None) -> Blocks:
        """The weights of a spec with an attribute `blocks`, as a target makes them."""
        if target is None:
            return _blocks_of(spec, tables=False, in_bytes=False)
        unit = target.vector
        return _blocks_of(spec, tables=unit.table_entries >= ENTRIES, in_bytes=unit.byte_lanes > unit.lanes)

    def grain(self, name: str) -> int:
        """Weights along k that share an element of a plane, or a staged number."""
        plane = self.kind.plane(name)
        return plane.per if plane is not None else 1 if name == "C" else self.kind.group

    def dtype(self, name: str) -> Dtype:
        """Element type of a plane; staged codes are bytes, other staged numbers fp32."""
        names = [plane.name for plane in self.kind.planes]
        if name in names:
            return self.dtypes[names.index(name)]
        return Dtype.I8 if name == "C" else Dtype.F32

    @property
    def scaled(self) -> bool:
        """Whether d is multiplied by a scale of each group."""
        return self.kind.plane("scale") is not None or self.kind.plane("scale_low") is not None

    @property
    def code(self) -> Tree:
        """What the scale multiplies; signed nibbles are less their zero already."""
        value = _joined(self.kind, "low", "high")
        if self.kind.codebook and self.tables:
            return ("lookup", value, *(float(entry) for entry in self.kind.codebook))
        if self.kind.codebook:
            return _looked_up(value, self.kind.codebook)
        zero = 0 if self.dtype("low") is Dtype.I4 else self.kind.zero
        return ("sub", value, float(zero)) if zero else value

    @property
    def scale(self) -> Tree:
        """The scale of a group."""
        if not self.scaled:
            return "d"
        low = "scale" if self.kind.plane("scale") is not None else "scale_low"
        value = _joined(self.kind, low, "scale_high")
        if self.kind.scale_zero:
            value = ("sub", value, float(self.kind.scale_zero))
        return ("mul", "d", value)

    @property
    def minimum(self) -> Tree | None:
        """What is taken off the weights of a group, where dmin says so."""
        return ("mul", "dmin", _joined(self.kind, "min_low", "min_high")) if self.kind.plane("dmin") else None

    def staged(self) -> dict[str, Tree]:
        """Numbers of a panel that the floats are made from, by the names that stand for them."""
        found = {"S": self.scale} if self.scaled else {}
        if self.minimum is not None:
            found["M"] = self.minimum
        return {**found, "C": self.code} if self._codes_apart else found

    @property
    def _codes_apart(self) -> bool:
        return self.in_bytes and self.dtype("low") in PACKED

    @property
    def floats(self) -> Tree:
        """The weights, in ggml's order of operations: bit by bit its values before they are rounded to fp16."""
        value: Tree = ("mul", "S" if self.scaled else "d", "C" if self._codes_apart else self.code)
        if self.kind.plane("m") is not None:
            return ("add", value, "m")
        return ("sub", value, "M") if self.minimum is not None else value

    @property
    def lies_ready(self) -> bool:
        """Whether the codes are what the matrix unit reads, as they lie."""
        return self.kind.plane("high") is None and not self.kind.codebook and not self._unsigned_zero

    @property
    def _unsigned_zero(self) -> bool:
        return self.kind.zero != 0 and self.dtype("low") is not Dtype.I4


@lru_cache(maxsize=4096)
def _blocks_of(spec: KernelSpec, *, tables: bool, in_bytes: bool) -> Blocks:
    kind = BLOCK_TYPES[str(spec["blocks"])]
    planes = spec.args[1 : 1 + len(kind.planes)]
    return Blocks(kind, int(spec["k"]), int(spec["n"]), tuple(arg.dtype for arg in planes), tables, in_bytes)


def operand_types(kind: BlockType) -> dict[str, str]:
    """Element types of the planes of a type as operands: nibbles less a zero of 8 are signed ones."""
    signed = kind.zero == 8 and kind.bits == 4
    return {plane.name: "int4" if signed and plane.name == "low" else plane.dtype for plane in kind.planes}


def leaves(tree: Tree) -> list[str]:
    """Names in a tree, each once, in order."""
    if isinstance(tree, tuple):
        return list(dict.fromkeys(name for part in tree[1:] for name in leaves(part)))
    return [tree] if isinstance(tree, str) else []


def _joined(kind: BlockType, low: str, high: str) -> Tree:
    """The number that the bits of two planes make; the second one may be absent."""
    plane = kind.plane(low)
    assert plane is not None
    return ("add", low, ("mul", high, float(1 << plane.bits))) if kind.plane(high) is not None else low


def _looked_up(value: Tree, codebook: tuple[int, ...], first: int = 0) -> Tree:
    """The entry of a codebook, by halving."""
    if len(codebook) == 1:
        return float(codebook[0])
    half = len(codebook) // 2
    low, high = _looked_up(value, codebook[:half], first), _looked_up(value, codebook[half:], first + half)
    return ("select", ("lt", value, float(first + half)), low, high)


def kernel_of(tree: Tree) -> VectorKernel:
    """The microprogram of a tree, whose sources are its leaves in their order."""
    return VectorKernel(_numbered(tree, leaves(tree)))


def _numbered(tree: Tree, names: list[str]) -> Expr:
    if isinstance(tree, tuple):
        return (tree[0], *(_numbered(part, names) for part in tree[1:]))
    return f"s{names.index(tree)}" if isinstance(tree, str) else tree
