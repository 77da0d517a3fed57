"""The functional machine: hand-built tiled products equal numpy exactly, in every legal order of completion."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from firsttoken_compiler.codegen.sync import insert_semaphores
from firsttoken_compiler.codegen.verify import verify
from firsttoken_compiler.codegen.weights import materialise, packed_bytes, panel_offset, quantise
from firsttoken_compiler.errors import ProgramError
from firsttoken_compiler.isa import word
from firsttoken_compiler.isa.dma import Load, Store, dram, spad
from firsttoken_compiler.isa.instruction import Instruction
from firsttoken_compiler.isa.matmul import ACCUMULATE, Matmul
from firsttoken_compiler.isa.opcodes import decode
from firsttoken_compiler.isa.program import Packing, Program, Tensor
from firsttoken_compiler.isa.types import Dtype, Engine, Operand, Space, queue_index
from firsttoken_compiler.isa.vector import INITIALISE, Vector
from firsttoken_compiler.isa.vector_kernel import VectorKernel
from firsttoken_compiler.target.target import Scratchpad, Target
from firsttoken_simulator.functional import FunctionalMachine

SCRATCHPAD = Scratchpad(bytes=1 << 16, banks=4, bank_bytes=16, alignment_bytes=64, accumulator_bytes=1 << 13)
TARGET = replace(Target.load("systolic-128"), scratchpad=SCRATCHPAD, cores=2)
DMA_IN, DMA_OUT, MATRIX, VECTOR = (
    queue_index(0, e) for e in (Engine.DMA_IN, Engine.DMA_OUT, Engine.MATRIX, Engine.VECTOR)
)
A_AT, W_AT, OUT_AT = 0, 8192, 32768
"""Scratchpad places of the double buffers; the second half of each lies `HALF` bytes on."""
HALF = 4096


@dataclass(frozen=True)
class Product:
    """y[m, n] = x[m, k] @ w[k, n] in tiles of `tile` rows, `depth` of k and one panel of columns."""

    m: int
    k: int
    n: int
    bits: int
    tile: int
    depth: int
    panel: int

    def tensors(self) -> tuple[Tensor, ...]:
        packing = Packing("w", "panels", self.k, self.n, self.panel, self.bits, self.k, False)
        dtype = Dtype.I4 if self.bits == 4 else Dtype.I8
        out: list[Tensor] = []
        for name, kind, element, shape, nbytes, recipe in (
            ("x", "input", Dtype.I8, (self.m, self.k), self.m * self.k, None),
            ("w", "weight", dtype, (self.k, self.n), packed_bytes(packing), packing),
            ("y", "output", Dtype.I32, (self.m, self.n), self.m * self.n * 4, None),
        ):
            address = -(-(out[-1].address + out[-1].nbytes) // 64) * 64 if out else 0
            out.append(Tensor(name, kind, Space.DRAM, address, nbytes, element, shape, recipe))
        return tuple(out)

    def program(self) -> Program:
        tensors = self.tensors()
        rows: list[Instruction] = []
        for step, (row, column) in enumerate(
            (row, column) for column in range(0, self.n, self.panel) for row in range(0, self.m, self.tile)
        ):
            rows += self.block(row, column, step % 2, tensors)
        code = insert_semaphores(np.stack([instruction.encode() for instruction in rows]))
        size = tensors[-1].address + tensors[-1].nbytes
        return Program(code=code, kernels=(VectorKernel.parse("s0"),), tensors=tensors, ops=(), dram_bytes=size)

    def block(self, row: int, column: int, half: int, tensors: tuple[Tensor, ...]) -> list[Instruction]:
        """One block of y: products over k in one accumulator, copied out through the scratchpad."""
        x, w, y = tensors
        assert w.packing is not None
        m, n = min(self.tile, self.m - row), min(self.panel, self.n - column)
        line = (n * self.bits + 7) // 8
        acc = Operand(Space.ACC, Dtype.I32, half * HALF, n * 4)
        out: list[Instruction] = []
        for number, first in enumerate(range(0, self.k, self.depth)):
            k, side = min(self.depth, self.k - first), (number + half) % 2 * HALF
            source = x.address + row * self.k + first
            a, at = spad(Dtype.I8, A_AT + side, 0, k), dram(Dtype.I8, source, 0, self.k)
            out.append(Load(queue=DMA_IN, dims=(1, m, k), operands=(a, at)))
            source = w.address + panel_offset(w.packing, column // self.panel) + first * line
            out.append(
                Load(queue=DMA_IN, dims=(1, 1, k * line), operands=(spad(w.dtype, W_AT + side), dram(w.dtype, source)))
            )
            operands = (acc, spad(Dtype.I8, A_AT + side, k), spad(w.dtype, W_AT + side, 0, line, n))
            out.append(Matmul(queue=MATRIX, dims=(m, n, k), flags=ACCUMULATE if first else 0, operands=operands))
        copied = spad(Dtype.I32, OUT_AT + half * HALF, 0, n * 4, 4)
        source_acc = Operand(Space.ACC, Dtype.I32, half * HALF, 0, n * 4, 4)
        out.append(Vector(queue=VECTOR, dims=(1, m, n), flags=INITIALISE, operands=(copied, source_acc)))
        to = dram(Dtype.I32, y.address + (row * self.n + column) * 4, 0, self.n * 4)
        out.append(Store(queue=DMA_OUT, dims=(1, m, n * 4), operands=(to, spad(Dtype.I32, copied.address, 0, n * 4))))
        return out


products = st.builds(
    Product,
    m=st.integers(1, 20),
    k=st.integers(1, 70),
    n=st.integers(1, 40),
    bits=st.sampled_from([4, 8]),
    tile=st.sampled_from([3, 8]),
    depth=st.sampled_from([16, 33]),
    panel=st.sampled_from([8, 16, 24]),
)
LARGE = Product(m=20, k=70, n=40, bits=8, tile=8, depth=16, panel=16)


def legal_order(code: np.ndarray, rng: np.random.Generator, eager: int = -1, held: int = -1) -> np.ndarray:
    """A random order of completion that queues and waits allow; queue `eager` first, instruction `held` last."""
    queue, signal = code[:, word.QUEUE].tolist(), code[:, word.SIGNAL].tolist()
    waits = code[:, word.WAITS : word.WAITS + 2 * word.MAX_WAITS].reshape(len(code), -1, 2).tolist()
    lines = {q: np.flatnonzero(code[:, word.QUEUE] == q).tolist() for q in set(queue)}
    semaphore = dict.fromkeys(range(max(queue) + 1), 0)
    order: list[int] = []
    while any(lines.values()):
        ready = [
            q
            for q, line in lines.items()
            if line and all(other == 0 or semaphore[other - 1] >= value for other, value in waits[line[0]])
        ]
        choices = [q for q in ready if q == eager] or [q for q in ready if lines[q][0] != held] or ready
        q = choices[rng.integers(len(choices))]
        i = lines[q].pop(0)
        semaphore[q] += signal[i]
        order.append(i)
    return np.array(order)


def prepared(product: Product, seed: int) -> tuple[FunctionalMachine, np.ndarray]:
    """A machine with random inputs and weights, and the result that numpy finds."""
    rng = np.random.default_rng(seed)
    x = rng.integers(-128, 128, (product.m, product.k)).astype(np.int8)
    w = rng.standard_normal((product.k, product.n)).astype(np.float32)
    program = product.program()
    verify(program, TARGET)
    machine = FunctionalMachine(program, TARGET)
    machine.write_tensor("x", x)
    materialise(program, {"w": w}.__getitem__, machine.write_bytes)
    q, _ = quantise(w, product.bits, product.k)
    return machine, x.astype(np.int32) @ q.astype(np.int32)


@settings(max_examples=60, deadline=None)
@given(products, st.integers(0, 2**31))
def test_tiled_product_equals_numpy_in_program_order_and_in_legal_orders(product: Product, seed: int) -> None:
    machine, expected = prepared(product, seed)
    machine.run()
    assert np.array_equal(machine.read_tensor("y"), expected)
    rng = np.random.default_rng(seed)
    for eager in (-1, DMA_IN, MATRIX, DMA_OUT):
        machine.write_tensor("y", np.zeros_like(expected))
        machine.run(legal_order(machine.program.code, rng, eager))
        assert np.array_equal(machine.read_tensor("y"), expected)


def test_every_lost_wait_of_a_large_product_is_rejected_and_most_change_the_numbers() -> None:
    machine, expected = prepared(LARGE, 1)
    program = machine.program
    x, memory = machine.read_tensor("x"), machine.bytes(Space.DRAM, 0).copy()
    rng, changed, lost = np.random.default_rng(2), 0, 0
    waits = np.argwhere(program.code[:, word.WAITS : word.WAITS + 2 * word.MAX_WAITS : 2] > 0)
    for i, slot in waits.tolist()[::3]:
        code = program.code.copy()
        queue, value = decode(code[i]).waits[slot]
        members = np.flatnonzero((code[:, word.QUEUE] == queue) & (code[:, word.SIGNAL] == 1))
        code[i, word.WAITS + 2 * slot : word.WAITS + 2 * slot + 2] = 0
        mutated = program.with_code(code)
        with pytest.raises(ProgramError, match="is not ordered after"):
            verify(mutated, TARGET)
        victim = FunctionalMachine(mutated, TARGET)
        victim.write_bytes(0, memory)
        victim.run(legal_order(code, rng, int(code[i, word.QUEUE]), int(members[value - 1])))
        lost += 1
        changed += not np.array_equal(victim.read_tensor("y"), expected)
        assert np.array_equal(victim.read_tensor("x"), x)
    print(f"lost waits {lost}, of which an adversarial order changed the result: {changed}")
    assert changed > lost * 0.9


def test_a_product_without_its_load_reads_poison() -> None:
    machine, expected = prepared(LARGE, 3)
    code = machine.program.code.copy()
    order = legal_order(code, np.random.default_rng(0))
    late = np.concatenate([order[order != 1], [1]])  # the first weight tile arrives after everything
    machine.run(late)
    assert not np.array_equal(machine.read_tensor("y"), expected)
    machine.run(order, poison=False)
    assert np.array_equal(machine.read_tensor("y"), expected)


def test_dram_persists_between_runs_and_local_memory_does_not() -> None:
    machine, _ = prepared(LARGE, 4)
    machine.run()
    first = machine.read_tensor("y")
    machine.write_tensor("x", np.zeros((LARGE.m, LARGE.k), np.int8))
    machine.run()
    assert first.any()
    assert not machine.read_tensor("y").any()


def small() -> Program:
    tensors = (
        Tensor("c", "constant", Space.DRAM, 0, 4, Dtype.F16, (2,)),
        Tensor("four", "kv", Space.DRAM, 64, 2, Dtype.I4, (3,)),
    )
    constants = {"c": np.array([1.5, -2], np.float16).view(np.uint8)}
    return Program(np.zeros((0, word.WIDTH), np.int64), (), tensors, (), constants, dram_bytes=128)


def test_constants_are_loaded_and_int4_tensors_keep_their_values() -> None:
    machine = FunctionalMachine(small(), TARGET)
    assert machine.read_tensor("c").tolist() == [1.5, -2]
    machine.write_tensor("four", np.array([-8, 7, 3], np.int8))
    assert machine.read_tensor("four").tolist() == [-8, 7, 3]
    machine.set_weights([(64, np.array([0x21, 0x03], np.uint8))])
    assert machine.read_tensor("four").tolist() == [1, 2, 3]


def test_local_memory_is_poisoned_per_core() -> None:
    machine = FunctionalMachine(replace(small(), cores=2), TARGET)
    machine.bytes(Space.SPAD, 0)[:] = 0
    assert np.isnan(machine.bytes(Space.SPAD, 1).view(np.float16)).all()
    assert np.isnan(machine.bytes(Space.ACC, 1).view(np.float32)).all()


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("c", np.zeros(3, np.float16), r"'c' is f16 \[2\], the array is float16 \[3\]"),
        ("c", np.zeros(2, np.float32), "the array is float32"),
        ("z", np.zeros(2, np.float32), "no tensor 'z'"),
    ],
)
def test_arrays_that_are_not_the_tensor_are_refused(name: str, array: np.ndarray, message: str) -> None:
    with pytest.raises(ProgramError, match=message):
        FunctionalMachine(small(), TARGET).write_tensor(name, array)


def test_limits_are_checked_before_anything_is_allocated() -> None:
    with pytest.raises(ProgramError, match="needs 1099511627776 bytes of DRAM, the limit is 34359738368"):
        FunctionalMachine(replace(small(), dram_bytes=1 << 40), TARGET)
    with pytest.raises(ProgramError, match="lacks the bytes of constant 'c'"):
        FunctionalMachine(replace(small(), constants={}), TARGET)
    with pytest.raises(ProgramError, match="bytes 120 to 136 of a DRAM of 128"):
        FunctionalMachine(small(), TARGET).write_bytes(120, np.zeros(16, np.uint8))
    code = Load(queue=DMA_IN + 5, dims=(1, 1, 8), operands=(spad(Dtype.I8, 0), dram(Dtype.I8, 0))).encode()
    with pytest.raises(ProgramError, match="reach core 1, it declares 1"):
        FunctionalMachine(small().with_code(code[None]), TARGET)


def test_an_instruction_that_cannot_execute_is_named() -> None:
    code = Load(queue=DMA_IN, dims=(1, 1, 8), operands=(spad(Dtype.I8, 0), dram(Dtype.I8, 124))).encode()
    machine = FunctionalMachine(small().with_code(np.stack([code])), TARGET)
    with pytest.raises(ProgramError, match=r"(?s)instruction 0: access to bytes 124 to 132.*core0.dma_in load"):
        machine.run()
    lost = Vector(queue=VECTOR, dims=(1, 1, 1), flags=8, operands=(spad(Dtype.I8, 0),)).encode()
    with pytest.raises(ProgramError, match="instruction 0: microprogram 4, the program has 0"):
        FunctionalMachine(small().with_code(np.stack([lost])), TARGET).run(np.array([0]))


@pytest.mark.parametrize("order", [[0, 0], [0], [0, 2]])
def test_an_order_that_is_no_permutation_is_refused(order: list[int]) -> None:
    row = Load(queue=DMA_IN, dims=(1, 1, 8), operands=(spad(Dtype.I8, 0), dram(Dtype.I8, 0))).encode()
    with pytest.raises(ProgramError, match="not a permutation of 2"):
        FunctionalMachine(small().with_code(np.stack([row, row])), TARGET).run(np.array(order))
