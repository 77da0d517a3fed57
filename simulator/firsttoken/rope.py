"""How rotary frequencies of a student are stretched over a longer context; the angles themselves are the provider's."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Llama3Scaling:
    """Low frequencies divided by a factor, high ones kept, those between blended (Llama 3.1 and later).

    Attributes:
        factor: what low frequencies are divided by.
        low_freq_factor: frequencies of fewer turns than this over `original_positions` are low.
        high_freq_factor: frequencies of more turns than this are high.
        original_positions: context of the pre-training, in tokens.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_positions: int

    def __post_init__(self) -> None:
        if not (math.isfinite(self.factor) and self.factor >= 1.0):
            raise ValueError(f"rotary scaling: factor is {self.factor!r}, must be at least 1; give the model's own")
        if not 0.0 < self.low_freq_factor < self.high_freq_factor < math.inf:
            raise ValueError(
                f"rotary scaling: low_freq_factor {self.low_freq_factor!r} and high_freq_factor "
                f"{self.high_freq_factor!r} must be positive and rise; 1 and 4 are usual"
            )
        _require_positions(self.original_positions)

    def __str__(self) -> str:
        return f"llama3, factor {self.factor:g} over {self.original_positions} positions"


@dataclass(frozen=True, slots=True)
class LongRope:
    """A divisor for each frequency: one set up to the original context, another beyond it (LongRoPE, as in Phi-3.5).

    Cosines and sines are multiplied by sqrt(1 + ln(max_positions / original_positions) / ln(original_positions)).

    Attributes:
        short: divisors where all positions lie within `original_positions`; head_dim / 2 of them.
        long: divisors where some do not.
        original_positions: context of the pre-training, in tokens.
    """

    short: tuple[float, ...]
    long: tuple[float, ...]
    original_positions: int

    def __post_init__(self) -> None:
        if len(self.short) != len(self.long):
            raise ValueError(
                f"rotary scaling: {len(self.short)} short and {len(self.long)} long divisors, must be as many; "
                "give one per frequency"
            )
        if not all(math.isfinite(value) and value > 0.0 for value in (*self.short, *self.long)):
            raise ValueError("rotary scaling: divisors must be finite and above 0; give the model's own")
        _require_positions(self.original_positions)

    def __str__(self) -> str:
        return f"longrope, {len(self.short)} divisors each up to and beyond {self.original_positions} positions"


RopeScaling = Llama3Scaling | LongRope


def _require_positions(value: object) -> None:
    if type(value) is not int or value < 2:
        raise ValueError(f"rotary scaling: original_positions is {value!r}, must be an integer of at least 2")
