"""Attention with online softmax: against numpy in float64, against whole rows, and what it never holds."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_bench import Bench, small_target

from firsttoken.kv_cache import quantise_rows
from firsttoken_compiler.codegen.build import build
from firsttoken_compiler.codegen.template import Template
from firsttoken_compiler.errors import AllocationError, OptionError
from firsttoken_compiler.isa import word
from firsttoken_compiler.isa.dma import Load
from firsttoken_compiler.isa.matmul import Matmul
from firsttoken_compiler.isa.types import Dtype, Space
from firsttoken_compiler.isa.vector import Vector
from firsttoken_compiler.schedule import attention
from firsttoken_compiler.schedule.choice import AttentionChoice, KernelKey, Schedules, facts_of
from firsttoken_compiler.schedule.choosing import check, default_choice, legal_choices, needs, ranked
from firsttoken_compiler.schedule.spec import Arg, KernelSpec
from firsttoken_compiler.schedule.tiling import Room
from firsttoken_compiler.schedule.traces import traces
from firsttoken_compiler.target.target import Attention, Target

D, S = Space.DRAM, Space.SPAD
TARGET = small_target()
WITHOUT_PAIR = replace(TARGET, matrix=replace(TARGET.matrix, macs_per_cycle={"fp16xfp16": 1}))
ROOM = Room(TARGET.scratchpad.bytes, TARGET.scratchpad.bytes)


@dataclass(frozen=True)
class Case:
    """An attention of `tokens` queries over `past` + `tokens` keys."""

    tokens: int
    past: int
    kv_heads: int
    shared: int
    width: int
    choice: AttentionChoice
    mask: str = ""
    """`` (causal), `mask` (an operand), `row` (one row for all queries) or `none`."""
    int8: bool = False
    narrow: bool = False
    """Whether the result is integers with a static scale."""
    on_chip: frozenset[str] = frozenset()
    seed: int = 0
    scale: float = 0.3
    target: Target = TARGET

    @property
    def keys(self) -> int:
        return self.past + self.tokens

    @property
    def masked(self) -> bool:
        return self.mask in ("mask", "row")

    @property
    def spec(self) -> KernelSpec:
        heads = self.kv_heads * self.shared
        matrix = Arg((self.tokens, heads * self.width), Dtype.F16)
        cached = self.past > 0 or self.int8
        shape = (self.kv_heads, self.keys, self.width) if cached else (self.keys, self.kv_heads * self.width)
        args = [matrix, *[Arg(shape, Dtype.I8 if self.int8 else Dtype.F16)] * 2]
        args += [Arg((1 if self.mask == "row" else self.tokens, self.keys), Dtype.F32)] * self.masked
        args += [Arg((self.kv_heads, self.keys, 1), Dtype.F16)] * (2 * self.int8)
        args += [Arg((1, 1), Dtype.F32)] * self.narrow
        params = [
            ("causal", int(self.mask == "")), ("heads", heads), ("kv_heads", self.kv_heads),
            ("mask", int(self.masked)), *([("narrow", 1)] if self.narrow else []), ("past", self.past),
            ("scale", self.scale),
        ]  # fmt: skip
        out = Arg(matrix.shape, Dtype.I8 if self.narrow else Dtype.F16)
        return KernelSpec("attention", tuple(params), tuple(args), (out,))

    @property
    def spaces(self) -> tuple[Space, ...]:
        return tuple(S if name in self.on_chip else D for name in [*attention.operand_names(self.spec), "out"])

    def template(self, choice: AttentionChoice | None = None) -> Template:
        return build(self.spec, self.spaces, self.target, ROOM, choice or self.choice)

    def arrays(self) -> list[np.ndarray]:
        r = np.random.default_rng(self.seed)
        spec = self.spec
        q, k, v = (r.standard_normal(arg.shape).astype(np.float16) for arg in spec.args[:3])
        mask = np.where(r.random((1 if self.mask == "row" else self.tokens, self.keys)) < 0.4, -30000.0, 0.5)
        mask[:, r.integers(0, mask.shape[1])] = 0
        scales: list[np.ndarray] = []
        if self.int8:
            (k, ks), (v, vs) = (quantise_rows(x * 10.0 ** r.integers(-2, 2, (*x.shape[:2], 1))) for x in (k, v))
            scales = [ks, vs]
        inverse = [np.array([[23.5]], np.float32)] * self.narrow
        return [q, k, v, *([mask.astype(np.float32)] * self.masked), *scales, *inverse]

    def run(self, choice: AttentionChoice | None = None) -> np.ndarray:
        bench = Bench(self.spec, self.spaces, self.target, (*self.spec.args, *self.spec.outs))
        return bench.run(self.template(choice), self.arrays())[0].astype(np.float64)

    def check(self) -> None:
        got, arrays = self.run(), dict(zip(attention.operand_names(self.spec), self.arrays(), strict=True))
        expected, largest = self.reference(arrays)
        step = 2e-3 * largest * (23.5 if self.narrow else 1) + 0.51 * self.narrow
        np.testing.assert_allclose(got, expected, rtol=2e-3, atol=step)
        rows = self.run(replace(self.choice, softmax="rows"))
        np.testing.assert_allclose(got, rows, rtol=2e-3, atol=step + 0.5 * self.narrow)

    def reference(self, arrays: dict[str, np.ndarray]) -> tuple[np.ndarray, float]:
        """(result, largest value)."""
        heads = self.kv_heads * self.shared
        q, k, v = (arrays[name].astype(np.float64) for name in "qkv")
        if k.ndim == 2:
            k, v = (x.reshape(self.keys, self.kv_heads, self.width).transpose(1, 0, 2) for x in (k, v))
        if self.int8:
            k, v = k * arrays["ks"], v * arrays["vs"]
        k, v = (np.repeat(x, self.shared, axis=0) for x in (k, v))
        scores = np.einsum("thd,hsd->hts", q.reshape(self.tokens, heads, self.width), k) * self.scale
        if self.masked:
            scores = scores + arrays["mask"]
        elif not self.mask:
            visible = np.arange(self.keys)[None] <= np.arange(self.tokens)[:, None] + self.past
            scores = np.where(visible, scores, -np.inf)
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        out = np.einsum("hts,hsd->thd", weights, v).reshape(self.tokens, -1)
        return (np.round(out * 23.5).clip(-128, 127) if self.narrow else out), float(np.abs(v).max())


def online(rows: int, keys: int, buffers: int = 2) -> AttentionChoice:
    return AttentionChoice(rows, keys, buffers, "online")


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Any attention, any tile of it, operands anywhere."""
    tokens = draw(st.one_of(st.just(1), st.integers(1, 11)))
    past, shared = draw(st.one_of(st.just(0), st.integers(0, 13))), draw(st.integers(1, 3))
    rows = shared if tokens == 1 else tokens
    choice = online(draw(st.integers(1, rows)), draw(st.integers(1, past + tokens)), draw(st.integers(1, 3)))
    int8 = draw(st.booleans())
    names = st.sampled_from(["q", "k", "v", "mask", "ks", "vs", "inverse", "out"])
    return Case(
        tokens, past, draw(st.integers(1, 3)), shared, draw(st.sampled_from([1, 2, 6, 8, 11])), choice,
        draw(st.sampled_from(["", "mask", "row", "none"])), int8, draw(st.booleans()),
        draw(st.frozensets(names)), draw(st.integers(0, 99)),
        target=WITHOUT_PAIR if int8 and draw(st.booleans()) else TARGET,
    )  # fmt: skip


