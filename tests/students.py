"""Students small enough to compute by hand, one per family, and one whose layers differ."""

from __future__ import annotations

import dataclasses

import pytest

from firsttoken.encoder import EncoderConfig
from firsttoken.student import LayerConfig, StudentConfig

LLAMA = StudentConfig(
    name="tiny-llama", family="llama", hidden=64, intermediate=96, layers=2, heads=4, kv_heads=2, head_dim=16,
    vocab=128, rope_theta=1e4, max_positions=64, rms_eps=1e-5, tie_embeddings=True, qkv_bias=False,
    source="made up for tests",
)  # fmt: skip
SMALL = dataclasses.replace(
    LLAMA, name="small-llama", hidden=256, intermediate=768, layers=1, kv_heads=2, head_dim=64, vocab=256
)
"""Its products have choices worth searching."""
QWEN2 = dataclasses.replace(
    LLAMA, name="tiny-qwen2", family="qwen2", head_dim=24, tie_embeddings=False, qkv_bias=True, rms_eps=1e-6
)
QWEN3 = dataclasses.replace(LLAMA, name="tiny-qwen3", family="qwen3", head_dim=24, qk_norm=True, rms_eps=1e-6)
ENCODERS = {
    head: EncoderConfig(
        name=f"tiny-{head}", family="bert", hidden=48, intermediate=96, layers=2, heads=4, vocab=128, max_positions=64,
        types=types, norm_eps=1e-12, head=head, labels=3 if head == "classifier" else 0, source="made up for tests",
    )
    for head, types in (("none", 0), ("mean", 2), ("classifier", 0), ("masked_lm", 2))
}  # fmt: skip
UNEVEN = dataclasses.replace(
    QWEN2,
    name="tiny-uneven",
    layers=3,
    per_layer=(LayerConfig(4, 2, 96), LayerConfig(6, 1, 32, 4), LayerConfig(3, 3, 64)),
)


@pytest.fixture(params=[LLAMA, QWEN2, QWEN3, UNEVEN], ids=lambda config: config.name)
def tiny(request: pytest.FixtureRequest) -> StudentConfig:
    return request.param


@pytest.fixture
def llama() -> StudentConfig:
    return LLAMA


@pytest.fixture
def qwen2() -> StudentConfig:
    return QWEN2


@pytest.fixture
def qwen3() -> StudentConfig:
    return QWEN3


@pytest.fixture
def uneven() -> StudentConfig:
    return UNEVEN
