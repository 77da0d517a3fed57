"""Packed weights: error bounds of quantisation, and the layout as the matrix unit reads it."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from firsttoken_compiler.codegen import weights
from firsttoken_compiler.codegen.weights import (
    dequantise,
    materialise,
    pack_panels,
    packed_bytes,
    panel_offset,
    quantise,
    quantise_asymmetric,
    scale_groups,
)
from firsttoken_compiler.errors import ProgramError
from firsttoken_compiler.formats.quantise import quantise as blocks_of
from firsttoken_compiler.formats.types import BLOCK_TYPES
from firsttoken_compiler.isa.dma import spad
from firsttoken_compiler.isa.matmul import Matmul
from firsttoken_compiler.isa.program import Packing, Program, Tensor
from firsttoken_compiler.isa.types import Dtype, Engine, Operand, Space, queue_index, unpack_int4
from firsttoken_compiler.isa.vector_kernel import VectorKernel

WEIGHT_TYPE = {4: Dtype.I4, 8: Dtype.I8, 16: Dtype.F16}


class Bytes:
    """One scratchpad and accumulator."""

    def __init__(self, data: np.ndarray) -> None:
        self.spaces = {Space.SPAD: data, Space.ACC: np.zeros(1 << 16, np.uint8)}

    def bytes(self, space: Space, core: int) -> np.ndarray:
        return self.spaces[space]

    def kernel(self, index: int) -> VectorKernel:
        raise ValueError(index)


def materialised(tensors: list[Tensor], arrays: dict[str, np.ndarray]) -> np.ndarray:
    """The memory image; every byte of it is written at most once."""
    size = max(tensor.address + tensor.nbytes for tensor in tensors)
    image, times = np.zeros(size, np.uint8), np.zeros(size, np.uint8)

    def write(address: int, data: np.ndarray) -> None:
        assert data.dtype == np.uint8
        assert data.ndim == 1
        image[address : address + data.size] = data
        times[address : address + data.size] += 1

    materialise(Program(np.zeros((0, 0), np.int64), (), tuple(tensors), ()), arrays.__getitem__, write)
    assert times.max(initial=0) <= 1
    assert times.sum() == sum(t.nbytes for t in tensors)
    return image


def matrix_tensors(k: int, n: int, panel: int, bits: int, group: int, transposed: bool) -> list[Tensor]:
    out: list[Tensor] = []
    for form in ("panels", "scales") if bits != 16 else ("panels",):
        packing = Packing("w", form, k, n, panel, bits, group, transposed)
        address = -(-out[-1].nbytes // 64) * 64 if out else 0
        dtype = WEIGHT_TYPE[bits] if form == "panels" else Dtype.F16
        out.append(Tensor(form, "weight", Space.DRAM, address, packed_bytes(packing), dtype, (k, n), packing))
    return out


shapes = st.tuples(st.integers(1, 40), st.integers(1, 40), st.integers(1, 24), st.sampled_from([4, 8, 16]))


def random_matrix(seed: int, k: int, n: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((k, n)) * 10.0 ** rng.integers(-3, 3, n)).astype(np.float32)


@settings(max_examples=150, deadline=None)
@given(shapes, st.integers(1, 40), st.booleans(), st.integers(0, 2**31), st.sampled_from([1, 64, 1 << 20]))
def test_matmul_reads_the_panels_back_exactly(
    shape: tuple[int, int, int, int], group: int, transposed: bool, seed: int, block: int
) -> None:
    k, n, panel, bits = shape
    matrix = random_matrix(seed, k, n)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weights, "BLOCK_ELEMENTS", block)
        tensors = matrix_tensors(k, n, panel, bits, group, transposed)
        image = materialised(tensors, {"w": matrix.T if transposed else matrix})
    expected = quantise(matrix, bits, group)[0] if bits != 16 else matrix.astype(np.float16)
    m = 3
    a = np.random.default_rng(seed + 1).integers(-128, 128, (m, k)).astype(np.int8 if bits != 16 else np.float16)
    at = -(-image.size // 64) * 64
    memory = Bytes(np.concatenate([image, np.zeros(at - image.size, np.uint8), a.reshape(-1).view(np.uint8)]))
    packing = tensors[0].packing
    assert packing is not None
    accumulator = Dtype.I32 if bits != 16 else Dtype.F32
    full = n // panel
    for first, count, width in ((0, full * panel, panel), (full, n % panel, n % panel)):
        if count == 0:
            continue
        row = (width * bits + 7) // 8
        w = Operand(Space.SPAD, WEIGHT_TYPE[bits], panel_offset(packing, first), k * row, row, width)
        left = spad(Dtype.I8 if bits != 16 else Dtype.F16, at, k * a.itemsize)
        acc = Operand(Space.ACC, accumulator, 0, count * 4)
        Matmul(queue=queue_index(0, Engine.MATRIX), dims=(m, count, k), operands=(acc, left, w)).execute(memory)
        found = memory.spaces[Space.ACC][: m * count * 4].view(accumulator.numpy).reshape(m, count)
        part = expected[:, first * panel : first * panel + count]
        if bits == 16:
            np.testing.assert_allclose(found, a.astype(np.float32) @ part.astype(np.float32), rtol=1e-4, atol=1e-2)
        else:
            assert np.array_equal(found, a.astype(np.int32) @ part.astype(np.int32))


@settings(max_examples=100, deadline=None)
@given(shapes, st.integers(1, 50), st.integers(0, 2**31))
def test_scales_lie_in_the_panels_of_their_columns(shape: tuple[int, int, int, int], group: int, seed: int) -> None:
    k, n, panel, bits = shape
    bits = 8 if bits == 16 else bits
    matrix = random_matrix(seed, k, n)
    tensor = matrix_tensors(k, n, panel, bits, group, False)[1]
    image = materialised(matrix_tensors(k, n, panel, bits, group, False), {"w": matrix})[tensor.address :]
    packing = tensor.packing
    assert packing is not None
    scales = quantise(matrix, bits, group)[1]
    for p in range(-(-n // panel)):
        width = min(panel, n - p * panel)
        at, size = panel_offset(packing, p), scale_groups(packing) * width * 2
        block = image[at : at + size].view(np.float16).reshape(-1, width)
        assert np.array_equal(block, scales[:, p * panel : p * panel + width])


@settings(max_examples=200, deadline=None)
@given(
    st.integers(1, 70),
    st.integers(1, 20),
    st.sampled_from([4, 8]),
    st.integers(1, 80),
    st.integers(-9, 6),
    st.integers(0, 2**31),
)
def test_quantisation_error_is_at_most_half_a_step(
    k: int, n: int, bits: int, group: int, power: int, seed: int
) -> None:
    matrix = np.random.default_rng(seed).standard_normal((k, n)).astype(np.float32) * np.float32(10.0**power)
    if not np.abs(matrix).max() / weights.QMAX[bits] < 65504:
        return
    q, scales = quantise(matrix, bits, group)
    assert q.shape == (k, n)
    assert scales.shape == (-(-k // group), n)
    assert np.abs(q).max(initial=0) <= weights.QMAX[bits]
    step = np.repeat(scales.astype(np.float64), group, axis=0)[:k]
    error = np.abs(matrix.astype(np.float64) - dequantise(q, scales, group))
    # Rounding the scale down to fp16 can leave the largest value beyond qmax steps; it is clipped to them.
    clipped = np.maximum(np.abs(matrix) - weights.QMAX[bits] * step, 0)
    assert (error <= np.maximum(step * (0.5 + 1e-4), clipped * (1 + 1e-4))).all()
    if np.abs(matrix).min() > 1e-2:  # normal fp16 scales are off by 2^-11 at most
        assert (clipped <= np.abs(matrix) * 2.0**-10).all()


@given(st.integers(0, 2**31), st.integers(1, 6), st.integers(1, 30), st.integers(1, 12))
def test_unpacking_panels_of_int4_gives_the_values_back(seed: int, k: int, n: int, panel: int) -> None:
    values = np.random.default_rng(seed).integers(-7, 8, (k, n)).astype(np.int8)
    packed = pack_panels(values, panel, 4)
    at = 0
    for first in range(0, n, panel):
        width = min(panel, n - first)
        size = k * -(-width // 2)
        rows = unpack_int4(packed[at : at + size].reshape(k, -1))
        assert np.array_equal(rows[:, :width], values[:, first : first + width])
        assert not rows[:, width:].any()
        at += size
    assert at == packed.size


def test_rounds_half_to_even_with_the_stored_scale_and_keeps_zero_columns() -> None:
    matrix = np.array([[7, 0], [2.5, 0], [-3.5, 0], [-7, 0]], np.float32)
    q, scales = quantise(matrix, 4, 4)
    assert q[:, 0].tolist() == [7, 2, -4, -7]
    assert scales.tolist() == [[1, 1]]
    assert not q[:, 1].any()


@settings(max_examples=100, deadline=None)
@given(
    st.integers(1, 70), st.integers(1, 12), st.sampled_from([4, 8]), st.integers(1, 80), st.floats(-9, 9),
    st.integers(0, 2**31),
)  # fmt: skip
def test_zero_points_halve_the_step_of_values_on_one_side(
    k: int, n: int, bits: int, group: int, middle: float, seed: int
) -> None:
    matrix = (np.random.default_rng(seed).standard_normal((k, n)) + middle).astype(np.float32)
    q, scales, zeros = quantise_asymmetric(matrix, bits, group)
    assert (q.shape, scales.shape, zeros.shape) == ((k, n), (-(-k // group), n), (-(-k // group), n))
    wide = [np.repeat(part.astype(np.float64), group, axis=0)[:k] for part in (scales, zeros)]
    found, low, high = (q - wide[1]) * wide[0], -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    # What lies beyond the range, as the scale or the zero point was rounded, is clipped to it.
    clipped = np.maximum((low - wide[1]) * wide[0] - matrix, 0) + np.maximum(matrix - (high - wide[1]) * wide[0], 0)
    assert (np.abs(matrix - found) <= np.maximum(wide[0] * (0.5 + 1e-4), clipped * (1 + 1e-4))).all()
    assert (clipped <= wide[0] * 0.51 + np.abs(matrix) * 2.0**-10).all()
    spread = np.maximum(matrix.max(axis=0), 0) - np.minimum(matrix.min(axis=0), 0)
    assert (scales.max(axis=0) <= (spread / (high - low)).astype(np.float16) + 1e-7).all()
    assert np.array_equal(quantise_asymmetric(np.zeros((k, n), np.float32), bits, group)[0], np.full((k, n), low))


@pytest.mark.parametrize(("bits", "group", "of"), [(4, 8, 32), (8, 12, 24), (4, 40, 40)])
def test_parts_of_groups_repeat_their_scales_and_zero_points(bits: int, group: int, of: int) -> None:
    k, n, panel, matrix = 40 if of == 40 else 2 * of, 10, 4, random_matrix(3, 40 if of == 40 else 2 * of, 10)
    tensors = []
    for form, dtype in (("panels", WEIGHT_TYPE[bits]), ("scales", Dtype.F16), ("zeros", Dtype.I8)):
        packing = Packing("w", form, k, n, panel, bits, group, False, f":{of}", 1 << (bits - 1))
        address = tensors[-1].address + tensors[-1].nbytes if tensors else 0
        tensors.append(Tensor(form, "weight", Space.DRAM, address, packed_bytes(packing), dtype, (k, n), packing))
    image = materialised(tensors, {"w": matrix})
    q, scales, zeros = quantise_asymmetric(matrix, bits, of)
    rows = np.arange(0, k, group) // of
    for tensor, values, width in zip(tensors, (q, scales[rows], zeros[rows]), (bits, 16, 8), strict=True):
        stored = image[tensor.address : tensor.address + tensor.nbytes]
        assert np.array_equal(stored, pack_panels(values, panel, width))


@pytest.mark.parametrize(
    ("dtype", "array"),
    [
        (Dtype.F32, np.arange(35, dtype=np.float64).reshape(5, 7) / 3),
        (Dtype.F16, np.arange(35, dtype=np.float32).reshape(5, 7) / 3),
        (Dtype.I64, np.arange(35, dtype=np.int32).reshape(5, 7)),
        (Dtype.F16, np.float32(2.5)),
    ],
)
@pytest.mark.parametrize("block", [1, 10, 1 << 20])
def test_plain_is_a_row_major_conversion(dtype: Dtype, array: np.ndarray, block: int) -> None:
    array = np.asarray(array)
    packing = Packing("w", "plain", 1, array.size, 1, dtype.bits, 0, False)
    tensor = Tensor("w", "weight", Space.DRAM, 0, array.size * dtype.bits // 8, dtype, array.shape, packing)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weights, "BLOCK_ELEMENTS", block)
        image = materialised([tensor], {"w": array})
    assert np.array_equal(image.view(dtype.numpy), array.astype(dtype.numpy).reshape(-1))


def test_fetches_each_source_once() -> None:
    asked: list[str] = []

    def fetch(name: str) -> np.ndarray:
        asked.append(name)
        return np.ones((8, 8), np.float32)

    tensors = tuple(matrix_tensors(8, 8, 4, 4, 8, False))
    materialise(Program(np.zeros((0, 0), np.int64), (), tensors, ()), fetch, lambda address, data: None)
    assert asked == ["w"]


@pytest.mark.parametrize(
    ("array", "bits", "message"),
    [
        (np.ones((4, 5), np.float32), 4, r"'w' has shape \(4, 5\), its packing expects \(5, 4\)"),
        (np.full((5, 4), np.nan, np.float32), 8, "not finite"),
        (np.full((5, 4), 1e30, np.float32), 8, "int8 with fp16 scales reaches"),
        (np.full((5, 4), 1e6, np.float32), 16, "keep it in fp32"),
    ],
)
def test_weights_that_do_not_fit_are_refused(array: np.ndarray, bits: int, message: str) -> None:
    with pytest.raises(ProgramError, match=message):
        materialised(matrix_tensors(5, 4, 4, bits, 5, False), {"w": array})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"form": "rows"}, "unknown packing form 'rows'; known: panels, scales, zeros, plain"),
        ({"bits": 5}, "4, 8 or 16 bits"),
        ({"group": 0}, "groups of 0 rows"),
        ({"n": 99}, "the tensor has 10"),
        ({"bits": 16, "form": "scales"}, "have no scales"),
        ({"bits": 16, "form": "zeros", "shift": 8}, "have no zeros"),
        ({"form": "zeros"}, "symmetric weights have no zeros"),
        ({"group": 3, "layout": ":5"}, "groups of 3 rows are no parts of those of ':5'"),
    ],
)
def test_impossible_recipes_are_refused(change: dict[str, object], message: str) -> None:
    fields = {"source": "w", "form": "panels", "k": 5, "n": 4, "panel": 4, "bits": 4, "group": 5, "transposed": False}
    packing = Packing(**{**fields, **change})  # type: ignore[arg-type]
    tensor = Tensor("w", "weight", Space.DRAM, 0, 10, Dtype.I4, (5, 4), packing)
    with pytest.raises(ProgramError, match=message):
        materialised([tensor], {"w": np.ones((5, 4), np.float32)})


@pytest.mark.parametrize(("bits", "group"), [(5, 4), (8, 0)])
def test_quantise_refuses_other_widths_and_groups(bits: int, group: int) -> None:
    with pytest.raises(ProgramError, match="bits are 4 or 8, groups at least 1"):
        quantise(np.ones((2, 2), np.float32), bits, group)


@pytest.mark.parametrize(("dtype", "low", "high"), [(Dtype.I4, -8, 7), (Dtype.U4, 0, 15)])
def test_four_bit_numbers_are_packed_low_nibble_first(dtype: Dtype, low: int, high: int) -> None:
    values = np.array([[low, high, 1], [3, 0, low]])
    packing = Packing("w", "plain", 0, 0, 0, 4, 0, False)
    tensor = Tensor("host:w", "weight", Space.DRAM, 0, 3, dtype, (2, 3), packing)
    found = materialised([tensor], {"w": values})
    flat = values.reshape(-1) & 15
    np.testing.assert_array_equal(found[:3], flat[0::2] | flat[1::2] << 4)
    for wrong in (low - 1, high + 1, 0.5):
        with pytest.raises(ProgramError, match=f"not made of {dtype.text} numbers"):
            materialised([tensor], {"w": np.where(values == 1, wrong, values)})


@pytest.mark.parametrize("name", ["q4_k", "q8_0", "q3_k"])
def test_planes_of_a_float_table_are_those_of_its_blocks(name: str) -> None:
    kind = BLOCK_TYPES[name]
    table = np.random.default_rng(5).standard_normal((5000, kind.block)).astype(np.float32)
    tensors: list[Tensor] = []
    for prefix, source in (("rows", "w"), ("blocks", "b")):
        for plane in kind.planes:
            width = kind.block // plane.per * min(plane.bits, 8) // 8
            form, bits = ("vectors", 16) if plane.bits == 16 else ("stored", 8)
            packing = Packing(source, form, 5000, width, width, bits, 1, False, f"{prefix}:{name}:{plane.name}")
            dtype, nbytes = Dtype.F16 if bits == 16 else Dtype.I8, packed_bytes(packing)
            at = tensors[-1].address + tensors[-1].nbytes if tensors else 0
            tensors.append(Tensor(plane.name, "weight", Space.DRAM, at, nbytes, dtype, (5000, width), packing))
    image = materialised(tensors, {"w": table, "b": blocks_of(table, kind)})
    assert np.array_equal(image[: image.size // 2], image[image.size // 2 :])
    with pytest.raises(ProgramError, match=r"'w' has shape \(4999, "):
        materialised(tensors, {"w": table[1:], "b": blocks_of(table, kind)})
    table[-1, 0] = np.nan
    with pytest.raises(ProgramError, match="table 'w' has values that are not finite"):
        materialised(tensors[: len(kind.planes)], {"w": table})


def test_a_plain_recipe_multiplies_by_a_number() -> None:
    def vector(layout: str) -> Tensor:
        packing = Packing("b", "plain", 0, 0, 0, 32, 0, False, layout)
        return Tensor("b", "weight", Space.DRAM, 0, 16, Dtype.F32, (4,), packing)

    array = np.array([1.0, -2, 4, 0], np.float32)
    made = materialised([vector("times:0.25")], {"b": array})
    assert made.view(np.float32).tolist() == [0.25, -0.5, 1.0, 0.0]
    with pytest.raises(ProgramError, match="layout 'times:x' of a plain recipe"):
        materialised([vector("times:x")], {"b": array})
