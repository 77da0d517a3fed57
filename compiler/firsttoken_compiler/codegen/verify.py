"""The static verifier: a program that passes touches only what it may, and any legal execution equals program order."""

from functools import partial
from typing import Any, Final

import numpy as np
from numba import njit

from firsttoken_compiler.codegen.footprints import GRANULE
from firsttoken_compiler.codegen.hazards import conflict, hazards
from firsttoken_compiler.codegen.verify_host import check_calls, check_order
from firsttoken_compiler.codegen.verify_memory import check_homes, check_tensors
from firsttoken_compiler.errors import ProgramError
from firsttoken_compiler.isa import word
from firsttoken_compiler.isa.forms import Forms, forms_of
from firsttoken_compiler.isa.instruction import BITS, columns
from firsttoken_compiler.isa.matmul import TRANSPOSED
from firsttoken_compiler.isa.opcodes import BY_MNEMONIC, BY_OPCODE, decode
from firsttoken_compiler.isa.program import Program
from firsttoken_compiler.isa.types import COMPUTED, ENGINES_PER_CORE, PACKED, Dtype, Engine, Space, queue_name
from firsttoken_compiler.isa.vector import KERNEL_SHIFT
from firsttoken_compiler.target.target import Target

MAX_REPORTED: Final = 5
MAX_OFFSET: Final = 1 << 38
"""Bound of addresses and strides; with that of extents no footprint overflows 64 bits."""

_LOAD, _STORE, _GATHER, _MATMUL, _VECTOR, _HOST_LOAD, _HOST_RUN, _HOST_STORE = (
    BY_MNEMONIC[name].OPCODE
    for name in ("load", "store", "gather", "matmul", "vector", "host_load", "host_run", "host_store")
)
_ENGINE = {
    _LOAD: Engine.DMA_IN,
    _GATHER: Engine.DMA_IN,
    _STORE: Engine.DMA_OUT,
    _MATMUL: Engine.MATRIX,
    _VECTOR: Engine.VECTOR,
    _HOST_LOAD: Engine.HOST,
    _HOST_RUN: Engine.HOST,
    _HOST_STORE: Engine.HOST,
}
_ANY = tuple(Dtype)
_LANES = (*(dtype for dtype in COMPUTED if dtype is not Dtype.I4), Dtype.BOOL, Dtype.U8, Dtype.U16)
_FACTORS = (Dtype.F32, Dtype.F16, Dtype.I16, Dtype.I8)
_NIBBLES = (Dtype.I4, Dtype.U4)
_INTEGER = (Dtype.I16, Dtype.I8, *_NIBBLES)
_OPERANDS: dict[int, tuple[tuple[tuple[Space, ...], tuple[Dtype, ...]], ...]] = {
    _LOAD: (((Space.SPAD,), _ANY), ((Space.DRAM,), _ANY)),
    _STORE: (((Space.DRAM,), _ANY), ((Space.SPAD,), _ANY)),
    _GATHER: (((Space.SPAD,), _ANY), ((Space.DRAM, Space.SPAD), (Dtype.I64,)), ((Space.DRAM,), _ANY)),
    _MATMUL: (
        ((Space.ACC, Space.SPAD), (Dtype.F32, Dtype.I32)),
        ((Space.SPAD,), _FACTORS),
        ((Space.SPAD,), (*_FACTORS, *_NIBBLES)),
    ),
    _VECTOR: (
        ((Space.SPAD, Space.ACC), _LANES),
        *(((Space.SPAD, Space.ACC), (*_LANES, *PACKED)),) * (word.MAX_OPERANDS - 1),
    ),
    _HOST_LOAD: (((Space.DRAM,), _ANY),),
    _HOST_STORE: (((Space.DRAM,), _ANY),),
}
"""Spaces and element types that each operand of each opcode may have."""


def verify(program: Program, target: Target) -> None:
    """Raises ProgramError with the first few violations: instruction, its text, the value and the limit.

    Four rounds, each only on what the one before accepted: fields; the memory plan; accesses; order. Order means that
    every local read follows a write, the queues never deadlock, every hazard between queues is covered by waits, and
    calls of the host run between the loads of their operands and the stores of their results.
    """
    fields = (_check_fields, _check_operands, _check_shapes, _check_calls)
    forms = forms_of(program.code)
    for checks in (fields, (check_tensors,), (_check_accesses,), (_check_order,)):
        found = _Findings(program, forms)
        for check in checks:
            check(found, target)
        found.raise_if_any()


