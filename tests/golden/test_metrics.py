"""What the model says of small runs is what the file says; a meant change is written by `make golden`."""

import csv
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from metrics import FILE, rows

from firsttoken_compiler.target.load import preset_names

KNOWN = list(csv.DictReader(FILE.read_text().splitlines()))


def test_the_file_has_every_target() -> None:
    assert tuple(dict.fromkeys(row["target"] for row in KNOWN)) == preset_names()


@pytest.mark.parametrize("target", preset_names())
def test_modelled_numbers_are_the_known_ones(target: str) -> None:
    now = list(rows((target,)))
    known = [row for row in KNOWN if row["target"] == target]
    assert now == known, "modelled numbers have changed; if they were meant to, run: make golden"
