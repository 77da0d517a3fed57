"""How much of a student is left in low precision: its program executed on a text, beside the float32 graph."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from firsttoken.divergence import Scores, score, standard_error
from firsttoken.execution import Loaded, load
from firsttoken.generation import ort_session, token_feeds
from firsttoken.options import Progress, RunOptions
from firsttoken.prose import TEXT, Window, windows
from firsttoken.subject import Built, Subject
from firsttoken_compiler.errors import OptionError, StudentError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from firsttoken.student import Tokenizer, WeightStore
    from firsttoken_compiler.target.target import Target

WINDOWS: Final = 4
TOKENS: Final = 128
TAIL: Final = 99.0
"""Percentile of the divergence that is reported beside its mean."""


@dataclass(frozen=True, slots=True)
class QualityRow:
    """One choice of number formats; standard errors take the tokens as independent.

    Attributes:
        weights: type of the weights as it was asked for.
        activations: type of the activations.
        group: weights that share a scale.
        norm_cache: how normalised rows are kept.
        kv_cache: type in which keys and values are kept.
        asymmetric: whether integer weights have zero points.
        rules: formats of some matrices, as `--mix` reads them.
        weight_bytes: bytes of everything in the program's memory that is made of the student's weights.
        kl_mean: mean divergence from the float32 run, nats per token.
        kl_mean_error: its standard error.
        kl_p99: 99th percentile over the tokens.
        top1_agreement: share of tokens whose likeliest successor is that of the float32 run.
        top1_agreement_error: its standard error.
        perplexity: exp of the mean loss.
        perplexity_ratio: perplexity over that of the float32 run.
        perplexity_ratio_error: its standard error, from the differences of the losses token by token.
    """

    weights: str
    activations: str
    group: str
    norm_cache: str
    kv_cache: str
    asymmetric: bool
    rules: tuple[str, ...]
    weight_bytes: int
    kl_mean: float
    kl_mean_error: float
    kl_p99: float
    top1_agreement: float
    top1_agreement_error: float
    perplexity: float
    perplexity_ratio: float
    perplexity_ratio_error: float


@dataclass(frozen=True, slots=True)
class QualityResult:
    """A student's formats on one text.

    Attributes:
        student: its name.
        target: the machine that the programs were compiled for.
        text: file of the text inside the package.
        windows: stretches of the text, each read from position 0 on.
        window_tokens: tokens of each.
        reference_perplexity: that of onnxruntime on the float32 graph.
        reference_perplexity_error: its standard error.
        rows: the formats, in the order in which they were asked for.
    """

    student: str
    target: str
    text: str
    windows: int
    window_tokens: int
    reference_perplexity: float
    reference_perplexity_error: float
    rows: tuple[QualityRow, ...]

    def to_json(self) -> str:
        """One document; the same question gives the same bytes."""
        from firsttoken_simulator.report.plain import plain_json

        return plain_json(json.dumps(asdict(self), indent=1, ensure_ascii=False))


def measure_quality(
    subject: Subject, formats: Sequence[RunOptions], target: Target, count: int, tokens: int, progress: Progress | None
) -> QualityResult:
    """See `api.quality`."""
    if not formats:
        raise OptionError("--weights names no format; give one or more, such as int4,int8")
    student, tokenizer = equipped(subject)
    student.lengths(tokens, 0)
    chosen = windows(tokenizer, count, tokens)
    reference = Reference(student, tokens)
    measured = [_measure(student, reference, options, target, chosen, progress) for options in formats]
    losses = measured[0][1].reference_loss
    perplexity = float(np.exp(losses.mean()))
    return QualityResult(
        student=student.name,
        target=target.name,
        text=TEXT,
        windows=count,
        window_tokens=tokens,
        reference_perplexity=perplexity,
        reference_perplexity_error=perplexity * standard_error(losses),
        rows=tuple(row for row, _ in measured),
    )


def equipped(subject: Subject) -> tuple[Built, Tokenizer]:
    """The student with the weights that it runs with, and its tokenizer; raises OptionError where it lacks them."""
    remedy = "give a student with real weights, such as smollm2-135m or a GGUF file ('firsttoken students')"
    if not isinstance(subject, Built):
        raise OptionError(f"{subject.name} is {subject.kind}, to measure it takes a tokenizer and all logits; {remedy}")
    weights, tokenizer = subject.stored_weights(), subject.tokenizer()
    if weights is None or tokenizer is None:
        lacking = " and no ".join(["weights"] * (weights is None) + ["tokenizer"] * (tokenizer is None))
        raise OptionError(f"{subject.name} has no {lacking} here, so that there is no quality to measure; {remedy}")
    return replace(subject, weights=weights, all_logits=True), tokenizer


class Reference:
    """The float32 graph of a student in onnxruntime, with the logits of all tokens of a window."""

    def __init__(self, student: Built, tokens: int) -> None:
        floats = student.float_weights()
        assert floats is not None
        self._session = ort_session(self._graph(student, floats, tokens), floats)

    def _graph(self, student: Built, floats: WeightStore, tokens: int) -> Any:
        return student.provider.graph(student.config, tokens=tokens, past=0, weights=floats, all_logits=True)

    def logits(self, window: Window) -> NDArray[np.float32]:
        """`[tokens, vocabulary]`."""
        (found,) = self._session.run(["logits"], token_feeds(window.ids))
        result: NDArray[np.float32] = found[0]
        return result


def scores(
    student: Built, reference: Reference, options: RunOptions, target: Target, chosen: Sequence[Window],
    progress: Progress | None = None,
) -> tuple[Scores, int]:  # fmt: skip
    """The windows' tokens scored on the functional machine, and the bytes of the program's weights.

    Raises FirsttokenError where the format does not exist, or its numbers overflow.
    """
    tokens = len(chosen[0].ids)
    loaded = loaded_program(student, options, target, tokens, progress)
    parts = []
    for window in _counted(chosen, progress):
        logits = loaded.run(token_feeds(window.ids))["logits"][0]
        lost = int((~np.isfinite(logits)).any(axis=-1).sum())
        if lost:
            raise StudentError(
                f"{student.name} with weights {options.weights}: {lost} of {tokens} tokens have logits that are not "
                "finite, its values exceed what fp16 holds; choose another format"
            )
        parts.append(score(logits, reference.logits(window), window.following))
    return Scores.joined(parts), sum(tensor.nbytes for tensor in loaded.program.of_kind("weight"))


def loaded_program(
    student: Built, options: RunOptions, target: Target, tokens: int, progress: Progress | None = None
) -> Loaded:
    """The program of a prompt of so many tokens, in the memory of a functional machine."""
    from firsttoken import api

    program = api.compile_subject(student, target, tokens, 0, options, progress)
    timeline = api.simulate(program, target, progress=progress)
    return load(program, timeline, student.open(tokens, 0), target)


def _counted(chosen: Sequence[Window], progress: Progress | None) -> Iterator[Window]:
    """The windows, each reported when it has been used."""
    for done, window in enumerate(chosen):
        if progress is not None:
            progress("execute windows", done, len(chosen))
        yield window


def _measure(
    student: Built, reference: Reference, options: RunOptions, target: Target, chosen: Sequence[Window],
    progress: Progress | None,
) -> tuple[QualityRow, Scores]:  # fmt: skip
    staged = None if progress is None else lambda stage, done, of: progress(f"{options.weights}: {stage}", done, of)
    found, nbytes = scores(student, reference, options, target, chosen, staged)
    return row_of(student, options, found, nbytes), found


def row_of(student: Built, options: RunOptions, found: Scores, nbytes: int) -> QualityRow:
    """The row of one format: `found` of its program, whose weights have `nbytes` bytes."""
    precision = options.precision(student.layer_bits)
    worse = found.loss - found.reference_loss
    ratio = float(np.exp(worse.mean()))
    return QualityRow(
        weights=options.weights,
        activations=f"{precision.acts}{' static' * bool(precision.ranges)}",
        group=precision.group,
        norm_cache=precision.norm_cache,
        kv_cache=precision.kv_cache,
        asymmetric=precision.asymmetric,
        rules=tuple(rule.text() for rule in precision.rules),
        weight_bytes=nbytes,
        kl_mean=float(found.kl.mean()),
        kl_mean_error=standard_error(found.kl),
        kl_p99=float(np.percentile(found.kl, TAIL)),
        top1_agreement=float(found.same.mean()),
        top1_agreement_error=standard_error(found.same),
        perplexity=float(np.exp(found.loss.mean())),
        perplexity_ratio=ratio,
        perplexity_ratio_error=ratio * standard_error(worse),
    )
