"""Prompts, and rows in the cache before a later token, that a cost table answers for."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from firsttoken.cost_tables.space import DIMS, Axis, Values, axis_of
from firsttoken_compiler.errors import OptionError

if TYPE_CHECKING:
    from firsttoken.cost import CostModel

LENGTHS: Final = ("prompt", "context")
QUESTION: Final = (*DIMS, *LENGTHS)
"""What a cost is asked for; flags of what a table does not cover have a bit for each."""
LENGTH_POINTS: Final = 5
"""Values of a range of lengths that are measured, unless more are asked for."""
NONE: Final = Axis((), (), ())


@dataclass(frozen=True, slots=True)
class Lengths:
    """Tokens of the prompt, and rows in the cache that a later token comes after; of the latter maybe none."""

    prompts: Axis
    contexts: Axis

    @staticmethod
    def of(model: CostModel, prompts: Values | None, contexts: Values | None) -> Lengths:
        """What is asked for; else the model's own prompt, and the cache before its decode step behind each prompt.

        Raises OptionError for values that are none, and for prompts without the model's own, which is the default.
        """
        own = model.prompt or 0
        first = axis_of("prompt", own if prompts is None else prompts, LENGTH_POINTS)
        if own not in first.values:
            raise OptionError(f"prompts {first} lack the model's own of {own}: add it, or give the model one of them")
        if contexts is not None:
            return Lengths(first, axis_of("context", contexts, LENGTH_POINTS))
        if not model.decode:
            return Lengths(first, NONE)
        parts = (tuple(value + model.decode - 1 for value in part) for part in (first.values, first.measured))
        values, measured = parts
        return Lengths(first, Axis(values, measured, measured))

    @property
    def graphs(self) -> tuple[tuple[int, int], ...]:
        """(tokens, cached rows) of the graphs that are measured: those of the prompts, then those of later tokens."""
        return (*((value, 0) for value in self.prompts.measured), *((1, value) for value in self.contexts.measured))

    def at(self, prompt: int, context: int) -> tuple[int, int]:
        """Positions in `prompts.values` and `contexts.values`; -1 for one not covered, 0 where there are none."""
        first = self.prompts.values.index(prompt) if prompt in self.prompts.values else -1
        if not self.contexts.values:
            return first, 0
        return first, self.contexts.values.index(context) if context in self.contexts.values else -1

    def shares(self, graph: int, *, later: bool, squared: bool) -> NDArray[np.float64]:
        """What each measured graph contributes to that of a value: its cost lies on a line between measured ones.

        `squared`: of an operator whose cost rises with the square of a prompt, as that of attention: on the parabola
        through the three measured prompts that are nearest, where there are as many.
        """
        axis = self.contexts if later else self.prompts
        before, value = len(self.prompts.measured) if later else 0, axis.values[graph]
        count = min(len(axis.measured), 3 if squared and not later else 2)
        first = max(0, min(bisect_right(axis.measured, value) - 1, len(axis.measured) - count))
        if count == 3 and first > 0 and value - axis.measured[first - 1] < axis.measured[first + 2] - value:
            first -= 1
        near, found = axis.measured[first : first + count], np.zeros(len(self.graphs))
        for at, own in enumerate(near):
            found[before + first + at] = math.prod((value - other) / (own - other) for other in near if other != own)
        return found

    def to_dict(self) -> dict[str, Any]:
        """JSON values from which `from_dict` makes the same."""
        return {name: [axis.values, axis.measured] for name, axis in zip(LENGTHS, (self.prompts, self.contexts),
                strict=True)}  # fmt: skip

    @staticmethod
    def from_dict(fields: Mapping[str, Any]) -> Lengths:
        """Inverse of `to_dict`; raises ValueError, KeyError or TypeError on anything else."""
        axes = [(tuple(values), tuple(measured)) for values, measured in (fields[name] for name in LENGTHS)]
        return Lengths(*(Axis(values, measured, measured) for values, measured in axes))
