"""Targets, programs and the three verbs of the timing tests."""

from dataclasses import replace
from typing import Any

import numpy as np

from firsttoken_compiler.isa import word
from firsttoken_compiler.isa.dma import Gather, Load, Store, dram, spad
from firsttoken_compiler.isa.instruction import Instruction
from firsttoken_compiler.isa.matmul import Matmul
from firsttoken_compiler.isa.program import Program
from firsttoken_compiler.isa.types import Dtype, Engine, Operand, Space, queue_index
from firsttoken_compiler.isa.vector import Vector
from firsttoken_compiler.isa.vector_kernel import COST_CLASSES, VectorKernel
from firsttoken_compiler.target import target as t
from firsttoken_simulator.units import dram as dram_unit

_PAIRS = {"int8xint8": 16384, "int8xint4": 16384, "int16xint4": 8192, "int16xint8": 8192, "fp16xfp16": 4096}

# LPDDR5-6400, one x16 channel, 8 Gb, tCK 1.25 ns: JESD209-5B as Ramulator 2.1 states it.
LPDDR5 = t.Dram(
    standard="LPDDR5", channels=1, channel_bits=16, data_rate_mtps=6400, burst_length=16, bank_groups=4,
    banks_per_group=4, page_bytes=2048, interleave_bytes=256, map="bank-interleaved", queue_depth=32,
    tcl_ns=21.25, tcwl_ns=11.25, trcd_ns=18.75, trp_ns=18.75, tras_ns=42.5, twr_ns=35.0, trtp_ns=10.0, tccd_s_ns=2.5,
    tccd_l_ns=5.0, twtr_ns=12.5, trtw_ns=15.0, trrd_ns=5.0, tfaw_ns=20.0, trefi_ns=3906.0, trfc_ns=210.0,
    refresh="all-bank", controller_ns=10.0,
)  # fmt: skip

_BASE = t.Target(
    name="textbook", description="128x128 weight-stationary array at 1 GHz with LPDDR5", clock_hz=1e9, cores=1,
    matrix=t.Matrix(
        kind="systolic", rows=128, columns=128, tile_m=0, dataflow="ws", double_buffered=True, macs_per_cycle=_PAIRS,
        fill_cycles=0, issue_cycles=4,
    ),
    vector=t.Vector(lanes=32, contexts=4, startup_cycles=8, cycles=dict.fromkeys(COST_CLASSES, 1.0)),
    scratchpad=t.Scratchpad(bytes=1 << 22, banks=32, bank_bytes=32, alignment_bytes=64, accumulator_bytes=1 << 20),
    dma=t.Dma(setup_cycles=16, outstanding=64, bus_bytes_per_cycle=64, bus_latency_cycles=20),
    dram=LPDDR5,
    host=t.Host(dispatch_us=50.0, fallback_us=20.0, flops=1e10, bytes_per_s=1e10),
    energy=t.Energy(
        mac_pj=dict.fromkeys(_PAIRS, 0.5), vector_op_pj=1.0, spad_read_pj_per_byte=1.0, spad_write_pj_per_byte=1.0,
        acc_pj_per_byte=1.0, dram_pj_per_bit=7.0, dram_activate_pj=1000.0, bus_pj_per_byte=1.0, static_w=0.1,
    ),
)  # fmt: skip


def make_target(**overrides: Any) -> t.Target:
    """The textbook target; `matrix_rows=8` replaces a field of a section, `cores=2` one of the target itself."""
    target = _BASE
    for key, value in overrides.items():
        section, _, name = key.partition("_")
        if section in ("matrix", "vector", "scratchpad", "dma", "dram", "host", "energy") and name:
            target = replace(target, **{section: replace(getattr(target, section), **{name: value})})
        else:
            target = replace(target, **{key: value})
    return target


def make_program(*instructions: Instruction, kernels: tuple[str, ...] = ("add(s0, s1)",), cores: int = 1) -> Program:
    """A program of nothing but instructions."""
    code = np.stack([i.encode() for i in instructions]) if instructions else np.zeros((0, word.WIDTH), np.int64)
    return Program(code=code, kernels=tuple(map(VectorKernel.parse, kernels)), tensors=(), ops=(), cores=cores)


def load(
    nbytes: int, address: int = 0, *, rows: int = 1, stride: int = 0, core: int = 0, signal: bool = True,
    waits: tuple[tuple[int, int], ...] = (),
) -> Load:  # fmt: skip
    """`rows` runs of `nbytes` from DRAM, `stride` bytes apart."""
    return Load(
        queue=queue_index(core, Engine.DMA_IN), signal=signal, waits=waits, dims=(1, rows, nbytes),
        operands=(spad(Dtype.I8, 0, 0, nbytes), dram(Dtype.I8, address, 0, stride)),
    )  # fmt: skip


