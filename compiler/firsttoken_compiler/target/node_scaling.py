"""What switching energy becomes at another process node and voltage, for presets that scale a published figure.

From 45 to 7 nm: the polynomials of Stillmaker and Baas ("Scaling equations for the accurate prediction of CMOS device
performance from 180 nm to 7 nm", Integration 58, 2017), with the coefficients that Accelergy uses. Below 7 nm there is
no such fit; energy then goes with the square root of the node at the same voltage, Accelergy's convention.
"""

import math
from typing import Final

from firsttoken_compiler.errors import TargetError

POLYNOMIALS: Final[dict[float, tuple[float, float, float]]] = {
    45: (1.103, -0.362, 0.2767),
    16: (0.2958, -0.1241, 0.03024),
    10: (0.2068, -0.09311, 0.02375),
    7: (0.1776, -0.09097, 0.02447),
}
"""Nanometres to (a, b, c) of a V^2 + b V + c, in one arbitrary unit of energy."""
REFERENCE_NM: Final = 7.0
REFERENCE_V: Final = 0.75
"""Node and voltage of the figures that the presets scale."""
VOLTS: Final = (0.4, 1.2)
"""Voltages that parts of these nodes run at."""


def switching_energy(node_nm: float, volts: float) -> float:
    """Energy of one operation in the unit of `POLYNOMIALS`; only ratios mean something.

    Raises TargetError for a node that has no polynomial and is not below 7 nm, and for a voltage outside `VOLTS`.
    """
    if not VOLTS[0] <= volts <= VOLTS[1]:
        raise TargetError(f"no scaling at {volts:g} V: voltages are {VOLTS[0]:g} to {VOLTS[1]:g}")
    if 0 < node_nm < REFERENCE_NM:
        return switching_energy(REFERENCE_NM, volts) * math.sqrt(node_nm / REFERENCE_NM)
    if node_nm not in POLYNOMIALS:
        known = ", ".join(f"{node:g}" for node in POLYNOMIALS)
        raise TargetError(f"no scaling to {node_nm:g} nm: nodes are {known}, and any below {REFERENCE_NM:g}")
    a, b, c = POLYNOMIALS[node_nm]
    return a * volts * volts + b * volts + c


def scale(
    node_nm: float, volts: float = REFERENCE_V, *, from_nm: float = REFERENCE_NM, from_volts: float = REFERENCE_V
) -> float:
    """What a figure of one node and voltage is multiplied by at another; raises TargetError as `switching_energy`."""
    return switching_energy(node_nm, volts) / switching_energy(from_nm, from_volts)
