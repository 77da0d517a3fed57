"""The matrices of a student whose format can be chosen, what each does, and what each is in low precision."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from firsttoken_compiler.options import HALF, INTEGERS, WeightRule

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from firsttoken_compiler.frontend.onnx_file import OnnxStudent
    from firsttoken_compiler.target.target import Target

ATTENTION: Final = "attn_*"
FEED_FORWARD: Final = "ffn_*"
OUTPUT: Final = "output"


@dataclass(frozen=True, slots=True)
class Matrix:
    """A weight of products: `k` inputs, `n` outputs.

    Attributes:
        source: the initialiser.
        k: inputs.
        n: outputs.
        transposed: whether it lies [n, k].
        role: one of `firsttoken_compiler.formats.policy.ROLES`.
        layer: the layer, None outside the layers.
    """

    source: str
    k: int
    n: int
    transposed: bool
    role: str
    layer: int | None


@dataclass(frozen=True, slots=True)
class Group:
    """Matrices that take one format together: a role or a pattern of roles, in a range of layers or outside them."""

    role: str
    layers: tuple[int, int] | None
    matrices: tuple[Matrix, ...]

    @property
    def name(self) -> str:
        """How tables call it."""
        return self.role if self.layers is None else f"{self.role}@{self.layers[0]}-{self.layers[1]}"

    @property
    def shape(self) -> tuple[tuple[str, int, int], ...]:
        """Equal for groups that cost the same."""
        return tuple(sorted((matrix.role, matrix.k, matrix.n) for matrix in self.matrices))

    def rule(self, weights: str) -> WeightRule:
        """The rule that gives it a format."""
        return WeightRule(self.role, weights, () if self.layers is None else (self.layers,))


def matrices_of(student: OnnxStudent, target: Target) -> tuple[Matrix, ...]:
    """The float matrices of a decoder's products, in the order of the graph; raises StudentError."""
    from firsttoken_compiler.frontend.contrib import prepare
    from firsttoken_compiler.frontend.masks import add_masks
    from firsttoken_compiler.frontend.specialise import specialise
    from firsttoken_compiler.passes.roles import roles_of
    from firsttoken_compiler.passes.split import split
    from firsttoken_compiler.tvm.api import operator_name

    prepared = prepare(add_masks(specialise(student)))
    imported, canonical = split(prepared, True, pairs=frozenset(target.matrix.macs_per_cycle))
    roles = roles_of(canonical)
    found: dict[str, Matrix] = {}
    for block in canonical.module["main"].body.blocks:
        for binding in block.bindings:
            call = binding.value
            if operator_name(call) != "npu.linear" or "stored" in call.attrs:
                continue
            weight = str(call.args[1].name)
            source, place = imported.weights[weight], roles.of(weight)
            k, n, transposed = (int(call.attrs[name]) for name in ("k", "n", "transposed"))
            found.setdefault(source, Matrix(source, k, n, bool(transposed), place.role, place.layer))
    return tuple(found.values())


def groups_of(matrices: tuple[Matrix, ...], blocks: int) -> tuple[Group, ...]:
    """Attention and feed-forward in `blocks` ranges of layers, as even as they can be, and the head."""
    layers = 1 + max((matrix.layer for matrix in matrices if matrix.layer is not None), default=-1)
    count = max(1, min(blocks, layers))
    edges = [layers * index // count for index in range(count + 1)]
    made = []
    for first, end in itertools.pairwise(edges):
        for role in (ATTENTION, FEED_FORWARD):
            rule = WeightRule(role, HALF, ((first, end - 1),)) if end > first else None
            inside = tuple(m for m in matrices if rule is not None and rule.covers(m.role, m.layer))
            made.append(Group(role, (first, end - 1), inside))
    made.append(Group(OUTPUT, None, tuple(matrix for matrix in matrices if matrix.role == OUTPUT)))
    return tuple(group for group in made if group.matrices)


def lowered(matrix: NDArray[np.float32], weights: str, group: str) -> NDArray[np.float32]:
    """A matrix [k, n] as the machine's format holds it: the values that a product's weights stand for, bit for bit.

    Raises FirsttokenError where the format cannot hold it.
    """
    if weights == HALF:
        return matrix.astype(np.float16).astype(np.float32)
    if weights in INTEGERS:
        from firsttoken_compiler.codegen.weights import dequantise, quantise

        rows = len(matrix) if group == "channel" else min(len(matrix), int(group))
        return dequantise(*quantise(matrix, INTEGERS[weights], rows), rows)
    from firsttoken_compiler.formats.dequantise import dequantise as dequantise_blocks
    from firsttoken_compiler.formats.quantise import quantise as quantise_blocks
    from firsttoken_compiler.formats.types import BLOCK_TYPES

    kind = BLOCK_TYPES[weights]
    return np.ascontiguousarray(dequantise_blocks(quantise_blocks(np.ascontiguousarray(matrix.T), kind), kind).T)
