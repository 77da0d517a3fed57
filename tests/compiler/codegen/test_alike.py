"""What repeats is moved, not made again; the template is the one that making everything again gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from firsttoken_compiler.codegen import unroll as module
from firsttoken_compiler.codegen.loops import Access, Alloc, Buffer, Computed, Loop, MatmulCall, Nest, Statement
from firsttoken_compiler.codegen.template import Template
from firsttoken_compiler.codegen.unroll import Place, unroll
from firsttoken_compiler.isa.types import Dtype, Space
from firsttoken_compiler.schedule.layout import Ragged, dense

X = Buffer("p0", "param", Dtype.F16, 1 << 12, 0)
Y = Buffer("p1", "param", Dtype.F16, 1 << 12, 1)
STAGE = Buffer("stage", "spad", Dtype.F16, 64)
SUMS = Buffer("sums", "acc", Dtype.F32, 16)
PLACES = [Place(Space.SPAD, dense((64, 64), Dtype.F16)), Place(Space.SPAD, dense((64, 64), Dtype.F16))]


def at(buffer: Buffer, step: int, *coefficients: int) -> Access:
    return Access(buffer, lambda env: env[0] * step if env else 0, coefficients)


def loop(extent: int, *body: Statement, axis: str = "", step: int = 0) -> list[Statement]:
    return [Loop(0, extent, axis, step, (0, 1, 2, 3), list(body))]


def both(body: list[Statement], monkeypatch: pytest.MonkeyPatch, ragged: Ragged | None = None) -> tuple[Template, int]:
    """The template, equal to the one without repetitions, and how many statements repeated."""
    hits: list[bool] = []
    repeated = module._Unroller._repeated

    def counted(self: Any, *of: Any) -> bool:
        hits.append(repeated(self, *of))
        return hits[-1]

    def made(method: Callable[..., bool]) -> Template:
        monkeypatch.setattr(module._Unroller, "_repeated", method)
        return unroll(body, PLACES, ragged or Ragged({}), 64)

    moved, again = made(counted), made(lambda *_: False)
    np.testing.assert_array_equal(moved.code, again.code)
    np.testing.assert_array_equal(moved.symbols, again.symbols)
    assert moved.kernels == again.kernels
    return moved, sum(hits)


def test_iterations_differ_in_their_addresses_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    nest = Nest((4, 8), ("", ""), at(Y, 640, 64, 1), ("mul", ("load", at(X, 640, 64, 1)), ("const", 2.0)))
    assert both(loop(6, nest), monkeypatch)[1] == 5


def test_slots_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    nest = Nest((64,), ("",), at(STAGE, 0, 1), ("add", ("load", at(X, 64, 1)), ("const", 1.0)))
    back = Nest((64,), ("",), at(Y, 64, 1), ("mul", ("load", at(STAGE, 0, 1)), ("const", 3.0)))
    assert both(loop(5, Alloc(STAGE, 2), nest, back), monkeypatch)[1] == 8


def test_a_tile_that_is_cut_is_made_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    nest = Nest((4, 8), ("m", ""), at(Y, 256, 64, 1), ("mul", ("load", at(X, 256, 64, 1)), ("const", 2.0)))
    template, hits = both(loop(4, nest, axis="m", step=4), monkeypatch, Ragged({"m": 14}))
    assert (len(template.code), hits) == (4, 2)


def test_reads_that_are_one_stream_in_some_iterations_are_two_in_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Iteration 0 reads one stream, the others two: the first of these is made, the rest are moved."""
    value = ("mul", ("load", at(X, 64, 1)), ("load", at(X, 0, 1)))
    template, hits = both(loop(5, Nest((64,), ("",), at(Y, 64, 1), value)), monkeypatch)
    assert sorted(kernel.sources for kernel in template.kernels) == [1, 2]
    assert hits == 3


def test_an_index_is_part_of_the_microprogram(monkeypatch: pytest.MonkeyPatch) -> None:
    value = ("add", ("load", at(X, 0, 1)), ("index", lambda env: env[0] // 2, (1,)))
    template, hits = both(loop(4, Nest((64,), ("",), at(Y, 64, 1), value)), monkeypatch)
    assert (len(template.kernels), hits) == (2, 2)


def test_products_repeat_and_the_first_sets_the_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    zero = Nest((4, 4), ("", ""), at(SUMS, 0, 4, 1), ("const", 0.0))
    axes = ("m", "n", "k")
    product = MatmulCall(4, 4, 8, axes, at(SUMS, 0), at(X, 8), at(Y, 256), 4, 64, 0, 64, 4)
    body: list[Statement] = [Alloc(SUMS), zero, *loop(4, product)]
    template, hits = both(body, monkeypatch)
    assert (len(template.code), hits) == (4, 2)


def test_parts_of_bytes_are_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """An element of half a byte begins at no byte in every other iteration: only a row of them can be addressed."""
    packed = Buffer("p0", "param", Dtype.I4, 1 << 12, 0)
    places = [Place(Space.SPAD, dense((64, 64), Dtype.I4)), PLACES[1]]
    monkeypatch.setattr(module, "PACKED", ())
    nest = Nest((8,), ("",), at(Y, 64, 1), ("load", at(packed, 3, 1)))
    monkeypatch.setitem(globals(), "PLACES", places)
    assert both(loop(6, nest), monkeypatch)[1] == 2


def test_nests_made_for_each_iteration_are_told_apart_by_their_form(monkeypatch: pytest.MonkeyPatch) -> None:
    """Offsets move an instruction; another number, index, operation or extent makes another one."""

    def make(env: list[int]) -> list[Nest]:
        i = env[0]
        factor = ("const", 2.0 if i < 6 else 3.0)
        value = ("mul", ("load", Access(X, lambda _env: i * 64, (64, 1))), factor)
        shifted = ("add", ("load", Access(X, lambda _env: i * 8, (64, 1))), ("index", lambda _env: i // 4, (0, 1)))
        extents = (4, 8) if i % 4 else (3, 8)
        return [
            Nest(extents, ("", ""), Access(Y, lambda _env: i * 64, (64, 1)), value),
            Nest((2, 8), ("", ""), Access(Y, lambda _env: i * 64, (64, 1)), shifted),
        ]

    template, hits = both(loop(8, Computed(make)), monkeypatch)
    assert len(template.code) == 16
    assert hits == (8 - 3) + (8 - 2)


def test_one_read_twice_is_not_two_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    def make(env: list[int]) -> list[Nest]:
        i = env[0]
        left = Access(X, lambda _env: i * 64, (1,))
        right = left if i < 2 else Access(X, lambda _env: 640, (1,))
        return [Nest((64,), ("",), at(Y, 64, 1), ("mul", ("load", left), ("load", right)))]

    template, hits = both(loop(6, Computed(make)), monkeypatch)
    assert (len(template.kernels), hits) == (2, 1 + 3)
