"""Names that steer terminals, spreadsheets, pages or parsers are no more than text in everything that is written."""

import csv
import io
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from onnx import ModelProto, helper
from page_tags import Tags

sys.path.insert(0, str(Path(__file__).parent))
import making as m

from firsttoken import api
from firsttoken_compiler.frontend.check_graph import MAX_NAME
from firsttoken_simulator.report.plain import cell, plain, plain_json, plain_lines

NAMES = (
    "two\nlines",
    "bell\x07 and \x1b[2J\x1b[31mred\x1b]0;title\x07",
    "</script><script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "=cmd|' /C calc'!A0",
    "@SUM(1+1)",
    " =1+1",
    "\t=1+1",
    "[bold red]markup[/] [/nothing]",
    "right \u202e to left",
    "c1 \x9b31m",
    "nul\x00byte",
    "a,b;c\td\"e'f",
    "{{ 7 * 7 }} {% raw %} ${x} %s %n {0}",
    "../../etc/passwd",
    "\u65e5\u672c\u8a9e \U0001f600",
    "x" * MAX_NAME,
    "# comment\n.kernel 7 forged(s0)",
    "\ufeffbom",
)
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ufeff]")


def hostile(name: str) -> ModelProto:
    """Products, a node of the host and a sum that all have a part of the name."""
    model = m.of_nodes(
        [
            helper.make_node("MatMul", ["x", name + "w"], [name + "v"], name=name),
            helper.make_node("CumSum", [name + "v", "k"], [name + "s"], name=name[:-3] + "cum"),
            helper.make_node("Add", [name + "s", name + "v"], ["y"], name="sum"),
        ],
        **{name + "w": m.weight(32, 32), "k": m.np.array(1)},
    )
    model.graph.name = model.doc_string = model.producer_name = name
    model.metadata_props.add(key=name[:900], value=name)
    return model


@pytest.mark.parametrize("name", NAMES, ids=range(len(NAMES)))
def test_reports(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from firsttoken.cli import _screen

    name = name[: MAX_NAME - 4]
    path = m.save(hostile(name), tmp_path)
    document = api.run(path, "systolic-128", out=tmp_path / "out", cache=False)
    assert {file.name for file in (tmp_path / "out").iterdir()} == set(api.REPORTS)
    read = {file: (tmp_path / "out" / file).read_bytes() for file in api.REPORTS}

    _screen([document])
    screen = capsys.readouterr().out
    assert not CONTROL.search(screen)
    assert "[bold red]" in screen or "[bold red]" not in name

    rows = list(csv.DictReader(io.StringIO(read["ops.csv"].decode(), newline="")))
    assert len(rows) == len(document.ops)
    for row in rows:
        for text in row.values():
            assert plain(text) == text
            assert not text.lstrip().startswith(("=", "+", "@"))
            assert not text.startswith("-") or float(text) <= 0

    assert json.loads(read["run.json"]) == json.loads(document.model_dump_json())
    assert not CONTROL.search(read["run.json"].decode())
    assert not CONTROL.search(read["program.txt"].decode())
    listed = read["program.txt"].decode().splitlines()
    assert all(line.startswith(("#", "core0.", ".kernel ")) for line in listed)
    assert ".kernel 7 forged(s0)" not in listed
    check_page(read["report.html"].decode())
    check_trace(read["trace.pftrace"], [op.op for op in document.ops])


def check_page(text: str) -> None:
    page = Tags()
    page.feed(text)
    assert not page.tags & {"script", "img", "iframe", "link", "object", "a", "form"}
    assert not [name for name in page.attributes if name.startswith("on") or name in ("href", "src")]
    assert "default-src 'none'" in text


def check_trace(data: bytes, operators: list[str]) -> None:
    from perfetto.protos.perfetto.trace.perfetto_trace_pb2 import Trace

    trace: Any = Trace.FromString(data)
    named = {entry.name for packet in trace.packet for entry in packet.interned_data.event_names}
    assert named <= set(operators)
    assert named


@pytest.mark.parametrize("name", NAMES, ids=range(len(NAMES)))
def test_messages(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from firsttoken.cli import guarded

    model = hostile(name[: MAX_NAME - 8])
    model.graph.node[0].input[1] = name[: MAX_NAME - 8] + "nowhere"
    path = m.save(model, tmp_path)
    with pytest.raises(SystemExit) as caught:
        guarded(lambda: api.run(path, "systolic-128", cache=False))
    said = capsys.readouterr()
    assert (caught.value.code, said.out) == (2, "")
    assert not CONTROL.search(said.err)
    assert said.err.count("\n") == 1
    assert "which no earlier node" in said.err


@pytest.mark.parametrize("name", NAMES, ids=range(len(NAMES)))
def test_text(name: str) -> None:
    assert plain(name).isprintable()
    assert plain_lines(name).count("\n") == name.count("\n")
    assert json.loads(plain_json(json.dumps({name: [name]}, ensure_ascii=False))) == {name: [name]}
    assert not CONTROL.search(plain_json(json.dumps(name, ensure_ascii=False)))
    assert str(cell(name)).lstrip()[:1] not in ("=", "+", "-", "@")
    assert cell(-3.5) == -3.5
