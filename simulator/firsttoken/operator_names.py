"""Finds operators of a program by the names that people use: module paths, patterns of them, and llama.cpp's names."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Final

from firsttoken_compiler.errors import OptionError

MOST_SHOWN: Final = 12
_ALIASES: Final = {
    "ffn.up": "mlp.up_proj", "ffn.gate": "mlp.gate_proj", "ffn.down": "mlp.down_proj",
    "attn.q": "self_attn.q_proj", "attn.k": "self_attn.k_proj", "attn.v": "self_attn.v_proj",
    "attn.o": "self_attn.o_proj", "attn.output": "self_attn.o_proj", "attn": "self_attn.attention",
    "attn.norm": "input_layernorm", "ffn.norm": "post_attention_layernorm",
}  # fmt: skip
"""Behind the layer's number."""
_OUTSIDE: Final = {"token_embd": "embed_tokens", "output": "lm_head", "output_norm": "norm"}
_IN_LAYER: Final = re.compile(r"(?:model\.)?(?:layers|blk)\.(?P<layer>\d+|\*)\.(?P<rest>.+)")


def spelt(name: str) -> str:
    """A name in the program's own spelling: `blk.3.ffn_up.weight` and `layers.3.ffn.up` → `layers.3.mlp.up_proj`."""
    name = name.strip().removesuffix(".weight")
    found = _IN_LAYER.fullmatch(name)
    if found is None:
        return _OUTSIDE.get(name, name)
    rest = found["rest"]
    alias = _ALIASES.get(re.sub(r"^(ffn|attn)_", r"\1.", rest))
    return f"layers.{found['layer']}.{alias or rest}"


def matching(name: str, known: Iterable[str]) -> list[str]:
    """The operators that a name or a pattern means, in the order in which they run; a product of several has all names.

    Raises OptionError naming those that are there and come closest.
    """
    from firsttoken_simulator.report.tables import parts_of

    names, wanted = list(known), spelt(name)
    found = [each for each in names if each == wanted or fnmatchcase(each, wanted)]
    found = found or [each for each in names if each.rpartition(".")[2] == wanted or each.endswith(f".{wanted}")]
    found = found or [each for each in names if any(fnmatchcase(part, wanted) for part in parts_of(each))]
    if found:
        return found
    layer = re.match(r"layers\.\d+\.", wanted)
    beside = [each for each in names if layer is not None and each.startswith(layer[0])]
    close = beside or difflib.get_close_matches(wanted, names, MOST_SHOWN, 0.3) or names
    last = max((int(n) for each in names for n in re.findall(r"^layers\.(\d+)\.", each)), default=-1)
    hint = f"; layers are 0 to {last}" if layer is not None and not beside and last >= 0 else ""
    more = f" and {len(close) - MOST_SHOWN} more" if len(close) > MOST_SHOWN else ""
    raise OptionError(f"--op {name!r}: no such operator{hint}; there are {', '.join(close[:MOST_SHOWN])}{more}")
