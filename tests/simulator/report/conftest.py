from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from firsttoken_compiler.isa import word
from firsttoken_compiler.isa.dma import Load, Store, dram, spad
from firsttoken_compiler.isa.host import HostLoad, HostRun, HostStore, host_flags
from firsttoken_compiler.isa.host_call import HostCall, HostValue
from firsttoken_compiler.isa.matmul import Matmul
from firsttoken_compiler.isa.program import OpInfo, Program, Tensor
from firsttoken_compiler.isa.types import ENGINES_PER_CORE, Dtype, Engine, Operand, Space
from firsttoken_compiler.isa.vector import Vector
from firsttoken_compiler.isa.vector_kernel import VectorKernel
from firsttoken_compiler.target.target import Target
from firsttoken_simulator.report.critical import dependences
from firsttoken_simulator.timeline import Timeline
from firsttoken_simulator.units.host import durations_fs

HOSTILE = "=cmd|' /C calc'!A0<script>alert(1)</script>\x1b[31m"
Case = tuple[Program, Timeline, Target]


def _instructions(count: int, rng: np.random.Generator, op_of: Callable[[int], int], hosts: set[int]) -> np.ndarray:
    """Random instructions; everything signals, and waits name earlier instructions. Operators in `hosts` are calls."""
    rows, signalled = [], [0] * ENGINES_PER_CORE
    for i in range(count):
        engine = (Engine.DMA_IN, Engine.DMA_OUT, Engine.MATRIX, Engine.VECTOR)[int(rng.integers(4))]
        if op_of(i) in hosts:
            engine = Engine.HOST
        others = [q for q in range(ENGINES_PER_CORE) if q != engine and signalled[q]]
        waits = tuple((q, int(rng.integers(1, signalled[q] + 1))) for q in others if rng.random() < 0.4)
        common = {"queue": int(engine), "op": op_of(i), "signal": True, "waits": waits}
        address = int(rng.integers(3)) * 4096
        if engine is Engine.HOST:
            rows.append(_host_instruction(common, i % 8, sorted(hosts).index(op_of(i)), address))
        elif engine is Engine.DMA_IN:
            operands = (spad(Dtype.I8, 0, 64), dram(Dtype.I8, address, 64))
            rows.append(Load(**common, dims=(4, 1, 64), operands=operands).encode())
        elif engine is Engine.DMA_OUT:
            operands = (dram(Dtype.I8, 4096 + address % 8192, 64), spad(Dtype.I8, 0, 64))
            rows.append(Store(**common, dims=(4, 1, 64), operands=operands).encode())
        elif engine is Engine.MATRIX:
            a, w = ((Dtype.I8, Dtype.I4), (Dtype.F16, Dtype.F16))[int(rng.integers(2))]
            acc = Operand(Space.ACC, Dtype.F32 if a is Dtype.F16 else Dtype.I32, 0, 64)
            matmul = (acc, spad(a, 0, 64), spad(w, 4096, 0, 8, 16))
            rows.append(Matmul(**common, dims=(16, 16, 32), operands=matmul).encode())
        else:
            operands = (spad(Dtype.F16, 0, 64, 0, 2), spad(Dtype.F16, 4096, 64, 0, 2))
            rows.append(Vector(**common, dims=(4, 1, 32), operands=operands).encode())
        signalled[int(engine)] += 1
    return np.stack(rows)


def _host_instruction(common: dict[str, Any], step: int, call: int, address: int) -> np.ndarray:
    """Of a call with three operands and four results of 128 floats."""
    operand = dram(Dtype.F16, 4096 + address % 8192, 256)
    kind, slot = (HostLoad, step) if step < 3 else (HostStore, step - 4) if step > 3 else (HostRun, 0)
    operands = () if step == 3 else (operand,)
    made = kind(**common, flags=host_flags(call, slot), dims=(1, 1, 1), operands=operands)
    return np.asarray(made.encode())


def _host_call(number: int, node: str) -> HostCall:
    values = [HostValue(f"v{i}", 1, (128,), Dtype.F16, (1,)) for i in range(7)]
    return HostCall(f"host.{number}", (node, "between"), "no NPU operator", tuple(values[:3]), tuple(values[3:]),
                    1000, 10**6 * number)  # fmt: skip


