"""The search of formats on students small enough to try every mix."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from firsttoken import RunOptions, api
from firsttoken.divergence import score
from firsttoken.fidelity import Reference, equipped, loaded_program
from firsttoken.generation import token_feeds
from firsttoken.matrices import groups_of, lowered, matrices_of
from firsttoken.mix_search import Budget, rules_of_groups, search
from firsttoken.prose import windows
from firsttoken.sensitivity import Weighed
from firsttoken.student import StudentConfig, WeightStore
from firsttoken.subject import Built, subject_of
from firsttoken.verbs.mix import file_text
from firsttoken.weight_rules import parse_rules
from firsttoken_compiler.errors import OptionError
from firsttoken_compiler.target.target import Target
from firsttoken_models.registry import PROVIDER
from firsttoken_models.weights import write_random_weights

TARGET = "systolic-128"
TOKENS = 8


@dataclass(frozen=True)
class Folder:
    """A student's weights and a tokenizer whose tokens are letters; satisfies `StudentFile`."""

    config: StudentConfig
    weights: WeightStore

    def content(self) -> str:
        return self.config.canonical_json()

    def float_weights(self) -> WeightStore:
        return self.weights

    def tokenizer(self) -> Letters:
        return Letters()


class Letters:
    """A tokenizer whose tokens are characters."""

    eos_ids = ()

    def encode(self, text: str) -> list[int]:
        return [ord(letter) % 128 for letter in text]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(map(chr, ids))

    def chat(self, user_text: str) -> list[int]:
        return self.encode(user_text)


def subject(config: StudentConfig, folder: Path) -> Built:
    weights = write_random_weights(config, folder / "weights", seed=3)
    return Built(PROVIDER, config, weights, Folder(config, weights))


@pytest.fixture(params=["llama", "qwen2"])
def student(request: pytest.FixtureRequest, tmp_path: Path) -> Built:
    return equipped(subject(request.getfixturevalue(request.param), tmp_path))[0]


def test_every_matrix_is_in_one_group(student: Built) -> None:
    matrices = matrices_of(student.open(TOKENS, 0), Target.load(TARGET))
    assert len(matrices) == 7 * student.config.layers + 1
    assert {m.role for m in matrices if m.layer == 1} == {
        "attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"
    }  # fmt: skip
    for blocks in (1, 2, 7):
        groups = groups_of(matrices, blocks)
        assert len(groups) == 2 * min(blocks, student.config.layers) + 1
        inside = [matrix.source for group in groups for matrix in group.matrices]
        assert sorted(inside) == sorted(matrix.source for matrix in matrices)


def test_rules_of_neighbours_are_one(student: Built) -> None:
    groups = groups_of(matrices_of(student.open(TOKENS, 0), Target.load(TARGET)), 2)
    chosen = ["int4", "int8", "int4", "int4", "int8"]
    assert [rule.text() for rule in rules_of_groups(groups, chosen)] == [
        "attn_*@0-1=int4", "ffn_*@0=int8", "ffn_*@1=int4", "output=int8",
    ]  # fmt: skip


@pytest.mark.parametrize("weights", ["int4", "int8"])
def test_matrices_in_onnxruntime_are_those_of_the_machine(student: Built, weights: str) -> None:
    """With fp16 activations the program differs from the float graph on the same weights by fp16's rounding alone."""
    target, options = Target.load(TARGET), RunOptions(weights=weights, acts="fp16", group="32")
    chosen = windows(Letters(), 1, TOKENS)
    weighed = Weighed(student, chosen)
    assert weighed.scores({}).kl.max() < 1e-9
    weighed.require(matrices_of(student.open(TOKENS, 0), target))
    low = {}
    for matrix in matrices_of(student.open(TOKENS, 0), target):
        own = weighed.arrays[matrix.source]
        made = lowered(np.ascontiguousarray(own.T if matrix.transposed else own), weights, "32")
        low[matrix.source] = np.ascontiguousarray(made.T if matrix.transposed else made)
    found = loaded_program(student, options, target, TOKENS).run(token_feeds(chosen[0].ids))["logits"][0]
    executed = score(found, Reference(student, TOKENS).logits(chosen[0]), chosen[0].following)
    predicted = weighed.scores(low)
    np.testing.assert_allclose(predicted.kl, executed.kl, rtol=0.1, atol=1e-5)
    np.testing.assert_allclose(predicted.loss, executed.loss, atol=0.02)


