"""Errors of predictions, and what they are together: means, medians, shares within a band, rank correlation."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from firsttoken.validation.measurements import KINDS, TIMES


@dataclass(frozen=True, slots=True)
class Pair:
    """One measured quantity with its prediction.

    Attributes:
        chip: name of the target.
        quantity: a key of `measurements.KINDS`.
        model: what was run.
        measured: value.
        predicted: value in the same unit.
        counted: whether statistics count it.
    """

    chip: str
    quantity: str
    model: str
    measured: float
    predicted: float
    counted: bool = True

    @property
    def error(self) -> float:
        """Predicted over measured, less 1."""
        return self.predicted / self.measured - 1

    @property
    def slowness(self) -> float:
        """Predicted over measured time, less 1: of a rate the other way round."""
        return self.measured / self.predicted - 1 if self.quantity.endswith("tok_s") else self.error

    @property
    def kind(self) -> str:
        """What it is put under."""
        return KINDS[self.quantity]


@dataclass(frozen=True, slots=True)
class Summary:
    """Statistics of some pairs; all but `rank` in per cent.

    Attributes:
        chip: name of the target, or "all".
        kind: kind of quantity, or "all times".
        n: pairs.
        mape: mean of absolute errors.
        median: median of absolute errors.
        mean: mean of signed errors: above 0 where predictions are too slow, or too much.
        worst: largest absolute error.
        within_10: share of pairs with an absolute error of at most 10 %.
        within_20: the same for 20 %.
        rank: Spearman's rank correlation of predicted and measured; None under three pairs or without any order.
        left_out: MAPE of rows predicted by a fit to the other models' rows; None where no fit says.
    """

    chip: str
    kind: str
    n: int
    mape: float
    median: float
    mean: float
    worst: float
    within_10: float
    within_20: float
    rank: float | None
    left_out: float | None = None


def summary(pairs: Sequence[Pair], chip: str, kind: str, left_out: float | None = None) -> Summary:
    """Statistics of at least one pair, whether counted or not."""
    sizes = [100 * abs(pair.error) for pair in pairs]
    return Summary(
        chip, kind, len(pairs), statistics.fmean(sizes), statistics.median(sizes),
        100 * statistics.fmean(pair.slowness for pair in pairs), max(sizes),
        share(sizes, 10.0), share(sizes, 20.0),
        rank_correlation([p.measured for p in pairs], [p.predicted for p in pairs]), left_out,
    )  # fmt: skip


def share(sizes: Sequence[float], limit: float) -> float:
    """Per cent of sizes that are at most `limit`."""
    return 100 * sum(size <= limit for size in sizes) / len(sizes)


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Spearman's rank correlation; None for less than three values, or where one side is constant."""
    if len(first) < 3 or len(set(first)) == 1 or len(set(second)) == 1:
        return None
    from scipy.stats import spearmanr

    value = float(spearmanr(first, second).statistic)
    return value if math.isfinite(value) else None


def summaries(pairs: Iterable[Pair], left_out: dict[str, float] | None = None) -> tuple[Summary, ...]:
    """By chip and kind, then each chip's times together, then each kind and all times over all chips.

    Only pairs that count. `left_out`: MAPE of a fit without each model by target, for the lines of whole chips.
    """
    counted = [pair for pair in pairs if pair.counted]
    chips = list(dict.fromkeys(pair.chip for pair in counted))
    kinds = [kind for kind in dict.fromkeys(KINDS.values()) if any(pair.kind == kind for pair in counted)]
    found = []
    for chip in chips:
        own = [pair for pair in counted if pair.chip == chip]
        found += [summary(part, chip, kind) for kind in kinds if (part := [p for p in own if p.kind == kind])]
        if times := [pair for pair in own if pair.kind in TIMES]:
            found.append(summary(times, chip, "all times", (left_out or {}).get(chip)))
    found += [summary([p for p in counted if p.kind == kind], "all", kind) for kind in kinds]
    if times := [pair for pair in counted if pair.kind in TIMES]:
        found.append(summary(times, "all", "all times"))
    return tuple(found)
