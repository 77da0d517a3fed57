"""Which weight tensors an encoder has: the names of BERT's checkpoints, matrices [K, N]."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from firsttoken.encoder import EncoderConfig

WORDS: Final = "embeddings.word_embeddings.weight"
POSITIONS: Final = "embeddings.position_embeddings.weight"
TYPES: Final = "embeddings.token_type_embeddings.weight"
TABLES: Final = (WORDS, POSITIONS, TYPES)
EMBEDDING_NORM: Final = "embeddings.LayerNorm"
SCORE_BIAS: Final = "cls.predictions.bias"


def encoder_shapes(config: EncoderConfig) -> dict[str, tuple[int, ...]]:
    """Return every weight tensor that the encoder's graph reads by name, in graph order."""
    hidden, wide = config.hidden, config.intermediate
    shapes: dict[str, tuple[int, ...]] = {WORDS: (config.vocab, hidden), POSITIONS: (config.max_positions, hidden)}
    if config.types:
        shapes[TYPES] = (config.types, hidden)
    shapes |= _norm(EMBEDDING_NORM, hidden)
    for index in range(config.layers):
        layer = f"encoder.layer.{index}"
        for name in ("query", "key", "value"):
            shapes |= _dense(f"{layer}.attention.self.{name}", hidden, hidden)
        shapes |= _dense(f"{layer}.attention.output.dense", hidden, hidden)
        shapes |= _norm(f"{layer}.attention.output.LayerNorm", hidden)
        shapes |= _dense(f"{layer}.intermediate.dense", hidden, wide)
        shapes |= _dense(f"{layer}.output.dense", wide, hidden)
        shapes |= _norm(f"{layer}.output.LayerNorm", hidden)
    if config.head == "classifier":
        shapes |= _dense("pre_classifier", hidden, hidden) | _dense("classifier", hidden, config.labels)
    if config.head == "masked_lm":
        shapes |= _dense("cls.predictions.transform.dense", hidden, hidden)
        shapes |= _norm("cls.predictions.transform.LayerNorm", hidden)
        shapes[SCORE_BIAS] = (config.vocab,)
    return shapes


def _dense(name: str, k: int, n: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (k, n), f"{name}.bias": (n,)}


def _norm(name: str, hidden: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (hidden,), f"{name}.bias": (hidden,)}
