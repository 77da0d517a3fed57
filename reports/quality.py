"""What every number format leaves of SmolLM2-135M: divergence, agreement, perplexity, bytes; executed, beside float32.

    python reports/quality.py [--windows 2] [--keep] [--only NAME]

Writes reports/quality/README.md and quality.json after every format. `--keep` measures only what quality.json lacks.
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from firsttoken import RunOptions, quality
from firsttoken_compiler.errors import FirsttokenError
from firsttoken_models.smollm2 import gguf_file

STUDENT: Final = "smollm2-135m"
TARGET: Final = "snapdragon-x-elite"
STORED: Final = "as stored (Q4_1, head Q8_0)"
"""The student's own GGUF file, its blocks executed as they are."""
CHANNEL: Final = {"group": "channel"}
INT4: Final = {"weights": "int4", "group": "32"}
INT8: Final = {"weights": "int8", "group": "channel"}
SECTIONS: Final[dict[str, dict[str, dict[str, Any]]]] = {
    "Weights, activations fp16": {
        "fp16": {"weights": "fp16"},
        STORED: {"weights": "fp16"},
        "int8, per channel": {**INT8, "acts": "fp16"},
        "int4, groups of 32": {**INT4, "acts": "fp16"},
        "int4, groups of 32, zero points": {**INT4, "acts": "fp16", "asymmetric": True},
        "int4, groups of 64": {"weights": "int4", "group": "64", "acts": "fp16"},
        "int4, groups of 128": {"weights": "int4", "group": "128", "acts": "fp16"},
        "int4, groups of 128, zero points": {"weights": "int4", "group": "128", "acts": "fp16", "asymmetric": True},
        "int4, per channel": {"weights": "int4", "acts": "fp16", **CHANNEL},
        **{
            name: {"weights": name}
            for name in (
                "q8_0", "q6_k", "q5_k_m", "q5_k_s", "q4_k_m", "q4_k_s", "q3_k_l", "q3_k_m", "q3_k_s", "q5_1", "q5_0",
                "q4_1", "q4_0", "iq4_nl",
            )
        },
    },
    "Activations": {
        "int8 per channel, acts int16": {**INT8, "acts": "int16"},
        "int8 per channel, acts int8": {**INT8, "acts": "int8"},
        "int4 groups of 32, acts int16": {**INT4, "acts": "int16"},
        "int4 groups of 32, acts int8": {**INT4, "acts": "int8"},
        "q4_k_m, acts int8": {"weights": "q4_k_m", "acts": "int8"},
    },
    "Norm caches": {
        "fp16, norms off": {"weights": "fp16", "norm_cache": "off"},
        "int8 per channel, acts fp16, norms int8": {**INT8, "acts": "fp16", "norm_cache": "int8"},
        "int8 per channel, acts fp16, norms int16": {**INT8, "acts": "fp16", "norm_cache": "int16"},
        "int8 per channel, acts int8, norms off": {**INT8, "acts": "int8", "norm_cache": "off"},
        "q4_k_m, norms int8": {"weights": "q4_k_m", "norm_cache": "int8"},
    },
    "Keys and values": {
        "fp16, kv int8": {"weights": "fp16", "kv_cache": "int8"},
        "int8 per channel, acts int8, kv int8": {**INT8, "acts": "int8", "kv_cache": "int8"},
    },
}  # fmt: skip
FOLDER: Final = Path(__file__).parent / "quality"


