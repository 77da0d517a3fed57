"""The host beside the NPU: operands by strides and types, subgraphs executed, errors of programs, time and energy."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from harness import load, make_program, make_target, store
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from firsttoken_compiler.errors import ProgramError
from firsttoken_compiler.isa.dma import dram
from firsttoken_compiler.isa.host import HostLoad, HostRun, HostStore, host_flags
from firsttoken_compiler.isa.host_call import HostCall, HostValue
from firsttoken_compiler.isa.program import OpInfo, Program
from firsttoken_compiler.isa.types import Dtype, Engine, Space, queue_index
from firsttoken_simulator.energy import energy
from firsttoken_simulator.functional import FunctionalMachine
from firsttoken_simulator.host import HostRuntime
from firsttoken_simulator.machine import simulate_program
from firsttoken_simulator.units.host import MAX_S, durations_fs

QUEUE = queue_index(0, Engine.HOST)
FLOAT, FLOAT16, DOUBLE, INT64, BOOL, UINT8, INT4, UINT4 = 1, 10, 11, 7, 9, 2, 22, 21


def model(text: str, opset: int = 21) -> bytes:
    parsed = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : {opset}, "my.own" : 1]> {text}')
    return bytes(parsed.SerializeToString())


def call(text: str, inputs: list[HostValue], outputs: list[HostValue], **changes: Any) -> HostCall:
    entry = HostCall("host.0", ("n",), "no NPU operator", tuple(inputs), tuple(outputs), 0, 0, model(text))
    return replace(entry, **changes)


def value(name: str, elem_type: int, shape: tuple[int, ...], dtype: Dtype, strides: tuple[int, ...] = ()) -> HostValue:
    row_major = tuple(int(np.prod(shape[i + 1 :])) for i in range(len(shape)))
    return HostValue(name, elem_type, shape, dtype, strides or row_major)


def computed(entry: HostCall, *operands: np.ndarray) -> list[np.ndarray]:
    """Bytes of every result."""
    state = HostRuntime((entry,)).call(0)
    for slot, operand in enumerate(operands):
        state.load(slot, np.ascontiguousarray(operand).reshape(-1).view(np.uint8))
    state.run()
    return [state.result(slot) for slot in range(len(entry.outputs))]


def identity(elem_type: str, shape: tuple[int, ...]) -> str:
    dims = ",".join(map(str, shape))
    return f"g ({elem_type}[{dims}] x) => ({elem_type}[{dims}] y) {{ y = Identity(x) }}"


# Operands and results.


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_operands_are_reached_by_strides(data: st.DataObject) -> None:
    """As numpy reaches them, whatever the axes' order, repeats of stride 0 included."""
    base = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    axes = data.draw(st.permutations(range(3)))
    view = base.transpose(axes)
    repeat = data.draw(st.integers(1, 3))
    view = np.broadcast_to(view[:, None], (view.shape[0], repeat, *view.shape[1:]))
    strides = tuple(step // 4 for step in view.strides)
    entry = call(
        identity("float", view.shape), [value("x", FLOAT, view.shape, Dtype.F32, strides)],
        [value("y", FLOAT, view.shape, Dtype.F32)],
    )  # fmt: skip
    (result,) = computed(entry, base)
    np.testing.assert_array_equal(result.view(np.float32).reshape(view.shape), view)


TYPES = {
    "float": (FLOAT, Dtype.F32), "float16": (FLOAT16, Dtype.F16), "double": (DOUBLE, Dtype.F64),
    "int64": (INT64, Dtype.I64), "bool": (BOOL, Dtype.BOOL), "uint8": (UINT8, Dtype.U8), "int32": (6, Dtype.I32),
    "int8": (3, Dtype.I8), "int16": (5, Dtype.I16), "uint16": (4, Dtype.U16), "uint32": (12, Dtype.U32),
    "uint64": (13, Dtype.U64),
}  # fmt: skip


@pytest.mark.parametrize("name", TYPES)
@settings(max_examples=10, deadline=None)
@given(st.data())
def test_every_type_of_memory_crosses_unchanged(name: str, data: st.DataObject) -> None:
    elem_type, dtype = TYPES[name]
    bits = np.uint8 if dtype is Dtype.BOOL else f"u{dtype.numpy.itemsize}"
    elements = st.integers(0, 1) if dtype is Dtype.BOOL else None
    array = data.draw(hnp.arrays(bits, (3, 5), elements=elements)).view(dtype.numpy)
    x, y = (value(side, elem_type, (3, 5), dtype) for side in "xy")
    entry = call(identity(name, (3, 5)), [x], [y])
    (result,) = computed(entry, array)
    assert result.tobytes() == array.tobytes()


def test_memory_may_hold_another_type_than_the_subgraph() -> None:
    """Values between operators are fp16 in memory, and whatever the graph says on the host."""
    entry = call(
        "g (float[4] x) => (float[4] y) { y = Mul(x, x) }",
        [value("x", FLOAT, (4,), Dtype.F16)], [value("y", FLOAT, (4,), Dtype.F16)],
    )  # fmt: skip
    (result,) = computed(entry, np.array([1.5, -2, 1000, np.inf], np.float16))
    assert result.view(np.float16).tolist() == [2.25, 4, 65504, np.inf]  # a number stays one


@pytest.mark.parametrize(
    ("name", "elem_type", "dtype", "low"), [("int4", INT4, Dtype.I4, -8), ("uint4", UINT4, Dtype.U4, 0)]
)
def test_packed_operands_are_widened_low_nibble_first(name: str, elem_type: int, dtype: Dtype, low: int) -> None:
    numbers = np.arange(low, low + 15)
    packed = np.append(numbers, 0) & 15
    data = (packed[0::2] | packed[1::2] << 4).astype(np.uint8)
    text = f"g ({name}[3,5] x) => (float[3,5] y) <float s = {{2}}> {{ y = DequantizeLinear(x, s) }}"
    entry = call(text, [value("x", elem_type, (3, 5), dtype)], [value("y", FLOAT, (3, 5), Dtype.F32)])
    (result,) = computed(entry, data)
    np.testing.assert_array_equal(result.view(np.float32), 2 * numbers)


def test_scalars_and_empty_tensors() -> None:
    entry = call(identity("int64", ()), [value("x", INT64, (), Dtype.I64)], [value("y", INT64, (), Dtype.I64)])
    (result,) = computed(entry, np.array(-7))
    assert result.view(np.int64).tolist() == [-7]
    x, y = (value(side, FLOAT, (0, 3), Dtype.F32) for side in "xy")
    empty = call(identity("float", (0, 3)), [x], [y])
    (result,) = computed(empty, np.zeros((0, 3), np.float32))
    assert result.size == 0


def test_several_results_and_an_operand_that_nothing_reads() -> None:
    entry = call(
        "g (float[4] x, float[2] unread) => (float[2] v, int64[2] i) <int64[1] k = {2}> { v, i = TopK(x, k) }",
        [value("x", FLOAT, (4,), Dtype.F32), value("unread", FLOAT, (2,), Dtype.F32)],
        [value("v", FLOAT, (2,), Dtype.F32), value("i", INT64, (2,), Dtype.I64)],
    )  # fmt: skip
    values, places = computed(entry, np.array([3, 9, 1, 5], np.float32), np.zeros(2, np.float32))
    assert values.view(np.float32).tolist() == [9, 5]
    assert places.view(np.int64).tolist() == [1, 3]


# What executes.


def test_what_onnxruntime_refuses_the_reference_evaluator_runs() -> None:
    """onnxruntime has no kernel for Softsign of float64; ONNX defines it."""
    x, y = value("x", DOUBLE, (3,), Dtype.F64), value("y", DOUBLE, (3,), Dtype.F64)
    entry = call("g (double[3] x) => (double[3] y) { y = Softsign(x) }", [x], [y])
    with pytest.raises(Exception, match="NOT_IMPLEMENTED"):
        onnxruntime.InferenceSession(entry.model, providers=["CPUExecutionProvider"])
    (result,) = computed(entry, np.array([1.0, -3.0, 0.0]))
    assert result.view(np.float64).tolist() == [0.5, -0.75, 0.0]


def test_what_neither_runs_is_an_error_that_says_what_both_said() -> None:
    entry = call(
        "g (float[3] x) => (float[3] y) { y = my.own.MakeBelieve(x) }",
        [value("x", FLOAT, (3,), Dtype.F32)], [value("y", FLOAT, (3,), Dtype.F32)],
    )  # fmt: skip
    with pytest.raises(ProgramError, match=r"neither onnxruntime \(.*MakeBelieve.*\) nor ONNX's .*MakeBelieve"):
        computed(entry, np.zeros(3, np.float32))


@pytest.mark.parametrize("data", [b"", b"\xff\xff", b"\x00" * 100])
def test_a_subgraph_that_is_none_is_an_error(data: bytes) -> None:
    x, y = value("x", FLOAT, (3,), Dtype.F32), value("y", FLOAT, (3,), Dtype.F32)
    entry = replace(call(identity("float", (3,)), [x], [y]), model=data)
    with pytest.raises(ProgramError):
        computed(entry, np.zeros(3, np.float32))


def test_a_subgraph_reads_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program file comes from anywhere; what lies beside it is not its business."""
    (tmp_path / "secret.bin").write_bytes(np.arange(3, dtype=np.float32).tobytes())
    monkeypatch.chdir(tmp_path)
    secret = onnx.TensorProto(name="w", data_type=FLOAT, dims=[3], data_location=onnx.TensorProto.EXTERNAL)
    secret.external_data.add(key="location", value="secret.bin")
    inner = onnx.parser.parse_graph("b () => (float[3] z) { z = Constant<value_floats = [0.0]>() }")
    for place in ("initializer", "attribute", "nested"):
        parsed = onnx.load_model_from_string(model("g (float[3] x) => (float[3] y) { y = Add(x, w) }"))
        if place == "initializer":
            parsed.graph.initializer.append(secret)
        else:
            constant = onnx.helper.make_node("Constant", [], ["w"])
            constant.attribute.add(name="value", type=onnx.AttributeProto.TENSOR).t.CopyFrom(secret)
            if place == "nested":
                body = onnx.GraphProto()
                body.CopyFrom(inner)
                body.node[0].attribute[0].CopyFrom(constant.attribute[0])
                constant = onnx.helper.make_node("If", ["c"], ["w"], then_branch=body, else_branch=body)
            parsed.graph.node.insert(0, constant)
        x, y = value("x", FLOAT, (3,), Dtype.F32), value("y", FLOAT, (3,), Dtype.F32)
        entry = replace(call(identity("float", (3,)), [x], [y]), model=parsed.SerializeToString())
        with pytest.raises(ProgramError, match="keeps tensor 'w' in a file"):
            computed(entry, np.zeros(3, np.float32))


# Programs that call wrongly.

ADD = call(
    "g (float[2] a, float[2] b) => (float[2] y) { y = Add(a, b) }",
    [value("a", FLOAT, (2,), Dtype.F32), value("b", FLOAT, (2,), Dtype.F32)], [value("y", FLOAT, (2,), Dtype.F32)],
)  # fmt: skip
PAIR = np.array([1, 2], np.float32).view(np.uint8)


def test_calls_and_slots_that_are_not_there() -> None:
    runtime = HostRuntime((ADD,))
    for number in (-1, 1):
        with pytest.raises(ProgramError, match=f"call {number} of the host, the program has 1"):
            runtime.call(number)
    for slot in (-1, 2):
        with pytest.raises(ProgramError, match=f"operand {slot} of call host.0, which has 2"):
            runtime.call(0).load(slot, PAIR)
    with pytest.raises(ProgramError, match=r"result 0 of call host.0, which has 0"):
        runtime.call(0).result(0)
    extra = replace(ADD, outputs=())
    state = HostRuntime((extra,)).call(0)
    state.load(0, PAIR)
    state.load(1, PAIR)
    state.run()
    with pytest.raises(ProgramError, match="result 0 of call"):
        state.result(0)


def test_operands_that_are_missing_are_named_and_do_not_last_for_a_second_run() -> None:
    state = HostRuntime((ADD,)).call(0)
    state.load(1, PAIR)
    with pytest.raises(ProgramError, match=r"call host.0 runs before its operands a are loaded"):
        state.run()
    state.load(0, PAIR)
    state.run()
    assert state.result(0).view(np.float32).tolist() == [2, 4]
    with pytest.raises(ProgramError, match=r"operands a, b are loaded"):
        state.run()


@pytest.mark.parametrize(
    ("shape", "strides"), [((3,), (1,)), ((2,), (2,)), ((2, 2), (1, 1)), ((2,), (-1,)), ((1 << 40,), (1 << 40,))]
)
def test_operands_beyond_their_bytes(shape: tuple[int, ...], strides: tuple[int, ...]) -> None:
    bad = replace(ADD, inputs=(HostValue("a", FLOAT, shape, Dtype.F32, strides), ADD.inputs[1]))
    with pytest.raises(ProgramError, match="reaches beyond its 2 elements"):
        HostRuntime((bad,)).call(0).load(0, PAIR)


def test_a_result_of_another_shape() -> None:
    bad = replace(ADD, outputs=(value("y", FLOAT, (3,), Dtype.F32),))
    with pytest.raises(ProgramError, match=r"makes y of shape \[2\], expected \[3\]"):
        computed(bad, PAIR, PAIR)


def transfer(kind: Any, address: int, nbytes: int, number: int = 0, slot: int = 0, **more: Any) -> Any:
    operand = dram(Dtype.F32, address, nbytes)
    flags = host_flags(number, slot)
    return kind(queue=QUEUE, flags=flags, dims=(1, 1, 1), operands=(operand,), **more)


def run(number: int = 0, **more: Any) -> HostRun:
    return HostRun(queue=QUEUE, flags=host_flags(number), dims=(1, 1, 1), operands=(), **more)


def called(*instructions: Any, hosts: tuple[HostCall, ...] = (ADD,)) -> Program:
    return replace(make_program(*instructions), hosts=hosts, dram_bytes=64)


def test_the_machine_runs_a_call_and_says_which_instruction_fails() -> None:
    target = make_target()
    steps = [transfer(HostLoad, 0, 8), transfer(HostLoad, 8, 8, slot=1), run(), transfer(HostStore, 16, 8)]
    machine = FunctionalMachine(called(*steps), target)
    machine.write_bytes(0, np.array([1, 2, 30, 40], np.float32))
    machine.run()
    assert machine.bytes(Space.DRAM, 0)[16:24].view(np.float32).tolist() == [31, 42]
    with pytest.raises(ProgramError, match=r"instruction 1: call host.0 runs before .*\n.*host_run"):
        FunctionalMachine(called(steps[0], *steps[2:]), target).run()
    with pytest.raises(ProgramError, match=r"instruction 3: .*result has 8 bytes, the program expects 4"):
        FunctionalMachine(called(*steps[:3], transfer(HostStore, 16, 4)), target).run()


def test_operands_are_taken_when_they_are_loaded() -> None:
    """What follows a load may overwrite its operand before the call runs."""
    twice = [transfer(HostLoad, 0, 8), transfer(HostLoad, 8, 8, slot=1), run(), transfer(HostStore, 0, 8),
             transfer(HostLoad, 0, 8), transfer(HostLoad, 8, 8, slot=1), run(), transfer(HostStore, 0, 8)]  # fmt: skip
    machine = FunctionalMachine(called(*twice), make_target())
    machine.write_bytes(0, np.array([1, 2, 30, 40], np.float32))
    machine.run()
    assert machine.bytes(Space.DRAM, 0)[:8].view(np.float32).tolist() == [61, 82]


# Time and energy.


@settings(max_examples=50, deadline=None)
@given(
    st.integers(0, 10**9), st.integers(0, 10**9), st.integers(0, 1 << 22), st.integers(0, 1 << 22),
    st.sampled_from([1e9, 3.3e10, 2e12]), st.sampled_from([7e8, 5e10]), st.sampled_from([0.0, 5.0, 123.4]),
)  # fmt: skip
def test_a_call_takes_dispatch_work_and_its_bytes(
    flops: int, nbytes: int, read: int, written: int, rate: float, bandwidth: float, fallback_us: float
) -> None:
    """fallback_us + max(flops / rate, bytes / bandwidth) + bytes in and out / bandwidth, to the clock edge."""
    target = make_target(host_flops=rate, host_bytes_per_s=bandwidth, host_fallback_us=fallback_us)
    entry = replace(ADD, flops=flops, nbytes=nbytes)
    steps = [transfer(HostLoad, 0, read), run(), transfer(HostStore, 0, written)]
    program = called(*steps, hosts=(entry,))
    expected = [read / bandwidth, fallback_us * 1e-6 + max(flops / rate, nbytes / bandwidth), written / bandwidth]
    line = simulate_program(program, target)
    np.testing.assert_allclose(line.busy_fs, np.array(expected) * 1e15, rtol=1e-12, atol=0.5)
    assert abs(int(line.busy_fs.sum()) - sum(expected) * 1e15) <= 1.5 + 1e-12 * sum(expected) * 1e15
    waits = line.total_fs - int(line.busy_fs.sum())
    assert 0 <= waits <= len(steps) * target.period_fs  # instructions start on clock edges
    assert (line.end_fs - line.start_fs == line.busy_fs).all()
    np.testing.assert_array_equal(line.dram_read_bytes, [read, 0, 0])
    np.testing.assert_array_equal(line.dram_write_bytes, [0, 0, written])


def test_calls_follow_one_another_and_overlap_the_npu() -> None:
    target = make_target(host_fallback_us=100.0)
    alone = simulate_program(called(run(), run()), target)
    assert alone.total_fs == pytest.approx(2 * 100e9, abs=2 * target.period_fs)
    beside = simulate_program(called(run(), load(4096), store(4096, 8192), run()), target)
    assert beside.total_fs == alone.total_fs
    waiting = simulate_program(called(run(signal=True), load(4096, waits=((QUEUE, 1),))), target)
    assert waiting.start_fs[1] >= waiting.end_fs[0] >= 100e9


def test_the_hosts_bytes_do_not_slow_the_npus() -> None:
    """What docs/machine.md says of contention: none."""
    target = make_target()
    npu = [load(1 << 16), load(1 << 16, 1 << 16)]
    alone = simulate_program(make_program(*npu), target)
    beside = simulate_program(called(*npu, *[transfer(HostLoad, 0, 1 << 16)] * 4), target)
    np.testing.assert_array_equal(beside.end_fs[:2], alone.end_fs)
    for name in ("dram_bursts", "dram_row_hits", "dram_row_misses", "dram_row_conflicts"):
        assert beside.counters[name] == alone.counters[name]


def test_energy_counts_the_hosts_bytes_and_the_time() -> None:
    target = make_target(host_fallback_us=100.0)
    ops = (OpInfo("erf.host", "host", ("n",), "", 0, 3),)
    program = replace(called(transfer(HostLoad, 0, 1000), run(), transfer(HostStore, 0, 24)), ops=ops)
    line = simulate_program(program, target)
    result = energy(program, line, target)
    table = target.energy
    assert result.nj("dram").tolist() == [pytest.approx(1024 * 8 * table.dram_pj_per_bit * 1e-3)]
    assert result.nj("bus").tolist() == [pytest.approx(1024 * table.bus_pj_per_byte * 1e-3)]
    assert result.nj("static").tolist() == [pytest.approx(line.total_fs * table.static_w * 1e-6)]
    for name in ("mac", "vector", "sram"):
        assert result.nj(name).tolist() == [0]


def test_calls_that_are_not_there_take_no_work_and_endless_ones_are_refused() -> None:
    target = make_target(host_flops=1e10)
    code = np.stack([run(7).encode(), run(0).encode()])
    entry = replace(ADD, flops=10**10)
    assert durations_fs(code, (entry,), target).tolist() == [20 * 10**9, 20 * 10**9 + 10**15]
    for flops in (10**10 * MAX_S, 10**300, 10**400):
        message = r"the host works for .* s, the limit is 4000 s; the longest call is that of 'n'"
        with pytest.raises(ProgramError, match=message):
            durations_fs(code, (replace(ADD, flops=flops),), target)
