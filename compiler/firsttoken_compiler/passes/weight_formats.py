"""Formats of weights that the graph has as floats: which one each matrix gets, and its recipes, operand by operand.

Integers whose sums could leave what the accumulators hold, or with zero points what fp32 holds exactly, are summed in
parts of their groups, which repeat the group's scale and zero point.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field, replace
from typing import Final

from firsttoken_compiler.errors import OptionError
from firsttoken_compiler.formats.types import BLOCK_TYPES
from firsttoken_compiler.isa.program import Packing
from firsttoken_compiler.options import HALF, INTEGERS, Precision
from firsttoken_compiler.passes.roles import OTHER, Place, Roles
from firsttoken_compiler.passes.stored import Part, block_parts
from firsttoken_compiler.schedule.linear import panel_of
from firsttoken_compiler.target.target import Target

INTEGER_ACTS: Final = ("int8", "int16")
ACC_LIMIT: Final = (1 << 31) - 1
"""Largest sum of an integer accumulator."""
EXACT_LIMIT: Final = 1 << 24
"""Whole numbers up to this are exact in fp32, in which zero points are taken off."""
SHORTEST: Final = 16
"""Rows of k that are worth a pass of their own."""
_LAYER: Final = re.compile(r"layers?[._](\d+)")


def layer_of(name: str) -> int | None:
    """Layer number in a tensor's or node's name; None outside the layers."""
    found = _LAYER.search(name)
    return int(found.group(1)) if found else None


@dataclass(frozen=True)
class Matrix:
    """A float weight of a product."""

    parameter: str
    source: str
    """The initialiser."""
    k: int
    n: int
    transposed: bool
    """The initialiser is stored `[n, k]`."""
    convolved: bool = False
    """The weight of a convolution of several taps."""


@dataclass(frozen=True)
class Formatted:
    """A matrix in its format."""

    format: str
    """One of `options.FORMATS`."""
    parts: dict[str, Part]
    """Tensors by the names of `npu.linear`'s operands, in their order; the matrix itself is the first one."""
    attributes: dict[str, int | str]
    """What `npu.linear` has to know."""


