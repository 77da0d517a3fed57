"""Matrices put together from the columns of several initialisers: the bytes of the one matrix that these make."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from firsttoken_compiler.codegen.weights import materialise, packed_bytes
from firsttoken_compiler.errors import ProgramError
from firsttoken_compiler.formats.quantise import quantise as blocks_of
from firsttoken_compiler.formats.types import BLOCK_TYPES
from firsttoken_compiler.isa import word
from firsttoken_compiler.isa.program import Packing, Program, Tensor
from firsttoken_compiler.isa.types import Dtype, Space

COLUMNS = (40, 24, 13)
"""Columns that begin and end inside panels of 16, and 4-bit ones inside a byte."""
SOURCES = ("q", "k", "v")


def image(packing: Packing, dtype: Dtype, arrays: dict[str, np.ndarray]) -> np.ndarray:
    nbytes = packing.n * dtype.bits // 8 if packing.form == "plain" else packed_bytes(packing)
    tensor = Tensor("w", "weight", Space.DRAM, 64, nbytes, dtype, (packing.k, packing.n), packing)
    out = np.full(nbytes, 0xEE, np.uint8)

    def write(address: int, data: np.ndarray) -> None:
        out[address - 64 : address - 64 + data.size] = data

    materialise(Program(np.zeros((0, 0), np.int64), (), (tensor,), ()), arrays.__getitem__, write)
    return out


def joined(packing: Packing) -> Packing:
    return replace(packing, sources=SOURCES, columns=COLUMNS)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("form", "bits", "group"), [
    ("panels", 16, 0), ("panels", 8, 64), ("panels", 4, 16), ("scales", 4, 16), ("scales", 8, 64),
])  # fmt: skip
def test_panels_and_scales_are_those_of_the_matrix(form: str, bits: int, group: int, transposed: bool) -> None:
    parts = np.split(np.random.default_rng(5).standard_normal((64, sum(COLUMNS))), np.cumsum(COLUMNS)[:-1], axis=1)
    matrix = np.concatenate(parts, axis=1)
    arrays = {name: part.T if transposed else part for name, part in zip(SOURCES, parts, strict=True)}
    whole = {"q": matrix.T if transposed else matrix}
    packing = Packing("q", form, 64, sum(COLUMNS), 16, bits, group, transposed)
    dtype = Dtype.F16 if form == "scales" or bits == 16 else {8: Dtype.I8, 4: Dtype.I4}[bits]
    np.testing.assert_array_equal(image(joined(packing), dtype, arrays), image(packing, dtype, whole))


@pytest.mark.parametrize(("form", "layout"), [("stored", "nk"), ("vectors", "ng"), ("sums", "nk")])
def test_what_the_file_stores_quantised_is_joined_alike(form: str, layout: str) -> None:
    r = np.random.default_rng(6)
    wide = 4 if form == "vectors" else 64
    parts = [r.integers(-8, 8, (n, wide)).astype(np.float32 if form == "vectors" else np.int8) for n in COLUMNS]
    bits, dtype = {"stored": (4, Dtype.I4), "vectors": (16, Dtype.F16), "sums": (4, Dtype.F32)}[form]
    packing = Packing("q", form, 64, sum(COLUMNS), 16, bits, 16, False, layout)
    given = dict(zip(SOURCES, parts, strict=True))
    np.testing.assert_array_equal(
        image(joined(packing), dtype, given), image(packing, dtype, {"q": np.concatenate(parts)})
    )


def test_planes_of_blocks_are_joined_alike() -> None:
    kind, r = BLOCK_TYPES["q4_0"], np.random.default_rng(7)
    parts = [blocks_of(r.standard_normal((n, 64)).astype(np.float32), kind) for n in COLUMNS]
    plane = kind.planes[0]
    packing = Packing("q", "planes", 64, sum(COLUMNS), 16, plane.bits, plane.per, False, f"q4_0:{plane.name}", 8)
    given = dict(zip(SOURCES, parts, strict=True))
    np.testing.assert_array_equal(
        image(joined(packing), Dtype.I4, given), image(packing, Dtype.I4, {"q": np.concatenate(parts)})
    )


def test_biases_lie_one_behind_another() -> None:
    parts = [np.arange(n, dtype=np.float32) + 100 * i for i, n in enumerate(COLUMNS)]
    packing = joined(Packing("q", "plain", 0, sum(COLUMNS), 0, 16, 0, False))
    made = image(packing, Dtype.F16, dict(zip(SOURCES, parts, strict=True))).view(np.float16)
    np.testing.assert_array_equal(made, np.concatenate(parts).astype(np.float16))


@pytest.mark.parametrize("columns", [(40, 24), (40, 24, 14), (77, 0, 0)])
def test_columns_that_do_not_add_up_are_refused(columns: tuple[int, ...]) -> None:
    packing = replace(joined(Packing("q", "panels", 64, 77, 16, 16, 0, False)), columns=columns)
    with pytest.raises(ProgramError, match="no recipe of columns"):
        image(packing, Dtype.F16, {name: np.zeros((64, 40)) for name in SOURCES})


def test_a_program_file_keeps_sources_and_names_none_where_there_is_one() -> None:
    one = Packing("q", "panels", 64, 77, 16, 16, 0, False)
    for packing in (one, joined(one)):
        tensor = Tensor("w", "weight", Space.DRAM, 0, packed_bytes(packing), Dtype.F16, (64, 77), packing)
        made = Program(np.zeros((0, word.WIDTH), np.int64), (), (tensor,), ())
        assert Program.decode(made.encode()).tensors == (tensor,)
        assert [part.source for part in packing.parts] == list(packing.sources or ("q",))
