"""Choices of schedules: names of kernels, what is possible, what is refused and why, and that all compute the same."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
from kernel_bench import Bench, small_target, with_scratchpad

from firsttoken_compiler.codegen.build import build
from firsttoken_compiler.errors import AllocationError, FirsttokenError, OptionError
from firsttoken_compiler.isa import word
from firsttoken_compiler.isa.dma import Load
from firsttoken_compiler.isa.types import Dtype, Space
from firsttoken_compiler.schedule import linear
from firsttoken_compiler.schedule.choice import (
    AttentionChoice,
    Choice,
    CoreSplit,
    GraphChoice,
    KernelKey,
    ProductChoice,
    RowsChoice,
    Schedules,
    kernel_key,
)
from firsttoken_compiler.schedule.choosing import check, default_choice, legal_choices, legal_costs, needs, ranked
from firsttoken_compiler.schedule.spec import Arg, KernelSpec
from firsttoken_compiler.schedule.tiling import Room

D, S = Space.DRAM, Space.SPAD
ROOM = Room(20_000, 40_000)
TARGET = small_target()


@dataclass(frozen=True)
class Product:
    """A product: fp16 with a residual, or int8 by int4 with a scale per group of 8 and token, and a bias."""

    m: int
    n: int
    k: int
    grouped: bool = False
    residual: bool = False

    @property
    def spec(self) -> KernelSpec:
        group = 8 if self.grouped else 0
        kind = ("int8", 4, Dtype.I8, Dtype.I4) if self.grouped else ("fp16", 16, Dtype.F16, Dtype.F16)
        params = {
            "acts": kind[0], "bias": int(self.grouped), "bits": kind[1], "factor": 0, "group": group, "k": self.k,
            "n": self.n, "out": "float16", "residual": int(self.residual), "silu": 0,
        }  # fmt: skip
        args = [Arg((self.m, self.k), kind[2]), Arg((self.k, self.n), kind[3])]
        if self.grouped:
            args += [Arg((self.m, 1), Dtype.F32), Arg((self.k // 8, self.n), Dtype.F16), Arg((self.n,), Dtype.F16)]
        args += [Arg((self.m, self.n), Dtype.F16)] * self.residual
        return KernelSpec("linear", tuple(params.items()), tuple(args), (Arg((self.m, self.n), Dtype.F16),))

    @property
    def spaces(self) -> tuple[Space, ...]:
        on_chip = ("a", "a_scale") if self.grouped else ()
        return tuple(S if name in on_chip else D for name in linear.operand_names(self.spec))

    def arrays(self) -> list[np.ndarray]:
        r = np.random.default_rng(7)
        integers = {Dtype.I8: (-128, 128), Dtype.I4: (-8, 8)}
        return [
            r.integers(*integers[arg.dtype], arg.shape) if arg.dtype in integers
            else (r.standard_normal(arg.shape) / 8).astype(arg.dtype.numpy)
            for arg in self.spec.args
        ]  # fmt: skip


GROUPED, HALF = Product(13, 37, 40, grouped=True), Product(24, 40, 96, residual=True)


def attention() -> tuple[KernelSpec, tuple[Space, ...]]:
    rows, cache = Arg((20, 4 * 8), Dtype.F16), Arg((2, 30, 8), Dtype.F16)
    params = (("causal", 1), ("heads", 4), ("kv_heads", 2), ("mask", 0), ("past", 10), ("scale", 0.3))
    return KernelSpec("attention", params, (rows, cache, cache), (rows,)), (S, D, D, S)


def add() -> tuple[KernelSpec, tuple[Space, ...]]:
    matrix = Arg((50, 24), Dtype.F16)
    return KernelSpec("add", (), (matrix, matrix), (matrix,)), (D, D, D)


KERNELS = [(GROUPED.spec, GROUPED.spaces), (HALF.spec, HALF.spaces), attention(), add()]
IDS = ["groups", "fp16", "attention", "rows"]


def test_a_key_names_the_kernel_and_where_its_operands_lie() -> None:
    key = kernel_key(HALF.spec, HALF.spaces)
    assert key.startswith("linear-24x40x96-")
    assert key == kernel_key(KernelSpec.from_json(HALF.spec.to_json()), HALF.spaces)
    assert key != kernel_key(HALF.spec, (S, *HALF.spaces[1:]))
    assert key != kernel_key(replace(HALF, residual=False).spec, HALF.spaces)


@pytest.mark.parametrize(("spec", "spaces"), KERNELS, ids=IDS)
def test_the_compilers_own_choice_is_legal_and_makes_the_same_code(
    spec: KernelSpec, spaces: tuple[Space, ...]
) -> None:
    own = default_choice(spec, spaces, TARGET, ROOM)
    assert own is not None
    check(spec, spaces, TARGET, ROOM, own)
    assert own in set(legal_choices(spec, spaces, TARGET, ROOM))
    mine, given = build(spec, spaces, TARGET, ROOM), build(spec, spaces, TARGET, ROOM, own)
    assert np.array_equal(mine.code, given.code)
    assert (mine.scratch_bytes, mine.acc_bytes, mine.tile) == (given.scratch_bytes, given.acc_bytes, given.tile)


@pytest.mark.parametrize(("spec", "spaces"), KERNELS, ids=IDS)
def test_legal_choices_are_distinct_pass_the_check_and_stay_within_their_account(
    spec: KernelSpec, spaces: tuple[Space, ...]
) -> None:
    every = list(legal_choices(spec, spaces, TARGET, ROOM))
    assert len(set(every)) == len(every) > 4
    for choice in every[:: max(1, len(every) // 12)]:
        check(spec, spaces, TARGET, ROOM, choice)
        template = build(spec, spaces, TARGET, ROOM, choice)
        scratch, acc = needs(spec, spaces, TARGET, choice)
        assert template.scratch_bytes <= scratch <= ROOM.limit, choice
        assert template.acc_bytes <= acc <= TARGET.scratchpad.accumulator_bytes or not acc, choice


@pytest.mark.parametrize(("spec", "spaces"), KERNELS, ids=IDS)
def test_costs_in_a_list_are_those_of_each_choice_alone(spec: KernelSpec, spaces: tuple[Space, ...]) -> None:
    listed = list(legal_costs(spec, spaces, TARGET, ROOM))
    assert [choice for choice, _ in listed] == list(legal_choices(spec, spaces, TARGET, ROOM))
    for choice, cost in listed[:: max(1, len(listed) // 40)]:
        assert ranked(spec, spaces, TARGET, choice) == cost


@pytest.mark.parametrize("case", [GROUPED, HALF], ids=["groups", "fp16"])
def test_every_order_and_depth_computes_the_same(case: Product) -> None:
    arrays = case.arrays()
    every = list(legal_choices(case.spec, case.spaces, TARGET, ROOM))
    names = linear.operand_names(case.spec)
    panels = tuple(names.index(name) for name in ("w", "w_scale", "bias") if name in names)
    bench = Bench(case.spec, case.spaces, TARGET, (*case.spec.args, *case.spec.outs), panels)
    variants: dict[tuple[str, int, bool], ProductChoice] = {}
    for choice in every:
        assert isinstance(choice, ProductChoice)
        if choice.m < case.m and choice.n < case.n:
            variants[choice.order, choice.buffers, choice.whole] = choice
    assert len(variants) == 2 * 3 * (2 if case.spaces[0] is D else 1)
    results = []
    for choice in variants.values():
        template = build(case.spec, case.spaces, TARGET, ROOM, choice)
        results.append(bench.run(template, arrays)[0].astype(np.float32))
    assert np.abs(results[0]).max() > 0.1
    for result in results[1:]:
        np.testing.assert_allclose(result, results[0], rtol=2e-3, atol=2e-2)


def test_buffers_are_slots_in_the_scratchpad() -> None:
    choices = [ProductChoice(8, 16, 32, buffers=count) for count in (1, 2, 3)]
    taken = [build(HALF.spec, HALF.spaces, TARGET, ROOM, choice).scratch_bytes for choice in choices]
    tile = 32 * 16 * 2 + 8 * 32 * 2  # weights and activations
    assert taken[1] - taken[0] >= tile
    assert taken[2] - taken[1] == taken[1] - taken[0]


def test_one_buffer_is_never_estimated_to_be_faster() -> None:
    for choice in list(legal_choices(HALF.spec, HALF.spaces, TARGET, ROOM))[::37]:
        assert isinstance(choice, ProductChoice)
        two = ranked(HALF.spec, HALF.spaces, TARGET, replace(choice, buffers=2))
        one = ranked(HALF.spec, HALF.spaces, TARGET, replace(choice, buffers=1))
        assert one is not None
        assert two is not None
        assert one >= two or choice.buffers == 2


def test_rows_outside_fetch_activations_once_and_weights_again() -> None:
    def loaded(order: str) -> int:
        code = build(HALF.spec, HALF.spaces, TARGET, ROOM, ProductChoice(8, 16, 96, order=order)).code
        loads = code[code[:, word.OPCODE] == Load.OPCODE]
        return int(loads[:, word.DIMS : word.DIMS + 3].prod(axis=1).sum())

    weights, activations, residual = 96 * 40 * 2, 24 * 96 * 2, 24 * 40 * 2
    assert loaded("columns") == weights + 3 * activations + residual
    assert loaded("rows") == 3 * weights + activations + residual


BAD: list[tuple[tuple[KernelSpec, tuple[Space, ...]], Choice, str]] = [
    ((HALF.spec, HALF.spaces), ProductChoice(25, 16, 32), "m is 25, the product has 24 rows: give 1 to 24"),
    ((HALF.spec, HALF.spaces), ProductChoice(8, 48, 32), "n is 48, the product has 40 columns: give 1 to 40"),
    ((HALF.spec, HALF.spaces), ProductChoice(8, 12, 32), "n is 12, no multiple of 8, the columns of a panel"),
    ((HALF.spec, HALF.spaces), ProductChoice(8, 16, 33), "k is 33, no multiple of 32, the rows that the matrix unit"),
    ((GROUPED.spec, GROUPED.spaces), ProductChoice(8, 16, 12), "k is 12, no multiple of 8, the weights of a group"),
    ((GROUPED.spec, GROUPED.spaces), ProductChoice(8, 16, 8, whole=True), "whole is true"),
    ((HALF.spec, HALF.spaces), ProductChoice(8, 16, 32, order="diagonal"), "order is 'diagonal': give columns or rows"),
    ((HALF.spec, HALF.spaces), ProductChoice(8, 16, 32, buffers=4), "buffers is 4: give 1 to 3"),
    ((HALF.spec, HALF.spaces), ProductChoice(8, 16, 32, method="codes"), "method is 'codes', which this product does"),
    ((HALF.spec, HALF.spaces), RowsChoice(3), "is no choice for a kernel of kind linear"),
    (attention(), AttentionChoice(21, 30), "rows is 21, a head has 20 of them: give 1 to 20"),
    (attention(), AttentionChoice(20, 31), "keys is 31, a head has 30 of them: give 1 to 30"),
    (add(), RowsChoice(51), "rows is 51, the kernel has 50: give 1 to 50"),
]


@pytest.mark.parametrize(("kernel", "choice", "message"), BAD, ids=[message[:30] for *_, message in BAD])
def test_what_is_not_possible_is_refused(
    kernel: tuple[KernelSpec, tuple[Space, ...]], choice: Choice, message: str
) -> None:
    with pytest.raises(OptionError) as caught:
        build(*kernel, TARGET, ROOM, choice)
    assert message in str(caught.value)
    assert str(caught.value).startswith(f"schedule of {kernel_key(*kernel)}: ")


def test_memory_that_is_not_there_is_refused_with_the_limit() -> None:
    choice = ProductChoice(24, 40, 96)
    scratch, acc = needs(HALF.spec, HALF.spaces, TARGET, choice)
    build(HALF.spec, HALF.spaces, TARGET, Room(scratch, scratch), choice)
    with pytest.raises(AllocationError, match=f"needs {scratch:,} bytes of scratchpad.*{scratch - 1:,} are free"):
        build(HALF.spec, HALF.spaces, TARGET, Room(scratch - 1, scratch - 1), choice)
    poor = with_scratchpad(TARGET, accumulator_bytes=acc - 64)
    with pytest.raises(AllocationError, match=f"needs {acc:,} bytes of accumulators.*has {acc - 64:,}"):
        build(HALF.spec, HALF.spaces, poor, Room(scratch, scratch), choice)


def test_a_kernel_without_a_choice_takes_none() -> None:
    matrix = Arg((4, 8), Dtype.F16)
    spec = KernelSpec("concat", (("axis", 0),), (matrix, matrix), (Arg((8, 8), Dtype.F16),))
    assert default_choice(spec, (D, D, D), TARGET, ROOM) is None
    assert not list(legal_choices(spec, (D, D, D), TARGET, ROOM))
    with pytest.raises(OptionError, match="leaves nothing to choose"):
        build(spec, (D, D, D), TARGET, ROOM, RowsChoice(2))


def test_schedules_are_values() -> None:
    key, other = kernel_key(HALF.spec, HALF.spaces), kernel_key(*add())
    first = Schedules(((key, ProductChoice(8, 16, 32)), (other, RowsChoice(5))))
    same = Schedules(((other, RowsChoice(5)), (key, ProductChoice(8, 16, 32))))
    assert first == same
    assert hash(first) == hash(same)
    assert first.canonical_json() == same.canonical_json()
    assert first.get(HALF.spec, HALF.spaces) == ProductChoice(8, 16, 32)
    assert first.get(HALF.spec, (S, *HALF.spaces[1:])) is None
    assert first.canonical_json() != Schedules(first.choices, GraphChoice(2)).canonical_json()
    assert first.canonical_json() != Schedules(first.choices, splits=((key, CoreSplit("n", 2)),)).canonical_json()
    with pytest.raises(FirsttokenError, match="two choices"):
        Schedules(((key, RowsChoice(1)), (key, RowsChoice(2))))


def test_kernels_that_do_not_occur_are_known_once_programs_are_made() -> None:
    key, other = kernel_key(HALF.spec, HALF.spaces), KernelKey("add-1x1-000000000000")
    given = Schedules(((key, ProductChoice(8, 16, 32)), (other, RowsChoice(5))))
    assert given.absent() == sorted((key, other))
    given.mark([(HALF.spec, HALF.spaces)])
    assert given.absent() == [other]
    assert given.marked().absent() == sorted((key, other))
