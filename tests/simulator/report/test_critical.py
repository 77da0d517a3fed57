import time

import networkx as nx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from firsttoken_compiler.errors import ProgramError
from firsttoken_compiler.isa import word
from firsttoken_simulator.report.critical import (
    CAUSES,
    critical_path,
    dependence_graph,
    op_time,
    op_time_by_cause,
    slack_fs,
)


@settings(max_examples=25, deadline=None)
@given(count=st.integers(1, 120), seed=st.integers(0, 10_000))
def test_segments_tile_the_run_and_follow_dependences(make_case, count: int, seed: int) -> None:
    program, timeline, _ = make_case(count, seed)
    path = critical_path(program, timeline)
    assert path.from_fs[0] == 0
    assert path.to_fs[-1] == timeline.total_fs
    np.testing.assert_array_equal(path.from_fs[1:], path.to_fs[:-1])
    assert (path.length_fs > 0).all()
    graph = dependence_graph(program)
    assert nx.is_directed_acyclic_graph(graph)
    for a, b in zip(path.instruction[:-1].tolist(), path.instruction[1:].tolist(), strict=True):
        assert graph.has_edge(a, b)


@settings(max_examples=25, deadline=None)
@given(count=st.integers(1, 120), seed=st.integers(0, 10_000))
def test_attribution_sums_to_the_total(make_case, count: int, seed: int) -> None:
    program, timeline, _ = make_case(count, seed)
    path = critical_path(program, timeline)
    assert int(op_time(program, path).sum()) == timeline.total_fs
    by_cause = op_time_by_cause(program, path, timeline)
    assert int(by_cause.sum()) == timeline.total_fs
    np.testing.assert_array_equal(by_cause.sum(axis=1), op_time(program, path))
    assert by_cause.shape == (len(program.ops), len(CAUSES))


@settings(max_examples=25, deadline=None)
@given(count=st.integers(1, 120), seed=st.integers(0, 10_000))
def test_slack_is_that_of_the_graph(make_case, count: int, seed: int) -> None:
    program, timeline, _ = make_case(count, seed)
    slack = slack_fs(program, timeline)
    assert (slack >= 0).all()
    path = critical_path(program, timeline)
    assert (slack[path.instruction] == 0).all()
    # The same by the graph itself: the longest way from an instruction's start to the end of the run.
    graph = dependence_graph(program, timeline)
    remaining = {}
    for node in reversed(list(nx.topological_sort(graph))):
        own = int(timeline.end_fs[node] - timeline.start_fs[node])
        ways = (edge["latency_fs"] + remaining[after] for _, after, edge in graph.out_edges(node, data=True))
        remaining[node] = max([own, *ways])
    expected = [timeline.total_fs - int(timeline.start_fs[i]) - remaining[i] for i in range(len(program))]
    np.testing.assert_array_equal(slack, expected)


def test_waits_that_cannot_be_met_are_named(make_case) -> None:
    program, timeline, _ = make_case(40)
    code = program.code.copy()
    code[3, word.WAITS : word.WAITS + 2] = 1, 999
    with pytest.raises(ProgramError, match=r"instruction 3 waits for core0.dma_in to reach 999, which it never does"):
        critical_path(program.with_code(code), timeline)


def test_a_cycle_is_an_error(make_case) -> None:
    program, timeline, _ = make_case(40)
    code = program.code.copy()
    first, last = np.flatnonzero(code[:, word.QUEUE] == 2)[[0, -1]]
    code[first, word.WAITS : word.WAITS + 2] = 3, (code[:, word.QUEUE] == 2).sum()
    assert last > first
    with pytest.raises(ProgramError, match="form a cycle"):
        slack_fs(program.with_code(code), timeline)


def test_fifty_thousand_instructions_in_two_seconds(make_case) -> None:
    small, timeline, _ = make_case(1000)
    # The same thousand instructions fifty times, each repetition's waits raised by the signals before it.
    copies, parts = 50, []
    signals = np.bincount(small.code[:, word.QUEUE], minlength=5)
    for copy in range(copies):
        code = small.code.copy()
        for slot in range(word.MAX_WAITS):
            waited = code[:, word.WAITS + 2 * slot]
            code[:, word.WAITS + 2 * slot + 1] += np.where(waited > 0, copy * signals[np.maximum(waited - 1, 0)], 0)
        parts.append(code)
    program = small.with_code(np.concatenate(parts))

    def repeat(values: np.ndarray, shift: int) -> np.ndarray:
        return np.concatenate([values + copy * shift for copy in range(copies)])

    from dataclasses import fields, replace

    arrays = {
        field.name: repeat(getattr(timeline, field.name), timeline.total_fs if field.name.endswith("_fs") else 0)
        for field in fields(timeline)
        if isinstance(getattr(timeline, field.name), np.ndarray)
    }
    long = replace(timeline, **arrays, total_fs=timeline.total_fs * copies)
    begin = time.process_time()
    path = critical_path(program, long)
    slack = slack_fs(program, long)
    assert time.process_time() - begin < 2
    assert int(path.length_fs.sum()) == long.total_fs
    assert len(slack) == 50_000
