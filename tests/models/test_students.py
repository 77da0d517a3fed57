"""firsttoken_models.students: exact numbers of the built-in students."""

from __future__ import annotations

from pathlib import Path

import pytest

from firsttoken.student import UnknownStudent
from firsttoken_models.students import ALIASES, DECODERS, DEEPSEEK_R1_DISTILL_QWEN_1_5B, STUDENTS, student


def test_deepseek_r1_distill_qwen_1_5b() -> None:
    config = DEEPSEEK_R1_DISTILL_QWEN_1_5B
    assert config.parameters == 1_777_088_000
    assert config.parameters - 2 * config.vocab * config.hidden == 1_310_340_608
    assert config.kv_bytes_per_token() == 28_672


PUBLISHED = {
    "smollm2-135m": 134_515_008, "smollm2-360m": 361_821_120, "smollm2-1.7b": 1_711_376_384,
    "qwen2-0.5b": 494_032_768, "qwen2-1.5b": 1_543_714_304, "qwen2.5-0.5b": 494_032_768, "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-3b": 3_085_938_688, "qwen3-0.6b": 596_049_920, "qwen3-1.7b": 1_720_574_976, "qwen3-4b": 4_022_468_096,
    "llama-3.2-1b": 1_235_814_400, "llama-3.2-3b": 3_212_749_824, "llama-3.1-8b": 8_030_261_248,
    "tinyllama-1.1b": 1_100_048_384, "phi-3.5-mini": 3_821_079_552, "deepseek-r1-distill-qwen-1.5b": 1_777_088_000,
    "minilm-l6": 22_713_216, "bert-base": 110_106_428, "distilbert": 66_955_010,
    "resnet-50": 25_557_032,
}  # fmt: skip
"""Elements of the tensors in each model's safetensors on huggingface.co, tied heads once; of ResNet-50 what the page of
torchvision.models gives."""
OUTSIDE_TABLES = {
    "qwen2.5-0.5b": 0.36, "qwen2.5-1.5b": 1.31, "qwen2.5-3b": 2.77, "qwen3-0.6b": 0.44, "qwen3-1.7b": 1.4,
    "qwen3-4b": 3.6,
}  # fmt: skip
"""Billions of parameters without embeddings, as the model cards round them."""


def test_parameters_are_the_published_ones() -> None:
    assert {name: config.parameters for name, config in STUDENTS.items()} == PUBLISHED
    for name, billions in OUTSIDE_TABLES.items():
        config = DECODERS[name]
        digits = len(str(billions).partition(".")[2])
        assert round((config.parameters - config.vocab * config.hidden) / 1e9, digits) == billions, name


def test_the_documentation_lists_them() -> None:
    page = (Path(__file__).parents[2] / "docs" / "students.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.split("|")[1:5]] for line in page.splitlines() if line.startswith("| ")][1:]
    assert rows == [[c.name, c.family, f"{c.parameters:,}", str(c.layers)] for c in STUDENTS.values()]


def test_caches_of_a_token() -> None:
    assert DECODERS["smollm2-135m"].kv_bytes_per_token() == 23_040
    assert DECODERS["llama-3.1-8b"].kv_bytes_per_token() == 131_072
    assert DECODERS["phi-3.5-mini"].kv_bytes_per_token() == 393_216


def test_every_student_says_where_it_comes_from() -> None:
    for name, config in STUDENTS.items():
        assert config.name == name
        assert any(word in config.source for word in ("config.json", "gguf", "torchvision.models"))


@pytest.mark.parametrize(
    "name",
    ["deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B", "DEEPSEEK-R1-DISTILL-QWEN-1.5B", " deepseek-r1-distill-qwen-1.5b "],
)
def test_names_in_any_case_and_with_organisation(name: str) -> None:
    assert student(name) is DEEPSEEK_R1_DISTILL_QWEN_1_5B


def test_every_alias_leads_somewhere() -> None:
    for alias, name in ALIASES.items():
        assert student(alias) is STUDENTS[name]
    assert student("Qwen/Qwen2.5-1.5B-Instruct") is STUDENTS["qwen2.5-1.5b"]
    assert student("HuggingFaceTB/SmolLM2-135M-Instruct") is STUDENTS["smollm2-135m"]
    with pytest.raises(UnknownStudent, match=r"nearest names: deepseek-r1-distill-qwen-1.5b"):
        student("deepseek-r1-distill-qwen-7b")
