"""`trace.pftrace`: the run as a Perfetto trace, one track per queue, and counters of DRAM bandwidth and scratchpad."""

from typing import Any, Final

import numpy as np

from firsttoken_compiler.isa import word
from firsttoken_compiler.isa.opcodes import BY_OPCODE
from firsttoken_compiler.isa.program import Program
from firsttoken_compiler.isa.types import queue_name
from firsttoken_simulator.report.occupancy import occupancy
from firsttoken_simulator.timeline import Timeline

_SEQUENCE: Final = 1
_RUN_TRACK: Final = 1
_QUEUE_TRACKS: Final = 1000
_BANDWIDTH_TRACK: Final = 100
_SPAD_TRACK: Final = 101
_RESIDENT_TRACK: Final = 102
_WORKING_TRACK: Final = 103
_SAMPLES: Final = 2000


def trace(program: Program, timeline: Timeline) -> bytes:
    """The trace, in nanoseconds; slices are named by operator and carry the instruction's number.

    A DMA slice lasts until its last request is sent, so that slices of one queue never overlap.
    """
    from perfetto.protos.perfetto.trace.perfetto_trace_pb2 import TrackEvent
    from perfetto.trace_builder.proto_builder import TraceProtoBuilder

    builder = TraceProtoBuilder()
    queues = np.unique(program.code[:, word.QUEUE]).tolist()
    _describe(builder, "npu", _RUN_TRACK, 0, first=True)
    for queue in queues:
        _describe(builder, queue_name(queue), _QUEUE_TRACKS + queue, _RUN_TRACK)
    for name, track in (
        ("DRAM GB/s", _BANDWIDTH_TRACK), ("scratchpad B/cycle", _SPAD_TRACK),
        ("scratchpad bytes of values", _RESIDENT_TRACK), ("scratchpad bytes of kernels", _WORKING_TRACK),
    ):  # fmt: skip
        descriptor = _describe(builder, name, track, _RUN_TRACK)
        descriptor.counter.unit = type(descriptor.counter).UNIT_UNSPECIFIED
    _slices(builder, program, timeline, TrackEvent)
    for track, values in (*_counters(timeline), *_held(program, timeline)):
        for at, value in values:
            packet = builder.add_packet()
            packet.timestamp = at
            packet.trusted_packet_sequence_id = _SEQUENCE
            packet.track_event.type = TrackEvent.TYPE_COUNTER
            packet.track_event.track_uuid = track
            packet.track_event.double_counter_value = value
    return bytes(builder.serialize())


def _describe(builder: Any, name: str, uuid: int, parent: int, first: bool = False) -> Any:
    packet = builder.add_packet()
    packet.trusted_packet_sequence_id = _SEQUENCE
    if first:
        packet.sequence_flags = 1  # SEQ_INCREMENTAL_STATE_CLEARED: names are interned from here on
    packet.track_descriptor.uuid = uuid
    packet.track_descriptor.name = name
    if parent:
        packet.track_descriptor.parent_uuid = parent
    return packet.track_descriptor


