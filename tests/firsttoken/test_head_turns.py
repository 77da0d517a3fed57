"""firsttoken.head_turns: the host turns rows of heads into heads of rows, and back."""

from __future__ import annotations

from dataclasses import replace

import pytest

from firsttoken.head_turns import head_turns_s
from firsttoken.latency import EncoderWork, LlmWork, Step, StepTime, predict
from firsttoken.options import RunOptions
from firsttoken_compiler.target.target import Runtime, Target

TARGET = Target.load("xdna2-strix")
FP16 = RunOptions(weights="fp16")


def test_queries_keys_values_and_results_are_read_and_written() -> None:
    """qwen2.5-1.5b: 28 layers, 12 and 2 heads of 128."""
    elements = 28 * 2 * (12 + 2) * 128
    assert head_turns_s(Step("qwen2.5-1.5b", 2048, 0, FP16), 1e9, TARGET) == pytest.approx(2048 * elements * 4 / 1e9)


def test_nothing_where_the_kernel_reads_rows_or_no_rate_is_known() -> None:
    prompt = Step("qwen2.5-1.5b", 64, 0, FP16)
    assert head_turns_s(prompt, 0.0, TARGET) == 0
    assert head_turns_s(prompt, 1e9, replace(TARGET, attention=None)) == 0
    assert head_turns_s(Step("qwen2.5-1.5b", 1, 64, FP16), 1e9, TARGET) == 0
    assert head_turns_s(Step("qwen2.5-0.5b", 64, 0, FP16), 1e9, TARGET) == 0  # heads of 64
    assert head_turns_s(prompt, 1e9, TARGET) > 0


def test_latency_adds_them_to_the_host_of_a_prompt() -> None:
    class Nothing:
        def seconds(self, step: Step, target: Target) -> StepTime:
            return StepTime(0.0, 0, 0.0)

    target = replace(TARGET, runtimes={"r": Runtime(1.0, turned_bytes_per_s=2e9), "plain": Runtime(1.0)})
    found = predict(LlmWork("qwen2.5-1.5b", FP16, 64, 0, 8, "r"), target, Nothing()).parts
    assert found["prefill"].host_s == head_turns_s(Step("qwen2.5-1.5b", 64, 0, FP16), 2e9, target) > 0
    assert found["decode"].host_s == 0
    assert predict(LlmWork("qwen2.5-1.5b", FP16, 64, 0, 8, "plain"), target, Nothing()).parts["prefill"].host_s == 0
    assert predict(EncoderWork("minilm-l6", FP16, 16, "r"), target, Nothing()).parts["inference"].host_s == 0
