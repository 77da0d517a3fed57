"""Vector unit: cycles from `rates.vector_cycles`; operands stream from and to the scratchpad or the accumulators.

A source with stride 0 along the inner axis is read once per row of lanes, any other once per element; the
destination is written once per element that it has, and a reduction that does not initialise reads it too. Rows of
elements of less than a byte are whole bytes. Operations are counted as those of fp32 lanes that take as long. The bank
time is that of the slowest operand's stream.
"""

import math

import numpy as np

from firsttoken_compiler.isa import word
from firsttoken_compiler.isa.types import PACKED, Dtype, Space
from firsttoken_compiler.isa.vector import INITIALISE, KERNEL_SHIFT
from firsttoken_compiler.isa.vector_kernel import VectorKernel
from firsttoken_compiler.target.rates import vector_cycles, vector_lanes
from firsttoken_compiler.target.target import Target
from firsttoken_simulator.units.compute import ComputeCost, distinct
from firsttoken_simulator.units.scratchpad import stream_cycles

_OPERANDS = [word.operand_column(i) + f for i in range(word.MAX_OPERANDS) for f in (0, 2, 3, 4)]
_SHAPE = [word.FLAGS, word.DIMS, word.DIMS + 1, word.DIMS + 2, *_OPERANDS]


def resolve(code: np.ndarray, index: np.ndarray, target: Target, kernels: tuple[VectorKernel, ...]) -> ComputeCost:
    """Costs of the vector instructions at `index`; every distinct (microprogram, extents, strides) is computed once."""
    rows, inverse = distinct(code, index, _SHAPE)
    table = np.array([_one(target, kernels, row) for row in rows.tolist()], np.int64).reshape(-1, 8)
    return ComputeCost(*table.T[:, inverse])


def _one(target: Target, kernels: tuple[VectorKernel, ...], row: list[int]) -> tuple[int, ...]:
    flags, dims = row[0], (row[1], row[2], row[3])
    kernel = kernels[flags >> KERNEL_SHIFT]
    elements = dims[0] * dims[1] * dims[2]
    read = written = acc = 0
    dtypes: list[Dtype] = []
    banks, sums = 0.0, False
    for index in range(word.MAX_OPERANDS):
        kind, *strides = row[4 + 4 * index : 8 + 4 * index]
        if not kind:
            continue
        dtype = Dtype(word.dtype_of(kind))
        dtypes.append(dtype)
        if index == 0:
            moved = dtype.nbytes(math.prod(extent for extent, stride in zip(dims, strides, strict=True) if stride))
            accumulates = kernel.reduction is not None and not flags & INITIALISE
        else:
            moved = dims[0] * dims[1] * dtype.nbytes(dims[2] if strides[2] else 1)
            accumulates = False
        if word.space_of(kind) == Space.ACC:
            acc += moved * (1 + accumulates)
            sums = sums or index > 0
            continue
        written += moved if index == 0 else 0
        read += moved if index or accumulates else 0
        banks = max(banks, stream_cycles(target, moved * (1 + accumulates), *_pattern(dims, strides, dtype)))
    cycles = vector_cycles(target, kernel, dims, tuple(dtypes), sums)
    each = sum(kernel.cost) + sum(dtype in PACKED for dtype in dtypes[1:])
    narrower = vector_lanes(target, kernel, tuple(dtypes)) / target.vector.lanes
    return 0, cycles, 0, math.ceil(banks), read, written, acc, math.ceil(elements * each / narrower)


def _pattern(dims: tuple[int, int, int], strides: list[int], dtype: Dtype) -> tuple[int, int]:
    """(run, stride) in bytes of the stream in the order in which the lanes take it."""
    run, stride = dtype.nbytes(1), dtype.nbytes(1)
    if dtype in PACKED and strides[2]:
        run = stride = dtype.nbytes(dims[2])
        dims = (dims[0], dims[1], 1)
    for extent, step in zip(reversed(dims), reversed(strides), strict=True):
        if extent == 1 or step == 0:
            continue
        if step != run:
            return run, step
        run *= extent
        stride = run
    return run, stride