def _slices(builder: Any, program: Program, timeline: Timeline, event: Any) -> None:
    code = program.code
    begin = (timeline.start_fs // 1_000_000).tolist()
    end = (np.maximum(timeline.issue_end_fs, timeline.start_fs) // 1_000_000).tolist()
    queue, op, opcode = (code[:, column].tolist() for column in (word.QUEUE, word.OP, word.OPCODE))
    flow = _flows(code)
    seen: set[int] = set()
    for i in np.lexsort((np.arange(len(code)), timeline.start_fs)).tolist():
        packet = builder.add_packet()
        packet.timestamp = begin[i]
        packet.trusted_packet_sequence_id = _SEQUENCE
        packet.sequence_flags = 2  # SEQ_NEEDS_INCREMENTAL_STATE
        if op[i] not in seen:
            seen.add(op[i])
            entry = packet.interned_data.event_names.add()
            entry.iid, entry.name = op[i] + 1, program.ops[op[i]].name
        slice_ = packet.track_event
        slice_.type = event.TYPE_SLICE_BEGIN
        slice_.track_uuid = _QUEUE_TRACKS + queue[i]
        slice_.name_iid = op[i] + 1
        slice_.flow_ids.extend(flow[i])
        note = slice_.debug_annotations.add()
        note.name, note.string_value = "instruction", f"{i} {BY_OPCODE[opcode[i]].MNEMONIC}"
        packet = builder.add_packet()
        packet.timestamp = end[i]
        packet.trusted_packet_sequence_id = _SEQUENCE
        packet.track_event.type = event.TYPE_SLICE_END
        packet.track_event.track_uuid = _QUEUE_TRACKS + queue[i]


def _flows(code: np.ndarray) -> list[list[int]]:
    """Arrows between a signalling instruction and the first wait on it: an id per signal, on either end."""
    flows: list[list[int]] = [[] for _ in range(len(code))]
    signaller: dict[tuple[int, int], int] = {}
    count: dict[int, int] = {}
    for i in np.flatnonzero(code[:, word.SIGNAL]).tolist():
        queue = int(code[i, word.QUEUE])
        count[queue] = count.get(queue, 0) + 1
        signaller[queue, count[queue]] = i
    drawn: set[int] = set()
    for slot in range(word.MAX_WAITS):
        waited, value = code[:, word.WAITS + 2 * slot] - 1, code[:, word.WAITS + 2 * slot + 1]
        for i in np.flatnonzero(waited >= 0).tolist():
            producer = signaller.get((int(waited[i]), int(value[i])))
            if producer is not None and producer not in drawn and code[producer, word.QUEUE] != code[i, word.QUEUE]:
                drawn.add(producer)
                flows[producer].append(producer + 1)
                flows[i].append(producer + 1)
    return flows


def _counters(timeline: Timeline) -> list[tuple[int, list[tuple[int, float]]]]:
    """(track, [(nanoseconds, value)]): mean rates over equal windows."""
    total = max(timeline.total_fs, 1)
    edges = np.linspace(0, total, min(_SAMPLES, max(1, timeline.total_cycles)) + 1)
    width = edges[1] - edges[0]
    dram = windowed(timeline, timeline.dram_read_bytes + timeline.dram_write_bytes, edges) / width * 1e6
    spad = windowed(timeline, timeline.spad_read_bytes + timeline.spad_write_bytes, edges) / width * timeline.period_fs
    at = (edges // 1_000_000).astype(np.int64).tolist()
    return [
        (track, list(zip(at, [*values.tolist(), 0.0], strict=True)))
        for track, values in ((_BANDWIDTH_TRACK, dram), (_SPAD_TRACK, spad))
    ]


def _held(program: Program, timeline: Timeline) -> list[tuple[int, list[tuple[int, float]]]]:
    """(track, [(nanoseconds, bytes)]): what the scratchpad holds, at every change."""
    found = occupancy(program, timeline)
    at = (found.at_fs // 1_000_000).tolist()
    return [
        (track, list(zip(at, held.astype(np.float64).tolist(), strict=True)))
        for track, held in ((_RESIDENT_TRACK, found.resident), (_WORKING_TRACK, found.working))
    ]


def windowed(timeline: Timeline, amount: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Amount per window between `edges` (fs), each instruction's spread evenly over its run time."""
    start = timeline.start_fs.astype(np.float64)
    length = np.maximum(timeline.end_fs - timeline.start_fs, 1).astype(np.float64)
    rate = amount / length
    # The cumulative amount at time t is the integral of the sum of the rates: linear between events.
    events = np.concatenate([start, start + length])
    change = np.concatenate([rate, -rate])
    order = np.argsort(events, kind="stable")
    times, slope = events[order], np.cumsum(change[order])
    grown = np.concatenate([[0.0], np.cumsum(slope[:-1] * np.diff(times))]) if len(times) else np.zeros(0)
    if not len(times):
        return np.zeros(len(edges) - 1)
    return np.maximum(np.diff(np.interp(edges, times, grown)), 0.0)