@settings(max_examples=60, deadline=None, print_blob=True)
@given(cases())
def test_equals_numpy_and_whole_rows(case: Case) -> None:
    case.check()


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("target", [TARGET, WITHOUT_PAIR], ids=["pair", "widened"])
@pytest.mark.parametrize(
    ("tokens", "past", "mask"), [(13, 0, ""), (9, 14, ""), (1, 36, ""), (11, 6, "mask"), (11, 6, "row"), (7, 9, "none")]
)
def test_ragged_tiles_of_grouped_heads(int8: bool, target: Target, tokens: int, past: int, mask: str) -> None:
    Case(tokens, past, 2, 3, 8, online(2 if tokens == 1 else 4, 5), mask, int8, target=target).check()


def test_maxima_that_rise_and_fall_between_tiles() -> None:
    """Scores of thousands: what earlier tiles summed vanishes, or what later ones add does."""
    for seed in range(4):
        Case(6, 17, 1, 2, 8, online(4, 4), scale=400.0, seed=seed).check()


def test_rows_whose_first_tiles_are_all_masked() -> None:
    """The running maximum is first that of masked scores, then a real one: nothing of the masked tiles is left."""
    case = Case(4, 12, 1, 1, 8, online(4, 4), "mask")
    arrays = case.arrays()
    for hidden in (-1e4, -3e38, -np.inf):
        arrays[3] = np.where(np.arange(16)[None] < 12, hidden, 0.0).repeat(4, axis=0).astype(np.float32)
        bench = Bench(case.spec, case.spaces, TARGET, (*case.spec.args, *case.spec.outs))
        got = bench.run(case.template(), arrays)[0].astype(np.float64)
        expected, _ = case.reference(dict(zip("qkv", arrays[:3], strict=True)) | {"mask": arrays[3]})
        np.testing.assert_allclose(got, expected, rtol=2e-3, atol=4e-3)


def test_tiles_that_are_fully_masked_are_skipped() -> None:
    """16 rows in tiles of 4 over tiles of 4 keys: 1 + 2 + 3 + 4 of 16 pairs of tiles have keys that are seen."""
    for mask, tiles in (("", 10), ("none", 16)):
        code = Case(16, 0, 1, 1, 8, online(4, 4), mask).template().code
        assert (code[:, word.OPCODE] == Matmul.OPCODE).sum() == 2 * tiles
        read = code[code[:, word.OPCODE] == Load.OPCODE, word.DIMS : word.DIMS + 3].prod(axis=1).sum()
        assert read == (16 + 2 * tiles * 4) * 8 * 2


