"""The samples of all probes as cells of the table: one per place and operator, the mean where there are several."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from firsttoken.cost_tables.lookup import grid_of
from firsttoken.cost_tables.probes import METRICS, Row, Sample, samples

if TYPE_CHECKING:
    from firsttoken.cost_tables.space import CostSpace
    from firsttoken.student import StudentConfig


def cells_of(
    space: CostSpace, measured: Sequence[Sequence[Sequence[Row]]]
) -> tuple[tuple[str, ...], NDArray[np.float64]]:
    """The operators' names, and [operators, cells, metrics of every phase]; cells that no student has are NaN.

    `measured`: rows of `space.probes`, phase by phase.
    """
    bases = grid_of(space).bases.tolist()
    phases = len(measured[0])
    numbers: dict[str, int] = {}
    found: list[tuple[int, int, Sample]] = []
    count = np.zeros((bases[-1], phases))
    for probe, rows in zip(space.probes, measured, strict=True):
        places = set()
        for sample in samples(rows, probe.layers):
            cell = _cell(space, bases, probe, sample)
            found.append((numbers.setdefault(f"{sample.group}.{sample.op}", len(numbers)), cell, sample))
            places.add((cell, sample.layer, sample.phase))
        for cell, _, phase in places:
            count[cell, phase] += 1
    total = np.zeros((len(numbers), bases[-1], phases, len(METRICS)))
    for number, cell, sample in found:
        total[number, cell, sample.phase] += sample.metrics
    mean = total / np.where(count > 0, count, np.nan)[:, :, None]
    return tuple(numbers), mean.reshape(len(numbers), bases[-1], -1)


def _cell(space: CostSpace, bases: list[int], probe: StudentConfig, sample: Sample) -> int:
    """Number of the cell that a sample belongs to; the order is that of `lookup`."""
    at = {name: axis.measured.index for name, axis in space.axes}
    size = {name: len(axis.measured) for name, axis in space.axes}
    hidden, head_dim = at["hidden"](probe.hidden), at["head_dim"](probe.head_dim)
    if sample.group == "start":
        return bases[2] + head_dim * size["hidden"] + hidden
    if sample.group == "head":
        return bases[3] + hidden * size["vocab"] + at["vocab"](probe.vocab)
    layer = probe.layer(sample.layer)
    bits = at["weight_bits"](layer.weight_bits or 0)
    if sample.group == "feed_forward":
        return (
            bases[1] + (bits * size["hidden"] + hidden) * size["intermediate"] + at["intermediate"](layer.intermediate)
        )
    kv = at["kv_heads"](layer.kv_heads)
    heads = [space.heads(value).measured for value in space["kv_heads"].measured]
    most = max(map(len, heads))
    row = ((bits * size["kv_heads"] + kv) * size["head_dim"] + head_dim) * size["hidden"] + hidden
    return row * most + heads[kv].index(layer.heads)
