"""Hazards against a walk over single granules, and what is kept of the last code."""

import numpy as np
import pytest

from firsttoken_compiler.codegen import hazards as module
from firsttoken_compiler.codegen.hazards import GRANULE, hazards
from firsttoken_compiler.isa import word
from firsttoken_compiler.isa.dma import Load, Store
from firsttoken_compiler.isa.opcodes import regions
from firsttoken_compiler.isa.types import ENGINES_PER_CORE, Dtype, Engine, Space


def code_of(rng: np.random.Generator, count: int, cores: int) -> np.ndarray:
    """Loads and stores of strided rows that overlap in part, on the queues of several cores."""
    code = np.zeros((count, word.WIDTH), np.int64)
    sides = {Load.OPCODE: (Space.SPAD, Space.DRAM), Store.OPCODE: (Space.DRAM, Space.SPAD)}
    for row in code:
        opcode = int(rng.choice(list(sides)))
        engine = Engine.DMA_IN if opcode == Load.OPCODE else Engine.DMA_OUT
        row[word.OPCODE] = opcode
        row[word.QUEUE] = int(rng.integers(cores)) * ENGINES_PER_CORE + int(engine)
        row[word.DIMS : word.DIMS + 3] = rng.integers(1, 4), rng.integers(1, 5), rng.integers(1, 3000)
        for index, space in enumerate(sides[opcode]):
            at = word.operand_column(index)
            strides = rng.choice([0, 64, 200, 1024, -640, 6000], 2)
            row[at : at + 4] = word.kind(space, Dtype.I8), rng.integers(40_000, 90_000), *strides
    return code


def walked(code: np.ndarray, queues: int) -> np.ndarray:
    """`need` by the last writer and the last readers of every granule."""
    need = np.full((len(code), queues), -1)
    writer: dict[tuple[int, ...], int] = {}
    readers: dict[tuple[int, ...], dict[int, int]] = {}
    queue = code[:, word.QUEUE].tolist()
    for i, write, space, at, c0, s0, c1, s1, c2, s2, run in sorted(regions(code).tolist(), key=lambda r: r[:2]):
        core = -1 if space == Space.DRAM else queue[i] // ENGINES_PER_CORE
        starts = [at + a * s0 + b * s1 + c * s2 for a in range(c0) for b in range(c1) for c in range(c2)]
        for granule in {g for s in starts for g in range(s // GRANULE, (s + run - 1) // GRANULE + 1)}:
            key = (space, core, granule)
            last = writer.get(key, -1)
            before = [last] if last >= 0 else []
            if write:
                before += [user for user in readers.get(key, {}).values() if user > last]
                writer[key] = i
            else:
                readers.setdefault(key, {})[queue[i]] = i
            for other in before:
                if queue[other] != queue[i]:
                    need[i, queue[other]] = max(need[i, queue[other]], other)
    return need


@pytest.mark.parametrize("seed", range(8))
def test_hazards_are_those_of_a_walk_over_granules(seed: int) -> None:
    """Reads that overlap in part, writes over several of them, strides in both directions, one to three cores."""
    cores = 1 + seed % 3
    code = code_of(np.random.default_rng(seed), 150, cores)
    expected = walked(code, cores * ENGINES_PER_CORE)
    assert (expected >= 0).sum() > 50
    np.testing.assert_array_equal(hazards(code, cores * ENGINES_PER_CORE).need, expected)


def test_hazards_of_the_same_instructions_are_found_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waits, signals and operators change no hazard; anything else does."""
    calls: list[int] = []
    found = module._hazards

    def counted(code: np.ndarray, queue: np.ndarray, queues: int) -> module.Hazards:
        calls.append(len(code))
        return found(code, queue, queues)

    monkeypatch.setattr(module, "_hazards", counted)
    code = code_of(np.random.default_rng(99), 40, 1)
    first = hazards(code, ENGINES_PER_CORE)
    synchronised = code.copy()
    synchronised[:, [word.OP, word.SIGNAL, *range(word.WAITS, word.WAITS + 2 * word.MAX_WAITS)]] = 1
    assert hazards(synchronised, ENGINES_PER_CORE) is first
    assert calls == [40]
    moved = code.copy()
    moved[7, word.operand_column(0) + 1] += GRANULE
    assert hazards(moved, ENGINES_PER_CORE) is not first
    assert hazards(code, 2 * ENGINES_PER_CORE).need.shape == (40, 2 * ENGINES_PER_CORE)
    assert calls == [40, 40, 40]
