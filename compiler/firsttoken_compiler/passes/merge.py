"""Products of the same rows become one product: q, k and v of an attention, gate and up of a SwiGLU.

The weights lie one behind another by columns, in panels as if they had been one matrix; so do scales, zero points and
biases. The result is one wide matrix, of which those that read the single results read columns (`Arg.whole`). Sums are
those of the single products: each column is summed in the order that the tile of the one product has.

Only what a schedule asks for (`GraphChoice.merged`). Products that differ in more than their columns stay apart, each
with its reason; `check` refuses a line that merges nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

from firsttoken_compiler.errors import OptionError
from firsttoken_compiler.isa.program import Packing
from firsttoken_compiler.passes.canonicalise import Canonical
from firsttoken_compiler.passes.lower import Launch, Launches, Value, storages_of
from firsttoken_compiler.passes.quantise import BESIDE, Kept, Quantised
from firsttoken_compiler.schedule import normed, rowwise
from firsttoken_compiler.schedule.choice import MERGES, NONE_MERGED, GraphChoice, merge_of
from firsttoken_compiler.schedule.definitions import linear_names
from firsttoken_compiler.schedule.spec import Arg, KernelSpec

QKV, GATE_UP = MERGES
PRODUCTS: Final = ("linear", "normed")
THROUGH: Final = ("rope", "kv_append", "kv_quantise", "rms_norm", "quantise")
"""Kernels between a product and the attention that reads it, which hand on their first operand."""
BY_ROW: Final = ("a", "a_scale", "a_zero", "a_sum")
"""Operands that all parts of a merged product share."""
OF_ONE: Final = {
    "residual": "adds the residual stream", "factor": "multiplies by another product",
    "inverse": "narrows its result to integers of a static scale",
}  # fmt: skip
"""Operands that belong to the result of one product, and what it does with them."""
SHOWN: Final = 6


@dataclass(frozen=True)
class Group:
    """Products that could be one."""

    kind: str
    """One of `MERGES`."""
    name: str
    """The module of the first."""
    parts: tuple[str, ...]
    """Their names."""
    line: str | None
    """The line of the schedule that merges them; None: nobody asked."""
    refused: str = ""
    """Why they stay apart all the same."""

    @property
    def title(self) -> str:
        """The name of the one product: `layers.3.self_attn.q_proj+k_proj+v_proj`."""
        return ".".join(part for part in (self.name, "+".join(map(_leaf, self.parts))) if part)

    def text(self) -> str:
        """As reports say it."""
        *others, last = map(_leaf, self.parts)
        return f"{self.name}: {', '.join(others)} and {last} " + (
            f"stay apart: {self.refused}" if self.refused else "are one product"
        )


@dataclass(frozen=True)
class Decisions:
    """All products that could be one, where a schedule merges some."""

    groups: tuple[Group, ...] = ()

    @property
    def lines(self) -> list[str]:
        """What became of those that the schedule names."""
        return [group.text() for group in self.groups if group.line is not None]

    @property
    def notes(self) -> dict[str, list[str]]:
        """The lines, as a program's `meta` keeps them; nothing where a schedule names none."""
        return {"merged": self.lines} if self.lines else {}


UNMERGED: Final = Decisions()


@dataclass(frozen=True)
class Merged:
    """The launches with merged products, and what is known of their weights and nodes."""

    launches: Launches
    quantised: Quantised
    canonical: Canonical
    decisions: Decisions = UNMERGED
    unfused: Mapping[str, str] = field(default_factory=dict)
    """Modules whose gate and up were kept from being fused and cannot be one, and why."""


@dataclass(frozen=True)
class Merge:
    """See the module's docstring. `names`: what people know the variables of the canonical module by."""

    graph: GraphChoice
    names: Mapping[str, str]
    weights: Mapping[str, str] = field(default_factory=dict)
    """Parameter → initialiser, of those without a packing."""
    refused: Mapping[str, str] = field(default_factory=dict)
    """Modules whose gate and up cannot be one, and why: they are fused."""

    def apart(self, variable: str) -> bool:
        """Whether SwiGLU stays out of the products of this gate, by its variable."""
        module = _module(self.names.get(variable, variable))
        return module not in self.refused and self.graph.merge_line(GATE_UP, module) is not None

    def run(self, launches: Launches, quantised: Quantised, canonical: Canonical) -> Merged:
        """Merges what the schedule names and can be."""
        if not self.graph.merged:
            return Merged(launches, quantised, canonical)
        return _State(self, launches, quantised, canonical).run()