def store(
    nbytes: int, address: int = 0, *, core: int = 0, signal: bool = True, waits: tuple[tuple[int, int], ...] = ()
) -> Store:
    """One run of `nbytes` to DRAM."""
    return Store(
        queue=queue_index(core, Engine.DMA_OUT), signal=signal, waits=waits, dims=(1, 1, nbytes),
        operands=(dram(Dtype.I8, address), spad(Dtype.I8, 0)),
    )  # fmt: skip


def gather(rows: int, nbytes: int, table_rows: int, *, indices: Space = Space.DRAM, address: int = 0) -> Gather:
    """`rows` rows of `nbytes` bytes out of a table at 1 MiB."""
    return Gather(
        queue=queue_index(0, Engine.DMA_IN), signal=True, dims=(rows, 1, nbytes),
        operands=(spad(Dtype.I8, 0, nbytes), Operand(indices, Dtype.I64, address, 8),
                  dram(Dtype.I8, 1 << 20, nbytes, table_rows)),
    )  # fmt: skip


def matmul(
    m: int, n: int, k: int, *, a: Dtype = Dtype.I8, w: Dtype = Dtype.I8, core: int = 0, signal: bool = True,
    waits: tuple[tuple[int, int], ...] = (), panel: int = 128,
) -> Matmul:  # fmt: skip
    """A product with dense operands, weights in panels."""
    row = panel * w.bits // 8
    return Matmul(
        queue=queue_index(core, Engine.MATRIX), signal=signal, waits=waits, dims=(m, n, k),
        operands=(Operand(Space.ACC, Dtype.I32, 0, n * 4), spad(a, 0, k * a.bits // 8),
                  spad(w, 1 << 20, k * row, row, panel)),
    )  # fmt: skip


def vector(
    n0: int,
    n1: int,
    n2: int,
    *,
    core: int = 0,
    signal: bool = True,
    waits: tuple[tuple[int, int], ...] = (),
    step: int = 2,
) -> Vector:
    """An fp16 map of two dense sources; `step` bytes between the elements of the second."""
    dense = spad(Dtype.F16, 0, n1 * n2 * 2, n2 * 2, 2)
    other = spad(Dtype.F16, 1 << 20, n1 * n2 * step, n2 * step, step)
    return Vector(
        queue=queue_index(core, Engine.VECTOR),
        signal=signal,
        waits=waits,
        dims=(n0, n1, n2),
        operands=(dense, dense, other),
    )


class DramBench:
    """A DRAM alone, driven by the three verbs; times in nanoseconds, `column` is when the read command is placed."""

    def __init__(self, **overrides: Any) -> None:
        self.target = make_target(**{f"dram_{k}": v for k, v in {"trefi_ns": 0.0, **overrides}.items()})
        self.p = dram_unit.resolve(self.target)
        self.state = dram_unit.new_state(self.p)
        self.activates = np.zeros(1, np.int64)

    def burst(self, bank: int, row: int, column: int = 0) -> int:
        """Burst number of a place in channel 0 of a bank-interleaved single-channel target."""
        return (row * int(self.p[dram_unit.P_PAGE]) + column) * int(self.p[dram_unit.P_BANKS]) + bank

    def issue(self, at_ns: float, bank: int, row: int, column: int = 0, *, write: bool = False) -> float:
        """Sends one request at `at_ns`; returns the time of its read command (its acknowledgement for a write)."""
        return self._request(self.state, at_ns, bank, row, column, write)

    def probe(self, at_ns: float, bank: int, row: int, column: int = 0) -> float:
        """When a read sent at `at_ns` would have its command placed, without sending it."""
        return self._request(dram_unit.DramState(*(a.copy() for a in self.state)), at_ns, bank, row, column, False)

    def assert_earliest_ready_at(
        self, expected_ns: float, bank: int, row: int, column: int = 0, at_ns: float = 0.0
    ) -> None:
        """A read sent at `at_ns` has its command at `expected_ns`: not ready one femtosecond earlier, ready then."""
        expected = round(expected_ns * 1e6)
        actual = round(self.probe(at_ns, bank, row, column) * 1e6)
        assert not actual <= expected - 1, f"ready at {actual} fs, expected not before {expected} fs"
        assert actual <= expected, f"ready at {actual} fs only, expected {expected} fs"

    def _request(self, state: dram_unit.DramState, at: float, bank: int, row: int, column: int, write: bool) -> float:
        burst = self.burst(bank, row, column)
        _, done = dram_unit.request(self.p, *state, self.activates, burst, write, 0, round(at * 1e6))
        after = 0 if write else int(self.p[[dram_unit.P_CL, dram_unit.P_BURST, dram_unit.P_CONTROLLER]].sum())
        return (int(done) - after) / 1e6
