"""Modelled cycles, energies and bytes of small runs on every target, as a file: a change of the model shows in a diff.

    python tests/golden/metrics.py          compare, and print what differs
    python tests/golden/metrics.py --write  write metrics.csv anew

SmolLM2's first layer with its table and head: enough for every kernel of a decoder on every target.
"""

import csv
import io
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Final

from firsttoken import RunOptions, Target
from firsttoken.api import measure
from firsttoken.student import find_student
from firsttoken.subject import subject_of
from firsttoken_compiler.errors import FirsttokenError
from firsttoken_compiler.target.load import preset_names

FILE: Final = Path(__file__).with_name("metrics.csv")
PROMPT: Final = 32
FORMATS: Final = {
    "fp16": RunOptions(weights="fp16"),
    "int4/int8": RunOptions(weights="int4"),
    "int8/int8": RunOptions(weights="int8"),
}
COLUMNS: Final = (
    "target", "formats", "graph", "cycles", "energy_uj", "dram_read_bytes", "dram_write_bytes", "scratchpad_bytes",
    "instructions",
)  # fmt: skip


def rows(targets: tuple[str, ...]) -> Iterator[dict[str, str]]:
    """A row per target, formats and graph; formats that a target cannot multiply are rows with a message."""
    _, config = find_student("smollm2-135m")
    subject = subject_of(replace(config, name="smollm2-135m-1-layer", layers=1))
    for name in targets:
        target = Target.load(name)
        for formats, options in FORMATS.items():
            for graph, tokens, past in (("prefill", PROMPT, 0), ("decode", 1, PROMPT)):
                head = {"target": name, "formats": formats, "graph": graph}
                try:
                    document, program, timeline = measure(subject, target, tokens, 0, options, past=past)
                except FirsttokenError as error:
                    yield {**dict.fromkeys(COLUMNS, ""), **head, "cycles": type(error).__name__}
                    continue
                numbers = {
                    "cycles": round(timeline.total_fs / timeline.period_fs),
                    "energy_uj": f"{1e3 * document.energy_mj:.3f}", "dram_read_bytes": document.dram_read_bytes,
                    "dram_write_bytes": document.dram_write_bytes, "scratchpad_bytes": document.sram_peak_bytes,
                    "instructions": len(program),
                }  # fmt: skip
                yield {**head, **{column: str(value) for column, value in numbers.items()}}


def text(targets: tuple[str, ...]) -> str:
    """The file."""
    made = io.StringIO()
    writer = csv.DictWriter(made, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows(targets))
    return made.getvalue()


def main() -> int:
    """Writes or compares; 1 where something differs."""
    now = text(preset_names())
    if "--write" in sys.argv[1:]:
        FILE.write_text(now)
        return 0
    before = FILE.read_text().splitlines()
    changed = [line for line in now.splitlines() if line not in before]
    print("\n".join(changed) or "nothing differs")
    return int(bool(changed))


if __name__ == "__main__":
    sys.exit(main())
