"""The matrix and vector instructions compute what numpy computes: integers exactly, odd shapes and panels included."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from memory import SmallMemory

from firsttoken_compiler.isa.dma import spad
from firsttoken_compiler.isa.matmul import ACCUMULATE, TRANSPOSED, Matmul
from firsttoken_compiler.isa.types import Dtype, Operand, Space, pack
from firsttoken_compiler.isa.vector import INITIALISE, KERNEL_SHIFT, Vector
from firsttoken_compiler.isa.vector_kernel import VectorKernel

PAIRS = [
    (Dtype.I8, Dtype.I8),
    (Dtype.I8, Dtype.I4),
    (Dtype.I16, Dtype.I4),
    (Dtype.I16, Dtype.I8),
    (Dtype.I16, Dtype.I16),
]
WEIGHTS_AT = 1 << 15


def limits(dtype: Dtype) -> tuple[int, int]:
    return -(1 << (dtype.bits - 1)), (1 << (dtype.bits - 1)) - 1


def random(generator: np.random.Generator, dtype: Dtype, shape: tuple[int, ...], extreme: bool) -> np.ndarray:
    """Values of the whole range, or only its two ends."""
    low, high = limits(dtype)
    if extreme:
        return generator.choice(np.array([low, high], dtype.numpy), shape)
    return generator.integers(low, high, shape, dtype.numpy, endpoint=True)


def write_panels(memory: SmallMemory, w: np.ndarray, dtype: Dtype, width: int) -> tuple[int, int]:
    """Stores `w` in panels of `width` columns, the last one padded; returns the strides of panels and rows."""
    k, n = w.shape
    row = Dtype.I4.nbytes(width) if dtype is Dtype.I4 else width * dtype.bits // 8
    padded = np.pad(w, ((0, 0), (0, -n % width + width % 2)))
    for panel in range(-(-n // width)):
        block = np.ascontiguousarray(padded[:, panel * width : panel * width + width + width % 2])
        for i in range(k):
            data = pack(block[i], 4) if dtype is Dtype.I4 else block[i, :width].view(np.uint8)
            at = WEIGHTS_AT + (panel * k + i) * row
            memory.spaces[Space.SPAD][at : at + row] = data[:row]
    return k * row, row


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: f"{pair[0].text}x{pair[1].text}")
@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 9), st.integers(1, 37), st.integers(1, 70), st.integers(1, 20), st.booleans(), st.booleans(),
    st.booleans(), st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_integer_products_are_exact(
    pair: tuple[Dtype, Dtype],
    m: int,
    n: int,
    k: int,
    half: int,
    accumulate: bool,
    transposed: bool,
    extreme: bool,
    seed: int,
) -> None:
    a_type, w_type = pair
    transposed = transposed and w_type is not Dtype.I4
    width = 2 * half if w_type is Dtype.I4 else half  # int4 panels start at whole bytes
    generator = np.random.default_rng(seed)
    memory = SmallMemory(1 << 16, seed=seed)
    a, w = random(generator, a_type, (m, k), extreme), random(generator, w_type, (k, n), extreme)
    memory.view(Space.SPAD, a_type.numpy.str, 0, m, k)[...] = a
    before = memory.view(Space.ACC, "<i4", 0, m, n).astype(np.int64)
    if transposed:
        memory.view(Space.SPAD, w_type.numpy.str, WEIGHTS_AT, n, k)[...] = w.T
        strides = (0, k * w_type.bits // 8, 0)
    else:
        strides = (*write_panels(memory, w, w_type, width), width)
    Matmul(
        queue=2, flags=ACCUMULATE * accumulate + TRANSPOSED * transposed, dims=(m, n, k),
        operands=(Operand(Space.ACC, Dtype.I32, 0, 4 * n), spad(a_type, 0, k * a_type.bits // 8),
                  spad(w_type, WEIGHTS_AT, *strides)),
    ).execute(memory)  # fmt: skip
    exact = a.astype(np.int64) @ w.astype(np.int64) + (before if accumulate else 0)
    np.testing.assert_array_equal(memory.view(Space.ACC, "<i4", 0, m, n), exact.astype(np.int32))


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: f"{pair[0].text}x{pair[1].text}")
def test_long_sums_of_extremes_wrap_and_stay_exact(pair: tuple[Dtype, Dtype]) -> None:
    """The largest product at the longest k that memory here holds: past any float's mantissa if it were fp32."""
    k, a_type, w_type = 8000, *pair
    memory = SmallMemory(1 << 16)
    memory.view(Space.SPAD, a_type.numpy.str, 0, k)[...] = limits(a_type)[0]
    low = limits(w_type)[0]
    column = np.full(2 * k, low, np.int8 if w_type is not Dtype.I16 else np.int16)
    column[1::2] = limits(w_type)[1]  # the second column
    data = pack(column, 4) if w_type is Dtype.I4 else column.view(np.uint8)
    row = 2 * w_type.bits // 8
    memory.spaces[Space.SPAD][WEIGHTS_AT : WEIGHTS_AT + data.size] = data
    Matmul(
        queue=2, dims=(1, 2, k),
        operands=(Operand(Space.ACC, Dtype.I32, 0, 8), spad(a_type, 0), spad(w_type, WEIGHTS_AT, 0, row, 2)),
    ).execute(memory)  # fmt: skip
    exact = np.array([k * limits(a_type)[0] * low, k * limits(a_type)[0] * limits(w_type)[1]], np.int64)
    np.testing.assert_array_equal(memory.view(Space.ACC, "<i4", 0, 2), exact.astype(np.int32))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("accumulate", [False, True])
