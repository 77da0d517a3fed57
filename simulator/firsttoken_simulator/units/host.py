"""The host CPU's time for a call: operands in, dispatch and computation, results out.

Computation is a roofline over the call's operations and the bytes that its nodes read and write; loads and stores move
their bytes at the host's rate. The host's requests to the DRAM are counted, but do not contend with the NPU's.
"""

import numpy as np

from firsttoken_compiler.isa import word
from firsttoken_compiler.isa.host import SLOT_BITS, HostRun
from firsttoken_compiler.isa.host_call import HostCall
from firsttoken_compiler.isa.instruction import columns
from firsttoken_compiler.target.target import Target


def durations_fs(code: np.ndarray, calls: tuple[HostCall, ...], target: Target) -> np.ndarray:
    """Femtoseconds of every row of host instructions, int64 `[rows]`."""
    host = target.host
    moved = columns(code, 0)[2] / host.bytes_per_s * 1e15
    work = np.array([max(c.flops / host.flops, c.nbytes / host.bytes_per_s) * 1e15 for c in calls] + [0.0])
    number = np.clip(code[:, word.FLAGS] >> SLOT_BITS, -1, len(calls))
    run = host.fallback_us * 1e9 + work[number]
    return np.rint(np.where(code[:, word.OPCODE] == HostRun.OPCODE, run, moved)).astype(np.int64)