def test_scores_are_never_more_than_those_of_a_tile() -> None:
    """No instruction of the vector unit works on more, and the scratchpad of a tile does not grow with the keys."""
    few, many = (Case(1, past, 1, 4, 8, online(4, 16)).template() for past in (127, 1023))
    vectors = many.code[many.code[:, word.OPCODE] == Vector.OPCODE]
    assert vectors[:, word.DIMS : word.DIMS + 3].prod(axis=1).max() == 4 * 16
    assert few.scratch_bytes == many.scratch_bytes
    assert few.acc_bytes == many.acc_bytes
    rows = Case(1, 1023, 1, 4, 8, online(4, 16)).template(AttentionChoice(4, 16))
    assert rows.scratch_bytes > 4 * many.scratch_bytes


def test_products_of_the_next_tile_come_before_the_values_of_this_one() -> None:
    """Scores are (rows, keys, width), values (rows, width, keys): one tile of scores is always ahead."""
    code = Case(4, 12, 1, 1, 8, online(4, 4), "none").template().code
    products = code[code[:, word.OPCODE] == Matmul.OPCODE, word.DIMS : word.DIMS + 3].tolist()
    scores, values = [4, 4, 8], [4, 8, 4]
    assert products == [scores, scores, values, scores, values, scores, values, values]


@settings(max_examples=40, deadline=None, print_blob=True)
@given(cases())
def test_the_account_covers_what_is_used(case: Case) -> None:
    template = case.template()
    scratch, acc = needs(case.spec, case.spaces, case.target, case.choice)
    assert template.scratch_bytes <= scratch
    assert template.acc_bytes <= acc


def test_buffers_are_tiles_of_keys_and_values() -> None:
    sizes = [Case(4, 60, 1, 1, 8, online(4, 16, buffers)).template().scratch_bytes for buffers in (1, 2, 3)]
    assert np.diff(sizes).tolist() == [2 * 16 * 8 * 2] * 2


def test_whole_rows_that_fit_nowhere_become_online() -> None:
    case = Case(1, 4095, 1, 1, 8, online(1, 16))
    room = Room(8000, 8000)
    choice = default_choice(case.spec, case.spaces, TARGET, room)
    assert isinstance(choice, AttentionChoice)
    assert choice.softmax == "online"
    check(case.spec, case.spaces, TARGET, room, choice)
    with pytest.raises(AllocationError, match="scratchpad"):
        check(case.spec, case.spaces, TARGET, room, replace(choice, softmax="rows"))
    replace(case, choice=choice).check()
    roomy = default_choice(case.spec, case.spaces, TARGET, ROOM)
    assert isinstance(roomy, AttentionChoice)
    assert roomy.softmax == "rows"


def test_both_forms_are_in_the_search_space() -> None:
    case = Case(20, 10, 2, 2, 8, online(4, 8))
    every = list(legal_choices(case.spec, case.spaces, TARGET, ROOM))
    found = [choice for choice in every if isinstance(choice, AttentionChoice) and choice.softmax == "online"]
    assert 0 < len(found) < len(every)
    assert all(choice.keys < 30 for choice in found)
    for choice in found[::17]:
        replace(case, choice=choice).template()
        assert (ranked(case.spec, case.spaces, TARGET, choice) or 0) > 0


def test_whole_rows_are_not_mentioned() -> None:
    assert facts_of(AttentionChoice(4, 8)) == {"rows": 4, "keys": 8, "buffers": 2}
    made = Schedules.of({KernelKey("a"): online(4, 8)})
    assert made.facts()["choices"] == {"a": {"rows": 4, "keys": 8, "buffers": 2, "softmax": "online"}}
    assert online(4, 8).text() == "4 rows x 8 keys, 2 buffers, online softmax"


def test_an_online_attention_has_no_trace() -> None:
    case = Case(20, 10, 2, 2, 8, online(4, 8))
    assert traces(case.spec, case.spaces, TARGET, case.choice) == []


def test_refusals_name_the_limit() -> None:
    case = Case(20, 10, 2, 2, 8, online(4, 8))
    with pytest.raises(OptionError, match=r"softmax is 'flash': give rows or online"):
        case.template(AttentionChoice(4, 8, 2, "flash"))
    mapped = replace(TARGET, attention=Attention(4, 8, 8, skips_masked=False, row_cycles=10.0))
    with pytest.raises(OptionError, match=r"softmax is 'online', and small maps the attention of a prompt"):
        replace(case, target=mapped).template()
    assert not [c for c in legal_choices(case.spec, case.spaces, mapped, ROOM) if "online" in c.text()]
    little = replace(TARGET, scratchpad=replace(TARGET.scratchpad, accumulator_bytes=1536))
    with pytest.raises(AllocationError, match=r"needs [\d,]+ bytes of accumulators, small has 1,536"):
        replace(case, target=little).template(online(20, 16))
