"""The documentation names what there is: every field of the reports, every verb, every file that it links."""

import re
from pathlib import Path

import pytest

from firsttoken.cli import app
from firsttoken_compiler.isa.opcodes import INSTRUCTIONS
from firsttoken_compiler.isa.program import FORMAT, FORMAT_VERSION
from firsttoken_compiler.isa.vector_kernel import OPERATIONS
from firsttoken_compiler.tvm import dialect
from firsttoken_simulator.report.document import (
    EnergyBands,
    EnergyRow,
    HostCallRow,
    LayerRow,
    OpRow,
    PathLink,
    Range,
    RunDocument,
    Rung,
    StepTable,
    TargetValue,
)

MODELS = [
    OpRow, RunDocument, LayerRow, PathLink, Rung, HostCallRow, TargetValue, EnergyBands, EnergyRow, Range, StepTable,
]  # fmt: skip
ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("model", MODELS)
def test_every_field_is_described(model: type[RunDocument]) -> None:
    described = set(re.findall(r"`(\w+)`", text("docs/reports.md")))
    assert set(model.model_fields) <= described


def test_no_column_is_described_that_is_gone() -> None:
    table = text("docs/reports.md").split("## Columns")[1].split("## Fields")[0]
    columns = {name for line in table.splitlines() if line.startswith("| `") for name in _names(line)}
    assert columns == set(OpRow.model_fields)


def _names(line: str) -> list[str]:
    return re.findall(r"`(\w+)`", line.split("|")[1])


def test_readme_shows_every_verb() -> None:
    verbs = {command.name or command.callback.__name__ for command in app.registered_commands if command.callback}
    verbs |= {str(group.name) for group in app.registered_groups}
    assert verbs <= set(re.findall(r"firsttoken (\w+)", text("README.md")))


def test_every_instruction_and_operation_is_described() -> None:
    words = set(re.findall(r"\w+", text("docs/program.md")))
    assert {instruction.MNEMONIC for instruction in INSTRUCTIONS} | set(OPERATIONS) <= words


def test_every_canonical_operator_is_named() -> None:
    listed = text("docs/architecture.md").split("The canonical operators:")[1].split("\n\n")[0]
    assert {f"npu.{name}" for name in re.findall(r"`(\w+)`", listed)} == set(dialect.CANONICAL)


def test_the_version_of_program_files_is_the_documented_one() -> None:
    assert f"format `{FORMAT}`, version {FORMAT_VERSION}:" in text("docs/program.md")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
        assert target.startswith("https://") or (page.parent / target).is_file(), target
