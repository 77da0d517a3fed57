"""Values become microprograms: streams are shared, constants fold, dense loops join."""

from __future__ import annotations

import pytest

from firsttoken_compiler.codegen.loops import Access, Buffer, Nest
from firsttoken_compiler.codegen.vectorise import Stream, Streams, merged, neutral
from firsttoken_compiler.errors import ProgramError
from firsttoken_compiler.isa.types import Dtype, Space

OUT = Buffer("out", "spad", Dtype.F32, 64)
IN = [Buffer(f"in{i}", "spad", Dtype.F16, 64) for i in range(8)]


def at(buffer: Buffer) -> Access:
    return Access(buffer, lambda _env: 0, (1,))


def load(number: int) -> tuple:
    return ("load", at(IN[number]))


def streams(first: tuple[int, ...] = ()) -> Streams:
    def stream(access: Access) -> Stream:
        number = IN.index(access.buffer) if access.buffer in IN else 99
        return Stream(number, Space.SPAD, access.buffer.dtype, 0, (16,))

    return Streams(stream, [3], first)


def test_a_stream_that_is_read_twice_is_one_source() -> None:
    s = streams()
    assert s.expression(("mul", load(1), ("add", load(0), load(1))), None, None) == ("mul", "s0", ("add", "s1", "s0"))
    assert [stream.symbol for stream in s.found] == [1, 0]


def test_constants_fold() -> None:
    def fold(value: tuple) -> object:
        return streams().expression(value, None, None)

    assert fold(("add", load(0), ("const", 0.0))) == "s0"
    assert fold(("mul", ("const", 1.0), load(0))) == "s0"
    assert fold(("add", ("mul", ("const", 2.0), ("const", 3.0)), ("sub", ("const", 1.0), ("const", 5.0)))) == 2.0
    assert fold(("sub", load(0), ("const", 0.0))) == ("sub", "s0", 0.0)
    assert fold(("div", ("const", 1.0), load(0))) == ("div", 1.0, "s0")


def test_more_sources_than_ports_is_an_error() -> None:
    value = load(0)
    for number in range(1, 7):
        value = ("add", value, load(number))
    with pytest.raises(ProgramError, match="more than 6 streams"):
        streams().expression(value, None, None)


def test_the_initial_value_of_the_destination_is_a_constant() -> None:
    value = ("add", ("load", at(OUT)), load(0))
    assert streams().expression(value, at(OUT), 0.0) == "s0"
    assert streams().expression(value, at(OUT), 2.0) == ("add", 2.0, "s0")
    assert streams().expression(value, at(OUT), None) == ("add", "s0", "s1")


def test_indices_are_loops_times_coefficients_plus_what_is_known() -> None:
    value = ("index", lambda env: 10 * env[0], (2, 0, 1))
    expected = ("add", "i2", ("add", ("mul", "i0", 2.0), 30.0))
    assert streams().expression(value, None, None) == expected
    assert streams((4, 0, 1)).expression(value, None, None) == ("add", "i2", ("add", ("mul", "i0", 2.0), 39.0))


@pytest.mark.parametrize("order", [0, 1])
def test_reductions(order: int) -> None:
    parts = [("load", at(OUT)), load(0)]
    nest = Nest((4,), ("",), at(OUT), ("max", *parts[:: 1 - 2 * order]))
    name, value = streams().reduction(nest)
    assert (name, value[0], value[1].buffer) == ("max", "load", IN[0])


def test_a_fold_that_is_no_reduction_is_an_error() -> None:
    for value in (("mul", ("load", at(OUT)), load(0)), ("add", load(0), load(1))):
        with pytest.raises(ProgramError, match="no reduction"):
            streams().reduction(Nest((4,), ("",), at(OUT), value))


def test_neutral_elements() -> None:
    assert neutral("add", 0.0)
    assert not neutral("add", 1.0)
    assert neutral("max", -3.4028234663852886e38)
    assert not neutral("max", 0.0)
    assert neutral("min", float("inf"))


def stream(*bits: int, symbol: int = 0) -> Stream:
    return Stream(symbol, Space.SPAD, Dtype.F16, 0, bits)


def test_dense_loops_join_in_every_stream_or_not_at_all() -> None:
    dims, dst, sources, _ = merged((2, 3, 4), stream(192, 64, 16), [stream(192, 64, 16)], "s0")
    assert dims == (1, 1, 24)
    assert (dst.bits, sources[0].bits) == ((16,), (16,))
    dims, dst, sources, _ = merged((2, 3, 4), stream(192, 64, 16), [stream(0, 64, 16)], "s0")
    assert dims == (1, 2, 12)
    assert (dst.bits, sources[0].bits) == ((192, 16), (0, 16))


def test_loops_of_one_iteration_drop_out_and_indices_follow() -> None:
    value = ("add", "i1", ("mul", "i3", ("add", "i0", 1.0)))
    dims, dst, _, expr = merged((1, 5, 1, 6), stream(999, 96, 999, 16), [], value)
    assert dims == (1, 5, 6)
    assert dst.bits == (96, 16)
    assert expr == ("add", "i1", "i2")


def test_a_loop_whose_index_is_used_does_not_join() -> None:
    dims, _, _, expr = merged((3, 4), stream(64, 16), [], "i1")
    assert dims == (1, 3, 4)
    assert expr == "i2"


def test_four_axes_that_do_not_join_are_an_error() -> None:
    with pytest.raises(ProgramError, match="more than three axes"):
        merged((2, 2, 2, 2), stream(1000, 400, 100, 16), [], "s0")
