"""The rungs of the ladder from the ideal to the actual time: names, and what they mean. Nothing heavy is imported."""

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class Step:
    """One rung: its name in files, what it is called, the resource that it belongs to, and what it means."""

    name: str
    title: str
    resource: str
    note: str


STEPS: Final = (
    Step("ideal", "MACs at peak", "matrix unit", "multiplies at the rate of their types"),
    Step("fill_drain", "fill and drain", "matrix unit", "the array fills and empties"),
    Step("array_load", "loading the array", "matrix unit", "it waits for the operand that it holds"),
    Step("padding", "padding", "matrix unit", "extents rounded up to those of the unit"),
    Step("issue", "issue", "matrix unit", "start of matrix instructions"),
    Step("dma_peak", "DRAM data at peak", "DRAM bandwidth", "waits for data, at the bus's peak"),
    Step("dma_bus", "narrow bus", "bus", "the bus to the DRAM is slower than it"),
    Step("dma_outstanding", "few requests in flight", "DMA engine", "a round trip per window of requests"),
    Step("dma_latency", "DRAM latency", "DRAM latency", "round trip of a stream that starts empty"),
    Step("dma_setup", "DMA setup", "DMA engine", "descriptors are set up"),
    Step("dma_refresh", "refresh", "DRAM efficiency", "all banks are closed"),
    Step("dma_rows", "rows, turnarounds", "DRAM efficiency", "the rest of what data waits for"),
    Step("vector", "vector work", "vector unit", "the matrix unit waits for it"),
    Step("bank_conflicts", "scratchpad conflicts", "scratchpad", "its ports and banks are busy"),
    Step("sync", "synchronisation", "synchronisation", "to a clock edge, or for another core"),
    Step("host", "calls of the host", "host", "what the NPU cannot compute"),
    Step("dispatch", "dispatch", "host", "before the first instruction"),
)
"""In the order of the ladder; `dispatch` belongs to no operator."""
NAMES: Final = tuple(step.name for step in STEPS)
BY_NAME: Final = {step.name: step for step in STEPS}
OF_OPERATORS: Final = NAMES[:-1]
HOLDERS: Final = ("dma", "matrix", "vector", "host")
"""What may hold the critical path."""
