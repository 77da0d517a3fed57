"""Formats of weights in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from firsttoken_simulator.report.screen import amount


def formats_text(rows: list[Mapping[str, Any]]) -> str:
    """What `Program.meta` records as `weight_formats`: `q4_k (113 matrices, 620.13 MB), ...`; empty for none."""
    return ", ".join(
        f"{row['format']}{' as stored' * row['stored']} ({row['matrices']} matrices, {amount(row['bytes'])})"
        for row in rows if row["matrices"]
    )  # fmt: skip
