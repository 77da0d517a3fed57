"""The package's own figures: sources, forms, and equality with the tables that they were taken from."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from firsttoken.validation.measurements import Measurement, Row, Skipped, read
from firsttoken.validation.published import published

FACTS = Path(__file__).parents[4] / "shared" / "facts"


def test_every_figure_has_a_source_and_runs_or_says_why_not() -> None:
    rows = published()
    assert len(rows) > 90
    assert [row.line for row in rows] == list(range(1, len(rows) + 1))
    assert all(row.source for row in rows if isinstance(row, Measurement))
    assert all(row.reason for row in rows if isinstance(row, Skipped))


def values(rows: tuple[Row, ...], name: str) -> Counter[tuple[str, str, float]]:
    """How often each chip has each value of a model."""
    return Counter(
        (row.target, row.model, quantity.value)
        for row in rows
        if isinstance(row, Measurement)
        for quantity in row.quantities
        if quantity.name == name
    )


@pytest.mark.skipif(not FACTS.is_dir(), reason="the tables of measurements are not here")
@pytest.mark.parametrize("name", ["decode_tok_s", "inference_ms", "power_w"])
def test_figures_are_those_of_the_table(name: str) -> None:
    assert values(published(), name) == values(read(FACTS / "silicon_calibration.csv"), name)


@pytest.mark.skipif(not FACTS.is_dir(), reason="the tables of measurements are not here")
@pytest.mark.parametrize("name", ["ttft_ms", "prefill_tok_s"])
def test_prefill_stands_once(name: str) -> None:
    own, table = values(published(), name), values(read(FACTS / "silicon_calibration.csv"), name)
    assert own <= table


@pytest.mark.skipif(not FACTS.is_dir(), reason="the tables of measurements are not here")
def test_what_counts_is_the_same() -> None:
    def counted(rows: tuple[Row, ...]) -> Counter[tuple[object, ...]]:
        return Counter((r.target, r.work, *r.counted.items()) for r in rows if isinstance(r, Measurement))

    table = counted(read(FACTS / "silicon_calibration.csv")) + counted(read(FACTS / "tpu_v3_kernels_calibration.csv"))
    assert counted(published()) == table
