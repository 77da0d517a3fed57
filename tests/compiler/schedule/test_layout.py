"""Where elements lie: distances of flat offsets, pitches in the scratchpad, panels, ragged extents."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from kernel_bench import small_target

from firsttoken_compiler.codegen.weights import pack_panels
from firsttoken_compiler.isa.types import Dtype, Space, unpack_int4
from firsttoken_compiler.schedule import layout
from firsttoken_compiler.schedule.layout import Diagonal, Layout, Ragged
from firsttoken_compiler.schedule.spec import Arg

TARGET = small_target(8, 8)
FETCH = max(TARGET.scratchpad.bank_bytes, 8 * 2)


@given(st.lists(st.integers(1, 6), min_size=1, max_size=4), st.data())
def test_coordinates_are_numpys(shape: list[int], data: st.DataObject) -> None:
    flat = data.draw(st.integers(0, int(np.prod(shape)) - 1))
    place = Layout(tuple(shape), tuple(range(10, 10 + len(shape))))
    assert place.coordinates(flat) == tuple(int(i) for i in np.unravel_index(flat, shape))
    assert place.coordinates(-flat) == tuple(-int(i) for i in np.unravel_index(flat, shape))


@given(st.integers(1, 9), st.integers(1, 200), st.sampled_from([Dtype.I8, Dtype.F16, Dtype.F32, Dtype.I16]))
def test_rows_in_the_scratchpad_start_an_odd_number_of_fetches_apart(rows: int, columns: int, dtype: Dtype) -> None:
    arg = Arg((rows, columns), dtype)
    row = columns * dtype.bits
    assert layout.pitch_bits(arg, Space.DRAM, TARGET) == row
    pitch = layout.pitch_bits(arg, Space.SPAD, TARGET)
    fetch = 8 * max(TARGET.scratchpad.bank_bytes, TARGET.matrix.rows * dtype.bits // 8)
    assert pitch >= row
    if rows > 1 and row >= fetch:
        assert pitch % fetch == 0
        assert pitch // fetch % 2 == 1
    else:
        assert pitch == row
    assert layout.resident_bytes(arg, TARGET) * 8 == (rows - 1) * pitch + row


def test_only_matrices_have_a_pitch() -> None:
    for shape in ((300,), (2, 3, 100)):
        arg = Arg(shape, Dtype.F16)
        assert layout.pitch_bits(arg, Space.SPAD, TARGET) == shape[-1] * 16
        assert layout.resident_bytes(arg, TARGET) == arg.nbytes
    assert layout.matrix(4, Arg((2, 3, 100), Dtype.F16), 1 << 20) == layout.dense((4, 3, 100), Dtype.F16)


@given(st.integers(1, 7), st.integers(1, 40), st.sampled_from([2, 4, 6, 10]), st.sampled_from([Dtype.I4, Dtype.I8]))
def test_panels_are_where_the_weights_are_packed(k: int, n: int, panel: int, dtype: Dtype) -> None:
    values = np.arange(k * n, dtype=np.int64).reshape(k, n) % 15 - 7
    raw = pack_panels(values.astype(np.int8), panel, dtype.bits)
    elements = unpack_int4(raw) if dtype is Dtype.I4 else raw.view(np.int8)
    count = -(-n // panel)
    place = layout.panels(count, k, panel, dtype, k, n)
    for row in range(k):
        for column in range(n):
            p, j = divmod(column, panel)
            bits = place.distance((p * k + row) * panel + j, narrow=p == count - 1)
            assert elements[bits // dtype.bits] == values[row, column]


def test_dense_is_row_major_over_the_real_extents() -> None:
    assert layout.dense((4, 6), Dtype.F16).bits == (96, 16)
    assert layout.dense((4, 6), Dtype.F32, (3, 5)).bits == (160, 32)
    assert layout.by_panel(3, 2, 8, Dtype.F16, 400).bits == (400, 128, 16)


@pytest.mark.parametrize(("columns", "width"), [(1, 1), (8, 8), (9, 1), (15, 7), (16, 8)])
def test_the_last_panel_has_what_is_left(columns: int, width: int) -> None:
    assert Ragged({}, columns, 8).last_width == width


def test_an_axis_goes_as_far_as_it_really_does() -> None:
    ragged = Ragged({"m": 10}, 19, 8)
    assert ragged.left("m", {"m": 8}) == 2
    assert ragged.left("m", {"m": 12}) == -2
    assert ragged.left("p", {}) == 3
    assert ragged.left("p", {"p": 2}) == 1
    assert ragged.left("j", {"j": 4}) is None


def test_a_causal_axis_ends_with_the_last_row_of_its_tile() -> None:
    ragged = Ragged({"r": 7, "t": 9}, diagonal=Diagonal("r", "t", 4, 2))
    assert ragged.left("t", {}) == 6
    assert ragged.left("t", {"r": 4, "t": 5}) == 4
    assert ragged.left("r", {"r": 4}) == 3
