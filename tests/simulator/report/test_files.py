import re
import time
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest

from firsttoken_compiler.isa import word
from firsttoken_compiler.isa.program import parse_listing
from firsttoken_simulator.energy import energy
from firsttoken_simulator.report.build import build_run
from firsttoken_simulator.report.document import RunDocument
from firsttoken_simulator.report.errors import ReportError
from firsttoken_simulator.report.folder import write_file, write_run
from firsttoken_simulator.report.html import page
from firsttoken_simulator.report.listing import listing
from firsttoken_simulator.report.screen import amount, norm_decisions, show
from firsttoken_simulator.report.trace import trace, windowed


@pytest.fixture(scope="module")
def case(make_case):
    return make_case(300, 5)


@pytest.fixture(scope="module")
def document(case) -> RunDocument:
    program, timeline, target = case
    return build_run(program, timeline, target, energy(program, timeline, target))


def test_listing_parses_back_and_shows_cycles(case, hostile: str) -> None:
    program, timeline, _ = case
    text = listing(program, timeline)
    code, kernels = parse_listing(text)
    np.testing.assert_array_equal(code, program.code)
    assert kernels == program.kernels
    assert "\x1b" not in text
    shown = re.findall(r"# \[(\d+)\] (\d+)\.\.(\d+)$", text, flags=re.MULTILINE)
    assert [int(i) for i, _, _ in shown] == list(range(len(program)))
    assert max(int(end) for _, _, end in shown) == timeline.total_cycles


def test_trace_has_a_slice_per_instruction_and_counters(case) -> None:
    from perfetto.protos.perfetto.trace.perfetto_trace_pb2 import Trace, TrackEvent

    program, timeline, _ = case
    parsed = Trace()
    parsed.ParseFromString(trace(program, timeline))
    events = [packet.track_event for packet in parsed.packet if packet.HasField("track_event")]
    begins = [event for event in events if event.type == TrackEvent.TYPE_SLICE_BEGIN]
    assert len(begins) == len(program)
    assert len([event for event in events if event.type == TrackEvent.TYPE_SLICE_END]) == len(program)
    names = {packet.track_descriptor.name for packet in parsed.packet if packet.HasField("track_descriptor")}
    assert {"core0.dma_in", "core0.matrix", "DRAM GB/s"} <= names
    ends: dict[int, int] = {}  # slices of one track must not overlap
    for packet in parsed.packet:
        event = packet.track_event
        if packet.HasField("track_event") and event.type == TrackEvent.TYPE_SLICE_BEGIN:
            assert packet.timestamp >= ends.get(event.track_uuid, 0)
        elif packet.HasField("track_event") and event.type == TrackEvent.TYPE_SLICE_END:
            ends[event.track_uuid] = packet.timestamp
    assert trace(program, timeline) == trace(program, timeline)


def test_trace_of_sixty_thousand_instructions_in_five_seconds(case) -> None:
    program, timeline, _ = case
    times = 200
    code = np.tile(program.code, (times, 1))
    code[:, word.WAITS : word.WAITS + 2 * word.MAX_WAITS] = 0
    arrays = {
        name: np.tile(value, times) + (np.repeat(np.arange(times), len(program)) * timeline.total_fs) * shift
        for name, value in vars(timeline).items()
        if isinstance(value, np.ndarray)
        for shift in [name in ("head_fs", "start_fs", "issue_end_fs", "end_fs")]
    }
    begin = time.process_time()
    data = trace(program.with_code(code), replace(timeline, **arrays, total_fs=timeline.total_fs * times))
    assert time.process_time() - begin < 5
    assert len(data) > 1_000_000


def test_windows_keep_the_amount(case) -> None:
    _, timeline, _ = case
    edges = np.linspace(0, timeline.total_fs, 38)
    assert windowed(timeline, timeline.dram_read_bytes, edges).sum() == pytest.approx(timeline.dram_read_bytes.sum())


class _Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href") or name.startswith("on")]


def test_page_is_self_contained_and_escapes_names(document: RunDocument) -> None:
    text = page(document)
    assert len(text.encode()) < 500_000
    tags = _Tags()
    tags.feed(text)
    assert "svg" in tags.tags
    assert "script" not in tags.tags
    assert not tags.links
    assert "&lt;script&gt;" in text
    for heading in ("Roofline", "From ideal to actual", "Critical path", "not modelled", "Energy by component"):
        assert heading in text
    assert f"{document.ttft_ms:.2f} ms" in text


def test_page_of_a_large_run_stays_small(document: RunDocument) -> None:
    many = document.model_copy(update={"ops": document.ops * 60, "layers": document.layers * 20, "steps": None})
    assert len(many.ops) > 2000
    assert len(page(many).encode()) < 500_000


def test_page_without_any_product(document: RunDocument) -> None:
    bare = [row.model_copy(update={"macs": 0}) for row in document.ops]
    assert "Roofline" not in page(document.model_copy(update={"ops": bare}))


def test_decisions_that_are_alike_are_one_line() -> None:
    kept = "kept as int8 in scratchpad for 3 products, 640 bytes; estimated: rows in DRAM"
    found = norm_decisions([f"layers.0.a: {kept} +9 cycles", f"layers.1.a: {kept} +8 cycles", "residual: 4 of 4"])
    assert found == [
        "layers.0.a and 1 more: kept as int8 in scratchpad for 3 products, 640 bytes", "residual: 4 of 4",
        "reasons of each in run.json",
    ]  # fmt: skip
    assert norm_decisions([]) == []


def test_first_screen_side_by_side(document: RunDocument, hostile: str) -> None:
    import io

    from rich.console import Console

    out = io.StringIO()
    slower = document.model_copy(update={"ttft_ms": document.ttft_ms * 2, "weights": "fp16"})
    show(Console(file=out, width=140), [slower, document])
    text = out.getvalue()
    for words in (
        "time to first token",
        "energy per prompt",
        "average power",
        "by kind",
        "host fallbacks",
        "2.00x time",
    ):
        assert words in text
    for line in ("Costliest operators", "Not modelled", "thermal throttling"):
        assert line in text
    assert hostile not in text
    assert "\x1b" not in text


def test_amount() -> None:
    assert [amount(n) for n in (0, 999, 1500, 2_500_000, 1.2e9)] == ["0 B", "999 B", "1.50 kB", "2.50 MB", "1.20 GB"]


def test_folder_of_a_run(tmp_path, case, document: RunDocument) -> None:
    program, timeline, _ = case
    written = write_run(tmp_path / "out", document, program, timeline)
    names = ["ops.csv", "program.npu", "program.txt", "report.html", "run.json", "trace.pftrace"]
    assert sorted(path.name for path in written) == sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    before = {path.name: path.read_bytes() for path in written}
    write_run(tmp_path / "out", document, program, timeline)
    assert before == {path.name: path.read_bytes() for path in written}
    assert RunDocument.from_json((tmp_path / "out" / "run.json").read_text("utf-8")) == document


def test_a_file_in_the_way_is_one_message(tmp_path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ReportError, match="cannot write"):
        write_file(tmp_path / "file" / "run.json", "x")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ReportError, match="cannot write"):
        write_file(tmp_path / "folder", "x")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]
