"""From what a table calls a chip to a target: rules on its words, the first that fits decides."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from firsttoken_compiler.errors import FirsttokenError

if TYPE_CHECKING:
    from firsttoken_compiler.target.target import Target

_RULES: Final = (
    (r"\bgpu\b|adreno|mali|immortalis", None, "a GPU, which is not modelled"),
    (r"\bcpu\b|\boryon\b|\bkryo\b|cortex", None, "a CPU, which is not modelled"),
    (r"snapdragon.*\bx2\b", "snapdragon-x2-elite", ""),
    (r"snapdragon.*\bx\b|\bx elite\b|\bx1e\b", "snapdragon-x-elite", ""),
    (r"snapdragon.*8 ?elite gen ?5", None, "Snapdragon 8 Elite Gen 5 (v81), for which there is no target"),
    (r"snapdragon.*8 ?elite|\bsm8750\b", "snapdragon-8-elite", ""),
    (r"snapdragon.*8 ?gen ?3|\bsm8650\b", "snapdragon-8-gen3", ""),
    (r"rk ?3588", "rk3588", ""),
    (r"rk ?3576", "rk3576", ""),
    (r"xdna ?2|\bnpu2\b|strix|aie2p", "xdna2-strix", ""),
    (r"tpu ?v3", "tpu-v3", ""),
    (r"tpu ?v4i", None, "TPU v4i, for which there is no target"),
    (r"tpu ?v4", "tpu-v4", ""),
    (r"ethos.?u85", "ethos-u85-2048", ""),
    (r"systolic.?128", "systolic-128", ""),
)  # fmt: skip
_NVDLA: Final = {
    "macs": re.compile(r"(\d+) ?(?:int8 )?mac", re.ASCII),
    "cbuf": re.compile(r"(\d+) ?ki?b\b", re.ASCII),
    "bytes_per_s": re.compile(r"(\d+(?:\.\d+)?) ?gb ?/ ?s", re.ASCII),
}


@dataclass(frozen=True, slots=True)
class Chip:
    """A chip's target: the name of a preset, and the variant of it that its name describes; or why there is none."""

    target: str
    variant: Target | None = None
    refusal: str = ""


def chip_of(text: str) -> Chip:
    """The chip that a table names; one without a target says why."""
    words = re.sub(r"[\s_-]+", " ", text.casefold())
    if "nvdla" in words:
        return _nvdla(words)
    for pattern, target, refusal in _RULES:
        if re.search(pattern, words):
            return Chip(target or "", None, refusal)
    return Chip("", None, f"no target for the chip {text!r:.80}")


def _nvdla(words: str) -> Chip:
    """NVDLA with the multipliers, buffer and bandwidth that its name gives; nvdla-full where it gives none."""
    found = {name: pattern.search(words) for name, pattern in _NVDLA.items()}
    if not any(found.values()):
        return Chip("nvdla-full")
    missing = [name for name, match in found.items() if match is None]
    if missing:
        return Chip("", None, f"an NVDLA whose description lacks {', '.join(missing)}")
    from firsttoken.validation.chips_nvdla import nvdla_variant

    macs, cbuf, rate = (float(match[1]) for match in found.values() if match is not None)
    try:
        return Chip("nvdla-full", nvdla_variant(int(macs), int(cbuf) << 10, rate * 1e9))
    except FirsttokenError as error:
        return Chip("", None, str(error))
