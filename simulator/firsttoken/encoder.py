"""What an encoder is to the rest of the project: its dimensions. It reads all tokens at once and has no cache."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Final

from firsttoken.student import require_positive

HEADS: Final = ("none", "mean", "classifier", "masked_lm")
"""What follows the last layer: nothing; the mean over the tokens that are not masked, normalised to length 1; two
products on the first token, ReLU between them; or the scores of all words at one position."""


@dataclass(frozen=True, slots=True)
class EncoderConfig:
    """Dimensions of an encoder like BERT: learned positions, attention both ways, LayerNorm after each sum, GELU.

    Attributes:
        name: how commands and reports call it.
        family: "bert" or "distilbert"; the other fields say in what they differ.
        hidden: width of the residual stream, in elements.
        intermediate: width of the feed-forward block.
        layers: number of layers.
        heads: heads of queries, keys and values; `hidden` is a multiple.
        vocab: rows of the word embeddings.
        max_positions: longest input, in tokens.
        types: rows of the token type embeddings, 0 where there are none.
        norm_eps: epsilon of every LayerNorm.
        head: one of `HEADS`.
        labels: outputs of a classifier.
        source: one line, where these numbers come from.
        unread: parameters of the published model that no output of the graph depends on.
    """

    name: str
    family: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    vocab: int
    max_positions: int
    types: int
    norm_eps: float
    head: str
    source: str
    labels: int = 0
    unread: int = 0

    def __post_init__(self) -> None:
        where = f"encoder {self.name!r}"
        if self.head not in HEADS:
            raise ValueError(f"{where}: head is {self.head!r}, must be one of {HEADS}; choose what follows the layers")
        for what in ("hidden", "intermediate", "layers", "heads", "vocab", "max_positions"):
            require_positive(where, what, getattr(self, what))
        if self.hidden % self.heads:
            raise ValueError(f"{where}: hidden is {self.hidden}, not a multiple of heads {self.heads}; change one")
        if self.types < 0 or self.unread < 0:
            raise ValueError(f"{where}: types is {self.types} and unread {self.unread}, must be at least 0")
        if (self.labels > 0) != (self.head == "classifier"):
            raise ValueError(f"{where}: labels is {self.labels} with head {self.head!r}; a classifier has 1 or more")
        if not 0.0 < self.norm_eps < 1.0:
            raise ValueError(f"{where}: norm_eps is {self.norm_eps!r}, must lie between 0 and 1; 1e-12 is usual")

    @property
    def head_dim(self) -> int:
        """Elements per head."""
        return self.hidden // self.heads

    @property
    def parameters(self) -> int:
        """Number of parameters of the published model; tables that two places share count once."""
        h, norm = self.hidden, 2 * self.hidden
        tables = (self.vocab + self.max_positions + self.types) * h + norm
        layer = 4 * (h * h + h) + 2 * norm + 2 * h * self.intermediate + self.intermediate + h
        heads = {
            "classifier": h * h + h + (h + 1) * self.labels,
            "masked_lm": h * h + h + norm + self.vocab,
        }
        return tables + self.layers * layer + heads.get(self.head, 0) + self.unread

    def canonical_json(self) -> str:
        """Return stable text of everything that decides the graph, for content hashing."""
        fields = {what: getattr(self, what) for what in _CONTENT}
        return json.dumps({**fields, "norm_eps": float(self.norm_eps)}, sort_keys=True, separators=(",", ":"))


_CONTENT: Final = (
    "family", "hidden", "intermediate", "layers", "heads", "vocab", "max_positions", "types", "head", "labels",
)  # fmt: skip
