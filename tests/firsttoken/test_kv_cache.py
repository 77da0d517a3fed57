"""Int8 keys and values through the whole chain: small students on both presets, what they keep, what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from firsttoken import RunOptions, Target, execution
from firsttoken.api import compile as compile_student
from firsttoken.api import compile_subject, execute, simulate
from firsttoken.generation import StaticCache
from firsttoken.kv_cache import SCALES, dequantise_rows, quantise_rows
from firsttoken.npu_session import NpuSession
from firsttoken.student import StudentConfig
from firsttoken.subject import Built, subject_of
from firsttoken_compiler.errors import OptionError
from firsttoken_models.registry import PROVIDER
from firsttoken_models.weights import write_random_weights

TARGETS = [Target.load(name) for name in ("snapdragon-x-elite", "systolic-128")]
FP16, INT8 = RunOptions(weights="fp16"), RunOptions(weights="fp16", kv_cache="int8")
PROMPT = [5, 77, 21, 8]
FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"


def session(config: StudentConfig, folder: Path, target: Target, options: RunOptions, capacity: int = 8) -> NpuSession:
    weights = write_random_weights(config, folder)
    return NpuSession(PROVIDER, config, weights, capacity, target=target, options=options)


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a.astype(np.float64), b.astype(np.float64)
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_near_the_fp16_cache_and_the_same_after_a_longer_prompt(
    qwen2: StudentConfig, target: Target, tmp_path: Path
) -> None:
    exact, npu = (session(qwen2, tmp_path, target, options) for options in (FP16, INT8))
    for found, expected in (
        (npu.prefill(PROMPT), exact.prefill(PROMPT)), (npu.decode(9, 4), exact.decode(9, 4)),
        (last := npu.decode(3, 5), exact.decode(3, 5)),
    ):  # fmt: skip
        assert 0.999 < cosine(found, expected) < 1 - 1e-7
    kept = {part: [buffer[:, :, :6].copy() for buffer in buffers] for part, buffers in npu.cache.parts.items()}
    assert cosine(npu.prefill([*PROMPT, 9, 3]), last) > 0.99999
    for part, buffers in kept.items():
        for layer, buffer in enumerate(buffers):
            again = npu.cache.parts[part][layer][:, :, :6]
            if layer == 0:  # what follows from the tokens alone is the same to the bit
                np.testing.assert_array_equal(again, buffer)
            difference = np.abs(again.astype(np.float32) - buffer.astype(np.float32)).max()
            assert difference <= (1 if again.dtype == np.int8 else 1e-2)


def test_the_first_layer_keeps_the_fp16_rows_quantised(llama: StudentConfig, tmp_path: Path) -> None:
    exact, npu = (session(llama, tmp_path, TARGETS[1], options) for options in (FP16, INT8))
    for one in (exact, npu):
        one.prefill(PROMPT)
        one.decode(9, 4)
    for part in ("key", "value"):
        integers, scales = quantise_rows(exact.cache.parts[part][0][:, :, :5])
        np.testing.assert_array_equal(npu.cache.parts[part][0][:, :, :5], integers)
        np.testing.assert_array_equal(npu.cache.parts[part + SCALES][0][:, :, :5], scales)


def test_rows_that_are_given_as_floats_are_quantised_and_come_back(llama: StudentConfig, tmp_path: Path) -> None:
    subject = Built(PROVIDER, llama, write_random_weights(llama, tmp_path))
    program = compile_subject(subject, TARGETS[1], 1, 6, INT8)
    machine = execution.load(program, simulate(program, TARGETS[1]), subject.open(1, 6), TARGETS[1])
    r = np.random.default_rng(0)
    cache = StaticCache(llama, 6)
    for buffer in (*cache.keys, *cache.values):
        buffer[...] = dequantise_rows(*quantise_rows(r.standard_normal(buffer.shape)))
    cache.length = 6
    outputs = machine.run(cache.feeds([7]))
    for layer in range(llama.layers):
        for part, buffers in (("key", cache.keys), ("value", cache.values)):
            name = f"present.{layer}.{part}"
            np.testing.assert_array_equal(outputs[name][:, :, :6], buffers[layer])
            assert outputs[name].dtype == np.float32
            assert name + SCALES not in outputs


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_half_the_bytes_and_a_scale_per_row(qwen2: StudentConfig, target: Target) -> None:
    kept = {}
    for options in (FP16, INT8):
        program = compile_student(qwen2, target, prompt=1, past=31, options=options)
        kept[options.kv_cache] = sum(tensor.nbytes for tensor in program.of_kind("kv"))
    width = qwen2.head_dim
    assert kept["int8"] * 2 * width == kept["fp16"] * (width + 2)


@pytest.mark.parametrize(
    "export", ["genai-qwen2-fp16-decode", "optimum-llama-with-past-decode", "script17-qwen2-decode-fp32-dynamic-eager"]
)
@pytest.mark.parametrize(("prompt", "past"), [(4, 0), (1, 6)])
def test_caches_of_other_exporters(export: str, prompt: int, past: int) -> None:
    path, r = FIXTURES / "routes" / export / "model.onnx", np.random.default_rng(0)
    subject, feeds = subject_of(path), {}
    for value in subject.open(*subject.lengths(prompt, past)).graph.input:
        shape = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        feeds[value.name] = r.standard_normal(shape).astype(np.float32)
        if value.type.tensor_type.elem_type == onnx.TensorProto.INT64:
            ids = r.integers(0, 8, shape) if "position" not in value.name else np.arange(past, past + prompt)[None]
            feeds[value.name] = np.ones(shape, np.int64) if "mask" in value.name else ids
    exact, near = (
        execute(path, TARGETS[1], feeds, prompt=prompt, past=past, options=options) for options in (FP16, INT8)
    )
    assert set(near) == set(exact)
    for name, array in exact.items():
        assert near[name].shape == array.shape
        assert 0.999 < cosine(near[name].ravel(), array.ravel()) < 1


def test_what_is_refused() -> None:
    with pytest.raises(OptionError, match=r"--kv-cache 'int4' is not one of fp16, int8"):
        RunOptions(kv_cache="int4")
    for path in (FIXTURES / "torch").glob("llama-*.onnx"):
        with pytest.raises(OptionError, match="the graph keeps no keys and values"):
            compile_student(path, TARGETS[1], options=RunOptions(kv_cache="int8", weights_absent=True))