def test_bytes_are_those_of_the_program_and_no_mix_that_fits_is_predicted_better(
    llama: StudentConfig, tmp_path: Path
) -> None:
    student = subject(llama, tmp_path)
    options = RunOptions(weights="int4", acts="fp16", group="32")
    limit = sum(bytes_of(student, options, weights) for weights in ("int4", "int8")) / 2
    result = find(student, Budget("weight_bytes", limit, 8), options)
    assert result.cost == result.cost_predicted <= limit
    sums = [
        (sum(o.cost for o in mix), sum(o.kl for o in mix))
        for mix in itertools.product(*(row.options for row in result.groups))
    ]
    base = result.cost - sum(next(o.cost for o in row.options if o.weights == row.chosen) for row in result.groups)
    assert result.kl_predicted == pytest.approx(min(kl for cost, kl in sums if base + cost <= limit))
    assert {row.chosen for row in result.groups} == {"int4", "int8"}
    assert result.held_out.weight_bytes == result.cost
    assert result.kl_executed > 0
    text = file_text(result, result.budget)
    assert parse_rules(text.encode(), "mix.toml") == result.rules


def test_time_is_that_of_the_simulation(llama: StudentConfig, tmp_path: Path) -> None:
    student, options = subject(llama, tmp_path), RunOptions(weights="int4", acts="fp16", group="32")
    lowest, highest = (time_of(student, options, weights) for weights in ("int4", "int8"))
    budget = Budget("ttft_ms", (lowest + highest) / 2, 8)
    result = find(student, budget, options)
    assert result.cost <= budget.limit
    plain = replace(options, rules=result.rules)
    assert api.measure(student, Target.load(TARGET), 8, 0, plain)[0].ttft_ms == result.cost


def find(student: Built, budget: Budget, options: RunOptions):  # type: ignore[no-untyped-def]
    return search(student, ("int4", "int8"), budget, options, Target.load(TARGET), 2, 1, TOKENS)


def bytes_of(student: Built, options: RunOptions, weights: str) -> int:
    program = api.compile_subject(student, Target.load(TARGET), 8, 0, replace(options, weights=weights))
    return sum(tensor.nbytes for tensor in program.of_kind("weight"))


def time_of(student: Built, options: RunOptions, weights: str) -> float:
    return api.measure(student, Target.load(TARGET), 8, 0, replace(options, weights=weights))[0].ttft_ms


@pytest.mark.parametrize("kind", ["weight_bytes", "ttft_ms"])
def test_a_budget_that_nothing_keeps_is_refused_with_the_least(llama: StudentConfig, tmp_path: Path, kind: str) -> None:
    with pytest.raises(OptionError, match=r"no mix of int4, int8 keeps 0\.00"):
        find(subject(llama, tmp_path), Budget(kind, 1e-6, 8), RunOptions())  # type: ignore[arg-type]


def test_matrices_that_lie_otherwise_are_refused(student: Built) -> None:
    weighed = Weighed(student, windows(Letters(), 1, TOKENS))
    (matrix, *_) = matrices_of(student.open(TOKENS, 0), Target.load(TARGET))
    for other in (replace(matrix, source="other"), replace(matrix, k=matrix.k + 1)):
        with pytest.raises(OptionError, match="formats cannot be tried"):
            weighed.require([other])


def test_one_format_is_no_choice() -> None:
    with pytest.raises(OptionError, match="give at least 2 formats"):
        api.mix("smollm2-135m", budget=Budget("ttft_ms", 1.0), formats=["int4", "int4"])
    with pytest.raises(OptionError, match="give a student with real weights"):
        search(subject_of("deepseek-r1-distill-qwen-1.5b"), ["int4", "int8"], Budget("ttft_ms", 1.0), RunOptions(),
               Target.load(TARGET), 5, 2, 128)  # fmt: skip
