"""ONNX's own backend tests on the functional machine: what passes on the NPU alone, with the host, not at all, and why.

    python reports/onnx_backend.py [pattern of names]

Writes reports/onnx-backend/README.md and cases.csv (with a pattern: only prints the totals).
"""

from __future__ import annotations

import csv
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Final

import onnx
import onnxruntime
from onnx_backend_cases import KINDS, PASSED, PRODUCT_RTOL, STATUSES, TRANSFORM_ATOL, Case, Outcome, all_cases
from onnx_backend_runner import TIMEOUT_SECONDS, run_all

OUT: Final = Path(__file__).parent / "onnx-backend"
TARGET_SHARE: Final = 90
TARGETED: Final = ("float", "integer", "quantised", "normalisation")
FAMILIES: Final = {
    "quantised": r"quantizelinear|qlinear|matmulinteger|convinteger",
    "normalisation": r"normalization|mvn|lrn|softmax|batchnorm|instancenorm",
    "attention": r"attention|rotary|tensorscatter|causal_?conv",
    "training and random": r"adam|adagrad|momentum|gradient|dropout|bernoulli|loss|nllloss|sce_",
    "text": r"string|regex|tfidf|label_encoder|strnorm",
    "sequences and optionals": r"seq|optional|(_|^)opt(_|$)|_opt$",
    "control flow": r"^test_(if|loop|scan)(\d|_|$)",
    "classical models": r"ai_onnx_ml",
    "images and signals": r"image_decoder|resize|upsample|gridsample|affine_grid|roialign|dft|stft|window|mel_?weight|nonmax",
}
"""By the test's name, first match; what is left is float or integer by the types of the graph's inputs."""
FLOATS: Final = (1, 10, 11, 16, 17, 18, 19, 20, 23, 24)


def main() -> None:
    """Runs the cases and writes the page."""
    pattern = re.compile(sys.argv[1]) if len(sys.argv) > 1 else None
    cases = [case for case in all_cases() if pattern is None or pattern.search(case.name)]
    found: list[tuple[Case, str, Outcome]] = []
    for case, outcome in run_all(cases):
        found.append((case, family(case), outcome))
        print(f"{len(found)}/{len(cases)} {outcome.status}: {case.name} {outcome.detail[:100]}", flush=True)
    print(dict(Counter(outcome.status for _, _, outcome in found)))
    if pattern is None:
        OUT.mkdir(exist_ok=True)
        write_csv(found)
        (OUT / "README.md").write_text("\n".join(page(found)), encoding="utf-8")


def family(case: Case) -> str:
    """What a case tests."""
    if case.kind == "light":
        return "whole networks"
    name = case.name.lower()
    for label, pattern in FAMILIES.items():
        if re.search(pattern, name):
            return label
    graph = case.model().graph
    types = {value.type.tensor_type.elem_type for value in (*graph.input, *graph.output)}
    return "float" if types & set(FLOATS) else "integer"