class _Findings:
    """Violations of one round; formats only the first few."""

    def __init__(self, program: Program, forms: Forms) -> None:
        self.program, self.forms = program, forms
        self.count = 0
        self.messages: list[str] = []

    def note(self, message: str) -> None:
        """A violation that belongs to no instruction."""
        self.count += 1
        if len(self.messages) < MAX_REPORTED:
            self.messages.append(message)

    def rows(self, bad: np.ndarray | np.bool, template: str, *values: Any) -> None:
        """A violation of every instruction where `bad` holds; `values` fill the template, arrays by instruction."""
        numbers = np.flatnonzero(bad)
        self.at(numbers, template, *(value[numbers] if isinstance(value, np.ndarray) else value for value in values))

    def alike(self, bad: Any, template: str, *values: Any) -> None:
        """The same by form; `bad` and `values` are arrays by form, what makes such an array, or the same for all."""
        if not np.any(bad):
            return
        made = [value() if callable(value) else value for value in values]
        every = [value[self.forms.of] if isinstance(value, np.ndarray) else value for value in made]
        self.rows(bad[self.forms.of], template, *every)

    def at(self, numbers: np.ndarray, template: str, *values: Any) -> None:
        """A violation of each instruction in `numbers`; `values` fill the template, arrays by position."""
        self.count += len(numbers)
        for position, number in enumerate(numbers[: MAX_REPORTED - len(self.messages)].tolist()):
            fills = (value[position] if isinstance(value, np.ndarray) else value for value in values)
            self.messages.append(f"instruction {number}: {template.format(*fills)}\n    {self.text(number)}")

    def text(self, number: int) -> str:
        """The instruction's line in a listing."""
        try:
            return str(decode(self.program.code[number]))
        except ProgramError as error:
            return f"({error})"

    def raise_if_any(self) -> None:
        """Raises ProgramError when anything was found."""
        if self.count:
            shown = f"; the first {len(self.messages)}" if self.count > len(self.messages) else ""
            raise ProgramError(
                f"the program breaks {self.count} rule{'s' if self.count > 1 else ''}{shown}:\n  "
                + "\n  ".join(self.messages)
                + "\ncompile the student again, or correct the listing that the program was made from"
            )


def _check_fields(found: _Findings, target: Target) -> None:
    program, code = found.program, found.program.code
    opcode, queue, op, signal = (code[:, column] for column in (word.OPCODE, word.QUEUE, word.OP, word.SIGNAL))
    queues, ops = program.cores * ENGINES_PER_CORE, max(1, len(program.ops))
    if not 1 <= program.cores <= target.cores:
        found.note(f"the program uses {program.cores} cores, the target has {target.cores}")
    found.rows(~np.isin(opcode, list(BY_OPCODE)), "unknown opcode {}", opcode)
    found.rows((queue < 0) | (queue >= queues), "queue {}, the program has {}", queue, queues)
    for number, engine in _ENGINE.items():
        wrong = (opcode == number) & (queue % ENGINES_PER_CORE != engine)
        found.rows(wrong, "belongs on a {} queue, is on queue {}", engine.text, queue)
    found.rows((op < 0) | (op >= ops), "operator {} of {}", op, ops)
    found.rows(~np.isin(signal, (0, 1)), "signal field is {}, not 0 or 1", signal)
    waits = code[:, word.WAITS : word.WAITS + 2 * word.MAX_WAITS].reshape(-1, word.MAX_WAITS, 2)
    bad = (waits[:, :, 0] < 0) | (waits[:, :, 0] > queues) | ((waits[:, :, 0] > 0) & (waits[:, :, 1] < 1))
    found.rows(bad.any(axis=1), "a wait names none of {} queues or a count below 1", queues)
    dims = code[:, word.DIMS : word.DIMS + 3]
    found.rows(((dims < 1) | (dims > word.MAX_EXTENT)).any(axis=1), "an extent lies outside 1 to {}", word.MAX_EXTENT)


