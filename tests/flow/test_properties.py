"""What must always hold (DESIGN.md), on random small students and targets through the whole chain."""

from __future__ import annotations

import hashlib
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chain import PAIRS, Chain, cosine, drawn, onnx_macs
from harness import make_target
from hypothesis import HealthCheck, Phase, given, settings

from firsttoken.student import LayerConfig, StudentConfig
from firsttoken_compiler.codegen.verify import verify
from firsttoken_compiler.errors import AllocationError, ProgramError
from firsttoken_compiler.isa import word
from firsttoken_compiler.isa.dma import Gather, Load, Store
from firsttoken_compiler.isa.matmul import Matmul
from firsttoken_compiler.isa.program import Program
from firsttoken_compiler.isa.types import Dtype, Space
from firsttoken_compiler.isa.vector import KERNEL_SHIFT, Vector
from firsttoken_compiler.isa.vector_kernel import COST_CLASSES
from firsttoken_compiler.options import resolve
from firsttoken_compiler.target.rates import pair_name
from firsttoken_compiler.target.target import Target
from firsttoken_simulator.energy import energy
from firsttoken_simulator.machine import simulate_program
from firsttoken_simulator.timeline import Timeline

SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large]
PHASES = [Phase.explicit, Phase.reuse, Phase.generate]
"""Without shrinking: an example takes half a second, and the blob reproduces it."""
SMALL = settings(max_examples=10, deadline=None, print_blob=True, suppress_health_check=SLOW, phases=PHASES)
UNEVEN = StudentConfig(
    name="uneven", family="qwen2", hidden=51, intermediate=90, layers=2, heads=4, kv_heads=2, head_dim=10, vocab=77,
    rope_theta=1e4, max_positions=64, rms_eps=1e-5, tie_embeddings=False, qkv_bias=True, source="made up for tests",
    per_layer=(LayerConfig(4, 2, 90), LayerConfig(3, 1, 33)),
)  # fmt: skip


@contextmanager
def chained(case: dict[str, Any]) -> Iterator[Chain]:
    with tempfile.TemporaryDirectory() as folder:
        yield Chain(folder=Path(folder), **case)


def rows_of(program: Program, kind: type) -> np.ndarray:
    return program.code[program.code[:, word.OPCODE] == kind.OPCODE]  # type: ignore[attr-defined]


def extents(code: np.ndarray) -> np.ndarray:
    return code[:, word.DIMS : word.DIMS + 3].prod(axis=1)


@SMALL
@given(drawn())
def test_macs_bytes_bounds_and_energy(case: dict[str, Any]) -> None:
    with chained(case) as chain:
        assert int(chain.timeline.macs.sum()) == onnx_macs(chain.model) == sum(op.macs for op in chain.program.ops)
        assert extents(rows_of(chain.program, Matmul)).sum() == onnx_macs(chain.model)
        check_bytes(chain.program, chain.timeline)
        check_rooflines(chain.program, chain.timeline, chain.target)
        check_energy(chain.program, chain.timeline, chain.target)


def check_bytes(program: Program, line: Timeline) -> None:
    """What the timing machine moved is what the instructions say, and all of every weight is among it."""
    loads, stores, gathers = (rows_of(program, kind) for kind in (Load, Store, Gather))
    indices = word.operand_column(1)
    looked_up = gathers[:, word.DIMS] * (
        gathers[:, word.DIMS + 2] + 8 * (word.space_of(gathers[:, indices]) == int(Space.DRAM))
    )
    assert line.dram_read_bytes.sum() == extents(loads).sum() + looked_up.sum()
    assert line.dram_write_bytes.sum() == extents(stores).sum()
    read = np.zeros(program.dram_bytes, bool)
    written = np.zeros(program.dram_bytes, np.int32)
    for row in loads:
        for at, run in runs(row, 1):
            read[at : at + run] = True
    for row in stores:
        for at, run in runs(row, 0):
            written[at : at + run] += 1
    for tensor in program.tensors:
        here = slice(tensor.address, tensor.address + tensor.nbytes)
        if tensor.packing is not None and tensor.packing.form in ("panels", "scales"):
            assert read[here].all(), f"{tensor.name} is not read completely"
        if tensor.space is Space.DRAM and tensor.kind == "output":
            assert (written[here] == 1).all(), f"{tensor.name} is not written exactly once"


