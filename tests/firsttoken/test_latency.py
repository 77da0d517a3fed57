from dataclasses import replace

import pytest

from firsttoken import latency
from firsttoken.latency import EncoderWork, ExactClock, LlmWork, Step, StepTime, compile_step, time_of
from firsttoken.options import RunOptions
from firsttoken_compiler.errors import OptionError
from firsttoken_compiler.target.target import Runtime, Target

STUDENT = "smollm2-135m"
FORMATS = RunOptions()


def machine(**runtime: object) -> Target:
    """A target with one runtime."""
    return replace(Target.load("systolic-128"), runtimes={"r": Runtime(**{"launch_us": 100.0, **runtime})})


class Ruler:
    """A clock whose steps take a microsecond a row and one per 100 rows before it; two operators, 3 mJ."""

    def seconds(self, step: Step, target: Target) -> StepTime:
        """See `latency.Clock`."""
        return StepTime((step.tokens + step.past / 100) * 1e-6, 2, 3.0)


def lengths(work: latency.Work, target: Target) -> dict[str, list[tuple[int, int, float]]]:
    """(tokens, rows before them, launches) of every phase."""
    phases = latency.plan(work, target).phases
    return {name: [(s.step.tokens, s.step.past, s.count) for s in launches] for name, launches in phases.items()}


def test_a_prompt_goes_through_the_smallest_contexts_that_hold_it() -> None:
    target = machine(chunk_tokens=128, context_buckets=(512, 1024, 2048))
    work = LlmWork(STUDENT, FORMATS, 900, 1024, 124)
    assert lengths(work, target) == {"prefill": [(128, 384, 4.0), (128, 896, 4.0)], "decode": [(1, 1023, 124.0)]}
    short = LlmWork(STUDENT, FORMATS, 56, 2048, 1)
    assert lengths(short, target) == {"prefill": [(128, 384, 1.0)], "decode": [(1, 511, 1.0)]}


def test_a_context_between_two_is_compiled_for() -> None:
    target = machine(chunk_tokens=128, context_buckets=(512, 1024, 2048))
    work = LlmWork(STUDENT, FORMATS, 600, 700, 100)
    assert lengths(work, target)["prefill"] == [(128, 384, 4.0), (128, 572, 1.0)]
    assert lengths(replace(work, context=0), target)["prefill"] == [(128, 384, 4.0), (128, 896, 1.0)]


def test_without_contexts_graphs_have_the_length_that_is_needed() -> None:
    whole = lengths(LlmWork(STUDENT, FORMATS, 300, 0, 3), machine())
    assert whole == {"prefill": [(300, 0, 1.0)], "decode": [(1, 301, 3.0)]}
    chunks = lengths(LlmWork(STUDENT, FORMATS, 300, 0, 0), machine(chunk_tokens=128))
    assert chunks == {"prefill": [(128, 0, 1.0), (128, 128, 1.0), (44, 256, 1.0)], "decode": []}


def test_of_many_chunks_some_stand_for_all() -> None:
    work = LlmWork(STUDENT, FORMATS, 64 * 31 + 5, 0, 0)
    target = machine(chunk_tokens=64)
    launches = lengths(work, target)["prefill"]
    assert [past // 64 for _, past, _ in launches] == [0, 8, 15, 22, 30, 31]
    assert sum(count for *_, count in launches) == pytest.approx(32)
    every = sum(64 + i * 0.64 for i in range(31)) + 5 + 31 * 0.64
    found = latency.predict(work, target, Ruler()).parts["prefill"]
    assert found.device_s == pytest.approx(every * 1e-6), "exact where the time of a chunk is a line"
    assert found.launches == pytest.approx(32)


def test_chunks_that_stand_for_all_are_close_on_the_machine() -> None:
    from firsttoken_models.students import STUDENTS

    small = replace(STUDENTS[STUDENT], layers=2)
    target, clock = machine(chunk_tokens=16), ExactClock(cache=False)
    found = latency.predict(LlmWork(small, FORMATS, 16 * 9, 0, 0), target, clock).parts["prefill"].device_s
    every = sum(clock.seconds(Step(small, 16, 16 * i, FORMATS), target).device_s for i in range(9))
    assert found == pytest.approx(every, rel=0.01)


def test_launches_add_up() -> None:
    target = machine(chunk_tokens=128, context_buckets=(512,), node_us=10.0)
    found = latency.predict(LlmWork(STUDENT, FORMATS, 256, 512, 10), target, Ruler())
    chunk, token = 128 + 3.84, 1 + 5.11
    assert found.ttft_ms == pytest.approx(2 * (chunk + 100 + 20) / 1e3)
    assert found.prefill_tok_s == pytest.approx(256 / (found.ttft_ms / 1e3))
    assert found.tpot_ms == pytest.approx((token + 120) / 1e3)
    assert found.decode_tok_s == pytest.approx(1e3 / found.tpot_ms)
    assert found.energy_mj == pytest.approx(3.0 + 120e-6 * target.energy.static_w * 1e3)
    assert found.power_w == pytest.approx(found.energy_mj / found.tpot_ms)
    # The clock of this file knows no band; time that the NPU waits has that of its static power.
    low, high = target.bounds["energy.static_w"]
    assert found.energy_band_mj == pytest.approx((3.0 + 120e-6 * low * 1e3, 3.0 + 120e-6 * high * 1e3))
    assert found.power_band_w == pytest.approx([energy / found.tpot_ms for energy in found.energy_band_mj])


def test_an_inference_is_one_launch_of_the_whole_graph() -> None:
    target, options = machine(), RunOptions(weights="fp16")
    clock = ExactClock(cache=False)
    found = latency.predict(EncoderWork("minilm-l6", options, 16), target, clock)
    step = Step("minilm-l6", 16, 0, options)
    device = time_of(compile_step(step, target), target)
    assert clock.seconds(step, target) == device
    assert found.ttft_ms == pytest.approx(device.device_s * 1e3 + 0.1)
    assert found.decode_tok_s is None


def test_a_clock_keeps_what_it_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    target, step = machine(), Step("minilm-l6", 16, 0, RunOptions(weights="fp16"))
    assert ExactClock().kept(step, target) is None
    first = ExactClock().seconds(step, target)
    monkeypatch.setattr(latency, "compile_step", None)
    assert ExactClock().seconds(step, target) == first == ExactClock().kept(step, target)


@pytest.mark.parametrize(
    ("work", "message"),
    [
        (LlmWork(STUDENT, FORMATS, 0), "at least 1"),
        (LlmWork(STUDENT, FORMATS, 600, 512), "--prompt 600 exceeds --context 512"),
        (LlmWork(STUDENT, FORMATS, 60, 1 << 20), "exceeds the 8192 positions"),
    ],
)
def test_lengths_that_cannot_be_are_refused(work: LlmWork, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        latency.plan(work, machine())


def test_bands_of_steps_add_up_and_a_polling_host_stands_beside() -> None:
    class Banded(Ruler):
        def seconds(self, step: Step, target: Target) -> StepTime:
            return StepTime(1e-3, 2, 3.0, 2.0, 5.0)

    target = machine(launch_us=500.0)
    target = replace(target, energy=replace(target.energy, static_w=0.0, host_poll_w=2.0), bounds={})
    found = latency.predict(LlmWork(STUDENT, FORMATS, 32, 0, 5), target, Banded())
    assert found.energy_mj == 3.0
    assert found.energy_band_mj == (2.0, 5.0)
    assert found.power_band_w == pytest.approx((2.0 / 1.5, 5.0 / 1.5))
    assert found.polling_mj == pytest.approx((3.0, 3.0, 3.0))
