"""Several prompt lengths of one student: a program for each, which share the packed weights."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from firsttoken_compiler.errors import OptionError

if TYPE_CHECKING:
    from firsttoken_compiler.isa.program import Program
    from firsttoken_simulator.report.document import RunDocument

MAX_PROMPT: Final = 1 << 20
MAX_BUCKETS: Final = 64


def prompt_lengths(texts: Iterable[str]) -> list[int | None]:
    """Lengths of `64`, or of `64,128`, each once and in order; `[None]` where nothing is said. Raises OptionError."""
    found: list[int | None] = []
    for text in (part.strip() for whole in texts for part in whole.split(",")):
        if not (text.isascii() and text.isdecimal() and len(text) < 9 and 1 <= int(text) <= MAX_PROMPT):
            raise OptionError(f"'--prompt' {text!r}: give the number of tokens, 1 to {MAX_PROMPT}, or several: 64,128")
        if int(text) not in found:
            found.append(int(text))
    if len(found) > MAX_BUCKETS:
        raise OptionError(f"'--prompt' gives {len(found)} lengths, at most {MAX_BUCKETS} are compiled at once")
    return sorted(found, key=lambda length: length or 0) or [None]


def bucket_path(path: Path, prompt: int) -> Path:
    """Where the file of one length goes: `student.npu` becomes `student-64.npu`."""
    return path.with_name(f"{path.stem}-{prompt}{path.suffix}")


def weight_bytes(programs: Sequence[Program]) -> dict[str, int]:
    """Bytes of the weights of all programs when each packed form is kept once, and of one form that all use."""
    kept = [{(t.packing, t.dtype, t.shape): t.nbytes for t in program.of_kind("weight")} for program in programs]
    together = {form: nbytes for forms in kept for form, nbytes in forms.items()}
    shared = set.intersection(*(set(forms) for forms in kept)) if kept else set()
    return {
        "weight_bytes": sum(together.values()),
        "shared_weight_bytes": sum(together[form] for form in shared),
    }


COLUMNS: Final = (
    "prompt", "TTFT ms", "cycles", "NPU ms", "host ms", "TPOT ms", "energy mJ", "low to high", "DRAM MB", "MAC util %",
)  # fmt: skip


def columns(runs: Sequence[RunDocument]) -> list[str]:
    """The heads of the columns; an encoder has no first token."""
    whole = all(run.unit != "prompt" for run in runs)
    return [name.replace("TTFT", "time") if whole else name for name in COLUMNS]


def bucket_row(run: RunDocument) -> list[str]:
    """One line of the table of buckets."""
    bands = run.energy_bands
    cells: list[Any] = [
        run.prompt_tokens, f"{run.ttft_ms:.3f}", f"{run.ttft_cycles:,}", f"{run.npu_ms:.3f}", f"{run.host_ms:.3f}",
        "-" if run.tpot_ms is None else f"{run.tpot_ms:.3f}", f"{run.energy_mj:.3f}",
        "-" if bands is None else f"{bands.npu_mj.low:.3f} to {bands.npu_mj.high:.3f}",
        f"{(run.dram_read_bytes + run.dram_write_bytes) / 1e6:.2f}", f"{run.mac_util_pct:.1f}",
    ]  # fmt: skip
    return [str(cell) for cell in cells]
