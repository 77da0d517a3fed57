"""What the timing machine reports: when every instruction ran, what it moved, and what it waited for."""

from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class Timeline:
    """Per-instruction results, arrays of length `len(program)`; times in femtoseconds from the start of the graph.

    An instruction reaches the head of its queue at `head_fs` (its predecessor left the issue stage), starts when its
    waits hold (`start_fs >= head_fs`), leaves the issue stage at `issue_end_fs` (compute: when it is done; DMA: when
    its last request is sent) and is complete, with its signal given, at `end_fs`.
    """

    head_fs: np.ndarray
    start_fs: np.ndarray
    issue_end_fs: np.ndarray
    end_fs: np.ndarray
    stall_spad_fs: np.ndarray
    """Part of the run time lost to scratchpad ports and bank conflicts."""
    stall_dram_fs: np.ndarray
    """DMA: part of the run time in which the next request waited for a free slot (latency or bandwidth of DRAM)."""
    busy_fs: np.ndarray
    """Compute: cycles the unit itself needs. DMA: time its data occupies the DRAM data bus, summed over channels."""
    macs: np.ndarray
    vector_ops: np.ndarray
    """fp32 lane operations (elements times operations of the microprogram)."""
    dram_read_bytes: np.ndarray
    dram_write_bytes: np.ndarray
    spad_read_bytes: np.ndarray
    spad_write_bytes: np.ndarray
    acc_bytes: np.ndarray
    dram_activates: np.ndarray
    completion_order: np.ndarray
    """Instruction indices by completion time, ties by index."""
    period_fs: int
    total_fs: int
    """Completion of the last instruction."""
    counters: dict[str, int] = field(default_factory=dict)
    """Machine-wide counts: dram_bursts, dram_row_hits, dram_row_misses, dram_row_conflicts, dram_refreshes, ..."""

    @property
    def total_cycles(self) -> int:
        """Clock cycles of the NPU, rounded up."""
        return -(-self.total_fs // self.period_fs)

    @property
    def total_ms(self) -> float:
        """Milliseconds."""
        return self.total_fs / 1e12