def _check_operands(found: _Findings, _: Target) -> None:
    program = found.program
    code = program.code[found.forms.first]
    opcode, kernel = code[:, word.OPCODE], code[:, word.FLAGS] >> KERNEL_SHIFT
    is_vector = opcode == _VECTOR
    lost = is_vector & ((kernel < 0) | (kernel >= len(program.kernels)))
    found.alike(lost, "microprogram {}, the program has {}", kernel, len(program.kernels))
    sources = np.array([entry.sources for entry in program.kernels] + [0])
    required = np.where(is_vector, 1 + sources[np.where(lost | ~is_vector, -1, kernel)], 0)
    for number, rules in _OPERANDS.items():
        rows = opcode == number
        required[rows & ~is_vector] = len(rules)
        for index, (spaces, dtypes) in enumerate(rules):
            kind = code[:, word.operand_column(index)]
            allowed = [0, *(word.kind(space, dtype) for space in spaces for dtype in dtypes)]
            limit = f"{'/'.join(s.text for s in spaces)} of {'/'.join(d.text for d in dtypes)}"
            name = BY_OPCODE[number].OPERAND_NAMES[index]
            texts = partial(_kind_texts, kind)
            found.alike(rows & ~np.isin(kind, allowed), "{} is {}, allowed: {}", name, texts, limit)
    for index in range(word.MAX_OPERANDS):
        found.alike((columns(code, index)[0] == 0) & (index < required), "lacks operand {} of {}", index, required)
        far = np.any([_beyond(stride) for stride in columns(code, index)[2:]], axis=0)
        huge = far[found.forms.of] | _beyond(columns(program.code, index)[1])
        found.rows(huge, "operand {} has an address or stride beyond {}", index, MAX_OFFSET)


def _beyond(numbers: np.ndarray) -> np.ndarray:
    return (numbers > MAX_OFFSET) | (numbers < -MAX_OFFSET)


def _check_shapes(found: _Findings, _: Target) -> None:
    """What single operands cannot show: type pairs and panels of products, packed streams, the extent of a table."""
    code = found.program.code[found.forms.first]
    matmul = code[:, word.OPCODE] == _MATMUL
    accumulator, left, right, width = (columns(code, i)[c] for i, c in ((0, 0), (1, 0), (2, 0), (2, 4)))
    mixed = ~np.isin(word.dtype_of(left), _INTEGER) | ~np.isin(word.dtype_of(right), _INTEGER)
    wrong = matmul & (word.dtype_of(accumulator) == Dtype.I32) & mixed
    texts = partial(_kind_texts, left), partial(_kind_texts, right)
    found.alike(wrong, "{} x {} cannot accumulate in i32, only in f32", *texts)
    transposed = (code[:, word.FLAGS] & TRANSPOSED) != 0
    nibbles = np.isin(word.dtype_of(right), _NIBBLES)
    found.alike(matmul & transposed & nibbles, "a transposed weight operand cannot be {}", texts[1])
    found.alike(matmul & ~transposed & (width < 1), "panels of {} columns, at least 1", width)
    for index in range(1, word.MAX_OPERANDS):
        kind, step = columns(code, index)[0], columns(code, index)[4]
        odd = (code[:, word.OPCODE] == _VECTOR) & np.isin(word.dtype_of(kind), PACKED) & ~np.isin(step, (0, 1))
        found.alike(odd, "elements of operand {} are {} apart; those of less than a byte 1, or 0", index, step)
    stride, rows = columns(code, 2)[2:4]
    run = code[:, word.DIMS + 2]
    bad = (stride < run) | (rows < 1) | (stride.astype(np.float64) * rows > MAX_OFFSET)
    bad &= code[:, word.OPCODE] == _GATHER
    found.alike(bad, "table of {} rows of {} bytes, limit {}; rows of {} are read", rows, stride, MAX_OFFSET, run)


def _check_calls(found: _Findings, _: Target) -> None:
    check_calls(found)


def _kind_texts(kinds: np.ndarray) -> np.ndarray:
    """Names like `spad:f16` of operand kinds."""
    last = word.kind(len(Space) + 1, 0)
    table = np.array([f"kind {kind}" for kind in range(last + 1)], dtype=object)
    for space in Space:
        for dtype in Dtype:
            table[word.kind(space, dtype)] = f"{space.text}:{dtype.text}"
    return table[np.clip(kinds, 0, last)]


