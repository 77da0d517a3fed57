"""What the verifier demands of calls of the host: they exist, their operands fit, and they come in an order."""

from __future__ import annotations

import math
from typing import Protocol

import numpy as np

from firsttoken_compiler.isa import word
from firsttoken_compiler.isa.host import SLOT_BITS, HostLoad, HostRun, HostStore
from firsttoken_compiler.isa.host_call import HostCall, HostValue
from firsttoken_compiler.isa.instruction import columns
from firsttoken_compiler.isa.program import Program

_OPCODES = (HostLoad.OPCODE, HostRun.OPCODE, HostStore.OPCODE)


class Findings(Protocol):
    """Takes violations, see `verify`."""

    program: Program

    def note(self, message: str) -> None:
        """A violation that belongs to no instruction."""

    def at(self, numbers: np.ndarray, template: str, *values: object) -> None:
        """A violation of each instruction in `numbers`."""


def check_calls(found: Findings) -> None:
    """Entries and fields: shapes that memory can hold, calls and slots that exist, bytes and types of each operand."""
    hosts = found.program.hosts
    for call in hosts:
        for value, is_result in [(v, False) for v in call.inputs] + [(v, True) for v in call.outputs]:
            _check_value(found, call, value, is_result)
    code = found.program.code
    for number in np.flatnonzero(np.isin(code[:, word.OPCODE], _OPCODES)).tolist():
        flags = int(code[number, word.FLAGS])
        index, slot = flags >> SLOT_BITS, flags & ((1 << SLOT_BITS) - 1)
        if not 0 <= index < len(hosts):
            found.at(np.array([number]), "call {} of the host, the program has {}", index, len(hosts))
            continue
        _check_slot(found, number, hosts[index], slot)


def check_order(found: Findings) -> None:
    """Each call on one queue; all operands loaded before it runs, results stored after it ran."""
    program = found.program
    loaded: dict[int, set[int]] = {}
    queues: dict[int, int] = {}
    ran: set[int] = set()
    for number in np.flatnonzero(np.isin(program.code[:, word.OPCODE], _OPCODES)).tolist():
        at = np.array([number])
        opcode, queue, flags = (int(program.code[number, column]) for column in (word.OPCODE, word.QUEUE, word.FLAGS))
        index, slot = flags >> SLOT_BITS, flags & ((1 << SLOT_BITS) - 1)
        call = program.hosts[index]
        if queues.setdefault(index, queue) != queue:
            found.at(at, "call {!r} of the host is on queue {} and on queue {}", call.name, queues[index], queue)
        if opcode == HostLoad.OPCODE:
            loaded.setdefault(index, set()).add(slot)
        elif opcode == HostRun.OPCODE:
            missing = sorted(set(range(len(call.inputs))) - loaded.pop(index, set()))
            if missing:
                found.at(at, "call {!r} runs before its operands {} are loaded", call.name, missing)
            ran.add(index)
        elif index not in ran:
            found.at(at, "result {} of call {!r} is stored before it runs", slot, call.name)


def needed_bytes(value: HostValue) -> int:
    """Bytes from the first to the last element of a value in memory."""
    if math.prod(value.shape) == 0:
        return 0
    return value.dtype.nbytes(1 + sum((n - 1) * step for n, step in zip(value.shape, value.strides, strict=True)))


def _check_value(found: Findings, call: HostCall, value: HostValue, is_result: bool) -> None:
    where = f"call {call.name!r} of the host: value {value.name!r}"
    if len(value.strides) != len(value.shape) or min((*value.shape, *value.strides), default=0) < 0:
        found.note(f"{where} has shape {list(value.shape)} and strides {list(value.strides)}")
        return
    steps = [math.prod(value.shape[axis + 1 :]) for axis in range(len(value.shape))]
    if is_result and any(n > 1 and a != b for n, a, b in zip(value.shape, value.strides, steps, strict=True)):
        found.note(f"{where} of shape {list(value.shape)} has strides {list(value.strides)}; results are row-major")


def _check_slot(found: Findings, number: int, call: HostCall, slot: int) -> None:
    row = found.program.code[number]
    opcode, at = int(row[word.OPCODE]), np.array([number])
    if opcode == HostRun.OPCODE:
        if slot:
            found.at(at, "slot {} of a run, which has none", slot)
        return
    values, name = (call.inputs, "operand") if opcode == HostLoad.OPCODE else (call.outputs, "result")
    if slot >= len(values):
        found.at(at, "{} {} of call {!r}, which has {}", name, slot, call.name, len(values))
        return
    value = values[slot]
    if len(value.shape) != len(value.strides):
        return
    kind, _, nbytes, _, _ = columns(row[None], 0)
    needed = needed_bytes(value)
    if nbytes[0] != needed:
        found.at(at, "moves {} bytes, {!r} of call {!r} needs {}", nbytes, value.name, call.name, needed)
    if word.dtype_of(kind[0]) != value.dtype:
        found.at(at, "{!r} of call {!r} is {} in memory", value.name, call.name, value.dtype.text)
