"""firsttoken.npu_session: small students with random weights on the functional machine, beside onnxruntime."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import workers

from firsttoken import CostModel, RunOptions, Target
from firsttoken.answer import Agreement, Recorder, agreement, equal_prefix, forced
from firsttoken.generation import OrtSession, greedy
from firsttoken.npu_session import NpuSession
from firsttoken.student import LayerConfig, StudentConfig
from firsttoken_models.registry import PROVIDER
from firsttoken_models.weights import write_random_weights

TARGET = Target.load("systolic-128")
FP16 = RunOptions(weights="fp16")
PROMPT = [5, 77, 21, 8]


def sessions(
    config: StudentConfig, folder: Path, options: RunOptions = FP16, capacity: int = 10
) -> tuple[NpuSession, OrtSession]:
    weights = write_random_weights(config, folder)
    npu = NpuSession(PROVIDER, config, weights, capacity, target=TARGET, options=options)
    return npu, OrtSession(PROVIDER, config, weights, capacity, threads=1)


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def measured(config: StudentConfig, folder: Path, options: RunOptions) -> Agreement:
    npu, reference = sessions(config, folder, options)
    recorded, expected = Recorder(npu, "npu", 6, None), Recorder(reference, "ort", 6, None)
    tokens = greedy(expected, PROMPT, 6, ())
    prefix = equal_prefix(greedy(recorded, PROMPT, 6, ()), tokens)
    logits = forced(npu, len(PROMPT), tokens, recorded.logits[: prefix + 1], len(expected.logits))
    return agreement(prefix, len(tokens), logits, expected.logits)


@pytest.mark.parametrize("student", ["llama", "qwen2", "qwen3"])
def test_same_answer_as_onnxruntime(student: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    found = measured(request.getfixturevalue(student), tmp_path, FP16)
    assert found.logits_cosine_min > 0.9999
    assert (found.equal_prefix_tokens, found.next_token_agreement, found.steps) == (6, 1.0, 6)


def test_layers_that_differ_in_width_and_bits(uneven: StudentConfig, tmp_path: Path) -> None:
    layers = (uneven.per_layer[0], LayerConfig(6, 2, 32, 4), uneven.per_layer[2])
    found = measured(replace(uneven, per_layer=layers), tmp_path, RunOptions(weights="int8"))
    assert found.logits_cosine_min > 0.9
    assert found.steps == 6


def test_one_key_head(llama: StudentConfig, tmp_path: Path) -> None:
    assert measured(replace(llama, kv_heads=1), tmp_path, FP16).logits_cosine_min > 0.9999


def test_a_second_prompt_forgets_the_first(llama: StudentConfig, tmp_path: Path) -> None:
    npu, _ = sessions(llama, tmp_path)
    first = greedy(npu, PROMPT, 4, ())
    greedy(npu, [1, 2, 3], 5, ())
    assert greedy(npu, PROMPT, 4, ()) == first


def test_decode_equals_a_longer_prompt(qwen2: StudentConfig, tmp_path: Path) -> None:
    npu, _ = sessions(qwen2, tmp_path)
    npu.prefill(PROMPT)
    decoded = npu.decode(9, 4)
    assert cosine(decoded, npu.prefill([*PROMPT, 9])) > 0.9999


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_integers_stay_near(llama: StudentConfig, tmp_path: Path, weights: str) -> None:
    npu, reference = sessions(llama, tmp_path, RunOptions(weights=weights, group="32"))
    assert cosine(npu.prefill(PROMPT), reference.prefill(PROMPT)) > {"int8": 0.99, "int4": 0.9}[weights]


def test_cost_model_in_several_processes(llama: StudentConfig, qwen2: StudentConfig) -> None:
    model = CostModel(TARGET, prompt=4)
    found = model.exact_many([llama, qwen2, llama], jobs=2)
    assert found[0] == found[2] != found[1]
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        assert pool.submit(workers.estimate, model, llama).result() == (found[0], [])


def test_bits_of_one_layer_change_its_cost_alone(llama: StudentConfig) -> None:
    base = CostModel(TARGET, prompt=4, options=RunOptions(weights="int8")).exact(llama)
    less = CostModel(TARGET, prompt=4, options=RunOptions(weights="int8", layer_bits=(0, 4))).exact(llama)
    assert less.weight_bytes < base.weight_bytes
    bytes_of = {
        layer.name: (layer.dram_bytes, other.dram_bytes)
        for layer, other in zip(base.by_layer, less.by_layer, strict=True)
    }
    assert bytes_of["layers.1"][0] > bytes_of["layers.1"][1]
    assert bytes_of["layers.0"][0] == bytes_of["layers.0"][1]
    assert less.macs == base.macs


def test_prompts_of_several_lengths_are_served_without_a_new_allocation(llama: StudentConfig, tmp_path: Path) -> None:
    """Programs of all lengths run in one memory, weights are stored once, and answers are those of sessions alone."""
    prompts = [[5, 77, 21, 8], [9, 3], [30, 31, 32, 33, 34, 35], [9, 3], [5, 77, 21, 8]]
    npu, _ = sessions(llama, tmp_path)
    npu.prepare(len(prompt) for prompt in prompts)
    prepared = npu.pool.use
    answers = [greedy(npu, prompt, 4, ()) for prompt in prompts]
    served = npu.pool.use
    assert served.allocations == prepared.allocations == 3  # DRAM, scratchpad, accumulators
    assert served.allocated_bytes == prepared.allocated_bytes
    assert served.requests > prepared.requests
    assert served.reuse > prepared.reuse > 1
    assert served.fragmentation < 0.25
    for prompt, answer in zip(prompts[:3], answers[:3], strict=True):
        assert greedy(sessions(llama, tmp_path)[0], prompt, 4, ()) == answer
    assert answers[3:] == [answers[1], answers[0]]


def test_a_longer_prompt_grows_the_memory_and_keeps_the_weights(llama: StudentConfig, tmp_path: Path) -> None:
    npu, reference = sessions(replace(llama, max_positions=512), tmp_path, capacity=450)
    short = npu.prefill(PROMPT)
    before = npu.pool.use.allocations
    assert cosine(npu.prefill([7] * 400), reference.prefill([7] * 400)) > 0.9999
    assert npu.pool.use.allocations > before
    np.testing.assert_array_equal(npu.prefill(PROMPT), short)
    assert npu.pool.use.allocations == before + 1
