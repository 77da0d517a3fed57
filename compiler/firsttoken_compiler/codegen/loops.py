"""A scheduled kernel as plain loops: what `tir_reader` makes of lowered TIR and `unroll` turns into instructions.

Offsets are in elements. A sequential loop's variable is known when its body is unrolled, so it enters offsets through
the environment; the loops of a nest become the axes of one instruction, so they enter through coefficients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from firsttoken_compiler.isa.types import Dtype

Offset = Callable[[list[int]], int]
"""Values of the sequential loops, outermost first → a number."""

Value = tuple[Any, ...]
"""`("load", Access)`, `("const", float)`, `("index", Offset, coefficients)` or `(operation, *values)`.

`("fill", float)` is a constant that an instruction of its own stores; a nest of `const` waits for one that absorbs it.
"""


@dataclass(frozen=True, eq=False)
class Buffer:
    """Memory that a kernel touches: an operand (`param` >= 0) or a local allocation."""

    name: str
    scope: str
    """`param`, `spad` or `acc`."""
    dtype: Dtype
    elements: int
    param: int = -1


@dataclass(frozen=True)
class Access:
    """Element `base + sum(coefficient * loop)` of a buffer, over the loops of the nest."""

    buffer: Buffer
    base: Offset
    coefficients: tuple[int, ...]


@dataclass(frozen=True)
class Alloc:
    """Makes a buffer fresh: its next slot where it has several.

    `slots` is how many it has; 0: as many as the software pipeline around it asks for.
    """

    buffer: Buffer
    slots: int = 0


@dataclass(frozen=True)
class Nest:
    """`dst[...] = value` over all points of the loops; `axes` names the kernel's axis that each loop runs along."""

    extents: tuple[int, ...]
    axes: tuple[str, ...]
    dst: Access
    value: Value


@dataclass(frozen=True)
class GatherNest:
    """`dst[i, :] = table[indices[i], :]` for `rows` rows of `width` elements; accesses have the row's coefficient."""

    rows: int
    width: int
    axis: str
    dst: Access
    indices: Access
    table: Buffer
    table_rows: int


@dataclass(frozen=True)
class MatmulCall:
    """One tensorised product: acc[m, n] += a[m, k] x w, extents before cutting; strides in elements."""

    m: int
    n: int
    k: int
    axes: tuple[str, str, str]
    acc: Access
    a: Access
    w: Access
    acc_stride: int
    a_stride: int
    w_panel_stride: int
    w_row_stride: int
    panel: int
    """Columns of a panel; 0 for a transposed weight operand `[n, k]`, whose rows are `w_row_stride` apart."""
    fresh: bool | None = None
    """Whether the sums begin here; None: where the accumulators were set to a constant before."""


@dataclass
class Loop:
    """A sequential loop; its iterations are unrolled. `step` is what one iteration advances `axis` by."""

    depth: int
    extent: int
    axis: str
    step: int
    stages: tuple[int, ...]
    """Software pipeline: stage of each engine's work (dma-in, matrix, vector, dma-out); empty when not pipelined."""
    body: list[Statement] = field(default_factory=list)
    ahead: str = ""
    """Name of an operand of which this makes the next tile: its instructions stand among the products since the tile
    before was made, so that the vector unit makes it while these run. They touch nothing that those touch."""
    skew: int = 0
    """Of a loop of one iteration inside another loop. -1: its instructions stand right behind those of the iteration
    before; 1: right before those of the next one. What they pass over touches nothing that they touch."""


@dataclass(frozen=True, eq=False)
class Computed:
    """Nests and products that depend on the sequential loops as no affine address can say (padding).

    They are made as loops are unrolled. Every iteration touches the same buffers with the same engines.
    """

    make: Callable[[list[int]], Sequence[Nest | MatmulCall]]

    @property
    def sample(self) -> Sequence[Nest | MatmulCall]:
        """Those of the first iteration."""
        return self.make([0] * 16)


Statement = Alloc | Nest | GatherNest | MatmulCall | Loop | Computed
