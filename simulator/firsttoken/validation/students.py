"""From what a table calls a model, and its number of parameters, to a student that a provider knows."""

from __future__ import annotations

import re
from typing import Any, Final

from firsttoken.student import UnknownStudent, find_any

_SIZE: Final = r"(?P<size>\d+(?:[.-]\d+)?[bm])\b"
_FAMILIES: Final = tuple(
    (re.compile(pattern), name)
    for pattern, name in (
        (r"r1-distill-llama-8b", "llama-3.1-8b"),
        (r"r1-distill(?:-qwen)?(?:-1[.-]5b|$)", "deepseek-r1-distill-qwen-1.5b"),
        (r"^phi-?3(?:[.-]5)?(?:-mini.*)?$", "phi-3.5-mini"),
        (r"minilm.*-l6|minilm-v2", "minilm-l6"),
        (r"distil-?bert", "distilbert"),
        (r"^(?:google-)?bert(?:-base.*)?$", "bert-base"),
        (r"^resnet-?50", "resnet-50"),
        (r"^tiny-?llama", "tinyllama-1.1b"),
        (r"llama-?v?3[.-](?P<version>\d)-?" + _SIZE, "llama-3.{version}-{size}"),
        (r"llama-?v?3-8b", "llama-3.1-8b"),
        (r"^qwen-?(?P<version>\d(?:[.-]5)?)(?:-" + _SIZE + r")?(?!-?vl)", "qwen{version}-{size}"),
        (r"^smollm-?2(?:-" + _SIZE + ")?", "smollm2-{size}"),
    )
)
"""Names that mean one student, whatever else stands there; several of them have the dimensions of another student:
Llama 3 8B and the distilled 8B those of Llama 3.1, Phi-3-mini those of Phi-3.5-mini."""
_REFUSED: Final = (
    (re.compile(r"(?:^|-)ssd(?:-|$)|speculative|eagle"), "speculative decoding is not modelled"),
    (re.compile(r"(?:^|-)vl(?:-|$)|vision|whisper|clip|stable-diffusion"), "no student of this kind"),
)
TOLERANCE: Final = 0.2
"""How far a stated number of parameters may be from a student's."""


def student_of(model: str, params: str = "") -> tuple[Any, str]:
    """(the student's configuration, "") of what a table calls a model; or (None, why there is none).

    Args:
        model: the name, in any spelling: "llama_v3_2_1b_instruct", "Qwen2-1.5B".
        params: the number of parameters, "1.54B"; it gives the size where the name has none, and must fit the student.
    """
    name = re.sub(r"[\s_]+", "-", re.sub(r"[(,].*", "", model).strip().casefold().rpartition("/")[2])
    refusal = next((why for pattern, why in _REFUSED if pattern.search(name)), None)
    if refusal is not None:
        return None, f"model {model!r:.80}: {refusal}"
    count = parameters(params)
    for known in _spellings(name, params):
        try:
            config = find_any(known)[1]
        except UnknownStudent:
            continue
        own = getattr(config, "parameters", None)
        if count is not None and own and abs(own / count - 1) > TOLERANCE:
            return None, (
                f"model {model!r:.80} has {count / 1e9:.3g}B parameters, the student {known} {own / 1e9:.3g}B"
            )
        return config, ""
    return None, f"no student for the model {model!r:.80}"


def parameters(text: str) -> float | None:
    """A number of parameters: "1.54B", "22.7M"; None where none can be read."""
    found = re.match(r"~?(\d{1,4}(?:\.\d{1,4})?) ?([bm])\b", text.strip().casefold())
    return float(found[1]) * (1e9 if found[2] == "b" else 1e6) if found else None


def _spellings(name: str, params: str) -> list[str]:
    """Names of students that a name may mean, the likeliest first."""
    stated = re.match(r"\d+(?:\.\d+)?[bm]\b", params.strip().casefold())
    for pattern, known in _FAMILIES:
        found = pattern.search(name)
        if found is None:
            continue
        parts = {key: value.replace("-", ".") for key, value in found.groupdict().items() if value}
        sizes = [parts.pop("size")] if "size" in parts else [stated[0]] if stated else []
        if "{size}" not in known:
            return [known.format(**parts)]
        return [known.format(**parts, size=size) for size in sizes]
    short = re.sub(r"(?:-(?:instruct|chat|it|hf|int4|int8|fp16|bf16|w4a16|w8a8))+$", "", name)
    return [name, short, *([f"{short}-{stated[0]}"] if stated else [])]
