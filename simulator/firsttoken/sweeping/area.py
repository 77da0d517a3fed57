"""An area proxy of a target's core: multipliers, lanes and memory bits at one old node, to rank machines with.

Not the area of a chip: control, wires, analogue parts and the node are left out. What it is for is the third axis of a
Pareto front: whether a machine needs more multipliers, lanes or memory bits than another one.
"""

from __future__ import annotations

from typing import Final

from firsttoken_compiler.target.target import Target

MULTIPLY_ADD_UM2: Final = {
    "fp32": 7700.0 + 4184.0, "fp16": 1640.0 + 1360.0, "int16": 1128.0 + 137.0, "int8": 282.0 + 137.0,
}  # fmt: skip
"""um2 of a multiplier and its adder at 45 nm by the wider operand: M. Horowitz, "Computing's energy problem", ISSCC
2014, and W. Dally's tables of the same figures (8-bit multiply 282, 32-bit add 137, fp16 1640 and 1360, fp32 7700 and
4184). The 16-bit multiplier is derived: four times the 8-bit one."""
NARROWER: Final = 0.5
"""Of the multiplier's area, for each halving of the narrower operand (8 x 4 bits): partial products."""
SRAM_BIT_UM2: Final = 0.346 / 0.7
"""um2 of a bit at 45 nm: a cell of 0.346 um2 (K. Mistry et al., IEDM 2007), 70 % of an array's area (assumed)."""


def area_proxy_mm2(target: Target) -> float:
    """Square millimetres at 45 nm of all cores' multipliers, lanes, scratchpads and accumulators; see the module."""
    pairs = [_multiply_add(pair) * rate for pair, rate in target.matrix.macs_per_cycle.items()]
    matrix = max(pairs)  # one array serves all pairs, the dearest decides
    lanes = target.vector.lanes * target.vector.contexts * MULTIPLY_ADD_UM2["fp32"]
    bits = 8 * (target.scratchpad.bytes + target.scratchpad.accumulator_bytes)
    return target.cores * (matrix + lanes + bits * SRAM_BIT_UM2) / 1e6


def _multiply_add(pair: str) -> float:
    """um2 of one multiply-accumulate of a pair such as `int8xint4`."""
    wide, narrow = sorted(pair.split("x"), key=lambda name: (name.startswith("fp"), _bits(name)), reverse=True)
    area = MULTIPLY_ADD_UM2[wide]
    if wide.startswith("fp"):
        return area
    adder = 137.0
    halvings = (_bits(wide) // _bits(narrow)).bit_length() - 1
    return float((area - adder) * NARROWER**halvings + adder)


def _bits(name: str) -> int:
    return int(name.lstrip("fpint"))