def runs(row: np.ndarray, operand: int) -> Iterator[tuple[int, int]]:
    """(address, bytes) of the contiguous pieces of a copy's operand."""
    n0, n1, run = (int(x) for x in row[word.DIMS : word.DIMS + 3])
    at = word.operand_column(operand)
    address, s0, s1 = (int(x) for x in row[at + 1 : at + 4])
    return ((address + i * s0 + j * s1, run) for i in range(n0) for j in range(n1))


def check_rooflines(program: Program, line: Timeline, target: Target) -> None:
    """No engine is faster than its peak."""
    cycles = line.total_fs / line.period_fs
    moved = line.dram_read_bytes.sum() + line.dram_write_bytes.sum()
    assert line.total_fs / 1e15 >= moved / target.dram.peak_bytes_per_s
    assert cycles >= moved / target.dma.bus_bytes_per_cycle
    matmuls = rows_of(program, Matmul)
    busy = sum(
        math.prod(int(x) for x in row[word.DIMS : word.DIMS + 3]) / target.matrix.macs_per_cycle[pair]
        for row, pair in zip(matmuls, pairs_of(program, matmuls), strict=True)
    )
    assert cycles >= busy
    weights = [target.vector.cycles[name] for name in COST_CLASSES]
    operations = sum(
        int(n) * float(np.dot(program.kernels[flags >> KERNEL_SHIFT].cost, weights))
        for n, flags in zip(
            extents(rows_of(program, Vector)), rows_of(program, Vector)[:, word.FLAGS].tolist(), strict=True
        )
    )
    assert cycles >= operations / (target.vector.lanes * target.vector.contexts)
    spad = line.spad_read_bytes.sum() + line.spad_write_bytes.sum()
    assert cycles >= spad / (target.scratchpad.banks * target.scratchpad.bank_bytes)


def pairs_of(program: Program, matmuls: np.ndarray) -> list[str]:
    a, w = (word.dtype_of(matmuls[:, word.operand_column(i)]) for i in (1, 2))
    return [pair_name(Dtype(x), Dtype(y)) for x, y in zip(a.tolist(), w.tolist(), strict=True)]


def check_energy(program: Program, line: Timeline, target: Target) -> None:
    """Actions times table plus static power times time, counted again from the instructions."""
    table, result = target.energy, energy(program, line, target)
    matmuls = rows_of(program, Matmul)
    mac = sum(
        n * table.mac_pj[pair] for n, pair in zip(extents(matmuls).tolist(), pairs_of(program, matmuls), strict=True)
    )
    vector = sum(
        n * sum(program.kernels[flags >> KERNEL_SHIFT].cost) * table.vector_op_pj
        for n, flags in zip(
            extents(rows_of(program, Vector)).tolist(), rows_of(program, Vector)[:, word.FLAGS].tolist(), strict=True
        )
    )
    moved = int(line.dram_read_bytes.sum() + line.dram_write_bytes.sum())
    dram = moved * 8 * table.dram_pj_per_bit + int(line.dram_activates.sum()) * table.dram_activate_pj
    sram = (
        int(line.spad_read_bytes.sum()) * table.spad_read_pj_per_byte
        + int(line.spad_write_bytes.sum()) * table.spad_write_pj_per_byte
        + int(line.acc_bytes.sum()) * table.acc_pj_per_byte
    )
    static = (line.total_fs * 1e-3 + target.host.dispatch_us * 1e6) * table.static_w
    bus = moved * table.bus_pj_per_byte
    expected = {"mac": mac, "vector": vector, "sram": sram, "dram": dram, "bus": bus, "static": static}
    for name, millijoules in result.by_component_mj.items():
        # Each operator and component is rounded to a femtojoule once.
        assert millijoules * 1e9 == pytest.approx(expected[name], rel=1e-9, abs=1e-3 * (len(program.ops) + 1)), name
    assert result.total_mj * 1e9 == pytest.approx(sum(expected.values()), rel=1e-9, abs=1e-2 * len(program.ops))