def check(graph: GraphChoice, groups: Sequence[Group]) -> None:
    """Raises OptionError for a line that merges nothing: which products, why, and what would help."""
    for line in graph.merged:
        pattern, kind = merge_of(line)
        meant = [group for group in groups if group.line == line]
        if kind == NONE_MERGED or any(not group.refused for group in meant):
            continue
        if meant:
            more = f" (and {len(meant) - 1} more modules)" if len(meant) > 1 else ""
            raise OptionError(
                f"schedule: merged has {line!r}, which merges nothing: {meant[0].text()}{more}; take the line out, or "
                "change what keeps them apart"
            )
        there = [group.name for group in groups if group.kind == kind]
        known = ", ".join(there[:SHOWN]) + (f" and {len(there) - SHOWN} more" if len(there) > SHOWN else "")
        raise OptionError(
            f"schedule: merged has {line!r}, and no module that {pattern!r} covers and no line before it names has "
            f"{kind} products: {f'there are {known}' if there else 'the graph has none of these'}; take the line out, "
            "or give one of these modules"
        )


class _State:
    def __init__(self, options: Merge, launches: Launches, quantised: Quantised, canonical: Canonical) -> None:
        self.options, self.before, self.quantised, self.canonical = options, launches, quantised, canonical
        self.launches = launches.launches
        self.made = {_key(out): i for i, launch in enumerate(self.launches) for out in launch.outs}
        self.readers: dict[tuple[str, str], list[tuple[Launch, int]]] = {}
        for launch in self.launches:
            for index, value in enumerate(launch.args):
                self.readers.setdefault(_key(value), []).append((launch, index))
        self.same = _same_values(self.launches)
        self.nodes = dict(canonical.nodes)
        self.params, self.packings, self.formats = dict(launches.params), {**quantised.packings}, {**quantised.formats}
        self.windows: dict[tuple[str, str], Value] = {}
        self.ones: dict[int, Launch] = {}
        self.gone: set[int] = set()

    def run(self) -> Merged:
        groups: list[Group] = []
        for kind, parts in self._found():
            name, paths = self._name(parts), tuple(self._path(part) for part in parts)
            group = Group(kind, name, paths, self.options.graph.merge_line(kind, name))
            if group.line is not None:
                group = replace(group, refused=self._why_apart(group, parts))
                if not group.refused:
                    self._join(group, parts)
            groups.append(group)
        decisions = Decisions(tuple(groups))
        unfused = {
            group.name: group.refused for group in groups if group.kind == GATE_UP and group.refused
            and group.name not in self.options.refused
        }  # fmt: skip
        if unfused or not self.ones:
            return Merged(self.before, self.quantised, self.canonical, decisions, unfused)
        quantised = replace(self.quantised, packings=self.packings, formats=self.formats)
        return Merged(self._rebuilt(), quantised, replace(self.canonical, nodes=self.nodes), decisions)

    def _found(self) -> Iterator[tuple[str, list[int]]]:
        """Groups by the launches that compute their parts; what is one product already is none."""
        known: set[tuple[int, ...]] = set()
        for launch in self.launches:
            kind, parts = QKV, list[int | None]()
            if launch.spec.kind == "attention":
                parts = [self._product_behind(value) for value in launch.args[:3]]
            elif launch.spec.kind == "swiglu":
                kind, parts = GATE_UP, [self.made.get(_key(value)) for value in launch.args[:2]]
            elif launch.spec.kind == "linear" and launch.spec.get("factor"):
                factor = launch.args[linear_names(launch.spec).index("factor")]
                kind, parts = GATE_UP, [self.made.get(_key(factor)), self.made[_key(launch.outs[0])]]
            found = tuple(part for part in parts if part is not None and self.launches[part].spec.kind in PRODUCTS)
            if len(set(found)) == len(parts) > 1 and found not in known:
                known.add(found)
                yield kind, list(found)

    def _product_behind(self, value: Value) -> int | None:
        """The launch of the product that an attention reads in another form."""
        number = self.made.get(_key(value))
        while number is not None and self.launches[number].spec.kind in THROUGH:
            number = self.made.get(_key(self.launches[number].args[0]))
        return number

    def _path(self, number: int) -> str:
        label = self.launches[number].label
        return self.options.names.get(label, label)

    def _name(self, parts: list[int]) -> str:
        return _module(self._path(parts[0]))

    def _why_apart(self, group: Group, parts: list[int]) -> str:
        """Why products cannot be one; empty where they can."""
        if group.kind == GATE_UP and group.name in self.options.refused:
            return self.options.refused[group.name]
        launches = [self.launches[part] for part in parts]
        leaves = [_leaf(path) for path in group.parts]
        first = launches[0]
        for launch, leaf in zip(launches[1:], leaves[1:], strict=True):
            why = self._difference(first, leaves[0], launch, leaf) or self._rows_differ(first, leaves[0], launch, leaf)
            if why:
                return why
        for launch, leaf in zip(launches, leaves, strict=True):
            why = self._bound(launch) or self._read_otherwise(launch)
            if why:
                return f"{leaf} {why}"
        return ""

    def _difference(self, first: Launch, name: str, other: Launch, leaf: str) -> str:
        """What tells two products apart beside their columns."""
        if first.spec.kind != other.spec.kind:
            return f"{name} is a {first.spec.kind}, {leaf} a {other.spec.kind}"
        formats = [self._format(launch) for launch in (first, other)]
        if formats[0] != formats[1]:
            return f"the weights of {name} are {formats[0]}, those of {leaf} {formats[1]}: give them one format"
        mine, others = dict(first.spec.params), dict(other.spec.params)
        for key in sorted({*mine, *others} - {"n"}):
            if mine.get(key, 0) != others.get(key, 0):
                return f"{key} of {name} is {mine.get(key, 0)}, of {leaf} {others.get(key, 0)}"
        for a, b, what in zip(first.args, other.args, _names(first.spec), strict=True):
            if a.arg.dtype != b.arg.dtype or self._recipe(a) != self._recipe(b):
                return f"{what} of {name} and of {leaf} are stored in different ways"
        return ""

    def _format(self, launch: Launch) -> str:
        kept = [self.quantised.formats[v.name] for v in launch.args if v.name in self.quantised.formats]
        return ", ".join(dict.fromkeys(each.format + " of the graph" * each.stored for each in kept)) or "unknown"

    def _recipe(self, value: Value) -> Packing | None:
        """A weight's recipe but for what it is made of and its columns."""
        found = self._packing(value) if value.kind == "param" else None
        return None if found is None else replace(found, source="", n=0)

    def _packing(self, value: Value) -> Packing | None:
        found = self.packings.get(value.name)
        if found is None and value.name in self.options.weights:
            found = Packing(self.options.weights[value.name], "plain", 0, 0, 0, value.arg.dtype.bits, 0, False)
        return found

    def _rows_differ(self, first: Launch, name: str, other: Launch, leaf: str) -> str:
        for a, b, what in zip(first.args, other.args, _names(first.spec), strict=True):
            if _shared(what) and self._same(a) != self._same(b):
                return f"{name} and {leaf} read different {'rows' if what == 'a' else what}"
        return ""

    def _same(self, value: Value) -> tuple[str, str]:
        return self.same.get(_key(value), _key(value))

    def _bound(self, launch: Launch) -> str:
        """What a product does with its result alone, or with weights that others read too."""
        for value, what in zip(launch.args, _names(launch.spec), strict=True):
            if what in OF_ONE:
                return OF_ONE[what]
            if _shared(what):
                continue
            if value.kind != "param" or self._packing(value) is None or value.name in self.canonical.constants:
                return f"has a {what} that is no weight of the student"
            if len(self.readers[_key(value)]) > 1:
                return f"shares its {what} with another operator"
        return ""

    def _read_otherwise(self, launch: Launch) -> str:
        """Who reads a product's result in a way in which columns of a wider matrix cannot be read."""
        out = launch.outs[0]
        if out.kind != "storage":
            return "is a result of the graph"
        for reader, index in self.readers.get(_key(out), []):
            if out.name in self.before.reshaped or reader.args[index].arg.shape != out.arg.shape:
                return "is also read as a matrix of other rows"
            if index not in _row_operands(reader.spec):
                return f"is read by {reader.spec.kind}, which takes no columns of a wider matrix"
        return ""

    def _join(self, group: Group, parts: list[int]) -> None:
        launches = [self.launches[part] for part in parts]
        widths = [launch.outs[0].arg.shape[1] for launch in launches]
        first, total = launches[0], sum(widths)
        args = []
        for index, what in enumerate(_names(first.spec)):
            values = [launch.args[index] for launch in launches]
            args.append(values[0] if _shared(what) else self._columns(values, total))
        out = replace(first.outs[0], arg=Arg((first.outs[0].arg.shape[0], total), first.outs[0].arg.dtype))
        params = tuple((key, total if key == "n" else value) for key, value in first.spec.params)
        spec = KernelSpec(first.spec.kind, params, tuple(value.arg for value in args), (out.arg,))
        nodes = (self.nodes.get(launch.label, ()) for launch in launches)
        self.nodes[first.label] = tuple(dict.fromkeys(node for each in nodes for node in each))
        self.ones[parts[0]] = Launch(spec, tuple(args), (out,), first.label, group.title)
        self.gone.update(parts[1:])
        begin = 0
        for launch, width in zip(launches, widths, strict=True):
            own = launch.outs[0]
            arg = replace(own.arg, whole=total)
            self.windows[_key(own)] = Value(out.kind, out.name, arg, out.arg.dtype.nbytes(begin))
            begin += width

    def _columns(self, values: list[Value], total: int) -> Value:
        """One weight of the columns of several, in the place of the first among the parameters."""
        first, name = values[0], "+".join(value.name for value in values)
        arg = replace(first.arg, shape=(*first.arg.shape[:-1], total))
        recipes = [self._packing(value) for value in values]
        assert recipes[0] is not None
        sources = tuple(recipe.source for recipe in recipes if recipe is not None)
        widths = tuple(value.arg.shape[-1] for value in values)
        self.packings[name] = replace(recipes[0], n=total, sources=sources, columns=widths)
        kept = [self.formats[value.name] for value in values if value.name in self.formats]
        if kept:
            matrix = BESIDE.join(dict.fromkeys(each.matrix for each in kept))
            self.formats[name] = Kept(matrix, kept[0].format, kept[0].stored)
        params = {}
        for known, value in self.params.items():
            if known == first.name:
                params[name] = arg
            if all(known != each.name for each in values):
                params[known] = value
        self.params = params
        return Value("param", name, arg)

    def _rebuilt(self) -> Launches:
        """The launches with merged products in place of their first parts, without those that nobody reads any more."""
        made = [
            self._reading(self.ones.get(number, launch))
            for number, launch in enumerate(self.launches)
            if number not in self.gone
        ]
        read = {_key(value) for launch in self.launches for value in launch.args}
        kept: list[Launch] = []
        live = {_key(value) for value in self.before.outputs}
        for launch in reversed(made):
            if live.isdisjoint(map(_key, launch.outs)) and not read.isdisjoint(map(_key, launch.outs)):
                continue  # it was read before, and is not now
            live.update(map(_key, launch.args))
            kept.append(launch)
        kept.reverse()
        return replace(self.before, launches=tuple(kept), storages=storages_of(kept), params=self.params)

    def _reading(self, launch: Launch) -> Launch:
        """The launch with columns of merged results among its operands."""
        if all(_key(value) not in self.windows for value in launch.args):
            return launch
        args = tuple(self.windows.get(_key(value), value) for value in launch.args)
        return replace(launch, args=args, spec=replace(launch.spec, args=tuple(value.arg for value in args)))


