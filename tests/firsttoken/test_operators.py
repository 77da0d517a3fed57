"""The table of operators: what the compiler itself says about where each runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from firsttoken.operators import HOST, NPU, PATTERN, Operator, operators, page

DOC = Path(__file__).parents[2] / "docs" / "operators.md"


@pytest.fixture(scope="module")
def table() -> dict[tuple[str, str], Operator]:
    return {(row.domain, row.name): row for row in operators()}


@pytest.mark.parametrize(
    ("name", "place", "words"),
    [
        ("MatMul", NPU, "rows and a constant matrix"),
        ("Add", NPU, "two tensors of a shape; rows and a constant vector"),
        ("RMSNormalization", NPU, "rows and a constant vector"),
        ("Reshape", NPU, "rows and a constant shape"),
        ("DynamicQuantizeLinear", PATTERN, "uint8"),
        ("CumProd", HOST, "no NPU operator for CumProd"),
        ("Acos", HOST, "no NPU operator"),
        ("LpNormalization", HOST, "rows of zeros"),
        ("Loop", HOST, "none of the forms"),
    ],
)
def test_places(table: dict[tuple[str, str], Operator], name: str, place: str, words: str) -> None:
    row = table["", name]
    assert row.runs == place
    assert words in row.why


def test_versions_and_types_are_those_of_onnx(table: dict[tuple[str, str], Operator]) -> None:
    assert table["", "Attention"].versions[:2] == (23, 24)
    assert table["", "MatMul"].versions == (9, 13)
    assert {"float", "float16", "bfloat16"} <= set(table["", "MatMul"].types)
    assert {place for row in table.values() for place in (row.runs,)} == {NPU, PATTERN, HOST}


def test_other_domains_have_converters(table: dict[tuple[str, str], Operator]) -> None:
    assert table["com.microsoft", "MatMulNBits"].runs == NPU
    assert table["com.microsoft", "SkipSimplifiedLayerNormalization"].why


def test_the_page_is_what_the_code_says(table: dict[tuple[str, str], Operator]) -> None:
    """`make docs` writes it."""
    text = DOC.read_text(encoding="utf-8")
    assert text == page(list(table.values()))
    assert len(re.findall(r"^\| ", text, re.M)) == len(table) + 1
