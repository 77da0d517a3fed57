"""Attention: the unrolled template against numpy in float64."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_bench import Bench, small_target

from firsttoken_compiler.codegen.template import Template
from firsttoken_compiler.codegen.tir_reader import read
from firsttoken_compiler.codegen.unroll import Place, unroll
from firsttoken_compiler.isa import word
from firsttoken_compiler.isa.dma import Load
from firsttoken_compiler.isa.matmul import Matmul
from firsttoken_compiler.isa.types import Dtype, Space
from firsttoken_compiler.schedule import attention
from firsttoken_compiler.schedule.attention import AttentionTile
from firsttoken_compiler.schedule.spec import Arg, KernelSpec

D, S = Space.DRAM, Space.SPAD
TARGET = small_target()


@dataclass(frozen=True)
class Case:
    """An attention of `tokens` queries over `past` + `tokens` keys."""

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
    scale: float = 0.3

    @property
    def cached(self) -> bool:
        return self.past > 0

    @property
    def spec(self) -> KernelSpec:
        heads, keys = self.kv_heads * self.shared, self.past + self.tokens
        matrix = Arg((self.tokens, heads * self.width), Dtype.F16)
        shape = (self.kv_heads, keys, self.width) if self.cached else (keys, self.kv_heads * self.width)
        args = [matrix, Arg(shape, Dtype.F16), Arg(shape, Dtype.F16)]
        args += [Arg((1 if self.mask == "row" else self.tokens, keys), Dtype.F32)] * self.masked
        params = (
            ("causal", int(self.mask == "")), ("heads", heads), ("kv_heads", self.kv_heads),
            ("mask", int(self.masked)), ("past", self.past), ("scale", self.scale),
        )  # fmt: skip
        return KernelSpec("attention", params, tuple(args), (Arg(matrix.shape, self.out),))

    @property
    def masked(self) -> bool:
        return self.mask in ("mask", "row")

    @property
    def names(self) -> list[str]:
        return ["q", "k", "v", *(["mask"] if self.masked else []), "out"]

    @property
    def spaces(self) -> tuple[Space, ...]:
        return tuple(S if name in self.on_chip else D for name in self.names)

    def template(self) -> Template:
        scheduled = attention.schedule(self.spec, self.spaces, self.tile, TARGET)
        body, _ = read(scheduled.lowered())
        places = [Place(space, layout) for space, layout in zip(self.spaces, scheduled.layouts, strict=True)]
        return unroll(body, places, scheduled.ragged, TARGET.scratchpad.alignment_bytes, scheduled.tile)

    def check(self) -> None:
        r = np.random.default_rng(self.seed)
        spec = self.spec
        q, k, v = (r.standard_normal(arg.shape).astype(np.float16) for arg in spec.args[:3])
        hidden = r.random((1 if self.mask == "row" else self.tokens, self.past + self.tokens)) < 0.4
        mask = np.where(hidden, -30000.0, r.uniform(-1, 1)).astype(np.float32)
        mask[:, r.integers(0, mask.shape[1])] = 0
        arrays = [q, k, v, mask][: len(spec.args)]
        got = Bench(spec, self.spaces, TARGET, (*spec.args, *spec.outs)).run(self.template(), arrays)[0]
        expected = self.reference(*(x.astype(np.float64) for x in (q, k, v, mask)))
        # The weights of the values are fp16, at most 1; their sum is divided out.
        np.testing.assert_allclose(got.astype(np.float64), expected, rtol=2e-3, atol=2e-3 * np.abs(v).max())

    def reference(self, q: np.ndarray, k: np.ndarray, v: np.ndarray, mask: np.ndarray) -> np.ndarray:
        heads, keys = self.kv_heads * self.shared, self.past + self.tokens
        if not self.cached:
            k, v = (x.reshape(keys, self.kv_heads, self.width).transpose(1, 0, 2) for x in (k, v))
        scores = np.einsum("thd,hsd->hts", q.reshape(self.tokens, heads, self.width), np.repeat(k, self.shared, axis=0))
        scores = scores * self.scale
        if self.masked:
            scores = scores + mask
        elif not self.mask:
            visible = np.arange(keys)[None] <= np.arange(self.tokens)[:, None] + self.past
            scores = np.where(visible, scores, -np.inf)
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        return np.einsum("hts,hsd->thd", weights, np.repeat(v, self.shared, axis=0)).reshape(self.tokens, -1)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Any attention, any tile of it, operands anywhere."""
    tokens = draw(st.one_of(st.just(1), st.integers(1, 11)))
    past, shared = draw(st.one_of(st.just(0), st.integers(0, 13))), draw(st.integers(1, 3))
    rows = shared if tokens == 1 else tokens
    tile = AttentionTile(draw(st.integers(1, rows)), draw(st.integers(1, past + tokens)), draw(st.integers(0, 3)))
    return Case(
        tokens, past, draw(st.integers(1, 3)), shared, draw(st.sampled_from([1, 2, 6, 8, 11])), tile,
        draw(st.sampled_from(["", "mask", "row", "none"])), draw(st.sampled_from([Dtype.F16, Dtype.F32])),
        draw(st.frozensets(st.sampled_from(["q", "k", "v", "mask", "out"]))), draw(st.integers(0, 99)),
    )  # fmt: skip


