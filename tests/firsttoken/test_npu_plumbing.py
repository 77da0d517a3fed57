"""firsttoken.npu_session on a machine that is onnxruntime inside: what is fed, what is kept, and where rows go."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from numpy.typing import NDArray

from firsttoken import RunOptions, Target
from firsttoken.execution import Loaded
from firsttoken.generation import OrtSession, greedy, ort_session
from firsttoken.npu_session import MAX_PROMPTS, NpuSession
from firsttoken.student import StudentConfig, WeightStore
from firsttoken_compiler.isa.program import Program, Tensor
from firsttoken_compiler.isa.types import Dtype, Space
from firsttoken_models.registry import PROVIDER
from firsttoken_models.weights import write_random_weights

ORDER = np.arange(3)


def interface(config: StudentConfig, tokens: int, past: int) -> Program:
    """The tensors that a compiled graph has: caches once, appended to in place, and no batch dimension."""
    shapes: dict[str, tuple[str, Dtype, tuple[int, ...]]] = {
        "input_ids": ("input", Dtype.I64, (tokens,)),
        "position_ids": ("input", Dtype.I64, (tokens,)),
        "logits": ("output", Dtype.F32, (1, config.vocab)),
    }
    if past:
        shapes["attention_mask"] = ("input", Dtype.F32, (tokens, past + tokens))
    kv = {}
    for i in range(config.layers):
        for part in ("key", "value"):
            shape = (config.layer(i).kv_heads, past + tokens, config.head_dim)
            shapes[f"present.{i}.{part}"] = ("kv", Dtype.F16, shape)
            kv[f"past_key_values.{i}.{part}"] = f"present.{i}.{part}"
    tensors = tuple(Tensor(n, k, Space.DRAM, 0, 0, d, s) for n, (k, d, s) in shapes.items())
    meta = {"prompt_tokens": tokens, "past": past, "kv": kv if past else {}}
    return Program(np.zeros((0, 1), np.int64), (), tensors, (), meta=meta)


class Machine:
    """Runs the ONNX graph on what was written, and leaves its results as a functional machine would."""

    def __init__(self, program: Program, session: Any) -> None:
        self.program, self.session = program, session
        self.memory: dict[str, NDArray[Any]] = {}

    def enter(self) -> bool:
        return False

    def write_tensor(self, name: str, array: NDArray[Any]) -> None:
        tensor = self.program.tensor(name)
        assert (array.shape, array.dtype) == (tensor.shape, tensor.dtype.numpy), name
        self.memory[name] = array.copy()

    def read_tensor(self, name: str) -> NDArray[Any]:
        return self.memory[name]

    def run(self, order: NDArray[Any]) -> None:
        assert order is ORDER
        past = self.program.meta["past"]
        feeds = {}
        for entry in self.session.get_inputs():
            name = self.program.meta["kv"].get(entry.name, entry.name)
            rows = self.memory[name][:, :past] if name != entry.name else self.memory[name]
            feeds[entry.name] = rows.reshape(entry.shape).astype(np.int64 if "ids" in name else np.float32)
        names = [entry.name for entry in self.session.get_outputs()]
        for name, array in zip(names, self.session.run(names, feeds), strict=True):
            tensor = self.program.tensor(name)
            self.memory[name] = array.reshape(tensor.shape).astype(tensor.dtype.numpy)


class Session(NpuSession):
    """Counts what is compiled."""

    compiled: list[tuple[str, int, int]]

    def _load(self, phase: str, tokens: int, past: int) -> Loaded:
        self.compiled.append((phase, tokens, past))
        weights = cast(WeightStore, self._weights)
        graph = PROVIDER.graph(self._config, tokens=tokens, past=past, weights=weights)
        program = interface(self._config, tokens, past)
        timeline: Any = SimpleNamespace(completion_order=ORDER)
        machine: Any = Machine(program, ort_session(graph, weights, threads=1))
        return Loaded(program, timeline, machine, lambda tensors: None)


@pytest.fixture
def both(tiny: StudentConfig, tmp_path: Path) -> tuple[Session, OrtSession]:
    weights = write_random_weights(tiny, tmp_path)
    target = Target.load("systolic-128")
    npu = Session(PROVIDER, tiny, weights, 12, target=target, options=RunOptions(weights="fp16"))
    npu.compiled = []
    return npu, OrtSession(PROVIDER, tiny, weights, 12, threads=1)


def test_each_step_has_the_reference_logits(both: tuple[Session, OrtSession]) -> None:
    npu, reference = both
    np.testing.assert_allclose(npu.prefill([5, 77, 21]), reference.prefill([5, 77, 21]), atol=1e-5)
    for position, token in enumerate([8, 3, 99, 1], start=3):
        expected = reference.decode(token, position)
        np.testing.assert_allclose(npu.decode(token, position), expected, atol=0.02)  # rows are kept as fp16
    assert npu.compiled == [("prefill", 3, 0), ("decode", 1, 12)]


def test_going_back_and_on_with_other_tokens(both: tuple[Session, OrtSession]) -> None:
    npu, reference = both
    npu.prefill([5, 77])
    for position, token in enumerate([8, 3, 99], start=2):
        npu.decode(token, position)
    npu.cache.rewind(3)
    expected = reference.prefill([5, 77, 8, 50])
    np.testing.assert_allclose(npu.decode(50, 3), expected, atol=0.02)


def test_programs_of_the_latest_lengths_are_kept(both: tuple[Session, OrtSession]) -> None:
    npu, _ = both
    for length in (*range(1, MAX_PROMPTS + 2), MAX_PROMPTS, 2, 1):
        npu.prompt_program(length)
    expected = [("prefill", length, 0) for length in (*range(1, MAX_PROMPTS + 2), 1)]  # 1 had gone, 2 had not
    assert npu.compiled == expected


def test_programs_serve_again(both: tuple[Session, OrtSession]) -> None:
    npu, _ = both
    first = greedy(npu, [1, 2, 3], 4, ())
    assert greedy(npu, [1, 2, 3], 4, ()) == first
    greedy(npu, [1, 2], 2, ())
    assert npu.compiled == [("prefill", 3, 0), ("decode", 1, 12), ("prefill", 2, 0)]