def _program(count: int, seed: int, with_hosts: bool) -> Program:
    rng = np.random.default_rng(seed)
    ops = 1 + count // 8
    on_host = set(range(3, count // 8, 4)) if with_hosts else set()
    code = _instructions(count, rng, lambda i: min(i // 8, ops - 1), on_host)
    tensors = tuple(
        Tensor(f"{kind}0", kind, Space.DRAM, 4096 * index, 4096, Dtype.I8, (4096,))
        for index, kind in enumerate(("weight", "activation", "kv"))
    )
    infos = tuple(
        OpInfo(
            name=HOSTILE if i == 1 else f"layers.{i // 3}.{('attention', 'up', 'down')[i % 3]}",
            kind="host" if i in on_host else "linear",
            onnx_nodes=(f"node{i}",),
            module=f"layers.{i // 3}",
            first=8 * i,
            last=min(8 * i + 8, count),
            w_bits=4,
            a_bits=8,
        )
        for i in range(ops)
    )
    meta = {
        "student": HOSTILE, "target": "systolic-128", "target_hash": "x", "prompt_tokens": 64, "past": 0,
        "weights": "int4", "activations": "int8", "group": "128", "norm_cache": "int8", "seed": 7, "phase": "prefill",
        "norm_decisions": ["layers.0: kept in scratchpad"],
    }  # fmt: skip
    kernels = (VectorKernel.parse("mul(s0, 2.0)"),)
    calls = tuple(_host_call(number, f"node{op}") for number, op in enumerate(sorted(on_host)))
    return Program(code, kernels, tensors, infos, spad_bytes=8192, acc_bytes=1024, meta=meta, hosts=calls)


def _timeline(program: Program, seed: int, target: Target) -> Timeline:
    """A list schedule: in-order queues, random durations, but those of the host; DMA leaves its issue stage before it
    completes."""
    period_fs, host_fs = target.period_fs, durations_fs(program.code, program.hosts, target)
    rng = np.random.default_rng(seed)
    count = len(program)
    head, start, issue_end, end = (np.zeros(count, np.int64) for _ in range(4))
    source, target, kind = dependences(program)
    before: list[list[tuple[int, int]]] = [[] for _ in range(count)]
    for a, b, k in zip(source.tolist(), target.tolist(), kind.tolist(), strict=True):
        before[b].append((a, k))
    last_end: dict[int, int] = {}
    for i in range(count):
        queue = int(program.code[i, word.QUEUE])
        head[i] = max((issue_end[a] for a, k in before[i] if k == 0), default=0)
        start[i] = max([head[i], *(end[a] for a, k in before[i] if k == 1)])
        duration = int(rng.integers(1, 40)) * period_fs
        on_host = queue % ENGINES_PER_CORE == Engine.HOST
        issue_end[i] = end[i] = start[i] + (int(host_fs[i]) if on_host else duration)
        if queue % ENGINES_PER_CORE in (Engine.DMA_IN, Engine.DMA_OUT):
            end[i] = max(int(end[i]) + int(rng.integers(0, 90)) * 777_777, last_end.get(queue, 0))
        last_end[queue] = int(end[i])
    opcode = program.code[:, word.OPCODE]
    zero = np.zeros(count, np.int64)
    return Timeline(
        head_fs=head, start_fs=start, issue_end_fs=issue_end, end_fs=end,
        stall_spad_fs=np.where(np.isin(opcode, (4, 5)), (issue_end - start) // 5, 0), stall_dram_fs=zero,
        busy_fs=issue_end - start,
        macs=np.where(opcode == Matmul.OPCODE, 16 * 16 * 32, 0), vector_ops=np.where(opcode == Vector.OPCODE, 128, 0),
        dram_read_bytes=np.where(np.isin(opcode, (Load.OPCODE, HostLoad.OPCODE)), 256, 0),
        dram_write_bytes=np.where(np.isin(opcode, (Store.OPCODE, HostStore.OPCODE)), 256, 0),
        spad_read_bytes=rng.integers(0, 999, count), spad_write_bytes=rng.integers(0, 999, count),
        acc_bytes=np.where(opcode == Matmul.OPCODE, 2048, 0), dram_activates=rng.integers(0, 3, count),
        completion_order=np.argsort(end, kind="stable"), period_fs=period_fs, total_fs=int(end.max()),
        counters={"dram_bursts": 12},
    )  # fmt: skip


@pytest.fixture(scope="session")
def make_case() -> Callable[..., Case]:
    """(program, timeline, target) of a random program."""

    def make(
        count: int = 200, seed: int = 0, target: str = "snapdragon-x-elite", hosts: bool = False, fallback_us: float = 0
    ) -> Case:
        machine = Target.load(target)
        if fallback_us:
            machine = replace(machine, host=replace(machine.host, fallback_us=fallback_us))
        program = _program(count, seed, hosts)
        return program, _timeline(program, seed, machine), machine

    return make


@pytest.fixture(scope="session")
def hostile() -> str:
    return HOSTILE
