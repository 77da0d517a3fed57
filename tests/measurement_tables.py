"""Tables of measurements as tests write them."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

from firsttoken.validation.table import FORMS

MODEL = {
    "chip": "RK3588", "model": "TinyLLAMA", "params": "1.1B", "weight_bits": "8", "act_bits": "8",
    "prompt_tokens": "128", "ttft_ms": "243.93", "decode_tok_s": "24.43", "source": "airockchip/rknn-llm",
    "confidence": "high", "notes": "dtype w8a8; new_tokens=64",
}  # fmt: skip


def table(columns: Sequence[str], *rows: dict[str, str]) -> bytes:
    """A CSV file of rows."""
    out = io.StringIO()
    writer = csv.DictWriter(out, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue().encode()


def models(*changes: dict[str, str]) -> bytes:
    """A table of whole models: `MODEL` with changes in each row."""
    return table(FORMS["models"], *(MODEL | change for change in changes))


def operators(*rows: tuple[str, str, str, str]) -> bytes:
    """A table of operators: (chip, op, shape, time_us)."""
    columns = ("chip", "op", "shape(MxKxN)", "tile", "time_us", "gflops", "GB_s", "used_by/source")
    return table(columns, *({"chip": c, "op": o, "shape(MxKxN)": s, "time_us": t} for c, o, s, t in rows))
