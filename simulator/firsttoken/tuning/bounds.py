"""What no schedule of a kernel can beat: its multiplications at the matrix unit's rate, its operands at the DRAM's."""

from __future__ import annotations

from firsttoken.tuning.search import Kernel


def bound_cycles(kernel: Kernel) -> float:
    """The larger of both bounds, cycles.

    Multiplications of a pair of types that the unit has no rate for, which are widened first, count at its fastest
    rate; operands that lie in DRAM cross the bus once, packed, at the peak of DRAM or bus. A cache counts with the rows
    that are in it.
    """
    from firsttoken_compiler.isa.types import Dtype, Space
    from firsttoken_compiler.schedule.rowwise import kernel_operands
    from firsttoken_compiler.target.rates import pair_name

    spec, target = kernel.spec, kernel.machine
    rates = target.matrix.macs_per_cycle
    rate = max(rates.values())
    if spec.kind == "attention" or (spec.kind == "linear" and not spec.get("blocks")):
        first = Dtype.F16 if spec.kind == "attention" else spec.args[0].dtype
        rate = rates.get(pair_name(first, spec.args[1].dtype), rate)
    compute = kernel.macs / rate
    if spec.kind in ("gather", "row", "columns", "kv_append", "kv_quantise", "concat"):
        return compute  # they move part of what their operands hold
    operands = kernel_operands(spec, (*spec.args, *spec.outs))
    nbytes = sum(arg.nbytes for arg, space in zip(operands, kernel.spaces, strict=True) if space is Space.DRAM)
    per_cycle = min(target.dram.peak_bytes_per_s / target.clock_hz, target.dma.bus_bytes_per_cycle)
    return max(compute, nbytes / per_cycle)
