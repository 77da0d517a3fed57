"""One block of rows becomes all of them: what is loaded before it, what is stored after it, what stays where it is."""

from __future__ import annotations

from firsttoken_compiler.codegen.loops import Access, Alloc, Buffer, GatherNest, Loop, Nest, Statement
from firsttoken_compiler.codegen.staging import over_rows
from firsttoken_compiler.isa.types import Dtype, Space

D, S = Space.DRAM, Space.SPAD
X = Buffer("p0", "param", Dtype.F16, 12, 0)
GAMMA = Buffer("p1", "param", Dtype.F16, 6, 1)
OUT = Buffer("p2", "param", Dtype.F16, 12, 2)


def at(buffer: Buffer, base: int = 0) -> Access:
    return Access(buffer, lambda _env: base, (6, 1))


def body() -> list[Statement]:
    return [Nest((2, 6), ("m", ""), at(OUT), ("mul", ("load", at(X, 3)), ("load", at(GAMMA))))]


def repeated(spaces: list[Space]) -> tuple[list[Statement], Loop]:
    *once, loop = over_rows(body(), [X, GAMMA, OUT], spaces, {0: 6, 2: 6}, 2, 7, 1, copies=False)
    assert isinstance(loop, Loop)
    assert (loop.extent, loop.axis, loop.step) == (4, "m", 2)  # 7 rows in blocks of 2
    return once, loop


def test_operands_in_the_scratchpad_are_used_where_they_are() -> None:
    once, loop = repeated([S, S, S])
    assert once == []
    (nest,) = loop.body
    assert isinstance(nest, Nest)
    assert (nest.dst.buffer, nest.dst.base([3])) == (OUT, 36)
    x, gamma = nest.value[1][1], nest.value[2][1]
    assert (x.buffer, x.base([3])) == (X, 39)
    assert (gamma.buffer, gamma.base([3])) == (GAMMA, 0)  # the same for every block


def test_operands_in_dram_are_staged() -> None:
    once, loop = repeated([D, D, D])
    stage, load = once  # gamma, once for all blocks
    assert isinstance(stage, Alloc)
    assert isinstance(load, Nest)
    assert (load.dst.buffer, load.value[1].buffer, load.extents) == (stage.buffer, GAMMA, (6,))
    first, fetch, fresh, nest, store = loop.body
    assert isinstance(first, Alloc)
    assert isinstance(fresh, Alloc)
    assert isinstance(fetch, Nest)
    assert (fetch.dst.base([3]), fetch.value[1].buffer, fetch.value[1].base([3])) == (0, X, 36)
    assert isinstance(nest, Nest)
    assert (nest.dst.buffer, nest.dst.base([3])) == (fresh.buffer, 0)
    assert (nest.value[1][1].buffer, nest.value[1][1].base([3])) == (first.buffer, 3)
    assert isinstance(store, Nest)
    assert (store.dst.buffer, store.dst.base([3]), store.value[1].buffer) == (OUT, 36, fresh.buffer)
    assert store.axes == ("m", "", "")


def test_copies_read_dram_themselves_and_stage_only_what_goes_back_there() -> None:
    copy: list[Statement] = [Nest((2, 6), ("m", ""), at(OUT), ("load", at(X)))]
    to = Buffer("p1", "param", Dtype.F16, 12, 1)
    for spaces, count in (([D, S], 1), ([S, D], 1), ([D, D], 3)):
        (loop,) = over_rows(copy, [X, to], spaces, {0: 6, 1: 6}, 2, 4, 1, copies=True)
        assert isinstance(loop, Loop)
        assert len(loop.body) == count


def test_a_gather_is_staged_even_when_its_indices_are_on_chip() -> None:
    table, indices, out = (Buffer(f"p{i}", "param", d, 12, i) for i, d in enumerate((Dtype.F16, Dtype.I64, Dtype.F16)))
    gather: list[Statement] = [GatherNest(2, 6, "m", at(out), at(indices), table, 9)]
    (loop,) = over_rows(gather, [table, indices, out], [D, S, D], {1: 1, 2: 6}, 2, 4, 1, copies=True)
    assert isinstance(loop, Loop)
    _, moved, _ = loop.body
    assert isinstance(moved, GatherNest)
    assert moved.dst.buffer.scope == "spad"
    assert (moved.indices.buffer, moved.indices.base([1])) == (indices, 2)


def test_rows_that_lie_in_parts_are_stored_part_by_part() -> None:
    """The heads of a cache lie apart."""
    new, cache = (Buffer(f"p{i}", "param", Dtype.F16, 12, i) for i in range(2))
    copy: list[Statement] = [Nest((2, 6), ("m", ""), at(cache), ("load", at(new)))]
    (loop,) = over_rows(copy, [new, cache], [D, D], {0: 6, 1: 6}, 2, 4, 1, copies=True, parts=3)
    assert isinstance(loop, Loop)
    store = loop.body[-1]
    assert isinstance(store, Nest)
    assert (store.extents, store.dst.coefficients) == ((2, 3, 2), (6, 2, 1))
