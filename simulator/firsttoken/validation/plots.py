"""Scatter plots of predicted against measured values in logarithmic axes: geometry only, drawn by the template."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from firsttoken.validation.measurements import UNITS
from firsttoken.validation.statistics import Pair

Place = Callable[[float], float]
SIZE: Final = 400.0
MARGIN: Final = 46.0
BANDS: Final = (20, 10)
"""Per cent around equality, the widest first, as it is drawn first."""
COLOURS: Final = (
    "#3b6ea5", "#b5523b", "#4f9d69", "#d9a441", "#7a6f9b", "#2a9d8f", "#8c564b", "#c2588f", "#6b7a3a", "#5c5c5c",
    "#1f4e79", "#a05a2c",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Dot:
    """A pair: hollow where it is not counted."""

    x: float
    y: float
    colour: str
    hollow: bool
    title: str


@dataclass(frozen=True, slots=True)
class Tick:
    """A line of the grid and its label."""

    at: float
    label: str


@dataclass(frozen=True)
class Plot:
    """One quantity: predicted up, measured across, both from `low` to `high`."""

    title: str
    size: float
    margin: float
    dots: tuple[Dot, ...]
    across: tuple[Tick, ...]
    up: tuple[Tick, ...]
    bands: tuple[tuple[int, str], ...]
    """(per cent, corners of the polygon)."""
    equal: tuple[float, float, float, float]
    key: tuple[tuple[str, str], ...]
    """(chip, colour)."""


def plots(pairs: Sequence[Pair], titles: Sequence[str]) -> tuple[Plot, ...]:
    """A plot for each quantity that has pairs; `titles` are what the dots show when pointed at."""
    chips = list(dict.fromkeys(pair.chip for pair in pairs))
    colours = {chip: COLOURS[at % len(COLOURS)] for at, chip in enumerate(chips)}
    found = []
    for quantity, unit in UNITS.items():
        chosen = [(pair, title) for pair, title in zip(pairs, titles, strict=True) if pair.quantity == quantity]
        if chosen:
            found.append(_plot(f"{quantity.rpartition('_')[0] or quantity}, {unit}", chosen, colours))
    return tuple(found)


def _plot(title: str, pairs: Sequence[tuple[Pair, str]], colours: dict[str, str]) -> Plot:
    values = [value for pair, _ in pairs for value in (pair.measured, pair.predicted)]
    low, high = min(values) / 1.4, max(values) * 1.4
    scale = SIZE / math.log(high / low)

    def along(value: float) -> float:
        return round(MARGIN + math.log(value / low) * scale, 1)

    def above(value: float) -> float:
        return round(SIZE - math.log(value / low) * scale, 1)

    bands = tuple((percent, _band(low, high, percent / 100, along, above)) for percent in BANDS)
    ticks = _ticks(low, high)
    shown = list(dict.fromkeys(pair.chip for pair, _ in pairs))
    return Plot(
        title, SIZE, MARGIN,
        tuple(
            Dot(along(pair.measured), above(pair.predicted), colours[pair.chip], not pair.counted, text)
            for pair, text in pairs
        ),
        tuple(Tick(along(value), f"{value:g}") for value in ticks),
        tuple(Tick(above(value), f"{value:g}") for value in ticks),
        bands, (along(low), above(low), along(high), above(high)), tuple((chip, colours[chip]) for chip in shown),
    )  # fmt: skip


def _band(low: float, high: float, width: float, along: Place, above: Place) -> str:
    """Corners of the area in which a prediction is within `width` of the measured value, cut at the frame."""
    top = [(low, low * (1 + width)), (high / (1 + width), high), (high, high)]
    bottom = [(high, high * (1 - width)), (low / (1 - width), low), (low, low)]
    return " ".join(f"{along(x):g},{above(y):g}" for x, y in top + bottom)


def _ticks(low: float, high: float) -> list[float]:
    """Powers of ten, with 2 and 5 between them where there are few."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    steps = (1, 2, 5) if last - first <= 3 else (1,)
    return [
        step * 10.0**power for power in range(first, last + 1) for step in steps if low <= step * 10.0**power <= high
    ]
