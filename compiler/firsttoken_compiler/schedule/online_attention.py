"""Attention with online softmax as a choice: what it needs, what it costs, the cheapest tile, where it is impossible.

Scores exist a tile of keys at a time; a running maximum and a running sum per row, and sums of values that are rescaled
whenever the maximum rises, take the place of whole rows of scores.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from firsttoken_compiler.isa.types import Dtype, Space
from firsttoken_compiler.isa.vector_kernel import VectorKernel
from firsttoken_compiler.schedule import attention
from firsttoken_compiler.schedule.attention import AttentionTile, Heads
from firsttoken_compiler.schedule.spec import KernelSpec
from firsttoken_compiler.target.rates import ceil_div, matmul_cost, pair_name, vector_cycles
from firsttoken_compiler.target.target import Target

_SHOWN = VectorKernel(("select", ("le", "i1", ("add", "i0", "i2")), ("mul", "s0", "s1"), "s2"))
_SCORES: Final = (
    VectorKernel("s0", "max"), VectorKernel(("f16", ("exp", ("sub", "s0", "s1")))), VectorKernel("s0", "add"),
)  # fmt: skip
_ROW: Final = (VectorKernel("s0"), VectorKernel(("exp", ("sub", "s0", "s1"))), VectorKernel(("mul", "s0", "s1")))
"""Per row and tile of keys: the maximum before, what earlier tiles are multiplied by, the running sum."""
_RESCALED: Final = VectorKernel(("add", ("mul", "s0", "s1"), "s2"))


def refusal(spec: KernelSpec, target: Target) -> str:
    """Why the target cannot run an attention in this form; empty where it can."""
    if attention.mapped(spec, target) is not None:
        return (
            f"{target.name} maps the attention of a prompt in its own way ([attention] of the target), whose contexts "
            "hold whole rows of scores"
        )
    return ""


def tiles(spec: KernelSpec, rows: set[int], keys: set[int]) -> Iterator[AttentionTile]:
    """Tiles of these rows and keys that have more than one tile of keys: of a single one nothing is carried on."""
    for r in sorted(rows):
        yield from (AttentionTile(r, k, online=True) for k in sorted(keys) if k < Heads.of(spec).keys)


def scratch_bytes(spec: KernelSpec, spaces: tuple[Space, ...], tile: AttentionTile, target: Target) -> int:
    """Scratchpad bytes of a tile with all its slots."""
    heads = Heads.of(spec)
    scaled, wide = attention.quantised_cache(spec), attention.quantised_cache(spec) and attention.widens(target)
    unit = max(target.alignment(Space.SPAD), target.matrix.tile_bytes)
    keys = ceil_div(heads.keys, tile.keys) * tile.keys
    scores, cached = tile.rows * tile.keys, tile.keys * heads.width
    kept = [scores * 4, scores * 2, scores * 2, *[tile.rows * 4] * 6, tile.rows * heads.width * 4]
    if scaled:  # weights times their values' scales in two slots beside plain weights, factors of keys and values
        kept += [scores * 2, tile.keys * 4, tile.keys * 4, 4]
        kept += [cached * 2] * 4 if wide else []
    slots = tile.buffers or attention.pipelined(spec, target)
    staged = {
        "q": (2, tile.rows * heads.width * 2), **dict.fromkeys("kv", (slots, spec.args[1].dtype.nbytes(cached))),
        "mask": (3, (1 if spec["mask"] and attention.one_mask_row(spec) else tile.rows) * tile.keys * 4),
        "ks": (3, tile.keys * 2), "vs": (3, keys * 2), "inverse": (3, 4),
        "out": (2, tile.rows * heads.width * spec.outs[0].dtype.bits // 8),
    }  # fmt: skip
    where = zip([*attention.operand_names(spec), "out"], spaces, strict=True)
    for name, space in where:
        kept += [staged[name][1]] * staged[name][0] if space is Space.DRAM else []
    return sum(ceil_div(nbytes, unit) * unit for nbytes in kept)


def cost(spec: KernelSpec, spaces: tuple[Space, ...], tile: AttentionTile, target: Target, rate: float) -> float:
    """Cycles with this tile; `rate`: bytes per cycle out of the DRAM.

    Per tile of keys the slowest of loads, products and softmax where engines run side by side, else all of them.
    """
    heads = Heads.of(spec)
    pair = pair_name(Dtype.F16, Dtype.F16 if attention.widens(target) else spec.args[1].dtype)
    load = 0.0
    if spaces[1] is Space.DRAM:
        load = 2 * (spec.args[1].dtype.nbytes(tile.keys * heads.width) / rate + target.dma.setup_cycles)
    products = sum(
        matmul_cost(target, tile.rows, n, k, pair).cycles + target.matrix.issue_cycles
        for n, k in ((tile.keys, heads.width), (heads.width, tile.keys))
    )
    vector = sum(vector_cycles(target, kernel, (1, tile.rows, tile.keys)) for kernel in (_SHOWN, *_SCORES))
    vector += sum(vector_cycles(target, kernel, (1, 1, tile.rows)) for kernel in _ROW)
    vector += vector_cycles(target, _RESCALED, (1, tile.rows, heads.width))
    parts = (load, float(products), float(vector))
    each = max(parts) if target.dma.decoupled else sum(parts)
    down, across = ceil_div(heads.rows, tile.rows), ceil_div(heads.keys, tile.keys)
    first = sum(parts) - each if target.dma.decoupled else 0.0
    seen = 1.0
    if spec["causal"] and not spec["mask"] and not heads.one_token:
        ends = [min(heads.keys, int(spec["past"]) + (at + 1) * tile.rows) for at in range(down)]
        seen = sum(ceil_div(end, tile.keys) for end in ends) / down / across
    return heads.batches * down * (seen * across * each + first)