@settings(max_examples=50, deadline=None, print_blob=True)
@given(cases())
def test_equals_numpy(case: Case) -> None:
    case.check()


@pytest.mark.parametrize("on_chip", list(product((False, True), repeat=5)), ids=str)
def test_every_combination_of_operand_spaces(on_chip: tuple[bool, ...]) -> None:
    """Ragged rows and keys, grouped heads, a mask."""
    names = ("q", "k", "v", "mask", "out")
    chosen = frozenset(name for name, on in zip(names, on_chip, strict=True) if on)
    Case(5, 18, 2, 2, 6, AttentionTile(2, 3), "mask", on_chip=chosen).check()
    Case(5, 0, 2, 2, 6, AttentionTile(2, 3), "mask", on_chip=chosen).check()


@pytest.mark.parametrize(
    "case",
    [
        Case(9, 0, 2, 3, 8, AttentionTile(4, 4)),
        Case(9, 7, 2, 3, 8, AttentionTile(4, 5)),
        Case(1, 17, 2, 4, 8, AttentionTile(3, 5)),
        Case(1, 17, 2, 4, 8, AttentionTile(4, 18), "mask"),
        Case(6, 0, 2, 2, 8, AttentionTile(4, 4), "row"),
        Case(1, 0, 1, 1, 2, AttentionTile(1, 1)),
        Case(7, 3, 1, 1, 64, AttentionTile(7, 10)),
    ],
    ids=["causal", "past", "one-token-grouped", "one-token-mask", "one-mask-row", "one-number", "one-tile"],
)
def test_prompts_and_single_tokens(case: Case) -> None:
    case.check()


def test_large_scores_do_not_overflow() -> None:
    Case(6, 5, 1, 2, 8, AttentionTile(4, 4), scale=400.0).check()


def test_key_tiles_cover_every_product_once() -> None:
    case = Case(5, 8, 2, 2, 6, AttentionTile(2, 5))
    matmuls = [row for row in case.template().code if row[word.OPCODE] == Matmul.OPCODE]
    assert sum(int(np.prod(row[word.DIMS : word.DIMS + 3])) for row in matmuls) == 2 * 4 * (2 * 10 + 2 * 12 + 13) * 6


@pytest.mark.parametrize("mask", ["", "mask", "none"])
def test_only_a_causal_attention_stops_at_its_diagonal(mask: str) -> None:
    """16 rows in tiles of 4 over tiles of 4 keys: 1 + 2 + 3 + 4 of 16 pairs of tiles have keys that are seen."""
    case = Case(16, 0, 1, 1, 8, AttentionTile(4, 4), mask=mask)
    code = case.template().code
    products = [row for row in code if row[word.OPCODE] == Matmul.OPCODE]
    read = sum(int(np.prod(row[word.DIMS : word.DIMS + 3])) for row in code if row[word.OPCODE] == Load.OPCODE)
    tiles = 10 if mask == "" else 16
    assert len(products) == 2 * tiles
    assert read == (16 + 2 * tiles * 4) * 8 * 2 + (mask == "mask") * 16 * 16 * 4
