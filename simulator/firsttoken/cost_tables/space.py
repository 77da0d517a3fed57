"""Which students a cost table covers: a student, the dimensions that vary, and the values that are measured."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any, Final

from firsttoken.rope import Llama3Scaling, LongRope
from firsttoken.student import WEIGHT_BITS, LayerConfig, StudentConfig
from firsttoken_compiler.errors import OptionError

DIMS: Final = ("layers", "hidden", "head_dim", "vocab", "heads", "kv_heads", "intermediate", "weight_bits")
"""What may vary; the last four may differ from layer to layer."""
PER_LAYER: Final = DIMS[4:]
LISTED: Final = ("head_dim", "kv_heads", "weight_bits")
"""Dimensions between whose values nothing is interpolated."""
POINTS: Final = 6
"""Values of a range that are measured, unless more are asked for."""
HIDDEN_POINTS: Final = 12
"""The same of the residual's width, on which the memory of a whole graph depends."""
STAIRS: Final = ("heads", "intermediate")
"""Dimensions whose every value is measured on lines, as tiles change at some of them."""
LINE_POINTS: Final = 64
"""Most values of such a dimension on a line."""
LINES: Final = 2
LAYERS_PER_PROBE: Final = 8
"""Layers of different widths that are measured in one student."""
_KIND: Final = ("family", "tie_embeddings", "qkv_bias", "qk_norm", "rope_scaling")
_ROPES: Final[dict[str, Any]] = {kind.__name__: kind for kind in (Llama3Scaling, LongRope)}


@dataclass(frozen=True, slots=True)
class Axis:
    """Values of a dimension, in order, and those of them that are measured, the first and the last among them.

    Attributes:
        values: all that students may have.
        measured: those that are measured with every measured value of the other dimension of a cell.
        line: those, and others that are measured with some of them: see `CostSpace.lines`.
    """

    values: tuple[int, ...]
    measured: tuple[int, ...]
    line: tuple[int, ...]

    @property
    def step(self) -> int:
        """The largest step that meets all values from the first one; 0 of a single value."""
        return math.gcd(*(value - self.values[0] for value in self.values))

    def __str__(self) -> str:
        low, high = self.values[0], self.values[-1]
        if len(self.values) > 2 and len(self.values) == (high - low) // self.step + 1:
            return f"{low} to {high} in steps of {self.step}"
        return ", ".join(map(str, self.values))


Values = str | int | Iterable[int]
"""A number, numbers ("1024,1536"), or a range with both ends, its step ("1024:2048:128"), and maybe how many of its
values are measured ("1024:2048:128:9")."""


