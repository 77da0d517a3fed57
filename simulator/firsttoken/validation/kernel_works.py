"""From an operator of a table to what `latency` runs."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from firsttoken.encoder import EncoderConfig
from firsttoken.latency import EncoderWork, KernelWork, Work
from firsttoken.options import RunOptions
from firsttoken.student import find_any
from firsttoken.validation.kernel_graphs import Operator, graph_of
from firsttoken_compiler.errors import OptionError

BERT_TOKENS: Final = 512
BERT_LAYERS: Final = 1
"""What "bert_base" times: by the multiply-accumulates that analytic models count for it, one layer of 512 tokens."""


def work_of(operator: Operator, runtime: str | None) -> Work:
    """The work that times one operator; raises OptionError for one that is no graph here."""
    if operator.op != "bert":
        graph_of(operator)  # refuses what it cannot build
        return KernelWork(operator, operator.options, runtime)
    config = find_any("bert-base")[1]
    if not isinstance(config, EncoderConfig):
        raise OptionError("bert-base is no encoder here")
    layer = replace(config, name="bert-base-layer", layers=BERT_LAYERS, head="none", unread=0)
    return EncoderWork(layer, RunOptions(weights="fp16"), BERT_TOKENS, runtime)
