"""Int8 keys and values: appended rows and attention over them, bit for bit against numpy."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_bench import Bench, small_target
from rowwise_case import F16, I8, Case, D, S, spec_of

from firsttoken.kv_cache import dequantise_rows, quantise_rows
from firsttoken_compiler.codegen.build import build
from firsttoken_compiler.codegen.template import Template
from firsttoken_compiler.codegen.tir_reader import read
from firsttoken_compiler.codegen.unroll import Place, unroll
from firsttoken_compiler.isa import word
from firsttoken_compiler.isa.matmul import Matmul
from firsttoken_compiler.isa.types import Dtype, Space
from firsttoken_compiler.schedule import attention
from firsttoken_compiler.schedule.attention import AttentionTile
from firsttoken_compiler.schedule.spec import Arg, KernelSpec
from firsttoken_compiler.schedule.tiling import Room, choose_attention
from firsttoken_compiler.target.target import Target

SMALL = small_target()
WITHOUT_PAIR = replace(
    SMALL, matrix=replace(SMALL.matrix, macs_per_cycle={"fp16xfp16": SMALL.matrix.macs_per_cycle["fp16xfp16"]})
)
PRESETS = [Target.load(name) for name in ("snapdragon-x-elite", "systolic-128")]


# --- appending ----------------------------------------------------------------------------------------------


def append_case(rows: int, past: int, heads: int, width: int, seed: int) -> tuple[Case, list[np.ndarray]]:
    """New rows, and the caches (integers, scales) before them."""
    r = np.random.default_rng(seed)
    shape = (heads, past + rows, width)
    outs = (Arg(shape, I8), Arg((*shape[:2], 1), F16))
    args = (Arg((rows, heads * width), F16), *(outs if past else ()))
    x = (r.standard_normal((rows, heads * width)) * 10.0 ** r.integers(-6, 4, (rows, 1))).astype(np.float16)
    x[r.integers(rows)] = 0
    before = [r.integers(-127, 128, shape).astype(np.int8), r.random(outs[1].shape).astype(np.float16)]
    return Case(spec_of("kv_quantise", args, *outs, kv_heads=heads, past=past), lambda x: x, (x,)), before


def check_append(
    case: Case, before: list[np.ndarray], spaces: tuple[Space, ...], template: Template, target: Target
) -> None:
    x, past = case.arrays[0], int(case.spec["past"])
    heads, _, width = before[0].shape
    got = Bench(case.spec, spaces, target, case.operands, results=2).run(template, [x, *before])
    new = quantise_rows(x.reshape(-1, heads, width).transpose(1, 0, 2))
    for found, old, rows in zip(got, before, new, strict=True):
        np.testing.assert_array_equal(found[:, :past], old[:, :past])
        np.testing.assert_array_equal(found[:, past:], rows)


@settings(max_examples=30, deadline=None, print_blob=True)
@given(st.data())
def test_appended_rows_are_numpys(data: st.DataObject) -> None:
    rows, past, heads = data.draw(st.integers(1, 9)), data.draw(st.integers(0, 6)), data.draw(st.integers(1, 4))
    width, seed = data.draw(st.sampled_from([1, 3, 8, 40])), data.draw(st.integers(0, 99))
    case, before = append_case(rows, past, heads, width, seed)
    spaces = (data.draw(st.sampled_from([D, S])), D, D)
    check_append(case, before, spaces, case.template(spaces, data.draw(st.integers(1, rows))), SMALL)


@pytest.mark.parametrize("target", PRESETS, ids=lambda target: target.name)
@pytest.mark.parametrize(("rows", "past"), [(1, 17), (40, 0), (5, 3)])
def test_appended_rows_on_the_presets(target: Target, rows: int, past: int) -> None:
    case, before = append_case(rows, past, 3, 64, 7)
    template = build(case.spec, (D, D, D), target, Room(1 << 20, 1 << 21))
    check_append(case, before, (D, D, D), template, target)


def test_no_scale_is_subnormal_and_no_row_overflows() -> None:
    x = np.array([[1e-7, 0], [6e-8, -6e-8], [65504, 1], [0, 0]], np.float16)
    integers, scales = quantise_rows(x)
    assert scales.min() == np.float16(2.0**-14)
    assert integers[2, 0] == 127
    assert np.abs(dequantise_rows(integers, scales) - x.astype(np.float32)).max() <= 0.51 * scales.max()


# --- attention ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Attention:
    """An attention of `tokens` queries over `past` + `tokens` rows of int8 caches."""

    tokens: int
    past: int
    kv_heads: int
    shared: int
    width: int
    tile: AttentionTile
    mask: str = ""
    """`` (causal), `mask` (an operand), `row` (one row for all queries) or `none`."""
    out: Dtype = Dtype.F16
    on_chip: frozenset[str] = frozenset()
    seed: int = 0
    narrow: bool = False
    """Whether the result is integers with a static scale."""

    @property
    def keys(self) -> int:
        return self.past + self.tokens

    @property
    def masked(self) -> bool:
        return self.mask in ("mask", "row")

    @property
    def spec(self) -> KernelSpec:
        heads = self.kv_heads * self.shared
        matrix, cache = Arg((self.tokens, heads * self.width), F16), (self.kv_heads, self.keys, self.width)
        args = [matrix, Arg(cache, I8), Arg(cache, I8)]
        args += [Arg((1 if self.mask == "row" else self.tokens, self.keys), Dtype.F32)] * self.masked
        args += [Arg((*cache[:2], 1), F16)] * 2 + [Arg((1, 1), Dtype.F32)] * self.narrow
        params = (
            ("causal", int(self.mask == "")), ("heads", heads), ("kv_heads", self.kv_heads),
            ("mask", int(self.masked)), ("past", self.past), ("scale", 0.3), *((("narrow", 1),) if self.narrow else ()),
        )  # fmt: skip
        return KernelSpec("attention", params, tuple(args), (Arg(matrix.shape, self.out),))

    @property
    def spaces(self) -> tuple[Space, ...]:
        return tuple(S if name in self.on_chip else D for name in [*attention.operand_names(self.spec), "out"])

    def arrays(self) -> list[np.ndarray]:
        """Queries are small multiples of 1/64, so that scores are exact in fp32 in any order."""
        r = np.random.default_rng(self.seed)
        spec = self.spec
        q = (r.integers(-64, 65, spec.args[0].shape) / 64).astype(np.float16)
        scale = 10.0 ** r.integers(-3, 1, (2, self.kv_heads, self.keys, 1))
        (k, ks), (v, vs) = (quantise_rows(r.standard_normal(spec.args[1].shape) * s) for s in scale)
        mask = np.where(r.random(spec.args[3].shape if self.masked else (1, 1)) < 0.4, -30000.0, 0.5)
        mask[:, r.integers(0, mask.shape[1])] = 0
        inverse = [np.array([[23.5]], np.float32)] if self.narrow else []
        return [q, k, v, *([mask.astype(np.float32)] if self.masked else []), ks, vs, *inverse]

    def check(self, target: Target) -> None:
        spec, arrays = self.spec, self.arrays()
        scheduled = attention.schedule(spec, self.spaces, self.tile, target)
        body, _ = read(scheduled.lowered())
        places = [Place(space, layout) for space, layout in zip(self.spaces, scheduled.layouts, strict=True)]
        template = unroll(body, places, scheduled.ragged, target.scratchpad.alignment_bytes, scheduled.tile)
        assert template.scratch_bytes <= attention.scratch_bytes(spec, self.spaces, self.tile, target)
        got = Bench(spec, self.spaces, target, (*spec.args, *spec.outs)).run(template, arrays)[0]
        self.compare(got, arrays, self.tile)

    def compare(self, got: np.ndarray, arrays: list[np.ndarray], tile: AttentionTile) -> None:
        expected = self.defined(arrays[:-1] if self.narrow else arrays, tile)
        if self.narrow:
            bounds = np.iinfo(self.out.numpy)
            expected = np.clip(np.rint(expected * arrays[-1]), bounds.min, bounds.max).astype(self.out.numpy)
            assert np.unique(expected).size > 5
        np.testing.assert_array_equal(got, expected)
        if self.narrow:
            return
        exact = self.exact(arrays)
        bound = 2e-3 * np.abs(dequantise_rows(arrays[2], arrays[-1])).max()
        np.testing.assert_allclose(got.astype(np.float64), exact, rtol=2e-3, atol=bound)

    def defined(self, arrays: list[np.ndarray], tile: AttentionTile) -> np.ndarray:
        """The definition: fp32, but for the fp16 weights of the values, in products of the machine's extents."""
        q, k, v, *_, ks, vs = (array.astype(np.float32) for array in arrays)
        heads = self.kv_heads * self.shared
        rows = np.stack([self.rows(np.arange(self.tokens), head) for head in range(heads)])  # (token, head) of each row
        if self.tokens == 1:  # the heads that share keys are rows of one product
            rows = rows.reshape(self.kv_heads, self.shared, 2)
        out = np.zeros((self.tokens, heads, self.width), np.float32)
        q = q.reshape(self.tokens, heads, self.width)
        for batch in rows:
            for first in range(0, len(batch), tile.rows):
                token, head = batch[first : first + tile.rows].T
                at = head[0] // self.shared
                scores = (q[token, head] @ k[at].T) * (ks[at, :, 0] * np.float32(0.3))
                scores = self.shown(scores, token, arrays, -1e30)
                weights = np.exp(scores - scores.max(axis=1, keepdims=True)).astype(np.float16).astype(np.float32)
                total, top = np.add.reduce(weights, axis=1, keepdims=True), vs[at].max()
                scaled = (weights * (vs[at, :, 0] / top)).astype(np.float16).astype(np.float32)
                parts = [slice(t, t + tile.keys) for t in range(0, self.keys, tile.keys)]
                mixed = sum(scaled[:, part] @ v[at, part] for part in parts)
                out[token, head] = mixed * (top / total)
        rows = out.reshape(self.tokens, -1)
        return rows if self.narrow else rows.astype(self.out.numpy)

    @staticmethod
    def rows(tokens: np.ndarray, head: int) -> np.ndarray:
        return np.stack([tokens, np.full_like(tokens, head)], axis=1)

    def shown(self, scores: np.ndarray, token: np.ndarray, arrays: list[np.ndarray], hidden: float) -> np.ndarray:
        """Scores of queries at `token` over all keys, those removed that they may not see."""
        if self.masked:
            return scores + arrays[3][np.minimum(token, len(arrays[3]) - 1)]
        visible = np.arange(self.keys)[None] <= token[:, None] + self.past
        return np.where(visible | (self.mask == "none"), scores, np.float32(hidden))

    def exact(self, arrays: list[np.ndarray]) -> np.ndarray:
        """Float64 attention over the rows that the caches stand for."""
        q, k, v, *_, ks, vs = arrays
        rows = (dequantise_rows(*pair).astype(np.float64) for pair in ((k, ks), (v, vs)))
        keys, values = (np.repeat(array, self.shared, axis=0) for array in rows)
        heads = q.reshape(self.tokens, -1, self.width).astype(np.float64)
        scores = self.shown(np.einsum("thd,hsd->hts", heads, keys) * 0.3, np.arange(self.tokens), arrays, -np.inf)
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        return np.einsum("hts,hsd->thd", weights / weights.sum(axis=-1, keepdims=True), values).reshape(self.tokens, -1)


