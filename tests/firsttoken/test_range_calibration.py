"""Ranges by onnxruntime's calibrators, and the static scales that programs take from them."""

from __future__ import annotations

import io
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

from firsttoken import RunOptions, Target, execution
from firsttoken.act_ranges import ActRanges
from firsttoken.api import compile as compile_student
from firsttoken.api import compile_subject, execute, simulate
from firsttoken.generation import ort_session, token_feeds
from firsttoken.range_calibration import METHODS, calibrate, calibrate_file, calibrate_text, read_samples
from firsttoken.student import StudentConfig
from firsttoken.subject import Built, subject_of
from firsttoken_compiler.errors import OptionError
from firsttoken_compiler.isa.program import Program
from firsttoken_models.registry import PROVIDER
from firsttoken_models.weights import write_random_weights

TARGETS = [Target.load(name) for name in ("snapdragon-x-elite", "systolic-128")]
IDS = [[5, 77, 21, 8, 9, 1], [3, 99, 14, 60, 2, 2]]
INT8 = RunOptions(weights="int8", group="channel")


def built(config: StudentConfig, folder: Path) -> Built:
    return Built(PROVIDER, config, write_random_weights(config, folder))


def ranges_for(subject: Built, method: str = "minmax") -> ActRanges:
    return calibrate(subject.open(6, 0), method, [token_feeds(ids) for ids in IDS])  # type: ignore[arg-type]


