"""Kernels cut for several cores: what each core gets, and that together it is the kernel."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from firsttoken_compiler.isa.types import Dtype, Space
from firsttoken_compiler.schedule.choice import CoreSplit
from firsttoken_compiler.schedule.parts import bounds, cut, partial_bytes, partial_count, row_bounds, ways
from firsttoken_compiler.schedule.spec import Arg, KernelSpec
from firsttoken_compiler.target.target import Target

TARGET = Target.load("systolic-128")
F16, F32, I8, I4 = Dtype.F16, Dtype.F32, Dtype.I8, Dtype.I4


def linear(m: int = 64, n: int = 512, k: int = 768, group: int = 0, **params: int | str) -> KernelSpec:
    """fp16, or int4 weights in groups with int8 activations; bias and residual where `params` say so."""
    whole = {"acts": "int8" if group else "fp16", "bias": 0, "bits": 4 if group else 16, "group": group, "k": k, "n": n}
    whole |= {"out": "float16", "residual": 0, "stored": 0, **params}
    args = [Arg((m, k), I8 if group else F16), Arg((k, n), I4 if group else F16)]
    args += [Arg((m, 1), F32), Arg((-(-k // group), n), F16)] if group else []
    args += [Arg((n,), F16)] if whole["bias"] else []
    args += [Arg((m, n), F16) for name in ("residual", "factor") if whole.get(name)]
    return KernelSpec("linear", tuple(sorted(whole.items())), tuple(args), (Arg((m, n), F16),))


def attention(tokens: int = 64, heads: int = 12, kv_heads: int = 2, width: int = 32, keys: int = 64) -> KernelSpec:
    params = {"causal": 1, "heads": heads, "kv_heads": kv_heads, "mask": 0, "out": "float16", "past": 0, "scale": 1.0}
    cache = Arg((kv_heads, keys, width), F16)
    rows = Arg((tokens, heads * width), F16)
    return KernelSpec("attention", tuple(sorted(params.items())), (rows, cache, cache), (rows,))


@given(st.integers(1, 5000), st.integers(1, 12), st.integers(1, 200))
def test_bounds_cover_everything_once(total: int, parts: int, unit: int) -> None:
    found = bounds(total, parts, unit)
    assert found[0][0] == 0 and found[-1][1] == total  # noqa: PT018
    assert all(a[1] == b[0] for a, b in itertools.pairwise(found))
    assert all(first % unit == 0 and first < last for first, last in found)
    assert len(found) == min(parts, -(-total // unit))
    units = [-(-(last - first) // unit) for first, last in found]
    assert max(units) - min(units) <= 1


@given(st.integers(2, 5000), st.integers(2, 8))
def test_no_core_gets_many_more_rows_than_the_others(rows: int, cores: int) -> None:
    sizes = [last - first for first, last in row_bounds(rows, cores)]
    assert sum(sizes) == rows
    assert max(sizes) <= -(-rows // cores) + max(1, rows // cores // 8)


def test_columns_are_whole_panels_of_everything_that_has_columns() -> None:
    spec = linear(n=640, group=32, bias=1, residual=1)
    first, second = cut(spec, CoreSplit("n", 2), TARGET)
    assert (first.core, second.core) == (0, 1)
    assert [part.spec["n"] for part in (first, second)] == [256, 384]
    assert [arg.shape for arg in second.spec.args] == [(64, 768), (768, 384), (64, 1), (24, 384), (384,), (64, 384)]
    assert second.at == (0, 2 * 768 * 64, 0, 2 * 24 * 256, 512, 512, 512)
    assert [arg.whole for arg in (*second.spec.args, *second.spec.outs)] == [0, 0, 0, 0, 0, 640, 640]


def test_terms_become_partial_sums_that_a_last_kernel_adds() -> None:
    spec = linear(bias=1, residual=1)
    *products, low, high = cut(spec, CoreSplit("k", 2), TARGET)
    assert [part.spec["k"] for part in products] == [384, 384]
    assert [(part.spec["bias"], part.spec["residual"]) for part in products] == [(1, 1), (0, 0)]
    assert [part.operands for part in products] == [(0, 1, 2, 3, -1), (0, 1, -2)]
    assert products[1].at == (768, 384 * 256, 0)
    assert products[1].spec.args[1] == Arg((384, 512), F16, 768)
    assert (low.spec.kind, dict(low.spec.params)["expr"]) == ("map", "add(s0, s1)")
    assert (low.operands, high.at) == ((-1, -2, 4), (32 * 2048, 32 * 2048, 32 * 1024))
    parts = (*products, low, high)
    assert (partial_count(parts), partial_bytes(parts)) == (2, 64 * 512 * 4)
    assert products[0].spaces((Space.SPAD,) * 5) == (*(Space.SPAD,) * 4, Space.DRAM)


def test_groups_are_not_cut() -> None:
    parts = cut(linear(k=160, group=32), CoreSplit("k", 3), TARGET)
    assert [part.spec["k"] for part in parts[:3]] == [32, 64, 64]
    assert [part.spec.args[3].shape for part in parts[:3]] == [(1, 512), (2, 512), (2, 512)]
    assert [part.at[3] for part in parts[:3]] == [0, 256, 3 * 256]


@pytest.mark.parametrize(
    ("spec", "possible"),
    [(linear(), ("none", "n", "k", "rows")), (linear(silu=1), ("none", "n", "rows")),
     (linear(n=128), ("none", "k", "rows")), (linear(m=1, n=100), ("none",)), (linear(factor=1), ("none", "n", "rows")),
     (attention(), ("none", "heads", "rows")), (attention(tokens=1), ("none", "heads")),
     (attention(tokens=1, heads=1, kv_heads=1), ("none",)),
     (KernelSpec("row", (("index", 3),), (Arg((9, 8), F16),), (Arg((1, 8), F16),)), ("none",))],
)  # fmt: skip
def test_a_kernel_is_cut_only_where_that_makes_parts(spec: KernelSpec, possible: tuple[str, ...]) -> None:
    assert ways(spec, TARGET, 2) == possible
    for way in {"n", "k", "heads", "rows"} - set(possible):
        (whole,) = cut(spec, CoreSplit(way, 2), TARGET)
        assert (whole.core, whole.spec, set(whole.at)) == (0, spec, {0})


@pytest.mark.parametrize(
    ("cores", "heads", "kv_heads"), [(2, [6, 6], [1, 1]), (4, [3] * 4, [1] * 4), (3, [6, 6], [1, 1])]
)
def test_heads_stay_with_their_keys(cores: int, heads: list[int], kv_heads: list[int]) -> None:
    parts = cut(attention(), CoreSplit("heads", cores), TARGET)
    assert [part.spec["heads"] for part in parts] == heads
    assert [part.spec["kv_heads"] for part in parts] == kv_heads
    share = 12 // len(parts)
    for index, part in enumerate(parts):
        key = index * share // 6
        assert part.at == (index * share * 64, key * 64 * 64, key * 64 * 64, index * share * 64)


def test_rows_of_an_attention_see_the_keys_before_them() -> None:
    parts = cut(attention(), CoreSplit("rows", 2), TARGET)
    assert [part.spec["past"] for part in parts] == [0, 32]
    assert [part.spec.args[1].shape for part in parts] == [(2, 64, 32)] * 2
