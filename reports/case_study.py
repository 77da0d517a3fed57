"""The claim of 130 ms to the first token and 16 tokens/s for the 1.5B student on a Snapdragon X, and of 1.77x over FP16.

    python reports/case_study.py

Writes reports/case-study/README.md.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Final

from firsttoken import RunOptions, Target
from firsttoken.latency import LlmWork, Prediction, latency
from firsttoken_compiler.target.target import Runtime

STUDENT: Final = "deepseek-r1-distill-qwen-1.5b"
TARGET: Final = "snapdragon-x-elite"
CLAIM_MS: Final = 130.0
CLAIM_TOK_S: Final = 16.0
CLAIM_RATIO: Final = 1.77
PROMPT: Final = 63
"""The longest of the claim's "under 64 tokens"."""
CHUNK: Final = 64
"""N = 64 of the sliding window that the vendor of the runtime states for its other model on this NPU."""
ANSWER: Final = 64
CPU_BITS: Final = 4.5
"""4-bit blocks of 32 with a 16-bit scale each."""
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

`{STUDENT}` on `{TARGET}`, {PROMPT} tokens in one chunk of {CHUNK} rows, then {ANSWER} tokens; the CPU reads {CPU_BITS} bits a weight at
{{rate:.0f}} GB/s (`host.bytes_per_s`, {{grade}}). A launch costs {{launch:.1f}} ms, the `launch_us` of the runtime `{{runtime}}` of the target ({{launch_grade}}).

## Prediction

| formats | TTFT ms | against 130 ms | tokens/s | against 16 | NPU ms a token | CPU ms a token | launch ms |
|---|---|---|---|---|---|---|---|"""


def main() -> None:
    """Runs everything and writes the page."""
    target, name = with_cpu(Target.load(TARGET))
    runtime = target.runtimes["case-study"]
    head = HEAD.format(
        rate=target.host.bytes_per_s / 1e9, grade=target.provenance["host.bytes_per_s"].grade,
        launch=runtime.launch_us / 1e3, runtime=name, launch_grade=grade(target, name),
    )  # fmt: skip
    found = {}
    for formats, options in FORMATS.items():
        work = LlmWork(STUDENT, options, PROMPT, 0, ANSWER, "case-study")
        found[formats] = latency(work, target)
        head += "\n" + row(formats, found[formats])
        print(row(formats, found[formats]), flush=True)
    OUT.parent.mkdir(exist_ok=True)
    OUT.write_text("\n".join([head, *decomposition(found), *verdict(found), ""]), encoding="utf-8")


def with_cpu(target: Target) -> tuple[Target, str]:
    """The target with the claim's runtime, which launches as its first runtime does; and that one's name."""
    name = next(iter(target.runtimes), "default")
    launch = target.runtime().launch_us
    runtime = Runtime(launch, 0.0, CHUNK, (), ("token_embd", "output"), CPU_BITS)
    return replace(target, runtimes={**target.runtimes, "case-study": runtime}), name


def grade(target: Target, name: str) -> str:
    """How the launch cost is known."""
    found = target.provenance.get(f"runtimes.{name}.launch_us") or target.provenance["host.dispatch_us"]
    return found.grade


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
    first, _, halves, whole = ((p.ttft_ms or 0.0, p.tpot_ms or 0.0) for p in found.values())
    lines = ["", "## Verdict", ""]
    for what, predicted, claimed in (
        ("Time to the first token", first[0], CLAIM_MS), ("Time of a token", first[1], 1e3 / CLAIM_TOK_S)
    ):  # fmt: skip
        ratio = claimed / predicted
        said = "agrees within 10 %" if abs(ratio - 1) <= 0.1 else (
            "is slower than the machine needs" if ratio > 1 else "is faster than the machine can be"
        )  # fmt: skip
        lines.append(f"- {what}: claimed {claimed:.1f} ms, predicted {predicted:.1f} ms; the claim {said} ({ratio:.2f}x).")
    lines += [
        f"- int16 instead of fp16 activations: predicted {halves[0] / first[0]:.2f}x; Qualcomm's own pair for "
        "Llama-3.2-1B on this chip is 2.46x (143.1 and 58.2 ms).",
        f"- int4 instead of fp16 weights too: predicted {whole[0] / first[0]:.2f}x; nothing of that kind is "
        f"published for this NPU, and {CLAIM_RATIO}x compares two models.",
        "- What lies between the claim and the prediction is not known: the article gives no method. Candidates are an older "
        "runtime, QDQ operators that its compiler leaves in place, several sessions per token, or a mean over longer answers. "
        "How far the target is from rows that were measured is in the validation report.",
    ]
    return lines


if __name__ == "__main__":
    main()
