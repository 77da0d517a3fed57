"""Answers of SmolLM2-135M (real weights) on the functional machine beside onnxruntime's, per number format.

    python reports/smollm2.py [--quick]

Writes reports/smollm2/README.md. `--quick` takes one question and prints only.
"""

import argparse
import time
from pathlib import Path
from typing import Final

from firsttoken import RunOptions, generate

STUDENT: Final = "smollm2-135m"
TARGET: Final = "snapdragon-x-elite"
QUESTIONS: Final = (
    "What is the capital of France?",
    "Name three colours of the rainbow.",
    "Write one sentence about the sea.",
)
TOKENS: Final = 16
FORMATS: Final = {
    "fp16": RunOptions(weights="fp16"),
    "int8 per channel, acts int16": RunOptions(weights="int8", acts="int16", group="channel"),
    "int8 per channel, acts int8": RunOptions(weights="int8", acts="int8", group="channel"),
    "int4 group 32, acts fp16": RunOptions(weights="int4", acts="fp16", group="32"),
    "int4 group 32, acts int8": RunOptions(weights="int4", acts="int8", group="32"),
    "int4 per channel, acts int8": RunOptions(weights="int4", acts="int8", group="channel"),
}
OUT: Final = Path(__file__).parent / "smollm2" / "README.md"


def main() -> None:
    """Runs every format on every question."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one question, nothing written")
    quick = parser.parse_args().quick
    rows, answers = [], []
    for name, options in FORMATS.items():
        for question in QUESTIONS[:1] if quick else QUESTIONS:
            start = time.perf_counter()
            found = generate(
                STUDENT, question, max_new_tokens=TOKENS, target=TARGET, options=options, compare="onnxruntime"
            )
            seconds = time.perf_counter() - start
            agreement = found.agreement
            assert agreement is not None
            rows.append(
                f"| {name} | {question} | {agreement.equal_prefix_tokens} of {agreement.reference_tokens} "
                f"| {100 * agreement.next_token_agreement:.0f} % of {agreement.steps} "
                f"| {agreement.logits_cosine_min:.5f} | {agreement.logits_cosine_mean:.5f} | {seconds:.0f} |"
            )
            answers.append(f"- {name}: *{question}* {found.text.strip()} (onnxruntime: {str(found.reference_text).strip()})")
            print(rows[-1], flush=True)
    if not quick:
        OUT.write_text(page(rows, answers), encoding="utf-8")


def page(rows: list[str], answers: list[str]) -> str:
    """The report."""
    head = [
        "# SmolLM2-135M on the functional machine",
        "",
        f"Greedy, at most {TOKENS} tokens, programs for `{TARGET}`, instructions executed in the timing machine's order "
        "of completion. The reference is onnxruntime on the fp32 graph with the same weights. Redraw: "
        "`make smollm2`.",
        "",
        "*Equal prefix*: tokens before the first difference, of the reference's answer. *Next token*: steps, fed with the "
        "reference's tokens, in which the likeliest token is the reference's. *Cosine*: of the raw logits per step.",
        "",
        "| format | question | equal prefix | next token | cosine min | cosine mean | s |",
        "|---|---|---|---|---|---|---|",
    ]
    notes = [
        "",
        "What limits the integer formats here is quantisation, not arithmetic: int32 sums are exact (tests/compiler/schedule), "
        "and the machine's fp16 answers on int4-dequantised weights have a cosine of 0.99999 and more with onnxruntime's on "
        "the same weights. The file's weights are Q4_1 (groups of 32 with a minimum); symmetric int4 rounds them a second "
        "time, the tied head included.",
        "",
        "## Answers",
        "",
    ]
    return "\n".join([*head, *rows, *notes, *answers, ""])


if __name__ == "__main__":
    main()
