"""The claim of 130 ms to the first token and 16 tokens/s for the 1.5B student on a Snapdragon X, and of 1.77x over FP16.

    python reports/case_study.py

Writes reports/case-study/README.md.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Final

from firsttoken import RunOptions, Target
from firsttoken.latency import LlmWork, Prediction, latency

STUDENT: Final = "deepseek-r1-distill-qwen-1.5b"
TARGET: Final = "snapdragon-x-elite"
CLAIM_MS: Final = 130.0
CLAIM_TOK_S: Final = 16.0
CLAIM_RATIO: Final = 1.77
PROMPT: Final = 63
"""The longest of the claim's "under 64 tokens"."""
RUNTIME: Final = "onnx_cpu_head"
"""The placement that the article states: chunks of 64, token table and head in 4-bit blocks on the CPU."""
ANSWER: Final = 64
OUT: Final = Path(__file__).parent / "case-study" / "README.md"
INT4: Final = RunOptions(weights="int4", group="channel", acts="int16", kv_cache="int8")
FORMATS: Final = {
    "int4 per channel, int16 activations": INT4,
    "int4 per channel, int8 activations": replace(INT4, acts="int8"),
    "int4 per channel, fp16 activations": replace(INT4, acts="fp16"),
    "fp16 weights and activations": RunOptions(weights="fp16", kv_cache="fp16"),
}
"""The claim leaves the activations open; the vendor of the chip publishes int16 and fp16 ones."""
HEAD: Final = f"""# 130 ms and 16 tokens/s for the 1.5B student on a Snapdragon X

Redraw: `make case-study`.

## The claim

"{CLAIM_MS:.0f} ms to the first token, {CLAIM_TOK_S:.0f} tokens/s" for DeepSeek-R1-Distill-Qwen-1.5B on the NPU of a Snapdragon X, prompts under 64
tokens: Windows Developer Blog, 29 January 2025, as it is quoted; the numbers were not re-read in the original. Placement, from
summaries of the same article: token table and LM head on the CPU in 4-bit blocks, everything else on the NPU with int4
weights per channel, as ONNX with QDQ, prompts in a sliding window of chunks. "230 ms in FP16", whence {CLAIM_RATIO}x, is almost
certainly another model's number: Phi Silica, 3.8 billion parameters in 4 bits, is published with 230 ms on the same NPU.

## Configuration

`{STUDENT}` on `{TARGET}` by its runtime `{RUNTIME}`: {PROMPT} tokens in one chunk of {{chunk}} rows, then {ANSWER} tokens; the CPU reads
{{bits}} bits a weight at {{rate:.0f}} GB/s (`host.bytes_per_s`, {{grade}}); a launch costs {{launch:.1f}} ms ({{launch_grade}}). The article leaves the
activations open, so all are predicted.

## Prediction

| formats | TTFT ms | against 130 ms | tokens/s | against 16 | NPU ms a token | CPU ms a token | launch ms |
|---|---|---|---|---|---|---|---|"""


def main() -> None:
    """Runs everything and writes the page."""
    target = Target.load(TARGET)
    runtime, source = target.runtimes[RUNTIME], target.provenance
    head = HEAD.format(
        chunk=runtime.chunk_tokens, bits=runtime.host_weight_bits, rate=target.host.bytes_per_s / 1e9,
        grade=source["host.bytes_per_s"].grade, launch=runtime.launch_us / 1e3,
        launch_grade=source[f"runtimes.{RUNTIME}.launch_us"].grade,
    )  # fmt: skip
    found = {}
    for formats, options in FORMATS.items():
        work = LlmWork(STUDENT, options, PROMPT, 0, ANSWER, RUNTIME)
        found[formats] = latency(work, target)
        head += "\n" + row(formats, found[formats])
        print(row(formats, found[formats]), flush=True)
    OUT.parent.mkdir(exist_ok=True)
    OUT.write_text("\n".join([head, *decomposition(found), *verdict(found), ""]), encoding="utf-8")


def row(formats: str, found: Prediction) -> str:
    """A line of the first table."""
    assert found.ttft_ms is not None
    assert found.decode_tok_s is not None
    token = found.parts["decode"]
    return (
        f"| {formats} | {found.ttft_ms:.1f} | {found.ttft_ms / CLAIM_MS:.2f}x | {found.decode_tok_s:.1f} "
        f"| {found.decode_tok_s / CLAIM_TOK_S:.2f}x | {1e3 * token.device_s:.1f} | {1e3 * token.host_s:.1f} "
        f"| {1e3 * token.launch_s:.1f} |"
    )


def decomposition(found: dict[str, Prediction]) -> list[str]:
    """Where the time to the first token goes."""
    lines = ["", "## Decomposition of the time to the first token", "", "| formats | NPU ms | CPU ms | launch ms |"]
    lines.append("|---|---|---|---|")
    for formats, prediction in found.items():
        part = prediction.parts["prefill"]
        times = " | ".join(f"{1e3 * value:.2f}" for value in (part.device_s, part.host_s, part.launch_s))
        lines.append(f"| {formats} | {times} |")
    return lines


def verdict(found: dict[str, Prediction]) -> list[str]:
    """What of the claim the prediction supports."""
    times = {name: (p.ttft_ms or 0.0, p.tpot_ms or 0.0) for name, p in found.items()}
    lines = ["", "## Verdict", ""]
    claims = (("to the first token", 0, CLAIM_MS), ("of a token", 1, 1e3 / CLAIM_TOK_S))
    for what, at, claimed in claims:
        fastest = min(times, key=lambda name: times[name][at])
        nearest = min(times, key=lambda name: abs(math.log(times[name][at] / claimed)))
        lines.append(
            f"- Time {what}: claimed {claimed:.1f} ms. The fastest formats are predicted to need {times[fastest][at]:.1f} ms "
            f"({fastest}); nearest is {nearest} with {times[nearest][at]:.1f} ms, {100 * (times[nearest][at] / claimed - 1):+.0f} %."
        )
    first, _, halves, whole = times.values()
    lines += [
        "- So the claim is possible on this NPU, and with integer activations far from what it can do: it looks like float "
        "activations, or like a runtime several times slower than those of Qualcomm, to which the target is fitted.",
        f"- int16 instead of fp16 activations: predicted {halves[0] / first[0]:.2f}x; Qualcomm's own pair for Llama-3.2-1B on "
        "this chip is 2.46x (143.1 and 58.2 ms).",
        f"- int4 with int16 activations instead of fp16 throughout: predicted {whole[0] / first[0]:.2f}x for the first token and "
        f"{whole[1] / first[1]:.2f}x for a token. {CLAIM_RATIO}x compares two models and measures nothing of this kind.",
        "- How far the target is from rows that were measured: [validation](../validation/README.md).",
    ]
    return lines


if __name__ == "__main__":
    main()
