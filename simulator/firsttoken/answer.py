"""Lets a student answer on the functional machine, and says how far that agrees with onnxruntime."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from firsttoken.execution import Loaded
from firsttoken.generation import OrtSession, Session, greedy
from firsttoken.npu_session import NpuSession
from firsttoken.options import Progress, RunOptions
from firsttoken.subject import Built, Subject
from firsttoken_compiler.errors import OptionError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import NDArray

    from firsttoken.student import Tokenizer, WeightStore
    from firsttoken_compiler.target.target import Target

    Logits = list[NDArray[np.float32]]


@dataclass(frozen=True, slots=True)
class Agreement:
    """How far the machine agrees with the reference.

    Attributes:
        equal_prefix_tokens: tokens of the two answers that are equal from the start.
        reference_tokens: tokens of the reference's answer.
        next_token_agreement: share of steps with the same likeliest token, both given the reference's tokens so far.
        logits_cosine_min: smallest cosine between the two logit vectors of a step, given the same tokens.
        logits_cosine_mean: their mean.
        steps: number of steps compared; the one that ends the answer counts.
    """

    equal_prefix_tokens: int
    reference_tokens: int
    next_token_agreement: float
    logits_cosine_min: float
    logits_cosine_mean: float
    steps: int


@dataclass(frozen=True, slots=True)
class GenerateResult:
    """An answer, where it was computed, what its prompt costs there, and the reference's answer where asked for."""

    student: str
    target: str
    weights: str
    activations: str
    norm_cache: str
    kv_cache: str
    prompt_tokens: int
    text: str
    ids: tuple[int, ...]
    ttft_ms: float
    energy_mj: float
    reference_text: str | None = None
    reference_ids: tuple[int, ...] | None = None
    agreement: Agreement | None = None
    energy_band_mj: tuple[float, float] | None = None
    """Low and high: every energy of the target at its bound."""

    def to_json(self) -> str:
        """One document; the same question gives the same bytes."""
        from firsttoken_simulator.report.plain import plain_json

        return plain_json(json.dumps(asdict(self), indent=1, ensure_ascii=False))


class Recorder:
    """A session that keeps the logits of every step and reports each."""

    def __init__(self, session: Session, stage: str, total: int, progress: Progress | None) -> None:
        self.session = session
        self.logits: Logits = []
        self._stage, self._total, self._progress = stage, total, progress

    def prefill(self, ids: list[int]) -> NDArray[np.float32]:
        """See `Session`."""
        self.logits.clear()
        return self._keep(self.session.prefill(ids))

    def decode(self, token: int, position: int) -> NDArray[np.float32]:
        """See `Session`."""
        return self._keep(self.session.decode(token, position))

    def _keep(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        self.logits.append(logits)
        if self._progress is not None:
            self._progress(self._stage, len(self.logits), self._total)
        return logits


def answer(
    subject: Subject,
    prompt_text: str,
    max_new_tokens: int,
    options: RunOptions,
    target: Target,
    compare: bool,
    progress: Progress | None,
) -> GenerateResult:
    """See `api.generate`."""
    if max_new_tokens < 1:
        raise OptionError(f"--max-new-tokens {max_new_tokens}: ask for at least 1")
    student, weights, tokenizer = _equipped(subject)
    ids = tokenizer.chat(prompt_text)
    capacity = len(ids) + max_new_tokens
    student.lengths(1, capacity)
    npu = NpuSession(
        student.provider, student.config, weights, capacity, target=target, options=options, progress=progress
    )
    recorder = Recorder(npu, "generate", max_new_tokens, progress)
    found = greedy(recorder, ids, max_new_tokens, tokenizer.eos_ids)
    result = _result(student, tokenizer, npu.prompt_program(len(ids)), target, len(ids), found)
    if not compare:
        return result
    floats = student.float_weights()
    assert floats is not None
    reference = Recorder(
        OrtSession(student.provider, student.config, floats, capacity), "onnxruntime", max_new_tokens, progress
    )
    expected = greedy(reference, ids, max_new_tokens, tokenizer.eos_ids)
    prefix = equal_prefix(found, expected)
    logits = forced(npu, len(ids), expected, recorder.logits[: prefix + 1], len(reference.logits))
    return _with_reference(result, tokenizer, expected, agreement(prefix, len(expected), logits, reference.logits))


def _equipped(subject: Subject) -> tuple[Built, WeightStore, Tokenizer]:
    """The student with weights and tokenizer; raises OptionError where it lacks them."""
    remedy = "give the name of a student that has both, such as smollm2-135m ('firsttoken students')"
    if not isinstance(subject, Built):
        raise OptionError(f"{subject.name} is {subject.kind}, to answer takes a tokenizer and a decode graph; {remedy}")
    weights, tokenizer = subject.stored_weights(), subject.tokenizer()
    if weights is None or tokenizer is None:
        lacking = " and no ".join(["weights"] * (weights is None) + ["tokenizer"] * (tokenizer is None))
        raise OptionError(f"{subject.name} has no {lacking} here; {remedy}")
    return subject, weights, tokenizer


def _result(
    student: Built, tokenizer: Tokenizer, prompt: Loaded, target: Target, tokens: int, found: list[int]
) -> GenerateResult:
    from firsttoken_simulator.energy import energy
    from firsttoken_simulator.report.build import build_run
    from firsttoken_simulator.report.energy_table import low_high

    run = build_run(prompt.program, prompt.timeline, target, energy(prompt.program, prompt.timeline, target))
    return GenerateResult(
        student=student.name,
        target=target.name,
        weights=run.weights,
        activations=run.activations,
        norm_cache=run.norm_cache,
        kv_cache=run.kv_cache,
        prompt_tokens=tokens,
        text=tokenizer.decode(found),
        ids=tuple(found),
        ttft_ms=run.ttft_ms,
        energy_mj=run.energy_mj,
        energy_band_mj=low_high(run),
    )


def _with_reference(
    result: GenerateResult, tokenizer: Tokenizer, expected: list[int], measured: Agreement
) -> GenerateResult:
    return replace(result, reference_text=tokenizer.decode(expected), reference_ids=tuple(expected), agreement=measured)


def equal_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    """Number of equal items from the start."""
    return next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))


