"""From what a table says of number formats to the options of a run."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from firsttoken.options import RunOptions
from firsttoken_compiler.options import WeightRule

_FLOATS: Final = re.compile(r"^(?:fp|bf|float)?-?(?:16|32)(?:\b|$)|^(?:float|half)\b")
QAIRT: Final = ("genie", "geniex_qairt")
"""Runtimes of graphs whose keys, values and head are int8."""
LLAMA_CPP: Final = "geniex_llamacpp"
HEAD_INT8: Final = WeightRule("output", "int8")


@dataclass(frozen=True, slots=True)
class Formats:
    """The options that a row's formats mean, what was assumed on the way; `refusal` says why there are none."""

    options: RunOptions | None
    assumed: tuple[str, ...] = ()
    refusal: str = ""


def formats_of(weight_bits: str, act_bits: str, notes: str, runtime: str, encoder: bool = False) -> Formats:
    """The options for the formats of a row of whole models.

    Args:
        weight_bits: "4", "8", "fp16", "4.5 (Q4_0; ...)", "4 (per-channel ...)".
        act_bits: "8", "16", "fp16 (HMX)", "bf16".
        notes: its notes, which may name the type exactly: "dtype w4a16_g128".
        runtime: the runtime's name, which decides on caches and head.
        encoder: whether the model has no cache and no head of words.
    """
    weights, acts = weight_bits.casefold().strip(), act_bits.casefold().strip()
    exact = re.search(r"\bw(\d+)a(\d+)(?:_g(\d+))?\b", notes.casefold())
    group = exact[3] if exact and exact[3] else "channel"
    assumed = []
    blocks = re.search(r"\bq([458])_([0k])(?:_[sm])?\b", f"{weights} {notes.casefold()}")
    if runtime == LLAMA_CPP or blocks:
        kind = blocks[0] if blocks else "q4_0" if weights.startswith("4") else "q8_0"
        down = (WeightRule("ffn_down", "q8_0"),) if re.search(r"ffn.down q8_0", weights) else ()
        return _made(kind, "fp16", "128", "int8" if runtime == LLAMA_CPP else "fp16", down)
    if _FLOATS.search(weights):
        if "bf16" in weights:
            assumed.append("bf16 is timed as fp16")
        return _made("fp16", "fp16", "128", assumed=tuple(assumed))
    bits = re.match(r"(?:int|w)?([48])\b", weights)
    if bits is None:
        return Formats(None, (), f"no number format for weights of {weight_bits!r:.60} bits")
    kind, activation = f"int{bits[1]}", _activation(acts, runtime)
    if activation is None:
        return Formats(None, (), f"no number format for activations of {act_bits!r:.60} bits")
    if "unverified" in acts:
        assumed.append(f"activations {activation}, as the table's {act_bits!r:.40} is not verified")
    if group not in ("32", "64", "128", "channel"):
        return Formats(None, (), f"no groups of {group} weights share a scale")
    head = () if encoder or runtime not in QAIRT else (HEAD_INT8,)
    return _made(kind, activation, group, "int8" if runtime in QAIRT else "fp16", head, tuple(assumed))


def _activation(acts: str, runtime: str) -> str | None:
    """The type of activations; RKLLM's 16 bits are floats, all others' integers."""
    if acts.startswith(("fp", "bf", "float")):
        return "fp16"
    if acts.startswith("16"):
        return "fp16" if runtime == "rkllm" else "int16"
    return "int8" if acts.startswith("8") else None


def _made(
    weights: str, acts: str, group: str, kv: str = "fp16", rules: tuple[WeightRule, ...] = (),
    assumed: tuple[str, ...] = (),
) -> Formats:  # fmt: skip
    return Formats(RunOptions(weights=weights, acts=acts, group=group, kv_cache=kv, rules=rules), assumed)