CASES = {
    "causal": Attention(9, 0, 2, 3, 8, AttentionTile(4, 4)),
    "past": Attention(9, 7, 2, 3, 8, AttentionTile(4, 5)),
    "one-token-grouped": Attention(1, 17, 2, 4, 8, AttentionTile(3, 5)),
    "one-token-mask": Attention(1, 17, 2, 4, 8, AttentionTile(4, 18), "mask"),
    "one-mask-row": Attention(6, 0, 2, 2, 8, AttentionTile(4, 4), "row"),
    "one-number": Attention(1, 0, 1, 1, 2, AttentionTile(1, 1)),
    "one-tile": Attention(7, 3, 1, 1, 64, AttentionTile(7, 10)),
    "all-visible": Attention(3, 2, 2, 2, 6, AttentionTile(2, 2), "none", Dtype.F32),
    "int8-result": Attention(9, 7, 2, 3, 8, AttentionTile(4, 5), "mask", I8, narrow=True),
    "int16-result": Attention(1, 17, 2, 4, 8, AttentionTile(3, 5), out=Dtype.I16, narrow=True),
}


@pytest.mark.parametrize("target", [SMALL, WITHOUT_PAIR], ids=["pair", "widened"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_attention_is_its_definition(case: Attention, target: Target) -> None:
    case.check(target)


@pytest.mark.parametrize("on_chip", list(product((False, True), repeat=4)), ids=str)
def test_every_place_of_the_operands(on_chip: tuple[bool, ...]) -> None:
    groups = (("q",), ("k", "ks"), ("v", "vs", "mask"), ("out",))
    names = frozenset(name for group, on in zip(groups, on_chip, strict=True) for name in group if on)
    case = Attention(5, 18, 2, 2, 6, AttentionTile(2, 3), "mask", on_chip=names)
    case.check(SMALL)
    case.check(WITHOUT_PAIR)


@settings(max_examples=25, deadline=None, print_blob=True)
@given(st.data())
def test_any_attention(data: st.DataObject) -> None:
    tokens, past, shared = data.draw(st.integers(1, 9)), data.draw(st.integers(0, 13)), data.draw(st.integers(1, 3))
    rows = shared if tokens == 1 else tokens
    tile = AttentionTile(data.draw(st.integers(1, rows)), data.draw(st.integers(1, past + tokens)))
    Attention(
        tokens, past, data.draw(st.integers(1, 3)), shared, data.draw(st.sampled_from([1, 2, 6, 8, 11])), tile,
        data.draw(st.sampled_from(["", "mask", "row", "none"])), data.draw(st.sampled_from([Dtype.F16, Dtype.F32])),
        seed=data.draw(st.integers(0, 99)),
    ).check(data.draw(st.sampled_from([SMALL, WITHOUT_PAIR])))  # fmt: skip


@pytest.mark.parametrize("target", PRESETS, ids=lambda target: target.name)
@pytest.mark.parametrize(("tokens", "past"), [(1, 150), (20, 0)])
def test_attention_on_the_presets(target: Target, tokens: int, past: int) -> None:
    case = Attention(tokens, past, 3, 3, 64, AttentionTile(1, 1), "mask" if past else "")
    room = Room(1 << 20, 1 << 21)
    template = build(case.spec, case.spaces, target, room)
    arrays = case.arrays()
    got = Bench(case.spec, case.spaces, target, (*case.spec.args, *case.spec.outs)).run(template, arrays)[0]
    case.compare(got, arrays, choose_attention(case.spec, case.spaces, target, room))


def test_int8_rows_are_multiplied_as_they_are_only_where_the_target_can() -> None:
    case = CASES["past"]
    for target, kind in ((SMALL, Dtype.I8), (WITHOUT_PAIR, Dtype.F16)):
        template = build(case.spec, case.spaces, target, Room(1 << 20, 1 << 21))
        rows = [row for row in template.code if row[word.OPCODE] == Matmul.OPCODE]
        assert {Matmul.from_row(row).operand(2).dtype for row in rows} == {kind}
