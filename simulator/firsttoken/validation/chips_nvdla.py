"""NVDLA in the sizes of the primer's table: `nvdla-full` with other multipliers, buffer and bandwidth."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from firsttoken_compiler.errors import OptionError
from firsttoken_compiler.target.target import Target

BASE: Final = "nvdla-full"
ATOMS: Final = {2048: (64, 32), 1024: (64, 16), 512: (32, 16), 256: (32, 8), 128: (16, 8), 64: (8, 8), 32: (4, 8)}
"""int8 multipliers -> (channels, kernels) of a step; 2048, 256 and 64 as nv_large, nv_medium_512 and nv_small have them
in proportion, the others assumed."""
LEAST_CBUF: Final = 32 << 10


def nvdla_variant(macs: int, cbuf_bytes: int, bytes_per_s: float) -> Target:
    """`nvdla-full` with this many int8 multipliers, bytes of convolution buffer, and DRAM of this rate, at its 1 GHz.

    fp16 has half the multipliers, as in nv_full. The DRAM keeps its latencies; its bursts take longer or shorter.
    Raises OptionError for sizes that the primer's table does not have.
    """
    if macs not in ATOMS:
        raise OptionError(f"an NVDLA of {macs} multipliers: it is built with {', '.join(map(str, ATOMS))}")
    if cbuf_bytes < LEAST_CBUF or bytes_per_s <= 0:
        raise OptionError(
            f"an NVDLA of {cbuf_bytes} bytes of buffer and {bytes_per_s:g} bytes/s: it has at least {LEAST_CBUF} and a "
            "rate above 0"
        )
    base = Target.load(BASE)
    (rows, columns), slower = ATOMS[macs], base.dram.peak_bytes_per_s / bytes_per_s
    matrix = replace(
        base.matrix, rows=rows, columns=columns, macs_per_cycle={"int8xint8": macs, "fp16xfp16": max(1, macs // 2)}
    )
    dram = replace(
        base.dram, data_rate_mtps=round(base.dram.data_rate_mtps / slower),
        tccd_s_ns=base.dram.tccd_s_ns * slower, tccd_l_ns=base.dram.tccd_l_ns * slower,
    )  # fmt: skip
    name = f"nvdla-{macs}"
    size = f"{macs} int8 MAC per cycle, {cbuf_bytes >> 10} KB convolution buffer, {bytes_per_s / 1e9:g} GB/s"
    return replace(
        base, name=name, description=f"NVDLA: {size}", matrix=matrix, dram=dram,
        scratchpad=replace(base.scratchpad, bytes=cbuf_bytes),
    )  # fmt: skip