def _check_accesses(found: _Findings, target: Target) -> None:
    check_homes(found, target)
    code = found.program.code
    for index in range(word.MAX_OPERANDS):
        kind, address = columns(code[found.forms.first], index)[0], columns(code, index)[1]
        local = (kind != 0) & (word.space_of(kind) != Space.DRAM)
        element = np.where(local, np.maximum(BITS[word.dtype_of(kind)] // 8, 1), 1)
        if not np.any(element > 1):
            continue
        element = element[found.forms.of]
        found.rows(
            address % element != 0, "address {} of operand {} is not a multiple of its element of {} bytes", address,
            index, element,
        )  # fmt: skip


def _check_order(found: _Findings, _: Target) -> None:
    check_order(found)
    program, code = found.program, np.ascontiguousarray(found.program.code)
    queues = program.cores * ENGINES_PER_CORE
    enumerated = hazards(code, queues)
    number, space, granule = enumerated.unwritten.T
    names = np.array(["", *(s.text for s in Space)])[space]
    found.at(number, "reads {} at byte {}, which nothing wrote before", names, granule * GRANULE)
    clock, heads = np.full((len(code), queues), -1, np.int32), np.full(queues, -1, np.int64)
    _replay(code, clock, heads)
    blocked = heads[heads >= 0]
    if len(blocked):
        names = np.array([queue_name(q) for q in code[blocked, word.QUEUE].tolist()])
        found.at(blocked, "never starts at the head of {}: deadlock", names)
        return
    later, queue = np.nonzero(enumerated.need > clock)
    earlier = enumerated.need[later, queue]
    pairs = zip(earlier[:MAX_REPORTED].tolist(), later[:MAX_REPORTED].tolist(), strict=True)
    reasons = np.array([f"{conflict(code, i, j)}: {found.text(i)}" for i, j in pairs], dtype=object)
    found.at(later, "is not ordered after instruction {}, {}", earlier, reasons)


@njit(cache=True)
def _replay(code: np.ndarray, clock: np.ndarray, heads: np.ndarray) -> None:
    """Runs the queues in order on the waits and signals alone; fills `clock` and `heads`.

    `clock[i, q]`: the last instruction of queue q that is complete whenever i is. `heads[q]`: the instruction that
    queue q is stuck at, -1 when it ran dry. Semaphores only count up, so any order of execution ends the same.
    """
    n, queues = clock.shape
    size = np.zeros(queues + 1, np.int64)
    for i in range(n):
        size[code[i, word.QUEUE] + 1] += 1
    first = np.cumsum(size)
    members = np.empty(n, np.int64)
    filled = first[:-1].copy()
    for i in range(n):
        q = code[i, word.QUEUE]
        members[filled[q]] = i
        filled[q] += 1
    head = first[:-1].copy()
    semaphore = np.zeros(queues, np.int64)
    signaller = np.empty(n, np.int64)  # of queue q from first[q]: the instructions that signalled, in order
    moved = True
    while moved:
        moved = False
        for q in range(queues):
            while head[q] < first[q + 1]:
                i = members[head[q]]
                ready = True
                for slot in range(word.MAX_WAITS):
                    other = code[i, word.WAITS + 2 * slot] - 1
                    if other >= 0 and semaphore[other] < code[i, word.WAITS + 2 * slot + 1]:
                        ready = False
                if not ready:
                    break
                if head[q] > first[q]:
                    clock[i] = clock[members[head[q] - 1]]
                for slot in range(word.MAX_WAITS):
                    other = code[i, word.WAITS + 2 * slot] - 1
                    if other >= 0:
                        producer = signaller[first[other] + code[i, word.WAITS + 2 * slot + 1] - 1]
                        clock[i] = np.maximum(clock[i], clock[producer])
                clock[i, q] = i
                if code[i, word.SIGNAL] != 0:
                    signaller[first[q] + semaphore[q]] = i
                    semaphore[q] += 1
                head[q] += 1
                moved = True
    for q in range(queues):
        if head[q] < first[q + 1]:
            heads[q] = members[head[q]]