@dataclass(frozen=True)
class CostSpace:
    """Students that differ from `base` in the dimensions of `axes` alone.

    Attributes:
        base: one of them; it gives the kind of graph.
        axes: (name out of `DIMS`, axis), in the order of `DIMS`, every dimension once.
        lines: values of hidden, evenly over the measured ones, with which every value of `STAIRS` is measured. How far
            their costs are from the lines between the measured ones is what a width costs more because of its tiles; at
            other values of hidden it lies between those of the lines.
    """

    base: StudentConfig
    axes: tuple[tuple[str, Axis], ...]
    lines: int = LINES

    @staticmethod
    def of(
        base: StudentConfig, vary: Mapping[str, Values], points: int | None = None, lines: int = LINES
    ) -> CostSpace:
        """The space around a student.

        Args:
            base: a student of uniform layers. Where the space lacks a value of its own, the space's first one counts.
            vary: values by dimension. All numbers of a list are measured, of a range `points`, evenly over it.
                `weight_bits` 0 is the precision of the options. `layers` is never interpolated: a layer costs the same
                wherever it stands.
            points: at least 2; None for `HIDDEN_POINTS` of hidden and `POINTS` of others.
            lines: see `CostSpace.lines`; 0: only `points` of heads and intermediate are measured.

        Raises:
            OptionError: a dimension is unknown, its values are not positive, or no student has them.
        """
        if lines < 0:
            raise OptionError(f"lines is {lines}, must be at least 0")
        if points is not None and points < 2:
            raise OptionError(f"points is {points}, must be at least 2: both ends of a range are measured")
        if any(layer != base.layer(0) for layer in base.per_layer):
            raise OptionError(f"{base.name} has layers of different widths: give one with uniform layers as the base")
        for name in vary:
            if name not in DIMS:
                raise OptionError(f"{name!r} is no dimension of a student; those that vary are {', '.join(DIMS)}")
        first = base.layer(0)
        own = {name: getattr(first if name in PER_LAYER else base, name) or 0 for name in DIMS}
        found = [(name, axis_of(name, vary.get(name, own[name]), points)) for name in DIMS]
        axes = tuple((name, _stairs(axis) if lines and name in STAIRS else axis) for name, axis in found)
        space = CostSpace(replace(base, per_layer=()), axes, lines)
        for kv_heads in space["kv_heads"].values:
            space.heads(kv_heads)
        return replace(space, base=space._nearest())

    def _nearest(self) -> StudentConfig:
        """The base, with the first value of each axis that does not have its own."""
        found: dict[str, Any] = {
            name: own if (own := getattr(self.base, name)) in self[name].values else self[name].values[0]
            for name in DIMS[:-1]
        }
        if found["heads"] % found["kv_heads"]:
            found["heads"] = self.heads(found["kv_heads"]).values[0]
        return replace(self.base, **found)

    def __getitem__(self, name: str) -> Axis:
        return self._by_name[name]

    @cached_property
    def _by_name(self) -> dict[str, Axis]:
        return dict(self.axes)

    def heads(self, kv_heads: int) -> Axis:
        """The query heads that go with so many key heads; raises OptionError where there are none."""
        axis = self["heads"]
        legal = tuple(value for value in axis.values if value % kv_heads == 0)
        if not legal:
            raise OptionError(
                f"heads {axis}: none is a multiple of {kv_heads} kv_heads; add one, or leave that out of kv_heads"
            )
        whole = len(axis.measured) == len(axis.values)
        measured = legal if whole else _thinned(legal, len(axis.measured))
        found = Axis(legal, measured, measured)
        return found if axis.line == axis.measured else _stairs(found)

    @property
    def line_hidden(self) -> tuple[int, ...]:
        """Values of hidden with which every value of `STAIRS` is measured."""
        measured = self["hidden"].measured
        return measured[:1] if self.lines == 1 else _thinned(measured, self.lines) if self.lines else ()

    def resolved(self, default_bits: int) -> CostSpace:
        """The space with `weight_bits` 0 written as the bits that it stands for, where these are known."""
        axes = dict(self.axes)
        bits = {value or default_bits for value in axes["weight_bits"].values}
        axes["weight_bits"] = Axis(*(tuple(sorted(bits)),) * 3)
        return replace(self, axes=tuple(axes.items()))

    def unlike(self, config: StudentConfig) -> tuple[str, ...]:
        """What a student differs in that no axis covers."""
        return tuple(name for name in _KIND if getattr(config, name) != getattr(self.base, name))

    @cached_property
    def probes(self) -> tuple[StudentConfig, ...]:
        """Students in which every measured layer, head and start occurs.

        The layers that are measured stand between a copy of the first and a copy of the last of them: what a layer
        costs less because nothing comes before or after it shows in the copies.
        """
        found = []
        vocabularies = self["vocab"].measured
        for head_dim in self["head_dim"].measured:
            first = head_dim == self["head_dim"].measured[0]
            for hidden in self["hidden"].measured:
                layers = self._layers(wide=first, line=hidden in self.line_hidden)
                chunks = [layers[at : at + LAYERS_PER_PROBE] for at in range(0, len(layers), LAYERS_PER_PROBE)]
                heads = vocabularies if first else vocabularies[:1]
                chunks += [layers[:1]] * (len(heads) - len(chunks))
                found += [
                    self._probe(hidden, head_dim, heads[number % len(heads)], chunk)
                    for number, chunk in enumerate(chunks)
                ]
        return tuple(found)

    def _layers(self, wide: bool, line: bool) -> list[LayerConfig]:
        """Layers that have all measured pairs of heads and, if `wide`, all measured widths, per precision."""

        def some(axis: Axis) -> tuple[int, ...]:
            return axis.line if line else axis.measured

        widths = some(self["intermediate"]) if wide else self["intermediate"].measured[:1]
        pairs = [(heads, kv) for kv in self["kv_heads"].measured for heads in some(self.heads(kv))]
        return [
            LayerConfig(*pairs[at % len(pairs)], widths[at % len(widths)], bits or None)
            for bits in self["weight_bits"].measured
            for at in range(max(len(pairs), len(widths)))
        ]

    def _probe(self, hidden: int, head_dim: int, vocab: int, chunk: Sequence[LayerConfig]) -> StudentConfig:
        layers = (chunk[0], *chunk, chunk[-1])
        return replace(
            self.base, name=f"{self.base.name} probe", hidden=hidden, head_dim=head_dim, vocab=vocab,
            layers=len(layers), per_layer=layers, heads=chunk[0].heads, kv_heads=chunk[0].kv_heads,
            intermediate=chunk[0].intermediate,
        )  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """JSON values from which `from_dict` makes the same space."""
        rope = self.base.rope_scaling
        base = {**asdict(self.base), "rope_scaling": None if rope is None else [type(rope).__name__, asdict(rope)]}
        axes = [[name, axis.values, axis.measured, axis.line] for name, axis in self.axes]
        return {"base": base, "axes": axes, "lines": self.lines}

    @staticmethod
    def from_dict(fields: Mapping[str, Any]) -> CostSpace:
        """Inverse of `to_dict`; raises ValueError, KeyError or TypeError on anything else."""
        base = dict(fields["base"])
        if base["rope_scaling"] is not None:
            kind, values = base["rope_scaling"]
            lists: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
            base["rope_scaling"] = _ROPES[kind](**lists)
        axes = tuple((name, Axis(*map(tuple, parts))) for name, *parts in fields["axes"])
        if tuple(name for name, _ in axes) != DIMS:
            raise ValueError("axes are not those of a student")
        return CostSpace(StudentConfig(**{**base, "per_layer": ()}), axes, int(fields["lines"]))


