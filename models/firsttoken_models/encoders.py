"""The built-in encoders: dimensions only, each with the line that says where they come from."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from firsttoken.encoder import EncoderConfig

BERT_BASE: Final = EncoderConfig(
    name="bert-base", family="bert", hidden=768, intermediate=3072, layers=12, heads=12, vocab=30522, max_positions=512,
    types=2, norm_eps=1e-12, head="masked_lm", unread=590_592 + 1_538,
    source="config.json of google-bert/bert-base-uncased; its pooler and next-sentence head are not read",
)  # fmt: skip
MINILM_L6: Final = replace(
    BERT_BASE, name="minilm-l6", hidden=384, intermediate=1536, layers=6, head="mean", unread=147_840,
    source="config.json and modules.json of sentence-transformers/all-MiniLM-L6-v2; its pooler is not read",
)  # fmt: skip
DISTILBERT: Final = replace(
    BERT_BASE, name="distilbert", family="distilbert", layers=6, types=0, head="classifier", labels=2, unread=0,
    source="config.json of distilbert/distilbert-base-uncased-finetuned-sst-2-english",
)  # fmt: skip

ENCODERS: Final = {encoder.name: encoder for encoder in (MINILM_L6, BERT_BASE, DISTILBERT)}