def write_csv(found: list[tuple[Case, str, Outcome]]) -> None:
    """One row per case; no times, so that equal results are equal files."""
    with (OUT / "cases.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("kind", "case", "family", "status", "detail"))
        writer.writerows((case.kind, case.name, label, outcome.status, outcome.detail) for case, label, outcome in found)


def page(found: list[tuple[Case, str, Outcome]]) -> list[str]:
    """The report's lines."""
    seconds = sum(outcome.seconds for _, _, outcome in found)
    node = [(label, outcome) for case, label, outcome in found if case.kind == "node"]
    lines = [
        "# ONNX's backend tests on the functional machine",
        "",
        f"Every test of `onnx.backend.test` {onnx.__version__} whose data ship with the package, compiled for `systolic-128` "
        "through `firsttoken.onnx_backend` and executed instruction by instruction; what the NPU cannot run runs on its "
        f"host (onnxruntime {onnxruntime.__version__}, ONNX's reference evaluator where that one refuses). "
        f"Redraw: `make onnx-backend` ({seconds / 60:.0f} minutes when this was drawn). Every case: [cases.csv](cases.csv).",
        "",
        "*NPU*: every node that is computed is computed on the NPU. *NPU + host*: both. *host*: no node on the NPU; many node "
        "tests pass as inputs what is a weight in any student (the second operand of MatMul, a norm's gamma), and compute "
        "in integers. *folded*: the compiler knew the result.",
        "",
    ]
    lines += table("Kinds of tests", [(case.kind, outcome) for case, _, outcome in found], list(KINDS))
    lines += table("Node tests by family", node, sorted({label for label, _ in node}))
    share = {label: passed([o for name, o in node if name == label]) for label in TARGETED}
    words = ", ".join(f"{label} {value:.1f} %" for label, value in share.items())
    lines += [f"Target: at least {TARGET_SHARE} % of float, integer, quantised and normalisation. Here: {words}.", ""]
    lines += [
        "## Tolerances",
        "",
        "The tests' own (rtol 1e-3 and atol 1e-7 nearly everywhere; integers and booleans exactly) with these exceptions:",
        "",
        f"- where a product ran on the matrix unit, {PRODUCT_RTOL:g} of the result's largest magnitude is added to atol, as its "
        "operands are rounded to float16;",
        f"- for DFT and STFT {TRANSFORM_ATOL:g} of the largest magnitude, as the expected zeros were computed in float64;",
        "- bfloat16 results: rtol 2^-6, as in the suite itself;",
        "- results drawn at random (Bernoulli, Dropout in training): shapes and types only.",
        "",
        f"A case that takes more than {TIMEOUT_SECONDS} s, or raises anything but the package's own errors, is a crash.",
        "",
    ]
    lines += reasons(found, "not supported", "Not supported, and why")
    lines += reasons(found, "failed", "Failed")
    lines += reasons(found, "crashed", "Crashed")
    return lines


def table(title: str, rows: list[tuple[str, Outcome]], order: list[str]) -> list[str]:
    """Counts of every status."""
    lines = [f"## {title}", "", "| | tests | passed % | " + " | ".join(STATUSES) + " |", "|---|" + "---|" * (len(STATUSES) + 2)]
    for label in [*order, "all"]:
        group = [outcome for name, outcome in rows if label in (name, "all")]
        counts = Counter(outcome.status for outcome in group)
        numbers = " | ".join(str(counts[status]) for status in STATUSES)
        lines.append(f"| {label} | {len(group)} | {passed(group):.1f} | {numbers} |")
    return [*lines, ""]


def passed(group: list[Outcome]) -> float:
    """Percent."""
    return 100 * sum(outcome.status in PASSED for outcome in group) / max(1, len(group))


def reasons(found: list[tuple[Case, str, Outcome]], status: str, title: str) -> list[str]:
    """Cases of a status by their reason, names and numbers left out of it."""
    groups: dict[str, list[str]] = {}
    for case, _, outcome in found:
        if outcome.status == status:
            groups.setdefault(alike(outcome.detail, case), []).append(case.name)
    if not groups:
        return [f"## {title}", "", "None.", ""]
    lines = [f"## {title}", "", "| tests | reason | for example |", "|---|---|---|"]
    for reason, names in sorted(groups.items(), key=lambda item: (-len(item[1]), item[0])):
        lines.append(f"| {len(names)} | {reason} | `{names[0]}` |")
    return [*lines, ""]


def alike(detail: str, case: Case) -> str:
    """The reason without what is particular to one case."""
    text = detail.removeprefix(f"{case.model().graph.name}: ")
    text = re.sub(r"instruction \d+: ", "", re.sub(r"'[^']*'", "…", text))
    text = re.sub(r"core\d+\.host.*", "", text)
    return re.sub(r"\d+(\.\d+)?", "N", text)[:220].replace("|", "\\|").strip()


if __name__ == "__main__":
    main()
