"""The host CPU's time for a call: operands in, dispatch and computation, results out.

Computation is a roofline over the call's operations and the bytes that its nodes read and write; loads and stores move
their bytes at the host's rate, but for weights that lie on the host's side, whose bytes are among the call's. The
host's requests to the DRAM are counted, but do not contend with the NPU's.
"""

from typing import Final

import numpy as np

from firsttoken_compiler.errors import ProgramError
from firsttoken_compiler.isa import word
from firsttoken_compiler.isa.host import SLOT_BITS, HostLoad, HostRun
from firsttoken_compiler.isa.host_call import COPIED, HostCall
from firsttoken_compiler.isa.instruction import columns
from firsttoken_compiler.target.target import Target

MAX_S: Final = 4000
"""Of all calls together: int64 counts 9223 s in femtoseconds."""
_MOST: Final = 1 << 100
"""Operations and bytes beyond this are as good as endless, and fit a float."""
_MOST_READ: Final = 1 << 50
"""Of one operand."""


def durations_fs(code: np.ndarray, calls: tuple[HostCall, ...], target: Target) -> np.ndarray:
    """Femtoseconds of every row of host instructions, int64 `[rows]`.

    Raises ProgramError when the host works longer than a timeline can hold.
    """
    host = target.host
    moved = columns(code, 0)[2] / host.bytes_per_s * 1e15
    moved[_reads(code, calls) != COPIED] = 0
    seconds = [max(min(c.flops, _MOST) / host.flops, min(c.nbytes, _MOST) / host.bytes_per_s) for c in calls]
    work = np.array([*seconds, 0.0]) * 1e15
    number = np.clip(code[:, word.FLAGS] >> SLOT_BITS, -1, len(calls))
    run = host.fallback_us * 1e9 + work[number]
    durations = np.where(code[:, word.OPCODE] == HostRun.OPCODE, run, moved)
    if durations.sum() > MAX_S * 1e15:
        nodes = calls[int(np.argmax(seconds))].nodes[:3] if calls else ()
        raise ProgramError(
            f"the host works for {durations.sum() / 1e15:.3g} s, the limit is {MAX_S} s; the longest call is that of "
            f"{', '.join(map(repr, nodes))}: replace its operators by ones that run on the NPU"
        )
    return np.rint(durations).astype(np.int64)


def traffic(code: np.ndarray, calls: tuple[HostCall, ...]) -> np.ndarray:
    """Bytes of DRAM that every row of host instructions loads or stores, int64 `[rows]`."""
    reads = _reads(code, calls)
    return np.where(reads == COPIED, columns(code, 0)[2], reads)


def _reads(code: np.ndarray, calls: tuple[HostCall, ...]) -> np.ndarray:
    """`HostValue.reads` of what every row loads; `COPIED` for other rows."""
    found = np.full(len(code), COPIED, np.int64)
    for row in np.flatnonzero(code[:, word.OPCODE] == HostLoad.OPCODE):
        call, slot = divmod(int(code[row, word.FLAGS]), 1 << SLOT_BITS)
        if 0 <= call < len(calls) and slot < len(calls[call].inputs):
            found[row] = max(COPIED, min(calls[call].inputs[slot].reads, _MOST_READ))
    return found
