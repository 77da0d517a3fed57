"""Weights as the machine reads them: quantised, packed into panels, written to their place in memory.

Integers are symmetric: the scale is absmax / 7 or absmax / 127, so that -8 and -128 are never used, a value and its
negative quantise alike, and no product overflows the range that the accumulators were sized for.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Final

import numpy as np

from firsttoken_compiler.codegen import block_weights, stored_weights
from firsttoken_compiler.errors import ProgramError
from firsttoken_compiler.formats import groups
from firsttoken_compiler.isa.program import Packing, Program, Tensor
from firsttoken_compiler.isa.types import PACKED, Dtype, pack

QMAX: Final = {4: 7, 8: 127}
BLOCK_ELEMENTS: Final = 1 << 21
"""Weights that are converted at a time; temporaries take about 12 bytes each."""
TIMES: Final = "times:"
"""Before the number that a `plain` recipe of floats multiplies by."""
_TIMES: Final = re.compile(rf"{TIMES}[0-9]+(\.[0-9]*)?(e[-+]?[0-9]{{1,3}})?")
SMALLEST_SCALE: Final = np.float16(2**-24)

Initialiser = Callable[[str], np.ndarray]
"""The array of an ONNX initialiser, by name."""
Write = Callable[[int, np.ndarray], None]
"""Stores uint8 bytes at a DRAM address."""


def materialise(program: Program, initialiser: Initialiser, write: Write) -> None:
    """Writes the bytes of every tensor that has a packing recipe, each source fetched once.

    Raises ProgramError when an initialiser does not fit its recipe: shape, size, non-finite values, fp16 range.
    """
    recipes: dict[tuple[str, ...], list[Tensor]] = {}
    for tensor in program.tensors:
        if tensor.packing is not None:
            recipes.setdefault(tensor.packing.sources or (tensor.packing.source,), []).append(tensor)
    for sources, tensors in recipes.items():
        arrays = [initialiser(source) for source in sources]
        matrices: dict[Packing, list[Tensor]] = {}
        in_blocks: dict[Packing, list[Tensor]] = {}
        in_rows: dict[tuple[str, int, int], list[Tensor]] = {}
        for tensor in tensors:
            packing = _recipe(tensor)
            if packing.form == "plain":
                _write_plain(tensor, arrays, write)
            elif block_weights.is_float_table(packing):
                in_rows.setdefault(block_weights.table_of(packing), []).append(tensor)
            elif packing.form in stored_weights.FORMS:
                _write_stored(tensor, packing, arrays, write)
            elif packing.form in block_weights.FORMS:
                in_blocks.setdefault(block_weights.matrix_of(packing), []).append(tensor)
            else:
                matrices.setdefault(replace(packing, form=""), []).append(tensor)
        for same in matrices.values():
            _write_matrix(same, arrays, write)
        for whole, same in in_blocks.items():
            _write_planes(whole, same, arrays, write)
        for same in in_rows.values():
            _write_rows(same, arrays[0], write)


def packed_bytes(packing: Packing) -> int:
    """Bytes of the packed form of anything in panels."""
    rows, bits = _rows_and_bits(packing)
    last = -(-packing.n // packing.panel) - 1
    width = packing.n - last * packing.panel
    return panel_offset(packing, last) + rows * _row_bytes(width, bits)


def panel_offset(packing: Packing, panel: int) -> int:
    """Byte offset of a panel from the tensor's base; all panels before the last are full."""
    rows, bits = _rows_and_bits(packing)
    return panel * rows * _row_bytes(packing.panel, bits)


def _rows_and_bits(packing: Packing) -> tuple[int, int]:
    """Rows of a panel and bits of an element."""
    if packing.form in ("scales", "zeros", "vectors", "sums"):
        return scale_groups(packing), {"scales": 16, "zeros": 8, "vectors": packing.bits, "sums": 32}[packing.form]
    if packing.form in block_weights.FORMS:
        return packing.k // packing.group, packing.bits
    return packing.k, packing.bits


