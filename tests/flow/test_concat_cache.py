"""Graphs that concatenate their cache: the same numbers to the bit, and bytes that are moved once more each way."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from students import QWEN2

from firsttoken import RunOptions, Target, latency, run
from firsttoken.latency import LlmWork
from firsttoken.npu_session import NpuSession
from firsttoken_compiler.target.target import Runtime
from firsttoken_models.registry import PROVIDER
from firsttoken_models.weights import write_random_weights

WIDE = dataclasses.replace(QWEN2, name="tiny-wide", head_dim=64, max_positions=4096)
PROMPT = [5, 77, 21, 8]


@pytest.mark.parametrize("kind", ["fp16", "int8"])
@pytest.mark.parametrize("target", ["snapdragon-x-elite", "systolic-128"])
def test_logits_and_caches_are_the_same_to_the_bit(target: str, kind: str, tmp_path: Path) -> None:
    weights = write_random_weights(QWEN2, tmp_path)
    options = RunOptions(weights="int8", kv_cache=kind)
    plain, copied = (
        NpuSession(PROVIDER, QWEN2, weights, 8, target=Target.load(target), options=of)
        for of in (options, dataclasses.replace(options, kv_concat=True))
    )
    for found, expected in (
        (copied.prefill(PROMPT), plain.prefill(PROMPT)), (copied.decode(9, 4), plain.decode(9, 4)),
        (copied.decode(3, 5), plain.decode(3, 5)),
    ):  # fmt: skip
        np.testing.assert_array_equal(found, expected)
    for part, buffers in plain.cache.parts.items():
        for found, expected in zip(copied.cache.parts[part], buffers, strict=True):
            np.testing.assert_array_equal(found, expected)


def test_a_copy_that_does_not_fit_moves_every_row_twice_more() -> None:
    target = Target.load("systolic-128")
    small = dataclasses.replace(target, scratchpad=dataclasses.replace(target.scratchpad, bytes=1 << 17))
    plain, copied = (
        run(WIDE, small, prompt=1, past=4095, options=RunOptions(kv_cache="int8", kv_concat=concat), cache=False)
        for concat in (False, True)
    )
    rows = 2 * WIDE.layers * 4096 * WIDE.kv_heads * WIDE.head_dim
    more = sum(copied.dram_bytes_by_kind.values()) - sum(plain.dram_bytes_by_kind.values())
    assert more == pytest.approx(2 * rows, rel=0.01)
    assert copied.ttft_cycles > plain.ttft_cycles


def test_nothing_is_copied_without_rows_before() -> None:
    plain, copied = (
        run(WIDE, "systolic-128", prompt=16, options=RunOptions(kv_concat=concat), cache=False)
        for concat in (False, True)
    )
    assert plain.ttft_cycles == copied.ttft_cycles


def test_a_runtime_says_whether_its_graphs_concatenate() -> None:
    work = LlmWork(WIDE, RunOptions(), 20, 32, 4)
    for concat in (False, True):
        runtime = Runtime(1.0, chunk_tokens=16, context_buckets=(16, 32), concatenates_cache=concat)
        target = dataclasses.replace(Target.load("systolic-128"), runtimes={"r": runtime})
        found = {(step.tokens, step.past): step.options.kv_concat for step in latency.steps(work, target)}
        assert found == {(16, 0): False, (16, 16): concat, (1, 31): concat}
