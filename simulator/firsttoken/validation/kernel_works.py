"""From an operator of a table to what `latency` runs."""

from __future__ import annotations

from firsttoken.latency import KernelWork, Work
from firsttoken.validation.kernel_graphs import Operator, graph_of


def work_of(operator: Operator, runtime: str | None) -> Work:
    """The work that times one operator; raises OptionError for one that is no graph here."""
    graph_of(operator)  # refuses what it cannot build
    return KernelWork(operator, operator.options, runtime)
