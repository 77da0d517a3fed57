"""firsttoken.group_tasks: a task per group of weights, and the host over the sums of each."""

from __future__ import annotations

from dataclasses import replace

import pytest

from firsttoken.group_tasks import MOVED_BYTES, group_tasks_s
from firsttoken.latency import EncoderWork, LlmWork, Step, StepTime, predict
from firsttoken.options import RunOptions
from firsttoken_compiler.target.target import Runtime, Target

TARGET = Target.load("systolic-128")
GROUPED = RunOptions(weights="int8", group="128")
RUNTIME = Runtime(0.0, group_us=10.0)


def test_one_task_for_every_group_of_every_matrix() -> None:
    """qwen2-1.5b: 12 groups in each of six matrices of a layer, 70 in the seventh; 142 x 28 layers."""
    slow = replace(TARGET.host, bytes_per_s=1e30)
    assert group_tasks_s(Step("qwen2-1.5b", 1, 0, GROUPED), RUNTIME, slow) == pytest.approx(3976 * 10e-6)
    assert group_tasks_s(Step("qwen2-1.5b", 64, 0, GROUPED), RUNTIME, slow) == pytest.approx(3976 * 10e-6)


def test_the_host_reads_the_sums_of_every_row() -> None:
    """Sums of a row: every weight of the layers over the 128 of a group."""
    sums = 28 * (12 * (1536 * 2 + 256 * 2 + 8960 * 2) + 70 * 1536)
    rows = [group_tasks_s(Step("qwen2-1.5b", tokens, 0, GROUPED), RUNTIME, TARGET.host) for tokens in (1, 65)]
    assert rows[1] - rows[0] == pytest.approx(64 * sums * MOVED_BYTES / TARGET.host.bytes_per_s)


@pytest.mark.parametrize(
    "options",
    [RunOptions(weights="int8", group="channel"), RunOptions(weights="int4", group="128"),
     RunOptions(weights="int8", acts="fp16", group="128"), RunOptions(weights="fp16")],
)  # fmt: skip
def test_other_products_are_whole(options: RunOptions) -> None:
    assert group_tasks_s(Step("qwen2-1.5b", 1, 0, options), RUNTIME, TARGET.host) == 0


def test_latency_adds_them_to_the_host() -> None:
    class Nothing:
        def seconds(self, step: Step, target: Target) -> StepTime:
            return StepTime(0.0, 0, 0.0)

    target = replace(TARGET, runtimes={"r": replace(RUNTIME, launch_us=1.0), "plain": Runtime(1.0)})
    found = predict(LlmWork("qwen2-1.5b", GROUPED, 64, 0, 8), target, Nothing()).parts
    for name, tokens in (("prefill", 64), ("decode", 1)):
        assert found[name].host_s == pytest.approx(
            group_tasks_s(Step("qwen2-1.5b", tokens, 0, GROUPED), RUNTIME, target.host)
        )
    assert predict(LlmWork("qwen2-1.5b", GROUPED, 64, 0, 8, "plain"), target, Nothing()).parts["decode"].host_s == 0
    assert predict(EncoderWork("minilm-l6", GROUPED, 16), target, Nothing()).parts["inference"].host_s == 0