def forced(session: NpuSession, prompt_tokens: int, tokens: Sequence[int], known: Logits, steps: int) -> Logits:
    """Logits of `steps` steps given `tokens`; `known` are those of the first steps, on the session that computed them.

    Step 0 follows the prompt, step i follows `tokens[:i]`.
    """
    logits = list(known[:steps])
    session.cache.rewind(prompt_tokens + len(logits) - 1)
    rest = range(len(logits), steps)
    return logits + [session.decode(tokens[step - 1], prompt_tokens + step - 1) for step in rest]


def agreement(prefix: int, expected: int, logits: Logits, reference: Logits) -> Agreement:
    """Compares the logits of equal steps."""
    pairs = list(zip(logits, reference, strict=True))
    cosines = [_cosine(a, b) for a, b in pairs]
    return Agreement(
        equal_prefix_tokens=prefix,
        reference_tokens=expected,
        next_token_agreement=sum(int(a.argmax()) == int(b.argmax()) for a, b in pairs) / len(pairs),
        logits_cosine_min=min(cosines),
        logits_cosine_mean=sum(cosines) / len(cosines),
        steps=len(pairs),
    )


def _cosine(a: Any, b: Any) -> float:
    import numpy as np

    left, right = a.astype(np.float64), b.astype(np.float64)
    norm = float(np.linalg.norm(left) * np.linalg.norm(right))
    return float(left @ right) / norm if norm else float(np.array_equal(left, right))


def lines(result: GenerateResult) -> list[str]:
    """The answer for a terminal: text, cost of its prompt, and the comparison where there is one."""
    kept = ", int8 keys and values" if result.kv_cache == "int8" else ""
    formats = f"{result.weights}/{result.activations}{kept}"
    energy = f"{result.energy_mj:.2f} mJ"
    if result.energy_band_mj is not None and result.energy_band_mj[0] < result.energy_band_mj[1]:
        energy += " ({:.2f} to {:.2f})".format(*result.energy_band_mj)
    found = [
        f"{result.student} on {result.target} ({formats}): {result.text}",
        f"  first token of {result.prompt_tokens} prompt tokens: {result.ttft_ms:.2f} ms, {energy}",
    ]
    if result.agreement is not None:
        measured = result.agreement
        equal = measured.equal_prefix_tokens == measured.reference_tokens == len(result.ids)
        shared = f"the first {measured.equal_prefix_tokens}" if not equal else "all"
        share = f"{100 * measured.next_token_agreement:.1f} % of {measured.steps} steps"
        found += [
            f"{result.student} in onnxruntime (fp32): {result.reference_text}",
            f"  {shared} of {measured.reference_tokens} tokens are the same; given the same tokens, {share} choose the "
            "same next one",
            f"  cosine of logits: at least {measured.logits_cosine_min:.6f}, mean {measured.logits_cosine_mean:.6f}",
        ]
    return found
