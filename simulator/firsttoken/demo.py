"""The main job on one page: a 1.5B student as fp16 and as int4 side by side, and a small one that answers.

Run it by `make demo`, or `python -m firsttoken.demo -o FOLDER`.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Final

from firsttoken.options import RunOptions
from firsttoken.progress import Bar

if TYPE_CHECKING:
    from collections.abc import Sequence

TARGET: Final = "snapdragon-x-elite"
STUDENT: Final = "deepseek-r1-distill-qwen-1.5b"
PROMPT_TOKENS: Final = 64
RUNS: Final = {
    "fp16": RunOptions(weights="fp16", acts="fp16", norm_cache="fp16"),
    # A scale per output channel, as Qualcomm runs int4 on this NPU: sums need no rescaling within k.
    "int4": RunOptions(weights="int4", acts="int8", group="channel", norm_cache="int8"),
}
SPEAKER: Final = "smollm2-135m"
QUESTION: Final = "What is the capital of France?"
MAX_NEW_TOKENS: Final = 16


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints both parts and writes one report folder per run; raises FirsttokenError when something is missing."""
    parser = argparse.ArgumentParser(prog="python -m firsttoken.demo", description=__doc__)
    parser.add_argument("-o", "--out", type=Path, default=Path("demo-out"), help="folder for the reports")
    parser.add_argument("--no-cache", action="store_true", help="compute even what an earlier run has kept")
    chosen = parser.parse_args(arguments)
    _side_by_side(chosen.out, not chosen.no_cache)
    _conversation()


def _side_by_side(out: Path, cache: bool) -> None:
    from firsttoken import api
    from firsttoken.cli import console
    from firsttoken_simulator.report.screen import show

    documents = []
    with Bar() as bar:
        for name, options in RUNS.items():
            document = api.run(
                STUDENT, TARGET, prompt=PROMPT_TOKENS, options=options, out=out / name, cache=cache,
                progress=bar.prefixed(f"{name}: "),
            )  # fmt: skip
            documents.append(document)
    show(console(), documents)
    for name in RUNS:
        print(f"wrote {out / name}: {', '.join(api.REPORTS)}")


def _conversation() -> None:
    from firsttoken import api
    from firsttoken.answer import lines

    with Bar() as bar:
        result = api.generate(
            SPEAKER, QUESTION, max_new_tokens=MAX_NEW_TOKENS, target=TARGET, compare="onnxruntime", progress=bar.update
        )
    print(f"\n{QUESTION}")
    for line in lines(result):
        print(line)


if __name__ == "__main__":
    from firsttoken.cli import guarded

    guarded(main)
