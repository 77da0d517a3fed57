"""How long the units take for one instruction, as integers: shared by the schedule's cost and by the timing machine.

Systolic formulas are SCALE-Sim's (its report prints the index of the last cycle, one less than these counts):
weight-stationary, per tile of the array: 2R + C + M - 2 (R to load the weights, then M rows skewed over R + C);
output-stationary, per tile: R + C + K - 2.
"""

import math
from dataclasses import dataclass

from firsttoken_compiler.errors import OptionError
from firsttoken_compiler.isa.types import PACKED, Dtype
from firsttoken_compiler.isa.vector_kernel import COST_CLASSES, LEAVING, VectorKernel
from firsttoken_compiler.target.target import Target

_PAIR_NAMES = {
    Dtype.F32: "fp32", Dtype.F16: "fp16", Dtype.I16: "int16", Dtype.I8: "int8", Dtype.I4: "int4", Dtype.U4: "int4",
}  # fmt: skip

_ACTIVATION_BITS = {name: dtype.bits for dtype, name in _PAIR_NAMES.items()}


def ceil_div(a: int, b: int) -> int:
    """Smallest integer >= a / b."""
    return -(-a // b)


def pair_name(activation: Dtype, weight: Dtype) -> str:
    """Key of the rate and energy tables, e.g. `int8xint4`."""
    return f"{_PAIR_NAMES[activation]}x{_PAIR_NAMES[weight]}"


@dataclass(frozen=True, slots=True)
class MatmulCost:
    """One matrix instruction as equal passes: `head_cycles + passes * pass_cycles + tail_cycles`."""

    passes: int
    pass_cycles: int
    head_cycles: int
    tail_cycles: int

    @property
    def cycles(self) -> int:
        """Total, without issue cost and without waiting for the scratchpad."""
        return self.head_cycles + self.passes * self.pass_cycles + self.tail_cycles


def tile_rows(target: Target, attends: bool) -> int:
    """Rows that a tile unit takes at a time; `attends` as for `matmul_cost`."""
    return target.attention.rows if attends and target.attention is not None else target.matrix.tile_m


def matmul_cost(target: Target, m: int, n: int, k: int, pair: str, attends: bool = False) -> MatmulCost:
    """Cycles of `[m, k] x [k, n]` on the matrix unit; `attends`: of an attention that the target maps in its own way.

    Raises OptionError when the unit has no rate for the pair.

    An array that keeps one operand (weights, or inputs) streams the other one past it: the m rows of the inputs, or the
    n columns of the weights. With double-buffering only the first load (R) and the last drain (R + C - 2) show; between
    them each pass takes the longer of what it streams and the R rows of the next load, the last one what it streams.
    Arrays side by side work on one product: each holds its own columns, all see the same stream.
    """
    unit = target.matrix
    if pair not in unit.macs_per_cycle:
        known = ", ".join(sorted(unit.macs_per_cycle))
        raise OptionError(
            f"target {target.name} cannot multiply {pair}; it has {known}: choose --acts and --weights so"
        )
    if unit.kind == "tile":
        tile_m = tile_rows(target, attends)
        block = tile_m * unit.rows * unit.columns
        per_issue = max(1, ceil_div(block, unit.macs_per_cycle[pair]))
        passes = ceil_div(n, unit.columns) * ceil_div(k, unit.rows)
        each = ceil_div(m, tile_m) * per_issue + math.ceil(unit.weight_cycles.get(pair, 0.0))
        waits = 0 if attends else max(0, _streaming(target, m, n, k, pair) - passes * each)
        return MatmulCost(passes, each, unit.fill_cycles, waits)
    # An array that is narrower than its peak for a pair repeats every step.
    r, c, width = unit.rows, unit.columns, unit.columns * unit.arrays
    repeat = max(1, ceil_div(r * width, unit.macs_per_cycle[pair]))
    if unit.dataflow == "os":
        return MatmulCost(ceil_div(m, r) * ceil_div(n, width), r + c + k * repeat - 2, 0, 0)
    held, streamed = (m, n * repeat) if unit.dataflow == "is" else (n, m * repeat)
    passes = ceil_div(k, r) * ceil_div(held, width)
    if unit.double_buffered:
        return MatmulCost(passes, max(streamed, r), r, r + c - 2 - max(0, r - streamed))
    return MatmulCost(passes, 2 * r + c + streamed - 2, 0, 0)


def _streaming(target: Target, m: int, n: int, k: int, pair: str) -> int:
    """Cycles in which the activations of a product reach a tile unit that states their rate; 0 for others."""
    unit = target.matrix
    if not (unit.tile_columns and unit.row_bytes_per_cycle):
        return 0
    nbytes = m * k * _ACTIVATION_BITS[pair.partition("x")[0]] // 8
    return ceil_div(n, unit.tile_columns) * math.ceil(nbytes / unit.row_bytes_per_cycle)


def matmul_scratchpad_bytes(target: Target, m: int, n: int, k: int, a_bits: int, w_bits: int) -> tuple[int, int]:
    """Bytes (read from scratchpad, moved to and from accumulators) by one matrix instruction.

    Weight-stationary and tile units read each weight once and the activations again for every column block;
    input-stationary units read each activation once and the weights again for every block of rows that the columns
    hold; output-stationary units read both again for every block of the other.
    """
    unit = target.matrix
    width = unit.columns * unit.arrays
    if unit.kind == "systolic" and unit.dataflow == "is":
        again = ceil_div(m, width) * (k * n * w_bits // 8)
        return again + m * k * a_bits // 8, 2 * m * n * 4 * ceil_div(k, unit.rows)
    column_blocks = ceil_div(n, width)
    if unit.kind == "systolic" and unit.dataflow == "os":
        weights = ceil_div(m, unit.rows) * (k * n * w_bits // 8)
        moved = m * n * 4
    else:
        weights = k * n * w_bits // 8
        moved = 2 * m * n * 4 * ceil_div(k, unit.rows)
    return weights + column_blocks * (m * k * a_bits // 8), moved


def _narrows(kernel: VectorKernel, dtypes: tuple[Dtype, ...]) -> bool:
    """Whether results are computed in fp32, or read as wider numbers, and kept in fewer bits."""
    if kernel.reduction is not None or not dtypes or dtypes[0].bits >= Dtype.F32.bits:
        return False
    return isinstance(kernel.expr, tuple) or any(dtype.bits > dtypes[0].bits for dtype in dtypes[1:])


BYTE_OPERATIONS = frozenset(("add", "sub", "mul", "lookup"))
"""What lanes of a byte do with codes: their sums, products with powers of two, and entries of tables are small."""
_BYTES = frozenset((Dtype.I8, Dtype.U8, *PACKED))


def vector_lanes(target: Target, kernel: VectorKernel, dtypes: tuple[Dtype, ...]) -> int:
    """Lanes that an instruction on these types (destination first) fills.

    Those of a byte where it makes bytes of packed elements by nothing but `BYTE_OPERATIONS`, on a target that has them.
    """
    narrow = _BYTES.issuperset(dtypes) and not set(PACKED).isdisjoint(dtypes[1:])
    in_bytes = narrow and kernel.reduction is None and kernel.operations <= BYTE_OPERATIONS
    return max(target.vector.lanes, target.vector.byte_lanes if in_bytes else 0)


def vector_cycles(
    target: Target, kernel: VectorKernel, dims: tuple[int, int, int], dtypes: tuple[Dtype, ...] = (), sums: bool = False
) -> int:
    """Cycles of one vector instruction: lane-vectors per context times the kernel's operations.

    The innermost axis fills the lanes; the outer two are divided over the contexts. An instruction whose inner axis is
    short packs outer elements into the same lane-vector. `dtypes` are those of the operands, the destination first:
    each source of less than a byte per element costs a conversion more, as bits are shifted and masked, or looked up,
    before they are numbers in lanes. Wider sources widen in the load ports. `sums`: a source lies in the accumulators.
    What works on the rows of an attention takes the contexts that the target says of it.
    """
    unit, lanes = target.vector, vector_lanes(target, kernel, dtypes)
    contexts, drain, each = unit.contexts, unit.drain_cycles, 0.0
    if kernel.rows and target.attention is not None:
        contexts, drain = target.attention.contexts, 0.0
        each = target.attention.row_cycles if kernel.rows == LEAVING else 0.0
    outer, inner = dims[0] * dims[1], dims[2]
    together = max(1, lanes // inner)
    vectors = ceil_div(inner, lanes) * ceil_div(outer, together)
    weight = sum(count * unit.cycles[name] for name, count in zip(COST_CLASSES, kernel.cost, strict=True))
    weight += sum(dtype in PACKED for dtype in dtypes[1:]) * unit.cycles["convert"]
    if unit.stages:
        used = [unit.cycles[name] for name, count in zip(COST_CLASSES, kernel.cost, strict=True) if count]
        weight = max([weight / unit.stages, *used])
    weight += drain * sums + unit.narrow_cycles * _narrows(kernel, dtypes)
    folds = unit.fold_cycles * ceil_div(outer, contexts) if kernel.reduction is not None else 0.0
    return unit.startup_cycles + max(1, round(ceil_div(vectors, contexts) * weight + folds + outer * inner * each))
