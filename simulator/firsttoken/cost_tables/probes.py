"""What the operators of a probe cost: it is compiled and simulated once, its rows are kept by content hash."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from typing import TYPE_CHECKING, Any, Final

from firsttoken.cache import ResultCache, content_key
from firsttoken.subject import subject_of
from firsttoken_compiler.errors import OptionError

if TYPE_CHECKING:
    from firsttoken.cost import CostModel
    from firsttoken.options import Progress
    from firsttoken.student import StudentConfig

METRICS: Final = ("ms", "mj", "dram_bytes", "macs")
"""What is known of an operator, in each graph."""
_BLOB: Final = "probe.json"
_LAYERS: Final = "layers"
_FEED_FORWARD: Final = "post_attention_layernorm"
"""The first operator of a layer's second half."""

Row = tuple[str, tuple[float, ...]]
"""An operator's name, and its metrics."""
Graph = tuple[int, int]
"""Tokens of a graph, and cached rows before them."""


@dataclass(frozen=True, slots=True)
class Sample:
    """What one operator cost in one place: `group` is "start", "attention", "feed_forward" or "head".

    `layer` is the measured layer's number in its probe, -1 of start and head.
    """

    group: str
    layer: int
    op: str
    graph: int
    metrics: tuple[float, ...]


def measure_all(
    model: CostModel, probes: Sequence[StudentConfig], graphs: Sequence[Graph], jobs: int | None = None,
    progress: Progress | None = None,
) -> list[list[list[Row]]]:  # fmt: skip
    """The rows of every probe, graph by graph; what is kept from before is not measured again.

    `jobs` spawned processes work side by side (default: one per CPU). Raises FirsttokenError.
    """
    if jobs is not None and jobs < 1:
        raise OptionError(f"jobs is {jobs}, must be at least 1; leave it away for one per CPU")
    asked = [(probe, graph) for probe in probes for graph in graphs]
    found: dict[int, list[Row]] = {}
    for at, (probe, graph) in enumerate(asked):
        if (kept := _kept(model, probe, graph)) is not None:
            found[at] = kept
    missing = [at for at in range(len(asked)) if at not in found]
    for at, rows in _measured(model, asked, missing, min(jobs or os.cpu_count() or 1, len(missing))):
        found[at] = rows
        if progress is not None:
            progress("probes", len(found), len(asked))
    return [[found[at * len(graphs) + graph] for graph in range(len(graphs))] for at in range(len(probes))]


def _measured(
    model: CostModel, asked: Sequence[tuple[StudentConfig, Graph]], missing: list[int], workers: int
) -> Iterator[tuple[int, list[Row]]]:
    if workers <= 1:
        for at in missing:
            yield at, measure(model, *asked[at])
        return
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        futures = {pool.submit(measure, model, *asked[at]): at for at in missing}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def measure(model: CostModel, probe: StudentConfig, graph: Graph) -> list[Row]:
    """The rows of one graph of a probe. Raises OptionError where the host computes a part of it."""
    from firsttoken import api

    tokens, past = graph
    document, _, _ = api.measure(subject_of(probe), model.target, tokens, 0, model.options, past=past)
    if document.host_fallbacks:
        raise OptionError(
            f"the host computes {document.host_fallbacks[0]} of {probe.name}, whose time is no sum over operators: "
            "ask for exact costs"
        )
    rows = _rows(document.ops, document.ttft_ms, document.energy_mj, model.target.clock_hz)
    ResultCache().put(_key(model, probe, graph), {_BLOB: json.dumps(rows).encode()})
    return rows


def _rows(ops: Sequence[Any], ms: float, mj: float, clock_hz: float) -> list[Row]:
    """The operators in their order, and before them what is no operator's: the dispatch."""
    rows: list[Row] = [
        (
            op.op,
            (op.cycles / clock_hz * 1e3, op.energy_nj / 1e6, op.dram_read_bytes + op.dram_write_bytes, op.macs),
        )
        for op in ops
    ]
    rest = (ms - sum(m[0] for _, m in rows), mj - sum(m[1] for _, m in rows), 0.0, 0.0)
    return [("dispatch", rest), *rows]


def _key(model: CostModel, probe: StudentConfig, graph: Graph) -> str:
    from firsttoken.api import run_parts

    subject, (tokens, past) = subject_of(probe), graph
    parts = run_parts(subject, model.target, tokens, 0, model.options, past)
    return content_key("cost probe", parts, subject.packages)


def _kept(model: CostModel, probe: StudentConfig, graph: Graph) -> list[Row] | None:
    blobs = ResultCache().get(_key(model, probe, graph), (_BLOB,))
    try:
        return None if blobs is None else [(op, tuple(metrics)) for op, metrics in json.loads(blobs[_BLOB])]
    except (ValueError, TypeError):
        return None


def samples(graphs: Sequence[Sequence[Row]], layers: int) -> list[Sample]:
    """The rows of a probe of so many layers by where they belong.

    Layer 0 is a copy of layer 1, the last one of the layer before it. What layer 0 alone has belongs to the start; what
    else the copies cost more or less than their originals is "first layer" of the start and "last layer" of the head.
    """
    found = []
    for graph, rows in enumerate(graphs):
        inside: list[list[Row]] = [[] for _ in range(layers)]
        for op, metrics in rows:
            place, _, rest = op.partition(".")
            if place == _LAYERS:
                number, _, name = rest.partition(".")
                inside[int(number)].append((name, metrics))
            else:
                group = "head" if inside[0] else "start"
                found.append(Sample(group, -1, op, graph, metrics))
        own = {name for name, _ in inside[1]}
        found += [Sample("start", -1, name, graph, m) for name, m in inside[0] if name not in own]
        lead = [row for row in inside[0] if row[0] in own]
        found.append(Sample("start", -1, "first layer", graph, _difference(lead, inside[1])))
        found.append(Sample("head", -1, "last layer", graph, _difference(inside[-1], inside[-2])))
        for layer in range(1, layers - 1):
            group = "attention"
            for name, metrics in inside[layer]:
                group = "feed_forward" if name == _FEED_FORWARD else group
                found.append(Sample(group, layer, name, graph, metrics))
    return found


def _difference(rows: Sequence[Row], others: Sequence[Row]) -> tuple[float, ...]:
    return tuple(
        sum(metrics[at] for _, metrics in rows) - sum(metrics[at] for _, metrics in others)
        for at in range(len(METRICS))
    )