def main() -> None:
    """Measures every format that exists."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--windows", type=int, default=2, help="stretches of 128 tokens of the text")
    parser.add_argument("--keep", action="store_true", help="measure only what quality.json lacks")
    parser.add_argument("--only", default="", help="measure formats whose name begins with this")
    chosen = parser.parse_args()
    path = FOLDER / "quality.json"
    kept = json.loads(path.read_text(encoding="utf-8")) if chosen.keep and path.is_file() else {}
    made: dict[str, Any] = kept if kept.get("windows") == chosen.windows else {"windows": chosen.windows, "rows": {}}
    for section, formats in SECTIONS.items():
        for label, options in formats.items():
            if label not in made["rows"] and label.startswith(chosen.only):
                measure(made, section, label, options)
                FOLDER.mkdir(exist_ok=True)
                path.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
                (FOLDER / "README.md").write_text(page(made), encoding="utf-8")


def measure(made: dict[str, Any], section: str, label: str, options: dict[str, Any]) -> None:
    """Adds a row; a format that is refused is named and left out."""
    student = gguf_file()[0] if label == STORED else STUDENT
    try:
        result = quality(student, TARGET, formats=[RunOptions(**options)], windows=made["windows"])
    except FirsttokenError as error:
        print(f"{label}: left out: {error}", flush=True)
        return
    row = asdict(result.rows[0])
    made["reference"] = [result.reference_perplexity, result.reference_perplexity_error]
    made["tokens"] = result.window_tokens
    made["rows"][label] = {"section": section} | row
    print(line(label, row), flush=True)


def line(label: str, row: dict[str, Any]) -> str:
    """A row of the page."""
    return (
        f"| {label} | {row['activations']} | {row['norm_cache']} | {row['weight_bytes'] / 1e6:.1f} "
        f"| {row['kl_mean']:.2e} ± {row['kl_mean_error']:.0e} | {row['kl_p99']:.2g} | {100 * row['top1_agreement']:.1f} "
        f"± {100 * row['top1_agreement_error']:.1f} | {row['perplexity']:.2f} "
        f"| {100 * (row['perplexity_ratio'] - 1):+.2f} ± {100 * row['perplexity_ratio_error']:.2f} |"
    )


def page(made: dict[str, Any]) -> str:
    """The report."""
    perplexity, error = made["reference"]
    lines = [
        "# What low precision leaves of SmolLM2-135M",
        "",
        f"Programs for `{TARGET}`, executed bit by bit on the functional machine; the reference is onnxruntime on the float32 "
        f"graph of the same weights (perplexity {perplexity:.2f} ± {error:.2f}). Text: the first {made['windows']} windows of "
        f"{made['tokens']} tokens of `simulator/firsttoken/texts/prose.txt`, which was written for this purpose; each window "
        f"starts at position 0. Redraw: `make quality`, or one format by `firsttoken quality {STUDENT} --weights q4_k_m "
        f"--windows {made['windows']}`. How each column is defined: [docs/quality.md](../../docs/quality.md).",
        "",
        "± is one standard error with tokens taken as independent. Nats per token; MB are 10^6 bytes of weights in DRAM, the "
        "token table included. What the text is to the student makes perplexities high: short windows of unseen prose.",
        "",
    ]
    for section in SECTIONS:
        rows = {label: made["rows"][label] for label in SECTIONS[section] if label in made["rows"]}
        if not rows:
            continue
        lines += [
            f"## {section}",
            "",
            "| format | activations | norm cache | weights MB | KL mean | KL 99 % | same top 1, % | perplexity | against fp32, % |",
            "|---|---|---|---|---|---|---|---|---|",
            *(line(label, row) for label, row in rows.items()),
            "",
        ]
    return "\n".join([*lines, *NOTES])


NOTES: Final = (
    "## How to read it",
    "",
    "- The student's weights come out of a GGUF file with Q4_1 blocks (a minimum, groups of 32) and a Q8_0 head: in each group "
    "they lie on a grid of 16 values already. Executed as they are stored they differ from float32 by fp16 arithmetic alone; "
    "any other format rounds them a second time, and its numbers are not those of the weights as they were trained. That is "
    "why Q5_K_M, whose fall-back Q5_1 has 31 steps where the file has 15, is no better than Q4_K_M with Q5_0: on layer 5's "
    "gate_proj Q5_1 errs by 4.5 % of the weights' rms and Q5_0 by 4.3 %, on normally distributed weights by 3.8 % and 4.3 %.",
    "- Rows of 576 and 1536 weights: 576 is no multiple of 256, so that most matrices of a mixture of K-quants fall back, as "
    "in llama.cpp: Q3_K to IQ4_NL, Q4_K to Q5_0, Q5_K to Q5_1, Q6_K to Q8_0. Mixtures are larger here than their names say.",
    "- An int8 norm cache is the activation type of the products that read it: it costs what int8 activations cost there. "
    "Whether such rows are kept or made again for every reader (off) changes no number.",
    "",
)


if __name__ == "__main__":
    main()