def _key(value: Value) -> tuple[str, str]:
    return value.kind, value.name


def _module(path: str) -> str:
    return path.rpartition(".")[0]


def _leaf(path: str) -> str:
    return path.rpartition(".")[2]


def _names(spec: KernelSpec) -> list[str]:
    """Operands of a product; those from which it makes its rows count as one operand each."""
    if spec.kind != "normed":
        return list(linear_names(spec))
    count = int(spec["operands"])
    return [*(f"norm {i}" for i in range(count)), *linear_names(normed.product_of(spec))[1:]]


def _shared(what: str) -> bool:
    """Whether an operand belongs to the rows, which all parts share."""
    return what in BY_ROW or what.startswith("norm ")


def _row_operands(spec: KernelSpec) -> Iterable[int]:
    """Operands of a kernel whose rows may lie in those of a wider matrix."""
    if spec.kind == "attention":
        return (0, 1, 2)
    if spec.kind == "linear":
        return [i for i, what in enumerate(linear_names(spec)) if what in ("a", "residual", "factor")]
    known = spec.kind in rowwise.BY_ROWS or spec.kind in ("map", "normalise")
    return rowwise.by_rows(spec) if known else ()


def _same_values(launches: Sequence[Launch]) -> dict[tuple[str, str], tuple[str, str]]:
    """Value → the first one that is computed alike, of those that are computed more than once."""
    first: dict[Any, tuple[str, str]] = {}
    same: dict[tuple[str, str], tuple[str, str]] = {}
    for launch in launches:
        operands = tuple((same.get(_key(value), _key(value)), value.arg) for value in launch.args)
        for index, out in enumerate(launch.outs):
            if launch.spec.kind != "host":
                same[_key(out)] = first.setdefault((launch.spec, operands, index), _key(out))
    return same
