"""firsttoken.answer and firsttoken.npu_session, on sessions made up for the purpose."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from numpy.typing import NDArray

from firsttoken import api
from firsttoken.answer import Agreement, GenerateResult, Recorder, agreement, equal_prefix, forced, lines
from firsttoken.generation import greedy
from firsttoken.npu_session import NpuSession
from firsttoken.student import StudentConfig
from firsttoken_compiler.errors import OptionError


class Sums:
    """Logits depend on the sum of all tokens so far; the likeliest next token is sum modulo 10, shifted by `slip`."""

    def __init__(self, slip_at: int = -1) -> None:
        self.cache = self
        self.tokens: list[int] = []
        self.slip_at = slip_at

    def rewind(self, length: int) -> None:
        assert length <= len(self.tokens)
        del self.tokens[length:]

    def prefill(self, ids: list[int]) -> NDArray[np.float32]:
        self.tokens = list(ids)
        return self._logits()

    def decode(self, token: int, position: int) -> NDArray[np.float32]:
        assert position == len(self.tokens)
        self.tokens.append(token)
        return self._logits()

    def _logits(self) -> NDArray[np.float32]:
        logits = np.zeros(10, np.float32)
        logits[(sum(self.tokens) + (len(self.tokens) == self.slip_at)) % 10] = 1.0
        return logits


def compared(slip_at: int, steps: int = 6) -> Agreement:
    npu, reference = Recorder(Sums(slip_at), "npu", steps, None), Recorder(Sums(), "ort", steps, None)
    found, expected = greedy(npu, [1, 2], steps, ()), greedy(reference, [1, 2], steps, ())
    prefix = equal_prefix(found, expected)
    session = cast(NpuSession, npu.session)
    logits = forced(session, 2, expected, npu.logits[: prefix + 1], len(reference.logits))
    return agreement(prefix, len(expected), logits, reference.logits)


def test_equal_sessions_agree() -> None:
    assert compared(-1) == Agreement(6, 6, 1.0, 1.0, 1.0, 6)


@pytest.mark.parametrize("slip_at", [2, 4, 7])
def test_one_slip_costs_one_step_under_the_same_tokens(slip_at: int) -> None:
    measured = compared(slip_at)
    assert measured.equal_prefix_tokens == slip_at - 2
    assert measured.next_token_agreement == pytest.approx(5 / 6)
    assert (measured.logits_cosine_min, measured.logits_cosine_mean) == (0.0, pytest.approx(5 / 6))


def test_equal_prefix() -> None:
    assert equal_prefix([1, 2, 3], [1, 2, 4]) == 2
    assert equal_prefix([1, 2], [1, 2, 4]) == 2
    assert equal_prefix([], [1]) == 0


def test_recorder_reports_each_step() -> None:
    seen: list[tuple[str, float, float]] = []
    recorder = Recorder(Sums(), "npu", 3, lambda *step: seen.append(step))
    greedy(recorder, [1], 3, ())
    greedy(recorder, [1], 1, ())
    assert seen == [("npu", 1, 3), ("npu", 2, 3), ("npu", 3, 3), ("npu", 1, 3)]
    assert len(recorder.logits) == 1


def test_result_as_document_and_as_text() -> None:
    result = GenerateResult("s", "t", "int4", "int8", "int8", "int8", 9, "Paris.", (1, 2), 3.25, 4.5)
    assert json.loads(result.to_json())["ids"] == [1, 2]
    assert json.loads(result.to_json())["agreement"] is None
    first = "s on t (int4/int8, int8 keys and values): Paris."
    assert lines(result) == [first, "  first token of 9 prompt tokens: 3.25 ms, 4.50 mJ"]
    banded = replace(result, energy_band_mj=(3.0, 6.25))
    assert lines(banded) == [first, "  first token of 9 prompt tokens: 3.25 ms, 4.50 mJ (3.00 to 6.25)"]


@pytest.mark.parametrize(
    ("student", "keywords", "message"),
    [
        ("deepseek-r1-distill-qwen-1.5b", {}, r"has no weights and no tokenizer here; give .* such as smollm2-135m"),
        ("model.onnx", {}, "model is an ONNX file, to answer takes a tokenizer"),
        ("smollm2-135m", {"max_new_tokens": 0}, "--max-new-tokens 0: ask for at least 1"),
    ],
)
def test_who_cannot_answer(
    student: str, keywords: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("model.onnx").touch()
    with pytest.raises(OptionError, match=message):
        api.generate(student, "Hello", **keywords)


def test_order_of_tokens_is_checked(llama: StudentConfig) -> None:
    target = api.target_of("systolic-128")
    session = NpuSession(None, llama, None, 4, target=target, options=api.ANSWER_DEFAULTS)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="the prompt is empty"):
        session.prefill([])
    with pytest.raises(ValueError, match="position is 2, the next position is 0"):
        session.decode(1, 2)
    with pytest.raises(ValueError, match="5 more tokens after 0 do not fit"):
        session.prefill([1, 2, 3, 4, 5])
    with pytest.raises(ValueError, match="cannot go back to 1 rows, the cache has 0"):
        session.cache.rewind(1)