def test_minmax_is_numpys_on_every_tensor_that_products_read(qwen2: StudentConfig, tmp_path: Path) -> None:
    subject = built(qwen2, tmp_path)
    found = ranges_for(subject)
    assert len(found.ranges) == 4 * qwen2.layers + 1
    model = PROVIDER.graph(qwen2, tokens=6, past=0, weights=subject.weights)
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in found.ranges)
    assert subject.weights is not None
    session = ort_session(model, subject.weights, threads=1)
    for name, (low, high) in found.ranges.items():
        arrays = [session.run([name], token_feeds(ids))[0] for ids in IDS]
        largest = max(float(np.abs(array).max()) for array in arrays)
        assert (-low, high) == pytest.approx((largest, largest), rel=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_gives_the_same_tensors_and_no_wider_ranges(
    llama: StudentConfig, tmp_path: Path, method: str
) -> None:
    subject = built(llama, tmp_path)
    widest, found = ranges_for(subject), ranges_for(subject, method)
    assert set(found.ranges) == set(widest.ranges)
    for (name, magnitude), (_, most) in zip(found.magnitudes(), widest.magnitudes(), strict=True):
        assert 0.1 * most < magnitude <= 1.01 * most, name


def folds(program: Program) -> int:
    """Reductions to the largest magnitude, which a scale per token takes."""
    return sum(str(kernel).startswith("max<- abs") for kernel in program.kernels)


@pytest.mark.parametrize("acts", ["int8", "int16"])
@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_programs_fold_nothing_and_stay_near(
    qwen2: StudentConfig, tmp_path: Path, target: Target, acts: str
) -> None:
    subject = built(qwen2, tmp_path)
    dynamic = replace(INT8, acts=acts)
    static = replace(dynamic, ranges=ranges_for(subject).magnitudes())
    programs = [compile_subject(subject, target, 6, 0, options) for options in (dynamic, static)]
    assert folds(programs[0]) > 0
    assert folds(programs[1]) == 0
    assert [program.meta["acts_range"] for program in programs] == ["dynamic", "static"]
    machines = [execution.load(p, simulate(p, target), subject.open(6, 0), target) for p in programs]
    exact, near = (machine.run(token_feeds(IDS[0]))["logits"].ravel() for machine in machines)
    assert exact @ near / np.linalg.norm(exact) / np.linalg.norm(near) > 0.999
    assert len(programs[1].ops) < len(programs[0].ops)  # what follows a product is quantised as it leaves it


@pytest.mark.parametrize(
    "options",
    [
        RunOptions(weights="int8", norm_cache="fp16"), RunOptions(weights="int8", norm_cache="off"),
        RunOptions(weights="int8", norm_cache="auto"), RunOptions(weights="int8", norm_cache="int16"),
        RunOptions(weights="q8_0", acts="int8"), RunOptions(weights="int8", asymmetric=True, group="32"),
    ],
    ids=["norms-fp16", "norms-off", "norms-auto", "norms-int16", "blocks", "zero-points"],
)  # fmt: skip
def test_scales_are_static_whatever_weights_and_norms_are(
    llama: StudentConfig, tmp_path: Path, options: RunOptions
) -> None:
    subject = built(llama, tmp_path)
    logits = []
    for chosen in (options, replace(options, ranges=ranges_for(subject).magnitudes())):
        program = compile_subject(subject, TARGETS[1], 6, 0, chosen)
        machine = execution.load(program, simulate(program, TARGETS[1]), subject.open(6, 0), TARGETS[1])
        logits.append(machine.run(token_feeds(IDS[0]))["logits"].ravel())
    exact, near = logits
    assert folds(program) == 0
    assert exact @ near / np.linalg.norm(exact) / np.linalg.norm(near) > 0.998


def test_ranges_of_a_prompt_serve_single_tokens(qwen2: StudentConfig, tmp_path: Path) -> None:
    subject = built(qwen2, tmp_path)
    static = replace(INT8, ranges=ranges_for(subject).magnitudes())
    assert folds(compile_subject(subject, TARGETS[1], 1, 7, static)) == 0


def test_what_programs_refuse(llama: StudentConfig, tmp_path: Path) -> None:
    subject = built(llama, tmp_path)
    ranges = ranges_for(subject).magnitudes()
    less = tuple(pair for pair in ranges if "layers.1/mlp/Mul" not in pair[0])
    with pytest.raises(OptionError, match=r"1 of the tensors .* '/model/layers.1/mlp/Mul_output_0' \(read by"):
        compile_subject(subject, TARGETS[1], 6, 0, replace(INT8, ranges=less))
    with pytest.raises(OptionError, match="--acts-range gives integer activations their scales, and --acts is fp16"):
        RunOptions(weights="fp16", ranges=ranges)
    with pytest.raises(OptionError, match="--norm-cache statistics keeps a scale per token"):
        RunOptions(norm_cache="statistics", ranges=ranges)


# --- ONNX files ---------------------------------------------------------------------------------------------


@pytest.fixture
def student(tmp_path: Path) -> Path:
    """Two products with a ReLU between them."""
    text = '<ir_version: 10, opset_import: ["" : 18]> two (float[4, 8] x) => (float[4, 6] y) {' + (
        "h = MatMul(x, w1)  r = Relu(h)  y = MatMul(r, w2) }"
    )
    model, r = onnx.parser.parse_model(text), np.random.default_rng(0)
    for name, shape in (("w1", (8, 16)), ("w2", (16, 6))):
        array = r.standard_normal(shape).astype(np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    path = tmp_path / "two.onnx"
    onnx.save(model, path)
    return path


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_a_file_with_ordinary_inputs_is_exactly_numpys(student: Path, tmp_path: Path, target: Target) -> None:
    r = np.random.default_rng(1)
    samples = r.standard_normal((5, 4, 8)).astype(np.float32)
    np.savez(tmp_path / "inputs.npz", x=samples)
    found = calibrate_file(subject_of(student), "minmax", tmp_path / "inputs.npz", None)
    assert found.samples == 5
    assert set(found.ranges) == {"x", "r"}
    assert found.ranges["x"][1] == pytest.approx(np.abs(samples).max())
    options = replace(INT8, ranges=found.magnitudes())
    program = compile_student(student, target, options=options)
    got = execute(student, target, {"x": samples[0]}, options=options)["y"]
    np.testing.assert_array_equal(got, defined(student, samples[0], dict(found.magnitudes())))
    assert [op.kind for op in program.ops].count("linear") == 2


def defined(path: Path, x: np.ndarray, ranges: dict[str, float]) -> np.ndarray:
    """The program's numbers: int8 by the static scales, int32 sums, fp32 scaling, fp16 where rows are kept."""
    from firsttoken_compiler.codegen.weights import quantise

    weights = {i.name: onnx.numpy_helper.to_array(i) for i in onnx.load(path).graph.initializer}

    def rows(values: np.ndarray, name: str) -> tuple[np.ndarray, np.float32]:
        scale = np.float32(max(ranges[name] / 127, 1e-12))
        return np.clip(np.rint(values * (np.float32(1) / scale)), -128, 127).astype(np.int32), scale

    def product(values: np.ndarray, name: str, weight: str) -> np.ndarray:
        integers, scale = rows(values, name)
        w, w_scale = quantise(weights[weight], 8, weights[weight].shape[0])
        return (integers @ w.astype(np.int32)).astype(np.float32) * scale * w_scale.astype(np.float32)

    hidden = np.maximum(product(x.astype(np.float16).astype(np.float32), "x", "w1"), np.float32(0))
    return product(hidden, "r", "w2")


def test_what_files_of_inputs_are_refused_for(student: Path, tmp_path: Path, llama: StudentConfig) -> None:
    subject, path = subject_of(student), tmp_path / "inputs.npz"
    graph = subject.open(*subject.lengths(None, None))
    with pytest.raises(OptionError, match="no such file"):
        read_samples(path, graph)
    path.write_bytes(b"no archive")
    with pytest.raises(OptionError, match=r"is not an \.npz file of arrays"):
        read_samples(path, graph)
    for arrays, message in (
        ({"z": np.zeros(3)}, "no array for input 'x'; the inputs are x"),
        ({"x": np.zeros((4, 7))}, r"input 'x' has shape \[4, 7\], a sample has \[4, 8\]"),
        ({"x": np.zeros((0, 4, 8))}, r"input 'x' has shape \[0, 4, 8\]"),
        ({"x": np.full((4, 8), "a")}, r"array 'x\.npy' has type <U1, expected numbers"),
        ({"x": np.full((4, 8), None)}, r"array 'x\.npy' has type object, expected numbers"),
    ):
        np.savez(path, **arrays)  # type: ignore[arg-type]
        with pytest.raises(OptionError, match=message):
            read_samples(path, graph)
    with zipfile.ZipFile(path, "w") as archive:
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": (1 << 40, 8)})
        archive.writestr("x.npy", header.getvalue())
    with pytest.raises(OptionError, match=r"'x\.npy' of shape \[1099511627776, 8\] is larger than its 128 bytes"):
        read_samples(path, graph)
    with pytest.raises(OptionError, match="is an ONNX file, to measure it takes a tokenizer"):
        calibrate_text(subject, "minmax", 1, 4)
    with pytest.raises(OptionError, match=r"--inputs .* is for ONNX files"):
        calibrate_file(built(llama, tmp_path), "minmax", path, None)
