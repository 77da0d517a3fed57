"""firsttoken_models.students: exact numbers of the built-in students."""

from __future__ import annotations

import pytest

from firsttoken.student import UnknownStudent
from firsttoken_models.students import ALIASES, DEEPSEEK_R1_DISTILL_QWEN_1_5B, SMOLLM2_135M, STUDENTS, student


def test_deepseek_r1_distill_qwen_1_5b() -> None:
    config = DEEPSEEK_R1_DISTILL_QWEN_1_5B
    assert config.parameters == 1_777_088_000
    assert config.parameters - 2 * config.vocab * config.hidden == 1_310_340_608
    assert config.kv_bytes_per_token() == 28_672


def test_smollm2_135m() -> None:
    assert SMOLLM2_135M.parameters == 134_515_008
    assert SMOLLM2_135M.kv_bytes_per_token() == 23_040


@pytest.mark.parametrize(
    "name",
    ["deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B", "DEEPSEEK-R1-DISTILL-QWEN-1.5B", " deepseek-r1-distill-qwen-1.5b "],
)
def test_names_in_any_case_and_with_organisation(name: str) -> None:
    assert student(name) is DEEPSEEK_R1_DISTILL_QWEN_1_5B


def test_every_alias_leads_somewhere() -> None:
    for alias, name in ALIASES.items():
        assert student(alias) is STUDENTS[name]
    with pytest.raises(UnknownStudent, match=r"nearest names: deepseek-r1-distill-qwen-1.5b"):
        student("deepseek-r1-distill-qwen-7b")