@SMALL
@given(drawn())
def test_numbers(case: dict[str, Any]) -> None:
    """Completion order and program order agree bit for bit; logits and caches agree with onnxruntime."""
    with chained(case) as chain:
        got, ordered = chain.outputs(chain.timeline.completion_order), chain.outputs(None)
        for name, values in ordered.items():
            assert values.tobytes() == got[name].tobytes(), name
        precision = chain.precision
        floats = precision.acts == "fp16" and precision.norm_cache in ("fp16", "off")
        for name, expected in chain.reference().items():
            # Weights are rounded in the reference too; what is left is fp16, or integer activations.
            assert np.isfinite(ordered[name]).all()
            assert cosine(ordered[name], expected) >= (0.9999 if floats else 0.99), name


def digest(program: Program, line: Timeline) -> str:
    """Of all bytes of a program and its timeline."""
    data = hashlib.sha256(program.encode())
    for field in fields(line):
        value = getattr(line, field.name)
        data.update(value.tobytes() if isinstance(value, np.ndarray) else repr(value).encode())
    return data.hexdigest()


def fixed_case() -> dict[str, Any]:
    """One case for all processes."""
    target = make_target(
        scratchpad_bytes=64 << 10, matrix_rows=16, matrix_columns=12, dram_channels=3,
        matrix_macs_per_cycle=dict.fromkeys(PAIRS, 192), name="fixed",
    )  # fmt: skip
    return {"config": UNEVEN, "tokens": 7, "past": 5, "precision": resolve("int4", None, "32", None), "target": target}


def test_same_input_same_bytes_also_in_another_process() -> None:
    with chained(fixed_case()) as first, chained(fixed_case()) as second:
        here = digest(first.program, first.timeline)
        assert digest(second.program, second.timeline) == here
    code = (
        f"import sys; sys.path[:0] = [{str(Path(__file__).parent)!r}, {str(Path(__file__).parents[1])!r}]\n"
        "import test_properties as t\n"
        "with t.chained(t.fixed_case()) as c: print(t.digest(c.program, c.timeline))"
    )
    seed = "1" if os.environ.get("PYTHONHASHSEED") == "2" else "2"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False, timeout=120,
        env={**os.environ, "PYTHONHASHSEED": seed},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == here


MIXING_LOSS = 0.5
"""Part of its bus time that a burst loses when streams share a channel; tests/simulator/test_machine.py measures it."""
REFRESH_FS = 300_000_000
"""One more refresh that a shifted program may meet, with the rows it closes."""


def noise_fs(program: Program, line: Timeline, target: Target) -> float:
    """By how much a faster part may slow a program (as in tests/simulator/test_machine.py).

    Queues run in order and durations are fixed, so the only anomaly is that a stream moves in time and meets another in
    the DRAM. At worst all traffic that two queues can have under way at once meets, each burst on one channel.
    """
    moved = line.dram_read_bytes + line.dram_write_bytes
    streams = np.bincount(program.code[:, word.QUEUE], weights=moved)
    shared = min(streams.sum(), 2 * (streams.sum() - streams.max()))
    channel = target.dram.peak_bytes_per_s / target.dram.channels
    return float(MIXING_LOSS * shared / channel * 1e15 + REFRESH_FS)


def faster(target: Target) -> list[Target]:
    """The target with one part faster."""
    matrix, dma, dram = target.matrix, target.dma, target.dram
    full = matrix.rows * matrix.columns * max(1, matrix.tile_m)
    # Not more channels: they change which addresses share one, so the same program may camp where it did not before.
    doubled = replace(
        dram, data_rate_mtps=2 * dram.data_rate_mtps, tccd_s_ns=dram.tccd_s_ns / 2, tccd_l_ns=dram.tccd_l_ns / 2
    )
    return [
        replace(target, clock_hz=target.clock_hz * 2),
        replace(target, dram=doubled),
        replace(target, matrix=replace(matrix, macs_per_cycle=dict.fromkeys(PAIRS, full))),
        replace(target, vector=replace(target.vector, lanes=2 * target.vector.lanes)),
        replace(target, dma=replace(dma, bus_bytes_per_cycle=2 * dma.bus_bytes_per_cycle)),
        replace(target, dma=replace(dma, outstanding=2 * dma.outstanding)),
        replace(target, scratchpad=replace(target.scratchpad, banks=2 * target.scratchpad.banks)),
    ]


