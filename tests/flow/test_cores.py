"""Work divided over several cores: the numbers of one core and of onnxruntime, faster where the matrix unit decides."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from chain import Chain, cosine, students
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from students import QWEN2

from firsttoken.api import simulate
from firsttoken.execution import load
from firsttoken.student import StudentConfig
from firsttoken_compiler.errors import OptionError
from firsttoken_compiler.frontend.onnx_file import OnnxStudent, from_model
from firsttoken_compiler.isa import word
from firsttoken_compiler.isa.dma import Load
from firsttoken_compiler.isa.matmul import Matmul
from firsttoken_compiler.isa.program import Program
from firsttoken_compiler.isa.types import ENGINES_PER_CORE
from firsttoken_compiler.options import Precision, resolve
from firsttoken_compiler.pipeline import compile_onnx
from firsttoken_compiler.schedule.choice import CoreSplit, GraphChoice, Schedules, launch_key
from firsttoken_compiler.schedule.parts import ways
from firsttoken_compiler.target.dram_presets import dram_device
from firsttoken_compiler.target.target import Target
from firsttoken_simulator.energy import energy
from firsttoken_simulator.machine import simulate_program
from firsttoken_simulator.report.build import build_run
from firsttoken_simulator.report.document import RunDocument
from firsttoken_simulator.report.html import page
from firsttoken_simulator.report.trace import trace

STUDENT = replace(QWEN2, name="cores", layers=1, hidden=256, intermediate=320, max_positions=256)
FORMATS = {
    "fp16": resolve("fp16", None, "channel", None),
    "int4": resolve("int4", None, "32", None),
    "int8": resolve("int8", None, "channel", None),
    "q4_k": resolve("q4_k", None, "32", None),
}
PREFERENCES = {"n": ("n", "heads", "rows"), "k": ("k", "heads", "rows", "n"), "rows": ("rows", "n")}
"""Ways of launches, the first that is possible; only products have columns, only attention has heads."""


def array(size: int, cores: int = 1, device: str = "") -> Target:
    """The textbook machine with a smaller array, more cores, and a DRAM with a controller of commands."""
    base = Target.load("systolic-128")
    rates = {pair: rate * size * size // 16384 for pair, rate in base.matrix.macs_per_cycle.items()}
    matrix = replace(base.matrix, rows=size, columns=size, macs_per_cycle=rates)
    target = replace(base, name="cores", cores=cores, matrix=matrix, provenance={})
    if device:
        dram, commands = dram_device(device, channels=4)
        target = replace(target, dram=dram, dram_commands=commands)
    return target


def chain_on(
    folder: Path, precision: Precision, tokens: int, past: int, target: Target, prefer: str = "", **config: Any
) -> Chain:
    """The student on a target; with `prefer` its launches are cut as `PREFERENCES` say, else as the compiler does."""
    chain = Chain(replace(STUDENT, **config), tokens, past, precision, target, folder)
    schedules = splits(chain.student, precision, target, prefer) if prefer else None
    chain.__dict__["program"] = compile_onnx(chain.student, target, precision, schedules=schedules)
    return chain


def splits(student: OnnxStudent, precision: Precision, target: Target, prefer: str) -> Schedules:
    found: dict[Any, CoreSplit] = {}

    def observe(compiled: Any, _templates: Any) -> None:
        for launch in compiled.launches.launches:
            possible = ways(launch.spec, target, target.cores)
            way = next((way for way in PREFERENCES[prefer] if way in possible), "none")
            found[launch_key(launch.spec)] = CoreSplit(way, 1 if way == "none" else target.cores)

    compile_onnx(student, target, precision, observe=observe)
    return Schedules(splits=tuple(found.items()))


def macs_by_core(program: Program, target: Target) -> list[int]:
    macs = simulate_program(program, target).macs
    core = program.code[:, word.QUEUE] // ENGINES_PER_CORE
    return [int(macs[core == index].sum()) for index in range(program.cores)]


@pytest.mark.parametrize(
    ("name", "tokens", "past", "cores", "prefer"),
    [("fp16", 12, 0, 2, "n"), ("fp16", 12, 0, 2, "k"), ("fp16", 40, 0, 4, "rows"), ("int4", 12, 0, 2, "rows"),
     ("int4", 12, 0, 4, "k"), ("int4", 1, 7, 2, "n"), ("int8", 1, 7, 4, "k"), ("int8", 5, 3, 2, "rows"),
     ("int8", 12, 0, 4, "n")],
)  # fmt: skip
def test_numbers_are_onnxruntimes_however_launches_are_cut(
    tmp_path: Path, name: str, tokens: int, past: int, cores: int, prefer: str
) -> None:
    chain = chain_on(tmp_path, FORMATS[name], tokens, past, array(32, cores), prefer)
    assert chain.program.cores == cores
    assert min(macs_by_core(chain.program, chain.target)) > 0
    found = chain.outputs(chain.timeline.completion_order)
    for output, expected in chain.reference().items():
        assert cosine(found[output].reshape(expected.shape), expected) > (0.999 if name != "fp16" else 0.99999), output
    one = chain_on(tmp_path, FORMATS[name], tokens, past, array(32))
    for output, values in one.outputs(None).items():
        assert cosine(found[output], values) > 0.99999, output


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    students(), st.integers(1, 20), st.integers(0, 5), st.sampled_from(("fp16", "int4", "int8")),
    st.sampled_from((2, 3, 4, 6)), st.sampled_from(sorted(PREFERENCES)), st.sampled_from((8, 16, 32)),
)  # fmt: skip
def test_any_student_on_any_cores_computes_what_one_core_does(
    config: StudentConfig, tokens: int, past: int, name: str, cores: int, prefer: str, size: int
) -> None:
    outputs = []
    for target, way in ((array(size), ""), (array(size, cores), prefer)):
        with tempfile.TemporaryDirectory() as folder:
            chain = Chain(config, tokens, past, FORMATS[name], target, Path(folder))
            cut = splits(chain.student, chain.precision, target, way) if way else None
            chain.__dict__["program"] = compile_onnx(chain.student, target, chain.precision, schedules=cut)
            outputs.append(chain.outputs(chain.timeline.completion_order))
    for output, values in outputs[0].items():
        assert cosine(outputs[1][output], values) > 0.999, output


@pytest.mark.parametrize("prefer", ["n", "rows"])
def test_blocks_of_weights_are_cut_too(tmp_path: Path, prefer: str) -> None:
    chain = chain_on(tmp_path, FORMATS["q4_k"], 12, 0, array(32, 2), prefer)
    found = chain.outputs(chain.timeline.completion_order)
    for output, values in chain_on(tmp_path, FORMATS["q4_k"], 12, 0, array(32)).outputs(None).items():
        assert cosine(found[output], values) > 0.99999, output


@pytest.mark.parametrize(("cores", "acts"), [(2, "fp16"), (4, "fp16"), (2, "int8")])
def test_channels_of_convolutions_are_cut(cores: int, acts: str) -> None:
    """Two convolutions, the second one of single pixels, with a pool on core 0 between them."""
    random = np.random.default_rng(1)
    weights = {"w": (72, 6, 3, 3), "b": (72,), "v": (40, 72, 1, 1)}
    arrays = {name: random.standard_normal(shape).astype(np.float32) for name, shape in weights.items()}
    make = onnx.helper.make_node
    nodes = [
        make("Conv", ["x", "w", "b"], ["c"], "c", pads=[1, 1, 1, 1]), make("Relu", ["c"], ["r"], "r"),
        make("MaxPool", ["r"], ["p"], "p", kernel_shape=[2, 2], strides=[2, 2]), make("Conv", ["p", "v"], ["y"], "y"),
    ]  # fmt: skip
    declare = onnx.helper.make_tensor_value_info
    inits = [onnx.numpy_helper.from_array(array, name) for name, array in arrays.items()]
    made = onnx.helper.make_graph(nodes, "net", [declare("x", 1, (1, 6, 12, 10))], [declare("y", 1, None)], inits)
    model = onnx.helper.make_model(made, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    student = from_model(onnx.shape_inference.infer_shapes(model), Path(), "net")
    precision, target = resolve("int8" if acts == "int8" else "fp16", acts, "channel", None), array(16, cores)
    program = compile_onnx(student, target, precision, schedules=splits(student, precision, target, "n"))
    assert program is not None
    assert sum("n over" in op.tile for op in program.ops) == 2
    assert min(macs_by_core(program, target)) > 0
    x = random.standard_normal((1, 6, 12, 10)).astype(np.float32)
    (expected,) = onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"x": x})
    found = load(program, simulate(program, target), student, target).run({"x": x})["y"]
    assert cosine(found, expected) > (0.99999 if acts == "fp16" else 0.999)


@pytest.mark.parametrize("prefer", ["n", "k"])
def test_cores_share_the_products_of_one(tmp_path: Path, prefer: str) -> None:
    """Columns and terms change no multiply-accumulate of a product; heads change none of an attention."""
    one, two = (chain_on(tmp_path, FORMATS["int8"], 16, 0, array(32, n), prefer if n > 1 else "") for n in (1, 2))
    parts = macs_by_core(two.program, two.target)
    assert sum(parts) == sum(macs_by_core(one.program, one.target))
    assert max(parts) < 0.62 * sum(parts)


def test_partial_sums_are_added_in_the_same_operator(tmp_path: Path) -> None:
    program = chain_on(tmp_path, FORMATS["fp16"], 12, 0, array(32, 2), "k").program
    down = next(number for number, op in enumerate(program.ops) if op.tile.endswith("k over 2 cores"))
    mine = program.code[program.code[:, word.OP] == down]
    sums = [t for t in program.tensors if t.name.startswith(f"sums{down}.")]
    assert [(t.kind, t.first, t.last) for t in sums] == [("scratch", down, down)] * 2
    assert set((mine[:, word.QUEUE] // ENGINES_PER_CORE).tolist()) == {0, 1}
    assert (mine[:, word.OPCODE] == Matmul.OPCODE).any()


@pytest.mark.parametrize(
    ("device", "size", "cores", "least"), [("lpddr5x-8533-16gb-x16", 16, 2, 1.7), ("", 8, 2, 1.7), ("", 8, 4, 1.9)],
    ids=["commands", "look-ahead", "look-ahead, 4 cores"],
)  # fmt: skip
def test_a_prompt_that_the_matrix_unit_decides_is_faster(
    tmp_path: Path, device: str, size: int, cores: int, least: float
) -> None:
    one, more = (chain_on(tmp_path, FORMATS["fp16"], 64, 0, array(size, n, device)) for n in (1, cores))
    gain = one.timeline.total_cycles / more.timeline.total_cycles
    print(f"{more.program.cores} cores: expected {least}, measured {gain:.2f}")
    assert gain >= least


@pytest.mark.parametrize(("size", "device"), [(128, ""), (32, ""), (32, "lpddr5x-8533-16gb-x16")])
@pytest.mark.parametrize(("tokens", "past"), [(1, 31), (48, 0)])
def test_cores_never_make_a_student_slower(tmp_path: Path, tokens: int, past: int, size: int, device: str) -> None:
    one, two = (chain_on(tmp_path, FORMATS["int8"], tokens, past, array(size, n, device)) for n in (1, 2))
    gain = one.timeline.total_cycles / two.timeline.total_cycles
    print(f"{tokens} tokens, {size} x {size}, {device or 'look-ahead'}: {gain:.3f}, {two.program.cores} cores")
    assert gain > 0.99


def test_what_the_dram_decides_gains_little(tmp_path: Path) -> None:
    """A token of a wide student is a stream of weights, however many cores read it."""
    wide = {"hidden": 512, "intermediate": 2048, "vocab": 1024}
    device = "lpddr5x-8533-16gb-x16"
    one, two = (
        chain_on(tmp_path, FORMATS["int8"], 1, 31, array(128, n, device), "n" if n > 1 else "", **wide) for n in (1, 2)
    )
    gain = one.timeline.total_cycles / two.timeline.total_cycles
    moved = sum(int(a.sum()) for a in (two.timeline.dram_read_bytes, two.timeline.dram_write_bytes))
    share = moved / (two.timeline.total_fs / 1e15) / two.target.dram.peak_bytes_per_s
    print(f"gain {gain:.2f}, {share:.2f} of the DRAM's peak")
    assert 0.85 < gain < 1.3
    assert share <= 1


def test_cores_with_few_requests_in_flight_read_faster_together(tmp_path: Path) -> None:
    """A core's requests cover a part of the DRAM's latency: two cores stream weights nearly twice as fast."""
    wide = {"hidden": 1536, "intermediate": 6144, "vocab": 4096}  # of several tiles each, which overlap
    targets = [array(128, n, "lpddr5x-8533-16gb-x16") for n in (1, 2)]
    one, two = (
        chain_on(tmp_path, FORMATS["int8"], 1, 31, replace(t, dma=replace(t.dma, outstanding=48)), **wide)
        for t in targets
    )
    gain = one.timeline.total_cycles / two.timeline.total_cycles
    print(f"expected more than 1.2, measured {gain:.2f}, {two.program.cores} cores")
    assert two.program.cores == 2
    assert gain > 1.2


def test_weights_do_not_wait_behind_what_another_core_makes(tmp_path: Path) -> None:
    program = chain_on(tmp_path, FORMATS["int8"], 1, 7, array(32, 2), "n").program
    given = [(t.address, t.address + t.nbytes) for t in program.tensors if t.kind in ("weight", "constant", "input")]
    core = program.code[:, word.QUEUE] // ENGINES_PER_CORE
    seen = 0
    for number, op in enumerate(program.ops):
        for index in range(2) if "over 2 cores" in op.tile else ():
            part = program.code[(program.code[:, word.OP] == number) & (core == index)]
            first = int(np.argmax(part[:, word.OPCODE] != Load.OPCODE))
            sources = part[:first, word.operand_column(1) + 1].tolist()
            made = [not any(low <= at < high for low, high in given) for at in sources]
            assert made == sorted(made)
            seen += True in made and False in made
    assert seen > 2


def test_a_schedule_takes_fewer_cores_and_no_more_than_there_are(tmp_path: Path) -> None:
    chain = Chain(STUDENT, 64, 0, FORMATS["fp16"], array(8, 4), tmp_path)

    def compiled(schedules: Schedules) -> Program:
        program = compile_onnx(chain.student, chain.target, chain.precision, schedules=schedules)
        assert program is not None
        return program

    one = compile_onnx(chain.student, array(8), chain.precision)
    assert one is not None
    assert np.array_equal(compiled(Schedules(graph=GraphChoice(1))).code, one.code)
    assert compiled(Schedules(graph=GraphChoice(2))).cores == 2
    with pytest.raises(OptionError, match="over 8 cores, target cores has 4"):
        compiled(Schedules(graph=GraphChoice(8)))


def test_a_split_that_a_launch_does_not_have_is_refused(tmp_path: Path) -> None:
    chain = Chain(STUDENT, 16, 0, FORMATS["fp16"], array(32, 2), tmp_path)
    every = splits(chain.student, chain.precision, chain.target, "n").splits
    of_heads = Schedules(splits=tuple((key, CoreSplit("heads", 2)) for key, _ in every))
    with pytest.raises(OptionError, match="heads over 2 cores, and the kernel cannot be cut so: give none, rows"):
        compile_onnx(chain.student, chain.target, chain.precision, schedules=of_heads)


def test_what_was_decided_is_said(tmp_path: Path) -> None:
    lines = chain_on(tmp_path, FORMATS["fp16"], 64, 0, array(8, 2)).program.meta["cores"]
    assert "one core" in lines[0]
    assert lines[0].endswith(" compiled")
    assert any("attention heads over 2 cores" in line or "attention rows over 2 cores" in line for line in lines)
    assert any("row core 0 (it cannot be cut)" in line for line in lines)


def test_reports_say_what_each_core_did(tmp_path: Path) -> None:
    chain = chain_on(tmp_path, FORMATS["fp16"], 12, 0, array(32, 2), "n")
    program, line, target = chain.program, chain.timeline, chain.target
    run = build_run(program, line, target, energy(program, line, target))
    assert [row.core for row in run.cores] == [0, 1]
    assert sum(row.macs for row in run.cores) == run.macs
    assert sum(row.dram_read_bytes for row in run.cores) == run.dram_read_bytes
    assert sum(row.dram_write_bytes for row in run.cores) == run.dram_write_bytes
    assert all(0 < row.matrix_pct <= 100 and 0 < row.vector_pct <= 100 for row in run.cores)
    mac = sum(run.macs * target.energy.mac_pj[pair] / 1e9 for pair in ("fp16xfp16",))
    assert run.energy_by_component_mj["mac"] == pytest.approx(mac)
    assert sum(row.cycles for row in run.ops) + run.host_cycles == run.ttft_cycles
    assert RunDocument.from_json(run.to_json()).cores == run.cores
    text = page(run)
    assert "core 1: matrix unit" in text
    assert run.core_decisions[1] in text
    tracks = trace(program, line)
    assert all(name.encode() in tracks for name in ("core0.matrix", "core1.matrix", "core1.vector", "core1.dma_out"))


def test_one_core_has_no_rows_of_its_own(tmp_path: Path) -> None:
    chain = chain_on(tmp_path, FORMATS["fp16"], 12, 0, array(32))
    run = build_run(chain.program, chain.timeline, chain.target, energy(chain.program, chain.timeline, chain.target))
    assert run.cores == []
    assert run.core_decisions == []
