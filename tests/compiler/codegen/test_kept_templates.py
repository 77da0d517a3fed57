"""Templates are made once for what decides them, and go when they take too much."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from firsttoken_compiler.codegen import build as module
from firsttoken_compiler.codegen.build import build
from firsttoken_compiler.codegen.kept_templates import KeptChoices, KeptTemplates
from firsttoken_compiler.codegen.template import Template
from firsttoken_compiler.errors import AllocationError
from firsttoken_compiler.isa import word
from firsttoken_compiler.isa.types import Dtype, Space
from firsttoken_compiler.schedule.choice import ProductChoice
from firsttoken_compiler.schedule.spec import Arg, KernelSpec
from firsttoken_compiler.schedule.tiling import Room
from firsttoken_compiler.target.target import Target

ROWS = Template(np.zeros((4, word.WIDTH), np.int64), np.zeros((4, word.MAX_OPERANDS), np.int16), (), 0, 0)

PARAMS = (
    ("acts", "fp16"), ("bias", 0), ("bits", 16), ("group", 0), ("k", 64), ("n", 96), ("out", "float16"),
    ("residual", 0), ("stored", 0),
)  # fmt: skip


def product(rows: int) -> KernelSpec:
    args = (Arg((rows, 64), Dtype.F16), Arg((64, 96), Dtype.F16))
    return KernelSpec("linear", PARAMS, args, (Arg((rows, 96), Dtype.F16),))


def test_equal_kernels_are_built_once_and_others_for_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "KEPT", KeptTemplates())
    target, room = Target.load("snapdragon-x-elite"), Room(1 << 20, 1 << 21)
    spaces = (Space.SPAD, Space.DRAM, Space.SPAD)
    first = build(product(8), spaces, target, room)
    assert build(product(8), spaces, target, room) is first
    assert build(product(8), spaces, replace(target, description="another"), room) is first
    assert build(product(8), spaces, target, replace(room, limit=1 << 22)) is first  # it gets the same tile
    others = [
        build(product(9), spaces, target, room),
        build(product(8), (Space.DRAM, Space.DRAM, Space.SPAD), target, room),
        build(product(8), spaces, replace(target, clock_hz=target.clock_hz * 2), room),
        build(product(8), spaces, target, Room(11_000, 11_000)),
        build(product(8), spaces, target, room, ProductChoice(8, 32, 64)),
    ]
    assert all(other is not first for other in others)


def test_what_is_kept_cannot_be_changed_by_who_uses_it() -> None:
    kept = KeptTemplates().get("a", lambda: replace(ROWS, code=ROWS.code.copy()))
    with pytest.raises(ValueError, match="read-only"):
        kept.code[0, 0] = 1
    assert kept.relocated([], 0, [], 3)[:, word.OP].tolist() == [3] * 4


def test_the_longest_unused_goes_first() -> None:
    made: list[str] = []

    def make(name: str) -> Template:
        made.append(name)
        return replace(ROWS, code=ROWS.code.copy(), symbols=ROWS.symbols.copy())

    store = KeptTemplates(limit=2 * (ROWS.code.nbytes + ROWS.symbols.nbytes))
    for name in ("a", "b", "a", "c", "a", "b"):
        store.get(name, lambda name=name: make(name))  # type: ignore[misc]
    assert made == ["a", "b", "c", "b"]
    assert len(store.kept) == 2
    assert store.nbytes == store.limit


def test_an_error_is_not_kept() -> None:
    def fail() -> Template:
        raise ValueError

    store = KeptTemplates()
    for _ in range(2):
        with pytest.raises(ValueError):  # noqa: PT011
            store.get("a", fail)
    assert not store.kept


def test_choices_are_kept_up_to_a_number_and_no_errors() -> None:
    made: list[str] = []
    store = KeptChoices(limit=2)

    def make(name: str) -> ProductChoice:
        made.append(name)
        if name == "bad":
            raise ValueError
        return ProductChoice(8, 32, len(made))

    for name in ("a", "b", "a", "c", "a", "b"):
        store.get(name, lambda name=name: make(name))  # type: ignore[misc]
    assert made == ["a", "b", "c", "b"]
    for _ in range(2):
        with pytest.raises(ValueError):  # noqa: PT011
            store.get("bad", lambda: make("bad"))
    assert list(store.kept) == ["a", "b"]


def test_a_choice_that_does_not_fit_is_refused_in_every_room_for_itself() -> None:
    target, spaces = Target.load("snapdragon-x-elite"), (Space.SPAD, Space.DRAM, Space.SPAD)
    choice = ProductChoice(8, 32, 64)
    assert build(product(8), spaces, target, Room(1 << 20, 1 << 21), choice).tile
    for _ in range(2):
        with pytest.raises(AllocationError, match="scratchpad"):
            build(product(8), spaces, target, Room(64, 64), choice)