def axis_of(name: str, given: Values, points: int | None = None) -> Axis:
    """The values of a dimension, and those that are measured; raises OptionError for what none has."""
    values, wanted = _values(name, given, points or (HIDDEN_POINTS if name == "hidden" else POINTS))
    if min(values) < (0 if name == "weight_bits" else 1):
        raise OptionError(f"{name} {min(values)}: must be at least 1")
    if name == "weight_bits" and (unknown := [v for v in values if v not in (0, *WEIGHT_BITS)]):
        raise OptionError(
            f"weight_bits {unknown[0]}: must be one of {WEIGHT_BITS}, or 0 for the precision of the options"
        )
    if name == "head_dim" and (odd := [v for v in values if v % 2]):
        raise OptionError(f"head_dim {odd[0]}: must be even because rotary positions turn pairs")
    measured = values if name in LISTED else _thinned(values, wanted)
    return Axis(values, measured, measured)


def _stairs(axis: Axis) -> Axis:
    """The axis with a line of many values."""
    line = set(axis.measured).union(_thinned(axis.values, LINE_POINTS))
    return replace(axis, line=tuple(sorted(line)))


def _values(name: str, given: Values, points: int) -> tuple[tuple[int, ...], int]:
    """The values in order, and how many of them are measured."""
    try:
        if isinstance(given, str) and ":" in given:
            low, high, step, *wanted = (int(part) for part in given.split(":"))
            if step < 1 or high < low or len(wanted) > 1 or min(wanted, default=2) < 2:
                raise ValueError
            return tuple(range(low, high + 1, step)), wanted[0] if wanted else points
        numbers = given.split(",") if isinstance(given, str) else [given] if isinstance(given, int) else given
        values = tuple(sorted({int(number) for number in numbers}))
        if not values:
            raise ValueError
    except ValueError:
        raise OptionError(
            f"{name}={given}: give a number, numbers such as 1024,1536, or FIRST:LAST:STEP[:POINTS] such as "
            "1024:2048:128, of which at least 2 points are measured"
        ) from None
    return values, len(values)


def _thinned(values: tuple[int, ...], points: int) -> tuple[int, ...]:
    """At most so many of the values, evenly, with the first and the last."""
    if len(values) <= points:
        return values
    return tuple(values[round(at * (len(values) - 1) / (points - 1))] for at in range(points))