@SMALL
@given(drawn())
def test_faster_parts_are_never_slower(case: dict[str, Any]) -> None:
    with chained(case) as chain:
        allowed = chain.timeline.total_fs + noise_fs(chain.program, chain.timeline, chain.target)
        for index, target in enumerate(faster(chain.target)):
            assert simulate_program(chain.program, target).total_fs <= allowed, index


def small_chain(folder: Path, **changes: Any) -> Chain:
    return Chain(folder=folder, **{**fixed_case(), **changes})


def test_tensors_may_not_overlap(tmp_path: Path) -> None:
    """Moving any tensor onto one that lives at the same time is rejected."""
    chain = small_chain(tmp_path)
    verify(chain.program, chain.target)
    tensors = chain.program.tensors
    for space in (Space.DRAM, Space.SPAD):
        placed = sorted((t for t in tensors if t.space is space and t.nbytes), key=lambda t: t.address)
        lives = {t.name: range(t.first, len(chain.program.ops) if t.lasting else t.last + 1) for t in placed}
        together = [
            (a, b) for a, b in combinations(placed, 2)
            if range(max(lives[a.name].start, lives[b.name].start), min(lives[a.name].stop, lives[b.name].stop))
        ]  # fmt: skip
        assert together
        for lower, upper in together:
            moved = replace(upper, address=lower.address + (lower.nbytes - 1) // 64 * 64)
            broken = replace(chain.program, tensors=tuple(moved if t is upper else t for t in tensors))
            with pytest.raises(ProgramError, match="overlap"):
                verify(broken, chain.target)


def test_buffers_may_not_overlap_while_both_live(tmp_path: Path) -> None:
    """A local buffer moved onto another one is rejected, or the numbers change: no two live ones share memory."""
    chain = small_chain(tmp_path, tokens=3, past=0, precision=resolve("fp16", None, "128", None))
    program, expected = chain.program, chain.outputs(None)
    r = np.random.default_rng(0)
    column = word.operand_column(0)
    local = [i for i, row in enumerate(program.code) if word.space_of(row[column]) == Space.SPAD]
    rejected = changed = 0
    for i in r.choice(local, 60, replace=False).tolist():
        code = program.code.copy()
        others = sorted({int(code[j, column + 1]) for j in local if abs(j - i) < 12} - {int(code[i, column + 1])})
        code[i, column + 1] = others[r.integers(len(others))]
        broken = program.with_code(code)
        try:
            verify(broken, chain.target)
        except ProgramError:
            rejected += 1
            continue
        machine = chain.machine(broken)
        machine.run()
        same = all(machine.read_tensor(n).tobytes() == v.tobytes() for n, v in expected.items())
        assert not same, f"instruction {i} wrote elsewhere and nothing noticed"
        changed += 1
    print(f"{rejected} rejected, {changed} with other numbers")
    assert rejected > 10


@pytest.mark.parametrize("nbytes", [1024, 2048, 4096])
def test_a_scratchpad_that_cannot_hold_one_tile(tmp_path: Path, nbytes: int) -> None:
    """What, where, the value, the limit and the remedy."""
    target = make_target(name="tiny-npu", scratchpad_bytes=nbytes, matrix_macs_per_cycle=dict.fromkeys(PAIRS, 64))
    with pytest.raises(AllocationError) as error:
        _ = small_chain(tmp_path, target=target).program
    message = str(error.value)
    assert "target tiny-npu" in message
    assert "scratchpad" in message
    value_and_limit = r"needs? \d+ bytes of scratchpad.* \d+ .*are free|scratchpad of \d+ bytes.* \d+ are needed"
    assert re.search(value_and_limit, message), message
    assert "raise scratchpad.bytes" in message


def test_accumulators_that_cannot_hold_one_tile(tmp_path: Path) -> None:
    rates = dict.fromkeys(PAIRS, 64)
    target = make_target(name="tiny-npu", scratchpad_accumulator_bytes=64, matrix_macs_per_cycle=rates)
    with pytest.raises(AllocationError, match=r"target tiny-npu: .* of accumulators; .*raise .*accumulator_bytes"):
        _ = small_chain(tmp_path, target=target).program