def test_float_products_accumulate_in_fp32(accumulate: bool, transposed: bool) -> None:
    m, n, k = 5, 7, 33
    generator = np.random.default_rng(3)
    memory = SmallMemory(1 << 16)
    a, w = (generator.standard_normal(shape).astype(np.float16) for shape in ((m, k), (k, n)))
    memory.view(Space.SPAD, "<f2", 0, m, k)[...] = a
    memory.view(Space.SPAD, "<f2", WEIGHTS_AT, *((n, k) if transposed else (k, n)))[...] = w.T if transposed else w
    acc = memory.view(Space.ACC, "<f4", 0, m, n)
    acc[...] = 2.0
    strides = (0, 2 * k, 0) if transposed else (0, 2 * n, n)
    Matmul(
        queue=2, flags=ACCUMULATE * accumulate + TRANSPOSED * transposed, dims=(m, n, k),
        operands=(Operand(Space.ACC, Dtype.F32, 0, 4 * n), spad(Dtype.F16, 0, 2 * k),
                  spad(Dtype.F16, WEIGHTS_AT, *strides)),
    ).execute(memory)  # fmt: skip
    exact = a.astype(np.float64) @ w.astype(np.float64) + (2.0 if accumulate else 0.0)
    np.testing.assert_allclose(acc, exact, atol=k * 2.0**-24 * 16)


def vector(memory: SmallMemory, dims: tuple[int, int, int], flags: int, *operands: Operand) -> None:
    Vector(queue=3, dims=dims, flags=flags, operands=operands).execute(memory)


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (Dtype.I8, [-128, 127, -1, 1, 0, 0, 127, -128]),
        (Dtype.I16, [-300, 300, -1, 1, 0, 0, 32767, -32768]),
        (Dtype.I32, [-300, 300, -1, 1, 0, 0, 2**31 - 1, -(2**31)]),
        (Dtype.F16, [-300, 300, -1.7, 1.7, 0, np.nan, np.inf, -np.inf]),
        (Dtype.F32, [-300, 300, -1.7, 1.7, 0, np.nan, 1e30, -1e30]),
    ],
)
def test_results_are_narrowed(dtype: Dtype, expected: list[float]) -> None:
    """Integers truncate towards zero and saturate, NaN becomes 0; fp16 rounds to nearest even and overflows to inf."""
    memory = SmallMemory(kernels=(VectorKernel.parse("s0"),))
    memory.view(Space.SPAD, "<f4", 0, 8)[...] = [-300, 300, -1.7, 1.7, 0, np.nan, 1e30, -1e30]
    element = dtype.bits // 8
    vector(memory, (1, 1, 8), 0, spad(dtype, 512, 0, 0, element), spad(Dtype.F32, 0, 0, 0, 4))
    expected_array = np.array(expected, np.float64).astype(dtype.numpy)
    np.testing.assert_array_equal(memory.view(Space.SPAD, dtype.numpy.str, 512, 8), expected_array)


@pytest.mark.parametrize(
    ("kernel", "ufunc"), [("add<- s0", np.add), ("max<- s0", np.maximum), ("min<- s0", np.minimum)]
)
@pytest.mark.parametrize("axes", [(0,), (1,), (2,), (0, 2), (1, 2), (0, 1, 2)])
@pytest.mark.parametrize("initialise", [False, True])
def test_reductions_fold_the_axes_of_stride_zero(
    kernel: str, ufunc: np.ufunc, axes: tuple[int, ...], initialise: bool
) -> None:
    dims = (2, 3, 4)
    memory = SmallMemory(kernels=(VectorKernel.parse("0.0"), VectorKernel.parse(kernel)))
    values = memory.view(Space.SPAD, "i1", 512, *dims).astype(np.float32)
    strides = [0 if axis in axes else stride for axis, stride in enumerate((48, 16, 4))]
    memory.view(Space.SPAD, "<f4", 0, *dims)[...] = np.arange(24).reshape(dims) - 10
    before = memory.view(Space.SPAD, "<f4", 0, *dims).copy()
    dst, source = spad(Dtype.F32, 0, *strides), spad(Dtype.I8, 512, 12, 4, 1)
    vector(memory, dims, (1 << KERNEL_SHIFT) | (INITIALISE if initialise else 0), dst, source)
    kept = tuple(slice(0, 1) if axis in axes else slice(None) for axis in range(3))
    expected = before.copy()
    folded = ufunc.reduce(values, axis=axes, keepdims=True)
    expected[kept] = folded if initialise else ufunc(before[kept], folded)
    np.testing.assert_array_equal(memory.view(Space.SPAD, "<f4", 0, *dims), expected)


def test_a_map_may_write_over_its_source() -> None:
    memory = SmallMemory(kernels=(VectorKernel.parse("mul(s0, 2.0)"),))
    row = memory.view(Space.SPAD, "<f4", 0, 16)
    row[...] = np.arange(16)
    vector(memory, (1, 1, 16), 0, spad(Dtype.F32, 0, 0, 0, 4), spad(Dtype.F32, 0, 0, 0, 4))
    np.testing.assert_array_equal(row, 2 * np.arange(16))