def scale_groups(packing: Packing) -> int:
    """Groups of rows that share a scale; the last group may be shorter than the others."""
    return -(-packing.k // packing.group)


def quantise(matrix: np.ndarray, bits: int, group: int) -> tuple[np.ndarray, np.ndarray]:
    """(q int8 `[k, n]`, scales fp16 `[ceil(k / group), n]`) of a matrix, so that q * scale is near it.

    The scale is rounded to fp16 first and that scale is the one used. A group of zeros gets scale 1, one too small for
    fp16 the smallest scale there is. Rounds half to even. Raises ProgramError for values that fp16 scales cannot reach.
    """
    if bits not in QMAX or group < 1:
        raise ProgramError(f"cannot quantise to {bits} bits in groups of {group}; bits are 4 or 8, groups at least 1")
    qmax, values = QMAX[bits], np.ascontiguousarray(matrix, np.float32)
    largest = groups.magnitudes(values, group)
    with np.errstate(over="ignore"):
        scales = (largest / np.float32(qmax)).astype(np.float16)
    if not np.isfinite(scales).all():
        limit = float(np.finfo(np.float16).max) * qmax
        raise ProgramError(
            f"values up to {largest.max()}; int{bits} with fp16 scales reaches finite values up to {limit}"
        )
    scales[scales == 0] = SMALLEST_SCALE
    scales[largest == 0] = 1
    return groups.rounded(values, scales.astype(np.float32), group, qmax), scales


def quantise_asymmetric(matrix: np.ndarray, bits: int, group: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(q int8 `[k, n]`, scales fp16, zeros int8 `[ceil(k / group), n]`), so that (q - zero) * scale is near a matrix.

    The range of a group, widened to hold 0, is spread over all integers of `bits` bits; these and the zero points are
    those of the unsigned range less its middle. Scales are as in `quantise`. Raises ProgramError likewise.
    """
    if bits not in QMAX or group < 1:
        raise ProgramError(f"cannot quantise to {bits} bits in groups of {group}; bits are 4 or 8, groups at least 1")
    middle, count = 1 << (bits - 1), -(-matrix.shape[0] // group)
    q = np.empty(matrix.shape, np.int8)
    scales, zeros = np.empty((count, matrix.shape[1]), np.float16), np.empty((count, matrix.shape[1]), np.int8)
    for index in range(count):
        rows = slice(index * group, (index + 1) * group)
        values = np.asarray(matrix[rows], np.float32)
        low, high = np.minimum(values.min(axis=0), 0), np.maximum(values.max(axis=0), 0)
        with np.errstate(over="ignore"):
            scale = ((high - low) / np.float32(2 * middle - 1)).astype(np.float16)
        if not np.isfinite(scale).all():
            raise ProgramError(f"values from {low.min()} to {high.max()} are too far apart for fp16 scales")
        scale[scale == 0] = SMALLEST_SCALE
        scale[high == low] = 1
        wide = scale.astype(np.float32)
        zero = np.clip(np.rint(-low / wide), 0, 2 * middle - 1)
        q[rows] = np.clip(np.rint(values / wide) + zero, 0, 2 * middle - 1) - middle
        scales[index], zeros[index] = scale, zero - middle
    return q, scales, zeros


def dequantise(q: np.ndarray, scales: np.ndarray, group: int) -> np.ndarray:
    """fp32 `[k, n]` of what `quantise` returned."""
    return q.astype(np.float32) * np.repeat(scales.astype(np.float32), group, axis=0)[: len(q)]


def pack_panels(columns: np.ndarray, panel: int, bits: int) -> np.ndarray:
    """Bytes of consecutive panels of a matrix `[rows, columns]`: int8 values for 4 and 8 bits, fp16 for 16."""
    rows, n = columns.shape
    full = n // panel * panel
    blocks = columns[:, :full].reshape(rows, -1, panel).transpose(1, 0, 2)
    return np.concatenate([_pack_rows(part, bits).reshape(-1) for part in (blocks, columns[:, full:])])


def _pack_rows(values: np.ndarray, bits: int) -> np.ndarray:
    """Values `[..., columns]` to bytes, each row padded to whole bytes."""
    return pack(values, bits) if bits < 8 else np.ascontiguousarray(values).view(np.uint8)


def _row_bytes(columns: int, bits: int) -> int:
    return (columns * bits + 7) // 8


def _recipe(tensor: Tensor) -> Packing:
    """The tensor's recipe, once it is known to be one that this module makes and to fit."""
    packing = tensor.packing
    assert packing is not None
    where = f"tensor {tensor.name!r} from {packing.source!r}"
    known = ("panels", "scales", "zeros", "plain", *stored_weights.FORMS, *block_weights.FORMS)
    if packing.form not in known:
        raise ProgramError(f"{where}: unknown packing form {packing.form!r}; known: {', '.join(known)}")
    if packing.sources and packing.form != "plain":
        summed = len(packing.sources) == len(packing.columns) and sum(packing.columns) == packing.n
        if not summed or min(packing.columns) < 1 or block_weights.is_table(packing):
            raise ProgramError(f"{where}: {packing} is no recipe of columns that lie one behind another")
    if packing.form == "plain":
        if packing.layout and not _TIMES.fullmatch(packing.layout):
            raise ProgramError(f"{where}: layout {packing.layout!r} of a plain recipe is no {TIMES!r} and a number")
        return packing
    if packing.form in block_weights.FORMS:
        block_weights.check(packing, where)
        return _fitting(packing, tensor, where)
    bits, spelt = ((8, 16, 32), "8, 16 or 32") if packing.form == "vectors" else ((4, 8, 16), "4, 8 or 16")
    if min(packing.k, packing.n, packing.panel) < 1 or packing.bits not in bits:
        raise ProgramError(f"{where}: {packing} needs k, n and panel above 0, and {spelt} bits")
    if packing.form in stored_weights.FORMS:
        stored_weights.check(packing, where)
    if packing.bits == 16 and packing.form in ("scales", "zeros"):
        raise ProgramError(f"{where}: fp16 weights have no {packing.form}")
    if packing.form == "zeros" and not packing.shift:
        raise ProgramError(f"{where}: symmetric weights have no zeros")
    own = packing.form not in stored_weights.FORMS
    if own and packing.group > 0 and _quantised_in(packing)[1] % packing.group:
        raise ProgramError(f"{where}: groups of {packing.group} rows are no parts of those of {packing.layout!r}")
    if packing.bits != 16 and packing.group < 1:
        raise ProgramError(f"{where}: groups of {packing.group} rows; integers need at least 1, k for per-channel")
    return _fitting(packing, tensor, where)


def _fitting(packing: Packing, tensor: Tensor, where: str) -> Packing:
    if packed_bytes(packing) > tensor.nbytes:
        raise ProgramError(f"{where}: packs to {packed_bytes(packing)} bytes, the tensor has {tensor.nbytes}")
    return packing


def _write_matrix(tensors: list[Tensor], arrays: list[np.ndarray], write: Write) -> None:
    """Panels and scales of one matrix under one recipe, a block of panels at a time."""
    packing = tensors[0].packing
    assert packing is not None
    matrices = [_oriented(part, array) for part, array in zip(packing.parts, arrays, strict=True)]
    for first, last in _blocks(packing.n, packing.k, packing.panel):
        made = [_converted(part, matrices[i], *span) for i, part, span in _pieces(packing, first, last)]
        for tensor in tensors:
            assert tensor.packing is not None
            form = tensor.packing.form
            values, bits = _beside([piece[form][0] for piece in made]), made[0][form][1]
            offset = panel_offset(tensor.packing, first // packing.panel)
            write(tensor.address + offset, pack_panels(values, packing.panel, bits))


def _oriented(packing: Packing, array: np.ndarray) -> np.ndarray:
    """An initialiser as the matrix `[k, n]` of its recipe."""
    expected = (packing.n, packing.k) if packing.transposed else (packing.k, packing.n)
    conv = _quantised_in(packing)[0] == "conv"
    if conv and array.ndim > 2 and array.shape[0] == packing.n and array[0].size == packing.k:
        taps = array.reshape(packing.n, array.shape[1], -1)  # [n, channels, taps]
        array = taps.transpose(2, 1, 0).reshape(expected)
    if array.shape != expected:
        raise ProgramError(f"initialiser {packing.source!r} has shape {array.shape}, its packing expects {expected}")
    return array.T if packing.transposed else array


def _converted(packing: Packing, matrix: np.ndarray, first: int, last: int) -> dict[str, tuple[np.ndarray, int]]:
    """(values, bits) of columns `[first, last)`, by form."""
    part = matrix[:, first:last]
    columns = groups.widened(part) if part.dtype == np.float16 else np.ascontiguousarray(part, np.float32)
    if not np.isfinite(columns).all():
        raise ProgramError(
            f"initialiser {packing.source!r} has values that are not finite; repair the student's weights"
        )
    if packing.bits == 16:
        return {"panels": (_to_half(packing.source, columns), 16)}
    return _quantised(packing, columns)


def _pieces(packing: Packing, first: int, last: int) -> Iterator[tuple[int, Packing, tuple[int, int]]]:
    """(number of the source, its own recipe, its columns) of what columns `[first, last)` are."""
    begin = 0
    for number, part in enumerate(packing.parts):
        low, high = max(first - begin, 0), min(last - begin, part.n)
        if low < high:
            yield number, part, (low, high)
        begin += part.n


def _beside(pieces: list[np.ndarray]) -> np.ndarray:
    return pieces[0] if len(pieces) == 1 else np.concatenate(pieces, axis=1)


def _quantised(packing: Packing, columns: np.ndarray) -> dict[str, tuple[np.ndarray, int]]:
    """(values, bits) of what a recipe makes of integers, by form; its groups repeat the numbers that they share."""
    of = _quantised_in(packing)[1]
    made = quantise_asymmetric(columns, packing.bits, of) if packing.shift else quantise(columns, packing.bits, of)
    rows = np.arange(0, packing.k, packing.group) // of
    forms = zip(("scales", "zeros"), made[1:], (16, 8), strict=False)
    return {"panels": (made[0], packing.bits), **{form: (values[rows], bits) for form, values, bits in forms}}


def _quantised_in(packing: Packing) -> tuple[str, int]:
    """Layout, and rows of a group that the weights are quantised in, of which the recipe's groups are parts."""
    layout, _, of = packing.layout.partition(":")
    return layout, int(of) if of.isdecimal() and len(of) < 10 else packing.group


def _write_stored(tensor: Tensor, packing: Packing, arrays: list[np.ndarray], write: Write) -> None:
    """Panels of what the file stores quantised, a block at a time."""
    for first, last in _blocks(packing.n, packing.k, packing.panel):
        pieces = _pieces(packing, first, last)
        values = _beside([stored_weights.columns(part, tensor.dtype, arrays[i], *span) for i, part, span in pieces])
        offset = panel_offset(packing, first // packing.panel)
        write(tensor.address + offset, pack_panels(values, packing.panel, _rows_and_bits(packing)[1]))


def _write_planes(whole: Packing, tensors: list[Tensor], arrays: list[np.ndarray], write: Write) -> None:
    """Panels of the planes of a matrix in blocks, which is taken apart, or quantised, once for all of them."""
    for first, last in _blocks(whole.n, whole.k, whole.panel):
        pieces = [block_weights.planes_of(part, arrays[i], *span) for i, part, span in _pieces(whole, first, last)]
        for tensor in tensors:
            packing = tensor.packing
            assert packing is not None
            offset = panel_offset(packing, first // packing.panel)
            values = _beside([block_weights.element(packing, planes) for planes in pieces])
            write(tensor.address + offset, pack_panels(values, packing.panel, packing.bits))


def _write_rows(tensors: list[Tensor], array: np.ndarray, write: Write) -> None:
    """Planes of a table of floats, whose rows are quantised once for all of them."""
    recipes = [tensor.packing for tensor in tensors if tensor.packing is not None]
    for start in range(0, recipes[0].k, block_weights.ROWS):
        planes = block_weights.float_rows(recipes[0], array, start)
        for tensor, packing in zip(tensors, recipes, strict=True):
            values = np.ascontiguousarray(block_weights.packed_rows(packing, planes))
            write(tensor.address + start * values[0].nbytes, values.reshape(-1).view(np.uint8))


def _blocks(n: int, k: int, panel: int) -> Iterator[tuple[int, int]]:
    """Column ranges of whole panels, about `BLOCK_ELEMENTS` weights each."""
    step = max(1, BLOCK_ELEMENTS // (k * panel)) * panel
    return ((first, min(first + step, n)) for first in range(0, n, step))


def _to_half(source: str, values: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        half = values.astype(np.float16)
    if not np.isfinite(half).all():
        raise ProgramError(
            f"initialiser {source!r} has values beyond fp16, up to {np.abs(values).max()}; keep it in fp32"
        )
    return half


def _write_plain(tensor: Tensor, arrays: list[np.ndarray], write: Write) -> None:
    """Row-major conversion to the tensor's element type, a block of rows at a time; several vectors become one."""
    packing = tensor.packing
    assert packing is not None
    array = arrays[0] if len(arrays) == 1 else np.concatenate([part.reshape(-1) for part in arrays])
    if tensor.dtype.nbytes(array.size) > tensor.nbytes:
        raise ProgramError(
            f"tensor {tensor.name!r} has {tensor.nbytes} bytes; {packing.source!r} of shape {array.shape} "
            f"does not fit as plain {tensor.dtype.text}"
        )
    if tensor.dtype in PACKED:
        low, high = (-8, 7) if tensor.dtype is Dtype.I4 else (0, (1 << tensor.dtype.bits) - 1)
        whole = array.astype(np.int64)
        if not (np.array_equal(whole, array.astype(np.float64)) and np.all((low <= whole) & (whole <= high))):
            raise ProgramError(f"initialiser {packing.source!r} is not made of {tensor.dtype.text} numbers")
        write(tensor.address, pack(whole.reshape(-1), tensor.dtype.bits))
        return
    rows = np.atleast_1d(array.T if packing.transposed else array)
    if packing.layout:
        rows = rows * np.float32(packing.layout.removeprefix(TIMES))
    step = max(1, BLOCK_ELEMENTS * len(rows) // max(1, array.size))
    address = tensor.address
    for first in range(0, len(rows), step):
        block = rows[first : first + step]
        if tensor.dtype is Dtype.F16:
            converted = _to_half(packing.source, block)
        else:
            with np.errstate(invalid="ignore", over="ignore"):
                converted = block.astype(tensor.dtype.numpy)
            if tensor.dtype is not Dtype.F32 and not np.array_equal(converted, block):
                raise ProgramError(f"initialiser {packing.source!r} is not made of {tensor.dtype.text} numbers")
        data = np.ascontiguousarray(converted).reshape(-1).view(np.uint8)
        write(address, data)
        address += data.size
