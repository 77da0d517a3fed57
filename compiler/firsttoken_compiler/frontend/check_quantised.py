"""Scales, zero points and blocks of quantised operators, where they are constants."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from firsttoken_compiler.errors import StudentError
from firsttoken_compiler.frontend.check_graph import label, shown

CHUNK: Final = 1 << 22
"""Scales looked at in one go."""
Triple = tuple[int | None, int, int | None]
"""Numbers of the inputs that are a tensor, its scale, and its zero point."""
_TRIPLES: Final[dict[str, tuple[Triple, ...]]] = {
    "QuantizeLinear": ((0, 1, 2),),
    "DequantizeLinear": ((0, 1, 2),),
    "QLinearMatMul": ((0, 1, 2), (3, 4, 5), (None, 6, 7)),
    "QLinearConv": ((0, 1, 2), (3, 4, 5), (None, 6, 7)),
    "QLinearAdd": ((0, 1, 2), (3, 4, 5), (None, 6, 7)),
    "QLinearMul": ((0, 1, 2), (3, 4, 5), (None, 6, 7)),
    "QGemm": ((0, 1, 2), (3, 4, 5), (None, 7, 8)),
    "QLinearSigmoid": ((0, 1, 2), (None, 3, 4)),
    "QLinearSoftmax": ((0, 1, 2), (None, 3, 4)),
    "QLinearLeakyRelu": ((0, 1, 2), (None, 3, 4)),
    "QLinearAveragePool": ((0, 1, 2), (None, 3, 4)),
    "QLinearGlobalAveragePool": ((0, 1, 2), (None, 3, 4)),
    "MatMulIntegerToFloat": ((0, 2, 4), (1, 3, 5)),
    "DynamicQuantizeMatMul": ((1, 2, 3),),
}
_DIVIDES: Final = ("QuantizeLinear",)
"""Operators that divide by the scale of input 1; those with a scale of a result divide by that."""


@dataclass(frozen=True)
class _Site:
    """A node with what is said about its inputs."""

    student: Any
    node: Any

    @property
    def where(self) -> str:
        return f"{self.student.name}: node {label(self.node)} ({self.node.op_type})"

    def shape(self, index: int | None) -> tuple[int, ...] | None:
        """Shape of an input that is an initialiser; None for any other."""
        name = self.input(index)
        return self.student.initializers[name].shape if name in self.student.initializers else None

    def input(self, index: int | None) -> str:
        return self.node.input[index] if index is not None and index < len(self.node.input) else ""

    def kind(self, index: int) -> int:
        return int(self.student.initializers[self.input(index)].onnx_type)

    def attribute(self, name: str, default: int) -> int:
        return next((int(a.i) for a in self.node.attribute if a.name == name), default)

    def array(self, index: int | None) -> np.ndarray | None:
        """Values of an input that is an initialiser and whose data is here."""
        name = self.input(index)
        if name not in self.student.initializers or not self.student.has_data(name):
            return None
        return np.asarray(self.student.array(name))

    def refuse(self, reason: str) -> StudentError:
        return StudentError(f"{self.where}: {reason}")


def check_quantised(student: Any) -> None:
    """Raises StudentError for a scale that is not a finite number or loses values, and for shapes that do not match."""
    for node in student.graph.node:
        site = _Site(student, node)
        if node.op_type in _TRIPLES and node.domain in ("", "com.microsoft"):
            for triple in _TRIPLES[node.op_type]:
                _check_triple(site, *triple)
        elif node.op_type == "QLinearConcat":
            for first in range(2, len(node.input) - 2, 3):
                _check_triple(site, first, first + 1, first + 2)
            _check_triple(site, None, 0, 1)
        elif node.op_type == "MatMulNBits":
            _check_nbits(site)
        elif node.op_type == "GatherBlockQuantized":
            _check_gather(site)


def _check_triple(site: _Site, tensor: int | None, scale: int, zero: int | None) -> None:
    shape, zeros = site.shape(scale), site.shape(zero)
    if shape is None:
        return
    if zeros is not None and zeros != shape and not (math.prod(zeros) == math.prod(shape) == 1):
        raise site.refuse(
            f"zero points {shown(site.input(zero))} have shape {list(zeros)}, their scales have {list(shape)}: "
            "export the model again"
        )
    data = site.shape(tensor)
    divides = tensor is None or site.node.op_type in _DIVIDES
    if data is not None and site.node.op_type in ("QuantizeLinear", "DequantizeLinear"):
        _check_granularity(site, data, shape)
    zero_at = _check_scales(site, scale, divides)
    if zero_at is None:
        return
    if data is None or site.node.op_type != "DequantizeLinear":
        raise site.refuse(f"scale {shown(site.input(scale))} is 0, which loses every value: export the model again")
    _check_lost(site, scale, zero)


def _check_granularity(site: _Site, data: tuple[int, ...], scale: tuple[int, ...]) -> None:
    """One scale, one per index of the axis, or one per block along it."""
    if math.prod(scale) == 1 and len(scale) <= 1:
        return
    axis, block = site.attribute("axis", 1), site.attribute("block_size", 0)
    if not -len(data) <= axis < len(data):
        raise site.refuse(f"axis {axis} does not exist, the tensor has shape {list(data)}")
    axis %= len(data)
    if block < 0:
        raise site.refuse(f"block_size {block}, must be 0 or more")
    if not block:
        if scale != (data[axis],):
            raise site.refuse(
                f"scales {shown(site.input(1))} have shape {list(scale)}, but axis {axis} of {list(data)} has "
                f"{data[axis]} elements: export the model again"
            )
        return
    expected = (*data[:axis], -(-data[axis] // block), *data[axis + 1 :])
    if scale != expected:
        raise site.refuse(
            f"blocks of {block} along axis {axis} of {list(data)} need scales of shape {list(expected)}, "
            f"{shown(site.input(1))} has {list(scale)}: export the model again"
        )


def _check_scales(site: _Site, index: int, divides: bool) -> int | None:
    """The first scale that is 0, where that may be harmless; raises StudentError for those that never are."""
    array = site.array(index)
    if array is None:
        return None
    flat = array.reshape(-1)
    first_zero = None
    for start in range(0, flat.size, CHUNK):
        part = flat[start : start + CHUNK].astype(np.float32)
        bad = np.flatnonzero(~np.isfinite(part))
        if bad.size:
            raise site.refuse(
                f"scale {int(bad[0]) + start} of {shown(site.input(index))} is {part[bad[0]]}: scales are finite "
                "numbers; export the model again"
            )
        if divides and part.size and float(part.min()) <= 0:
            raise site.refuse(f"scale {shown(site.input(index))} is {part.min()}, must be above 0: export again")
        zeros = np.flatnonzero(part == 0)
        if zeros.size and first_zero is None:
            first_zero = int(zeros[0]) + start
    return first_zero


def _check_lost(site: _Site, scale: int, zero: int | None) -> None:
    """A scale of 0 is what quantisers write for weights that are all 0; for others it loses them."""
    data, scales, zeros = site.array(0), site.array(scale), site.array(zero)
    if data is None or scales is None:
        return
    axis, block = site.attribute("axis", 1) % max(data.ndim, 1), site.attribute("block_size", 0)
    for position in np.argwhere(scales == 0):
        if not scales.ndim or scales.size == 1:
            part: tuple[slice | int, ...] = ()
        elif not block:
            part = (*[slice(None)] * axis, int(position[0]))
        else:
            at = position.tolist()
            part = (*at[:axis], slice(at[axis] * block, (at[axis] + 1) * block), *at[axis + 1 :])
        expected = 0 if zeros is None else int(zeros.reshape(scales.shape)[tuple(position)])
        if bool((data[part].astype(np.int64) != expected).any()):
            raise site.refuse(
                f"scale {position.tolist()} of {shown(site.input(scale))} is 0, which loses the weights of its block: "
                "export the model again"
            )


def _check_block_size(site: _Site, block: int) -> None:
    if block < 16 or block & (block - 1):
        raise site.refuse(f"block_size {block}, must be a power of 2 of at least 16: quantise the model again")


def _check_nbits(site: _Site) -> None:
    """com.microsoft MatMulNBits: B [N, blocks, block bytes], scales [N, blocks], zero points packed per row."""
    k, n, bits = site.attribute("K", 0), site.attribute("N", 0), site.attribute("bits", 4)
    block = site.attribute("block_size", 0)
    _check_block_size(site, block)
    if k < 1 or n < 1 or bits not in (2, 3, 4, 5, 6, 7, 8):
        raise site.refuse(f"K {k}, N {n}, bits {bits}: K and N are 1 or more, bits 2 to 8")
    blocks = -(-k // block)
    packed = n * blocks * (block * bits // 8)
    given = [(1, packed, f"{n} x {blocks} blocks of {block} weights of {bits} bits"), (2, n * blocks, "one per block")]
    for index, elements, meaning in given:
        shape = site.shape(index)
        if shape is not None and math.prod(shape) != elements:
            raise site.refuse(
                f"input {shown(site.input(index))} has shape {list(shape)}, needed are {elements} elements "
                f"({meaning}); K is {k}, N is {n}: quantise the model again"
            )
    zeros = site.shape(3)
    if zeros is not None:
        needed = n * (-(-blocks * bits // 8)) if site.kind(3) == 2 else n * blocks
        if math.prod(zeros) != needed:
            raise site.refuse(
                f"zero points {shown(site.input(3))} have shape {list(zeros)}, needed are {needed} elements for "
                f"{n} x {blocks} blocks: quantise the model again"
            )
    if site.shape(2) is not None and _check_scales(site, 2, False) is not None:
        _check_lost_blocks(site, n, blocks, bits)


def _check_lost_blocks(site: _Site, n: int, blocks: int, bits: int) -> None:
    data, scales, zeros = site.array(1), site.array(2), site.array(3)
    if data is None or scales is None or bits not in (4, 8) or (zeros is not None and zeros.dtype != np.uint8):
        return
    rows = data.reshape(n * blocks, -1)
    for index in _zero_blocks(scales.reshape(-1), blocks, site.attribute("K", 0) % site.attribute("block_size", 16)):
        middle = 1 << (bits - 1)
        if zeros is not None:
            row, column = divmod(index, blocks)
            packed = zeros.reshape(n, -1)[row]
            middle = int(packed[column]) if bits == 8 else int(packed[column // 2]) >> (4 * (column % 2)) & 15
        if bool((rows[index] != (middle if bits == 8 else middle * 17)).any()):
            raise site.refuse(
                f"scale {index} of {shown(site.input(2))} is 0, which loses the weights of its block: "
                "quantise the model again"
            )


def _zero_blocks(scales: np.ndarray, blocks: int, rest: int) -> Iterator[int]:
    """Blocks whose scale is 0, without those that end in padding."""
    for index in np.flatnonzero(scales == 0).tolist():
        if not (rest and index % blocks == blocks - 1):
            yield index


def _check_gather(site: _Site) -> None:
    """com.microsoft GatherBlockQuantized: scales have the table's shape with blocks along one axis."""
    table, scales, zeros = site.shape(0), site.shape(2), site.shape(3)
    block, bits = site.attribute("block_size", 128), site.attribute("bits", 4)
    _check_block_size(site, block)
    if table is None or scales is None:
        return
    rank = len(table)
    axis = site.attribute("quantize_axis", 1)
    if not -rank <= axis < rank:
        raise site.refuse(f"quantize_axis {axis} does not exist, the table has shape {list(table)}")
    axis %= rank
    values = [*table]
    if site.kind(0) == 2:
        values[-1] *= 8 // bits if bits in (2, 4, 8) else 1
    expected = (*values[:axis], -(-values[axis] // block), *values[axis + 1 :])
    if scales != expected:
        raise site.refuse(
            f"blocks of {block} along axis {axis} of {values} need scales of shape {list(expected)}, "
            f"{shown(site.input(2))} has {list(scales)}: quantise the model again"
        )
    if zeros is not None and site.kind(3) != 2 and zeros != scales:
        raise site.refuse(f"zero points {shown(site.input(3))} have shape {list(zeros)}, scales have {list(scales)}")
    _check_scales(site, 2, False)