@dataclass
class WeightFormats:
    """What options say about one student's float weights; remembers which layers and rules found one."""

    precision: Precision
    target: Target
    roles: Roles
    layers: set[int] = field(default_factory=set)
    used: set[int] = field(default_factory=set)
    """Rules that cover something."""

    def of(self, parameter: str, source: str, k: int, convolved: bool = False) -> str:
        """The format of a matrix: one of `options.FORMATS`.

        Convolutions of several taps have no rows that blocks could lie along: they stay fp16.
        """
        place = self._place(parameter, source)
        if place.layer is not None:
            self.layers.add(place.layer)
        self.used.update(i for i, rule in enumerate(self.precision.rules) if rule.covers(place.role, place.layer))
        found = self.precision.format_of(place.role, place.layer, self.roles.layers, k)
        return HALF if convolved and found in BLOCK_TYPES else found

    def made(self, matrix: Matrix) -> Formatted:
        """A matrix in the format that is chosen for it."""
        chosen = self.of(matrix.parameter, matrix.source, matrix.k, matrix.convolved)
        self._require_pair(chosen)
        panel, shape = panel_of(self.target), (matrix.k, matrix.n)
        if chosen in BLOCK_TYPES:
            kind = BLOCK_TYPES[chosen]
            parts = block_parts(matrix.source, chosen, *shape, panel, stored=False, transposed=matrix.transposed)
            return Formatted(chosen, parts, {"bits": kind.bits, "group": kind.group, "blocks": chosen})
        layout = "conv" if matrix.convolved else ""
        if chosen == HALF:
            packing = Packing(matrix.source, "panels", *shape, panel, 16, 0, matrix.transposed, layout)
            return Formatted(chosen, {"w": Part(packing, "float16", shape)}, {"bits": 16, "group": 0})
        bits = INTEGERS[chosen]
        group, of = self._groups(matrix, bits)
        shift = 1 << (bits - 1) if self.precision.asymmetric else 0
        layout = f"{layout}:{of}" if group != of else layout
        packing = Packing(matrix.source, "panels", *shape, panel, bits, group, matrix.transposed, layout, shift)
        rows = (-(-matrix.k // group), matrix.n)
        parts = {"w": Part(packing, chosen, shape), "w_scale": Part(replace(packing, form="scales"), "float16", rows)}
        if shift:
            parts["w_zero"] = Part(replace(packing, form="zeros"), "int8", rows)
        return Formatted(chosen, parts, {"bits": bits, "group": group, **({"zeros": 1} if shift else {})})

    def check(self) -> None:
        """Every layer that `layer_bits` names, and every rule, is about a float weight."""
        lost = [i for i, bits in enumerate(self.precision.layer_bits) if bits and i not in self.layers]
        if lost:
            raise OptionError(
                f"bits are given for layer {lost[0]}, but float weights of products are in layers "
                f"{sorted(self.layers)}: give one --weights for all; weights that the graph stores quantised keep "
                "their bits, and where the graph is no decoder, layers are those of names like 'layers.0.mlp.weight'"
            )
        idle = [rule for i, rule in enumerate(self.precision.rules) if i not in self.used]
        if idle:
            known = sorted({place.role for place in self.roles.places.values()}) or [OTHER]
            number = self.precision.rules.index(idle[0]) + 1
            raise OptionError(
                f"--mix, rule {number}: {idle[0].text()} is for none of the student's float weights; there are "
                f"{', '.join(known)}, in layers {_ranges(self.layers)}; what the graph stores quantised stays as it is"
            )

    def _place(self, parameter: str, source: str) -> Place:
        """Outside what the structure tells, layers are those of names."""
        place = self.roles.of(parameter)
        return replace(place, layer=layer_of(source)) if place.role == OTHER else place

    def _groups(self, matrix: Matrix, bits: int) -> tuple[int, int]:
        """(rows of a sum, rows that share a scale), the first a part of the second."""
        asked = self.precision.group
        of = matrix.k if asked == "channel" else min(matrix.k, int(asked))
        most = self._longest(bits)
        even = not self.precision.asymmetric or matrix.k % of == 0
        if of <= most and even:
            return of, of
        shared = math.gcd(matrix.k, of)
        part = next(shared // d for d in range(1, shared + 1) if shared % d == 0 and shared // d <= most)
        if part >= SHORTEST:
            return part, of
        why = "zero points" if self.precision.asymmetric else "int16 activations"
        raise OptionError(
            f"{why}: weight {matrix.source} has {matrix.k} rows, which do not divide into parts of {SHORTEST} to "
            f"{most} rows of groups of {of}: choose another --group, or neither --asymmetric nor int16 activations"
        )

    def _longest(self, bits: int) -> int:
        """Rows of k whose sum cannot become too large."""
        acts = {self.precision.acts, self.precision.norm_cache}
        largest = (1 << (bits - 1)) - (not self.precision.asymmetric)
        limits = [ACC_LIMIT // (32767 * largest)] if "int16" in acts else []
        if "int8" in acts and self.precision.asymmetric:
            limits.append(EXACT_LIMIT // (127 * largest))
        return min(limits, default=1 << 62)

    def _require_pair(self, chosen: str) -> None:
        """The matrix unit multiplies these weights by every type of activations that meets them."""
        cached = [self.precision.norm_cache] if self.precision.norm_cache in INTEGER_ACTS else []
        meets = (self.precision.acts, *cached) if chosen in INTEGERS else (HALF,)
        weights = chosen if chosen in INTEGERS else HALF
        for acts in meets:
            if f"{acts}x{weights}" not in self.target.matrix.macs_per_cycle:
                known = ", ".join(sorted(self.target.matrix.macs_per_cycle))
                raise OptionError(
                    f"target {self.target.name} cannot multiply {acts} by {weights}; it has {known}: "
                    "choose --acts, --norm-cache and --weights so"
                )


def _ranges(layers: set[int]) -> str:
    return f"{min(layers)} to {max(layers)}" if layers else "of no number"
