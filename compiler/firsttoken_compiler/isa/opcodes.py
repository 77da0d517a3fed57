"""The table of instructions, and decoding by opcode or mnemonic."""

import numpy as np

from firsttoken_compiler.errors import ProgramError
from firsttoken_compiler.isa import word
from firsttoken_compiler.isa.dma import Gather, Load, Store
from firsttoken_compiler.isa.host import HostLoad, HostRun, HostStore
from firsttoken_compiler.isa.instruction import REGION_COLUMNS, Instruction
from firsttoken_compiler.isa.matmul import Matmul
from firsttoken_compiler.isa.types import parse_queue
from firsttoken_compiler.isa.vector import Vector

INSTRUCTIONS: tuple[type[Instruction], ...] = (Load, Store, Gather, Matmul, Vector, HostLoad, HostRun, HostStore)
BY_OPCODE = {cls.OPCODE: cls for cls in INSTRUCTIONS}
BY_MNEMONIC = {cls.MNEMONIC: cls for cls in INSTRUCTIONS}


def decode(row: np.ndarray) -> Instruction:
    """The instruction of an encoded row; raises ProgramError for an unknown opcode or a malformed field."""
    opcode = int(row[word.OPCODE])
    if opcode not in BY_OPCODE:
        raise ProgramError(f"unknown opcode {opcode}; known: {', '.join(map(str, BY_OPCODE))}")
    try:
        return BY_OPCODE[opcode].from_row(row)
    except ValueError as error:
        raise ProgramError(f"malformed {BY_OPCODE[opcode].MNEMONIC} instruction: {error}") from error


def parse(line: str) -> Instruction:
    """The instruction of a line of a listing; inverse of `str`. Raises ProgramError naming the bad word."""
    words = line.split()
    if len(words) < 2 or words[1] not in BY_MNEMONIC:
        raise ProgramError(f"expected 'queue mnemonic ...' with one of {', '.join(BY_MNEMONIC)}, got {line!r}")
    try:
        return BY_MNEMONIC[words[1]].from_text([f"queue={parse_queue(words[0])}", *words[2:]])
    except (ValueError, KeyError) as error:
        raise ProgramError(f"cannot parse {line!r}: {error}") from error


def regions(code: np.ndarray) -> np.ndarray:
    """Footprints of all instructions, int64 `[regions, len(REGION_COLUMNS)]`, ordered by instruction."""
    parts = [np.zeros((0, len(REGION_COLUMNS)), np.int64)]
    for cls in INSTRUCTIONS:
        rows = np.flatnonzero(code[:, word.OPCODE] == cls.OPCODE)
        parts.append(cls.regions(rows, code[rows]))
    table = np.concatenate(parts)
    return np.take(table, np.argsort(table[:, 0], kind="stable"), axis=0)
