"""Calls of the host as instructions and as entries of the program."""

from __future__ import annotations

import math

import numpy as np

from firsttoken_compiler.frontend.partition import Segment
from firsttoken_compiler.isa import word
from firsttoken_compiler.isa.host import HostLoad, HostRun, HostStore, host_flags
from firsttoken_compiler.isa.host_call import COPIED, HostCall, HostValue
from firsttoken_compiler.isa.types import Dtype, Engine, Operand, Space
from firsttoken_compiler.passes.host import HostSite

Transfer = tuple[int, int, Dtype]
"""(address, bytes, element type) of a tensor in DRAM."""
_NO_EXTENTS = (1, 1, 1)


def host_code(call: int, op: int, loads: list[Transfer], stores: list[Transfer]) -> np.ndarray:
    """The instructions of one call, int64 `[instructions, word.WIDTH]`."""
    rows = [_transfer(HostLoad, call, op, slot, load) for slot, load in enumerate(loads)]
    run = HostRun(queue=int(Engine.HOST), op=op, flags=host_flags(call), dims=_NO_EXTENTS, operands=())
    rows.append(run.encode())
    rows += [_transfer(HostStore, call, op, slot, store) for slot, store in enumerate(stores)]
    return np.stack(rows).reshape(-1, word.WIDTH)


def _transfer(kind: type[HostLoad] | type[HostStore], call: int, op: int, slot: int, part: Transfer) -> np.ndarray:
    address, nbytes, dtype = part
    operand = Operand(Space.DRAM, dtype, address, nbytes)
    queue = int(Engine.HOST)
    return kind(queue=queue, op=op, flags=host_flags(call, slot), dims=_NO_EXTENTS, operands=(operand,)).encode()


def host_call(segment: Segment, site: HostSite, loaded: list[Dtype], stored: list[Dtype]) -> HostCall:
    """The program's entry: how the subgraph's operands lie in memory, and what the call costs."""
    reads = {name: segment.reads.get(name, COPIED) for name in (*segment.inputs, *segment.weights)}
    layouts = [*site.operands, *((segment.types[n].shape, row_major(segment.types[n].shape)) for n in segment.weights)]
    inputs = tuple(
        HostValue(name, segment.types[name].elem_type, shape, dtype, strides, reads[name])
        for name, (shape, strides), dtype in zip((*segment.inputs, *segment.weights), layouts, loaded, strict=True)
    )
    outputs = tuple(
        HostValue(name, segment.types[name].elem_type, shape, dtype, row_major(shape))
        for name, shape, dtype in zip(segment.outputs, site.results, stored, strict=True)
    )
    return HostCall(
        segment.name, segment.nodes, segment.reason, inputs, outputs, segment.flops, segment.nbytes, segment.model
    )


def row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides in elements."""
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
