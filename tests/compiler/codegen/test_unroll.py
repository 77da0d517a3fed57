"""Loops become instructions: ragged tiles are cut, copies become as few descriptors as they can, slots take turns."""

from __future__ import annotations

import numpy as np
import pytest

from firsttoken_compiler.codegen.loops import Access, Alloc, Buffer, Loop, Nest, Statement
from firsttoken_compiler.codegen.template import ABSOLUTE, SCRATCH, Template
from firsttoken_compiler.codegen.unroll import Place, unroll
from firsttoken_compiler.errors import ProgramError
from firsttoken_compiler.isa import word
from firsttoken_compiler.isa.dma import Load, Store
from firsttoken_compiler.isa.opcodes import decode
from firsttoken_compiler.isa.types import Dtype, Space
from firsttoken_compiler.isa.vector import INITIALISE, Vector
from firsttoken_compiler.schedule.layout import Layout, Ragged, by_panel, dense

D, S = Space.DRAM, Space.SPAD
X = Buffer("p0", "param", Dtype.F16, 1 << 20, 0)
Y = Buffer("p1", "param", Dtype.F16, 1 << 20, 1)
STAGE = Buffer("stage", "spad", Dtype.F16, 64)


def at(buffer: Buffer, *coefficients: int, step: int = 0) -> Access:
    return Access(buffer, (lambda env: env[0] * step) if step else (lambda _env: 0), coefficients)


def made(body: list[Statement], *places: Place, ragged: Ragged | None = None) -> Template:
    return unroll(body, list(places), ragged or Ragged({}), 64)


def loads(template: Template) -> list[tuple[tuple[int, int, int], tuple[int, int], tuple[int, int]]]:
    """(extents, destination strides, source strides) of every copy."""
    found = []
    for row in template.code:
        copy = decode(row)
        assert isinstance(copy, (Load, Store))
        dst, src = copy.operand(0), copy.operand(1)
        found.append((copy.dims, (dst.s0, dst.s1), (src.s0, src.s1)))
    return found


def copy(extents: tuple[int, ...], to: tuple[int, ...], source: tuple[int, ...], axes: tuple[str, ...] = ()) -> Nest:
    return Nest(extents, axes or ("",) * len(extents), at(STAGE, *to), ("load", at(X, *source)))


def test_a_dense_copy_is_one_run() -> None:
    place = Place(D, dense((4, 8), Dtype.F16))
    assert loads(made([Alloc(STAGE), copy((4, 8), (8, 1), (8, 1))], place)) == [((1, 1, 64), (0, 0), (0, 0))]


def test_a_strided_copy_is_one_descriptor() -> None:
    place = Place(D, Layout((4, 8), (320, 16)))
    assert loads(made([Alloc(STAGE), copy((4, 8), (8, 1), (8, 1))], place)) == [((1, 4, 16), (0, 16), (0, 40))]


def test_a_copy_with_three_strides_is_several_descriptors() -> None:
    place = Place(D, Layout((2, 2, 2, 4), (8000, 2000, 400, 16)))
    template = made([Alloc(STAGE), copy((2, 2, 2, 4), (40, 16, 6, 1), (16, 8, 4, 1))], place)
    assert [entry[0] for entry in loads(template)] == [(2, 2, 8)] * 2
    column = word.operand_column(1) + 1
    assert np.diff(template.code[:, column]).tolist() == [1000]


def test_scattered_elements_are_copied_one_by_one() -> None:
    place = Place(D, Layout((4, 3), (96, 32)))
    assert loads(made([Alloc(STAGE), copy((4, 3), (3, 1), (3, 1))], place)) == [((1, 12, 2), (0, 2), (0, 4))]


def test_the_last_tile_is_cut_and_tiles_beyond_the_end_are_left_out() -> None:
    place = Place(D, dense((8, 8), Dtype.F16))
    load = Nest((3, 8), ("m", ""), at(STAGE, 8, 1), ("load", at(X, 8, 1, step=24)))
    loop = Loop(0, 4, "m", 3, (0, 1, 2, 3), [Alloc(STAGE), load])
    template = made([loop], place, ragged=Ragged({"m": 7}))
    assert [entry[0] for entry in loads(template)] == [(1, 1, 48), (1, 1, 48), (1, 1, 16)]


def test_a_narrow_last_panel_is_a_piece_of_its_own() -> None:
    place = Place(D, by_panel(3, 2, 8, Dtype.F16, 13 * 16))
    load = Nest((3, 2, 8), ("m", "p", "j"), at(STAGE, 16, 8, 1), ("load", at(X, 16, 8, 1)))
    template = made([Alloc(STAGE), load], place, ragged=Ragged({}, 13, 8))
    assert [entry[0] for entry in loads(template)] == [(1, 3, 16), (1, 3, 10)]


def test_slots_take_turns() -> None:
    load = Nest((8,), ("",), at(STAGE, 1), ("load", at(X, 1, step=8)))
    use = Nest((8,), ("",), at(Y, 1, step=8), ("exp", ("load", at(STAGE, 1))))
    loop = Loop(0, 4, "m", 1, (0, 1, 2, 3), [Alloc(STAGE), load, use])
    template = made([loop], Place(D, dense((4, 8), Dtype.F16)), Place(S, dense((4, 8), Dtype.F16)))
    addresses = template.code[::2, word.operand_column(0) + 1]
    assert addresses.tolist() == [0, 128, 256, 0]  # load → vector: two stages, three slots
    assert template.scratch_bytes == 384
    assert (template.symbols[::2, 0] == SCRATCH).all()
    assert template.symbols[1].tolist()[:3] == [1, SCRATCH, ABSOLUTE]


def test_a_reduction_from_its_neutral_element_initialises_and_another_start_is_an_error() -> None:
    total = Buffer("total", "spad", Dtype.F32, 4)
    start = Nest((4,), ("",), at(total, 1), ("const", 0.0))
    fold = Nest((4, 8), ("", ""), at(total, 1, 0), ("add", ("load", at(total, 1, 0)), ("load", at(X, 8, 1))))
    place = Place(S, dense((4, 8), Dtype.F16))
    template = made([Alloc(total), start, fold], place)
    (row,) = template.code
    vector = decode(row)
    assert isinstance(vector, Vector)
    assert vector.flags & INITIALISE
    assert str(template.kernels[0]) == "add<- s0"
    with pytest.raises(ProgramError, match=r"a reduction by add starts at 2\.0"):
        made([Alloc(total), Nest((4,), ("",), at(total, 1), ("const", 2.0)), fold], place)


def test_a_template_goes_where_it_is_put() -> None:
    place = Place(D, dense((4, 8), Dtype.F16))
    template = made([Alloc(STAGE), copy((4, 8), (8, 1), (8, 1))], place)
    (row,) = template.relocated([4096], 640, [], 7, core=2)
    moved = decode(row)
    assert (moved.operand(0).address, moved.operand(1).address, moved.op, moved.queue) == (640, 4096, 7, 10)
    assert template.code[0, word.OP] == 0  # the template itself is unchanged


def test_microprograms_are_renumbered_and_flags_stay() -> None:
    nest = Nest((8,), ("",), at(Y, 1), ("exp", ("load", at(X, 1))))
    places = [Place(S, dense((8,), Dtype.F16))] * 2
    template = made([nest], *places)
    (row,) = template.relocated([0, 64], 0, [5], 0)
    assert row[word.FLAGS] == 5 << 1
