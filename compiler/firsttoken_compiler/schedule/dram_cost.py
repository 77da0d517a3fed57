"""What transfers take by the numbers of a target's DMA and DRAM, without simulating them: for ranking schedules."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from firsttoken_compiler.target.rates import ceil_div
from firsttoken_compiler.target.target import Dram, Target


@dataclass(frozen=True, slots=True)
class Reading:
    """Cycles of a load: of the queue that sends its requests, and of the DRAM's channels."""

    link: float
    dram: float


def latency(target: Target) -> float:
    """Cycles from a request to its answer: an open row, behind the other bursts of its chunk on the channel."""
    dram = target.dram
    chunk = max(1, dram.interleave_bytes // dram.burst_bytes)
    nanoseconds = dram.controller_ns + dram.tcl_ns + chunk * _burst_ns(dram)
    return nanoseconds * target.clock_hz / 1e9 + target.dma.bus_latency_cycles


def transfer(target: Target, nbytes: int, transfers: int = 1) -> float:
    """Cycles of so many loads that bring so many bytes in long runs."""
    if not transfers:
        return 0.0
    return transfers * reading(target, max(1, ceil_div(nbytes, transfers)), nbytes, 1).link


def reading(target: Target, run: int, stride: int, rows: int) -> Reading:
    """Cycles of one load of `rows` runs of `run` bytes that lie `stride` bytes apart, among others.

    Requests go out as earlier ones come back. A run opens rows of the DRAM, and the set-up of a descriptor sends
    nothing: with more requests in flight than the DRAM needs both pass unseen. Otherwise what goes out in that time
    comes back later by it: all of a short run, and of a long one as much as is under way at its start.
    """
    dram, dma = target.dram, target.dma
    awake = 1 - dram.trfc_ns / dram.trefi_ns
    wait = latency(target)
    peak = min(dram.peak_bytes_per_s / target.clock_hz, dma.bus_bytes_per_cycle)
    flying = dma.outstanding * dram.burst_bytes
    rate = min(peak, flying / wait) * awake
    spare = max(0.0, flying / peak - wait)
    opening = max(0.0, (dram.trp_ns + dram.trcd_ns) * target.clock_hz / 1e9 - spare)
    setup = max(0.0, dma.setup_cycles - spare)
    used, each, opened, anew = _spread(dram, run, stride, rows)
    late = rows * anew * opening * min(run / rate, opening) / wait + setup * min(1.0, setup / wait)
    run_ns = max(each * _burst_ns(dram), opened * max(dram.trrd_ns, dram.tfaw_ns / 4))
    run_ns += max(anew, each * dram.burst_bytes / (dram.page_bytes * _banks(dram))) * _seen(dram)
    share = used / dram.channels * camping(dram, run, stride, rows)
    channels = rows * share * run_ns * target.clock_hz / 1e9 / awake
    issue = dma.setup_cycles + rows * run / dma.bus_bytes_per_cycle
    return Reading(max(issue, rows * run / rate + late, channels), channels)


def _spread(dram: Dram, run: int, stride: int, rows: int) -> tuple[int, int, float, float]:
    """(channels that a run uses, its bursts on each, rows that it opens there, share of the runs that open any).

    Runs that lie close together find the rows of the one before still open.
    """
    used = min(dram.channels, ceil_div(run, dram.interleave_bytes))
    each = ceil_div(ceil_div(run, dram.burst_bytes), used)
    banks = _banks(dram)
    opened = max(min(banks, each), ceil_div(each * dram.burst_bytes, dram.page_bytes))
    apart = stride * dram.channels / used / camping(dram, run, stride, rows)
    anew = min(1.0, apart / (dram.page_bytes * banks * dram.channels)) if rows > 1 else 1.0
    return used, each, opened * anew, anew


def _banks(dram: Dram) -> int:
    """Banks of a channel that a stream goes round."""
    return {"row-linear": 1, "group-interleaved": dram.bank_groups}.get(
        dram.map, dram.bank_groups * dram.banks_per_group
    )


def _seen(dram: Dram) -> float:
    """Nanoseconds of opening a row that looking ahead does not hide: the queue holds little more than a chunk."""
    ahead = max(0, dram.queue_depth - max(1, dram.interleave_bytes // dram.burst_bytes))
    return max(0.0, dram.trp_ns + dram.trcd_ns - ahead * _burst_ns(dram))


def _burst_ns(dram: Dram) -> float:
    return dram.burst_length * 1e3 / dram.data_rate_mtps


@functools.lru_cache(maxsize=65536)
def camping(target_dram: Dram, run: int, stride: int, count: int) -> float:
    """How much longer `count` runs of `run` bytes take because they meet the same DRAM channels: at least 1.

    The busiest channel's bytes over the mean, with runs `stride` bytes apart.
    """
    step, channels = target_dram.interleave_bytes, target_dram.channels
    load = [0] * channels
    for index in range(min(count, 8 * channels)):
        at, left = index * stride, run
        rounds, left = divmod(left, step * channels)
        load = [nbytes + rounds * step for nbytes in load]
        while left > 0:
            part = min(left, step - at % step)
            load[at // step % channels] += part
            at, left = at + part, left - part
    return max(load) * channels / sum(load)


@functools.lru_cache(maxsize=65536)
def storing(dram: Dram, run: int, stride: int, rows: int) -> float:
    """Nanoseconds that storing `rows` runs of `run` bytes keeps the DRAM from a stream of reads.

    The data bus turns round twice for every batch of writes, and each run opens rows that the reads do not use.
    """
    used, each, opened, _ = _spread(dram, run, stride, rows)
    burst_ns = _burst_ns(dram)
    turn = (dram.trtw_ns + dram.tcwl_ns + burst_ns + dram.twtr_ns) / max(1, dram.queue_depth // 2)
    run_ns = each * (burst_ns + turn) + opened * max(dram.trrd_ns, dram.tfaw_ns / 4)
    return rows * used / dram.channels * run_ns * camping(dram, run, stride, rows)
