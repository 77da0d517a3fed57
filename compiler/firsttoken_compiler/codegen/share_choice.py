"""Which share of the scratchpad holds values, and which is left to kernels, decided by cost for networks over integers.

A convolution that has more room fetches its image and its weights fewer times; a value that lies in the scratchpad is
not fetched at all. Which of them saves more depends on the network and on the size of the scratchpad: plans with
several shares are placed, written out and estimated as whole programs, and the cheapest is taken.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from firsttoken_compiler.codegen.norm_ways import Costs
from firsttoken_compiler.errors import AllocationError
from firsttoken_compiler.passes.lower import Launches
from firsttoken_compiler.passes.place import WORKING_SHARE, Place, Placement

SHARES: Final = (WORKING_SHARE, 0.6, 0.75, 0.9)
"""Shares for kernels that are compared, the usual one first."""


def place_by_cost(place: Place, launches: Launches) -> Placement:
    """The cheapest placement where products write integers and one core runs them; the usual one for all others.

    It is the same whatever a schedule file says about tiles.
    """
    first = place.run(launches)
    if place.cores > 1 or not any(launch.spec.get("requantised") for launch in launches.launches):
        return first
    plans = [first, *(replace(place, share=share).run(launches) for share in SHARES[1:])]
    cycles = [_cycles(place, plan, launches) for plan in plans]
    return plans[cycles.index(min(cycles))]


def _cycles(place: Place, placement: Placement, launches: Launches) -> float:
    try:
        return Costs(place.target, placement).whole(launches).cycles
    except AllocationError:
        return float("inf")
