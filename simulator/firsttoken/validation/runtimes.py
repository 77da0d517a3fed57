"""From what a row says of its source to the runtime that ran it."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from firsttoken_compiler.target.target import Target

CPU_HEAD: Final = "onnx_cpu_head"
"""ONNX with embedding and head on the CPU."""
_RULES: Final = (
    (r"onnx.*\n?.*(?:lm )?head.* on (?:the )?cpu|(?:lm )?head.* on (?:the )?cpu.*\n?.*onnx", CPU_HEAD),
    (r"geniex_llama\.?cpp|ggml.hexagon|llama\.cpp|\bq4_0\b|\bgguf\b", "geniex_llamacpp"),
    (r"geniex_qairt|geniex", "geniex_qairt"),
    (r"\bgenie\b", "genie"),
    (r"powerserve", "powerserve"),
    (r"qnn_dlc", "qnn_dlc"),
    (r"rkllm|rknn-llm", "rkllm"),
    (r"mlir-air|\bxrt\b", "mlir_air"),
    (r"\bonnx\b", "onnx"),
    (r"\bqnn\b", "qnn_dlc"),
    (r"qai-hub-models", "genie"),
    (r"\bjax\b|\bxla\b|\btpu\b", "xla"),
)
"""Qualcomm's hub without a runtime: its language models are run by Genie."""
OF_TARGET: Final = (("rk", "rkllm"), ("xdna", "mlir_air"), ("tpu", "xla"), ("snapdragon", "genie"))
"""What runs on a target where a row says nothing, by the beginning of the target's name."""
OF_OPERATORS: Final = (("snapdragon", "qnn_dlc"),)
"""The same for single operators."""
DEFAULT: Final = "default"


def runtime_of(target: str, *texts: str, operator: bool = False) -> str:
    """The runtime that texts name, by the first rule that fits; what is usual on the target where they name none."""
    words = "\n".join(texts).casefold()
    for pattern, runtime in _RULES:
        if re.search(pattern, words):
            return runtime
    known = (*OF_OPERATORS, *OF_TARGET) if operator else OF_TARGET
    return next((runtime for prefix, runtime in known if target.startswith(prefix)), DEFAULT)


def on(target: Target, name: str) -> tuple[str | None, str]:
    """(the target's runtime of that name, or None for its first or only one, what is assumed by that)."""
    if name in target.runtimes:
        return name, ""
    if name == CPU_HEAD and "onnx" in target.runtimes:
        return "onnx", f"{name} is not described for {target.name}: run as by onnx"
    first = next(iter(target.runtimes), None)
    if first is None:
        return None, "" if name == DEFAULT else f"{name} is not described for {target.name}: each graph is one dispatch"
    return None, "" if name == DEFAULT else f"{name} is not described for {target.name}: run as by {first}"
