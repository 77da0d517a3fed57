"""Every wait and every signal of a compiled program is needed: without it the verifier objects, or numbers change."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from chain import PAIRS, Chain
from harness import make_target

from firsttoken.student import StudentConfig
from firsttoken_compiler.codegen.verify import verify
from firsttoken_compiler.errors import ProgramError
from firsttoken_compiler.frontend.onnx_file import from_model
from firsttoken_compiler.isa import word
from firsttoken_compiler.isa.program import Program
from firsttoken_compiler.options import resolve
from firsttoken_compiler.pipeline import compile_onnx

BLOCK = StudentConfig(
    name="block", family="qwen2", hidden=72, intermediate=136, layers=1, heads=2, kv_heads=1, head_dim=8, vocab=32,
    rope_theta=1e4, max_positions=64, rms_eps=1e-5, tie_embeddings=False, qkv_bias=True, source="made up for tests",
)  # fmt: skip
TARGET = make_target(
    scratchpad_bytes=32 << 10, matrix_rows=8, matrix_columns=8, matrix_macs_per_cycle=dict.fromkeys(PAIRS, 64)
)


@pytest.fixture(scope="module")
def block(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    """A transformer block with a cache, part of it streamed from DRAM."""
    folder = tmp_path_factory.mktemp("block")
    return Chain(BLOCK, 5, 3, resolve("int4", None, "32", None), TARGET, folder)


@pytest.fixture(scope="module")
def gemm() -> Program:
    """One MatMul of an ONNX file, in tiles of columns and along k."""
    graph = "gemm (float[1,53,150] x) => (float[1,53,70] y) { y = MatMul (x, w) }"
    text = f'<ir_version: 10, opset_import: ["" : 18]> {graph}'
    model = onnx.parser.parse_model(text)
    weights = np.random.default_rng(0).standard_normal((150, 70)).astype(np.float32)
    model.graph.initializer.append(onnx.numpy_helper.from_array(weights, "w"))
    program = compile_onnx(from_model(model, Path(), "gemm"), TARGET, resolve("int4", "int8", "32", "off"))
    assert program is not None
    return program


@pytest.fixture(scope="module")
def planes() -> Program:
    """A product on Q4_K blocks, whose tiles of weights are made by the vector unit among the products."""
    graph = "gemm (float[1,5,512] x) => (float[1,5,110] y) { y = MatMul (x, w) }"
    model = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 18]> {graph}')
    weights = np.random.default_rng(0).standard_normal((512, 110)).astype(np.float32)
    model.graph.initializer.append(onnx.numpy_helper.from_array(weights, "w"))
    program = compile_onnx(from_model(model, Path(), "gemm"), TARGET, resolve("q4_k", "fp16", "channel", "off"))
    assert program is not None
    return program


@pytest.fixture(scope="module", params=["block", "gemm", "planes"])
def program(request: pytest.FixtureRequest, block: Chain, gemm: Program, planes: Program) -> Program:
    return {"block": block.program, "gemm": gemm, "planes": planes}[request.param]


def slots(program: Program) -> Iterator[tuple[int, int]]:
    """(instruction, column) of every wait."""
    for column in range(word.WAITS, word.WAITS + 2 * word.MAX_WAITS, 2):
        yield from ((int(i), column) for i in np.flatnonzero(program.code[:, column]))


def without_wait(program: Program, instruction: int, column: int) -> Program:
    code = program.code.copy()
    code[instruction, column : column + 2] = 0
    return program.with_code(code)


def without_signal(program: Program, instruction: int) -> Program:
    code = program.code.copy()
    code[instruction, word.SIGNAL] = 0
    return program.with_code(code)


def test_no_wait_can_go(program: Program) -> None:
    verify(program, TARGET)
    found = list(slots(program))
    assert len(found) > 60
    for instruction, column in found:
        with pytest.raises(ProgramError, match=rf"instruction {instruction}: is not ordered after instruction \d+"):
            verify(without_wait(program, instruction, column), TARGET)


def test_no_signal_can_go(program: Program) -> None:
    verify(program, TARGET)
    signals = np.flatnonzero(program.code[:, word.SIGNAL])
    assert len(signals) > 60
    for instruction in signals.tolist():
        with pytest.raises(ProgramError, match=r"deadlock|is not ordered after"):
            verify(without_signal(program, instruction), TARGET)


def test_the_numbers_change_when_an_unordered_instruction_runs_early(block: Chain) -> None:
    """The verifier is not merely strict: of the orders that a lost wait allows, some compute something else."""
    program, expected = block.program, block.outputs(None)
    r = np.random.default_rng(0)
    found = list(slots(program))
    changed = 0
    picked = [found[i] for i in r.choice(len(found), 12, replace=False)]
    for instruction, column in picked:
        machine = block.machine()
        machine.run(eagerly(without_wait(program, instruction, column), instruction))
        changed += any(machine.read_tensor(name).tobytes() != values.tobytes() for name, values in expected.items())
    print(f"{changed} of {len(picked)} lost waits change numbers when the instruction runs as early as it may")
    assert changed > len(picked) // 2


def test_any_legal_order_gives_the_same_bytes(block: Chain) -> None:
    """Random orders that the semaphores allow."""
    expected = block.outputs(None)
    for seed in range(4):
        machine = block.machine()
        machine.run(legal_order(block.program, np.random.default_rng(seed)))
        for name, values in expected.items():
            assert machine.read_tensor(name).tobytes() == values.tobytes(), (seed, name)


def eagerly(program: Program, instruction: int) -> np.ndarray:
    """A legal order in which `instruction` runs as soon as its queue and its waits let it."""
    code, queue = program.code, int(program.code[instruction, word.QUEUE])
    before = [i for i in range(instruction) if code[i, word.QUEUE] == queue]
    return _schedule(code, lambda ready: min(ready, key=lambda i: (i not in before and i != instruction, i)))


def legal_order(program: Program, r: np.random.Generator) -> np.ndarray:
    """A random order that the semaphores allow."""
    return _schedule(program.code, lambda ready: int(r.choice(ready)))


def _schedule(code: np.ndarray, choose: Callable[[list[int]], int]) -> np.ndarray:
    """Queues in order, an instruction once its waits hold; `choose` among the heads that may run."""
    queues = {int(q): np.flatnonzero(code[:, word.QUEUE] == q).tolist()[::-1] for q in np.unique(code[:, word.QUEUE])}
    count = dict.fromkeys(range(64), 0)
    order: list[int] = []
    while any(queues.values()):
        ready = [q[-1] for q in queues.values() if q and _may_run(code[q[-1]], count)]
        assert ready, "deadlock"
        chosen = choose(ready)
        queue = int(code[chosen, word.QUEUE])
        queues[queue].pop()
        count[queue] += int(code[chosen, word.SIGNAL])
        order.append(chosen)
    return np.array(order)


def _may_run(row: np.ndarray, count: dict[int, int]) -> bool:
    waits = row[word.WAITS : word.WAITS + 2 * word.MAX_WAITS].reshape(-1, 2).tolist()
    return all(count[q - 1] >= value for q, value in waits if q)


def test_completion_order_is_one_of_the_legal_orders(block: Chain) -> None:
    code, place = block.program.code, np.argsort(block.timeline.completion_order)
    for i, column in slots(block.program):
        queue, value = (int(x) for x in code[i, column : column + 2])
        signals = np.flatnonzero((code[:, word.QUEUE] == queue - 1) & (code[:, word.SIGNAL] > 0))
        assert place[signals[value - 1]] < place[i]


