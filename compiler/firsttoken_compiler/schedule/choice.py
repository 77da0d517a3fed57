"""What a schedule chooses, as values that can be kept, compared and tried by hand.

A choice belongs to a kernel: a spec and the memories in which its operands lie. `choosing` makes the choice that costs
least, lists those that are possible, and refuses what a target cannot do.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from functools import lru_cache
from itertools import pairwise
from typing import Any, Final, NewType

from firsttoken_compiler.errors import OptionError
from firsttoken_compiler.isa.types import Space
from firsttoken_compiler.schedule.spec import KernelSpec

KernelKey = NewType("KernelKey", str)
"""Stable name of a kernel, readable up to its hash: `linear-64x8960x1536-5d41c0b2a97e`."""
ORDERS: Final = ("columns", "rows")
"""Outer loop of a product. `columns`: a tile of weights stays while all rows pass it; `rows`: a tile of activations
stays while all columns pass it, and weights come again for each."""
MOST_BUFFERS: Final = 3
SOFTMAXES: Final = ("rows", "online")
"""How an attention's scores become weights; see `AttentionChoice`."""
HASH_DIGITS: Final = 12


@dataclass(frozen=True, slots=True)
class ProductChoice:
    """Of a product, a product on blocks, one of normalised rows, and a convolution (rows are its output pixels).

    Attributes:
        m: rows of a tile.
        n: columns of a tile, whole panels.
        k: elements of a tile along the dimension that is summed over.
        whole: activations that lie in DRAM are fetched once, all of them, instead of tile by tile.
        order: one of `ORDERS`.
        buffers: tiles of what streams (weights, and activations where they come tile by tile) that exist at a time:
            1 waits for each, with 2 the next one comes while the matrix unit works.
        method: of a product on blocks, "floats" or "codes".
        block: rows that a product of normalised rows makes at a time.
    """

    m: int
    n: int
    k: int
    whole: bool = False
    order: str = "columns"
    buffers: int = 2
    method: str = ""
    block: int = 0

    def text(self) -> str:
        """One line for people."""
        parts = [f"{self.m}x{self.n}x{self.k}", f"{self.order} outside", f"{self.buffers} buffers"]
        parts += ["activations whole"] if self.whole else []
        parts += [self.method] if self.method else []
        return ", ".join([*parts, f"{self.block} rows normalised at a time"] if self.block else parts)


@dataclass(frozen=True, slots=True)
class AttentionChoice:
    """Of an attention.

    Attributes:
        rows: query rows of a tile.
        keys: keys of a tile, and values.
        buffers: tiles of keys and of values that exist at a time.
        softmax: one of `SOFTMAXES`. `rows`: all scores of a tile of rows are there before their softmax; `online`:
            those of one tile of keys, and running maxima and sums rescale what the tiles before have made.
    """

    rows: int
    keys: int
    buffers: int = 2
    softmax: str = "rows"

    def text(self) -> str:
        """One line for people."""
        online = ", online softmax" if self.softmax == "online" else ""
        return f"{self.rows} rows x {self.keys} keys, {self.buffers} buffers{online}"


@dataclass(frozen=True, slots=True)
class RowsChoice:
    """Of a kernel that works row by row: rows of a block."""

    rows: int

    def text(self) -> str:
        """One line for people."""
        return f"{self.rows} rows"


Choice = ProductChoice | AttentionChoice | RowsChoice


def facts_of(choice: Choice) -> dict[str, Any]:
    """A choice as JSON values; a softmax of whole rows is not mentioned."""
    return {name: value for name, value in asdict(choice).items() if (name, value) != ("softmax", "rows")}


def kinds_of(spec: KernelSpec) -> type[ProductChoice] | type[AttentionChoice] | type[RowsChoice] | None:
    """What a kernel's choice is; None for a kernel that has none (those over images, concatenations, the host's)."""
    if spec.kind in ("linear", "conv", "normed"):
        return ProductChoice
    if spec.kind == "attention":
        return AttentionChoice
    return None if spec.kind in UNCHOSEN else RowsChoice


UNCHOSEN: Final = ("host", "concat", "windows", "pool", "transpose")


@lru_cache(maxsize=65536)
def kernel_key(spec: KernelSpec, spaces: tuple[Space, ...]) -> KernelKey:
    """The name of a kernel whose operands and results lie in these memories."""
    text = f"{spec.to_json()} {[space.name for space in spaces]}{_wholes(spec)}"
    return KernelKey(f"{spec.kind}-{dims_of(spec)}-{hashlib.sha256(text.encode()).hexdigest()[:HASH_DIGITS]}")


def _wholes(spec: KernelSpec) -> str:
    """What tells kernels apart that read columns of wider matrices."""
    wholes = [arg.whole for arg in (*spec.args, *spec.outs)]
    return f" {wholes}" if any(wholes) else ""


def dims_of(spec: KernelSpec) -> str:
    """Rows, columns and depth of a product; tokens and features of its result otherwise."""
    dims = product_dims(spec) or (spec.outs[0].shape if spec.outs else ())
    return "x".join(str(extent) for extent in dims) or "scalar"


def product_dims(spec: KernelSpec) -> tuple[int, int, int] | None:
    """(m, n, k) of a product of any kind; None for other kernels."""
    if spec.kind not in ("linear", "conv", "normed"):
        return None
    depth = int(spec["k"]) if spec.get("k") else spec.args[0].shape[1]
    return spec.outs[0].shape[0], int(spec["n"]), depth


@dataclass(frozen=True, slots=True)
class GraphChoice:
    """What a schedule chooses about the graph as a whole: what is fused with what, and who works.

    Attributes:
        cores: cores that work is divided over; 0 for as many as the compiler uses by itself.
        norms: what norms keep for their products, `layers.*.input_layernorm=scratchpad`: one of `NORM_WAYS`, for those
            that a pattern covers, the first that does; others go as the compiler decides.
        merged: products of the same rows that become one, `layers.*.self_attn=qkv`: one of `MERGES`, for the modules
            that a pattern covers, the first that says this kind or `none`; a kind alone is for all. Others stay apart.
    """

    cores: int = 0
    norms: tuple[str, ...] = ()
    merged: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Raises OptionError naming the value, and what is possible."""
        object.__setattr__(self, "norms", tuple(self.norms))
        for text in self.norms:
            if text.rpartition("=")[2].strip() not in NORM_WAYS or not text.rpartition("=")[0].strip():
                raise OptionError(f"schedule: norms has {text!r:.80}: give NAME=WAY, a way is {', '.join(NORM_WAYS)}")
        object.__setattr__(self, "merged", tuple(text.strip() for text in self.merged))
        for text in self.merged:
            if merge_of(text)[1] not in (*MERGES, NONE_MERGED):
                kinds = ", ".join((*MERGES, NONE_MERGED))
                raise OptionError(f"schedule: merged has {text!r:.80}: give NAME=KIND or KIND, a kind is {kinds}")
        if not 0 <= self.cores <= 1024:
            raise OptionError(f"schedule: cores is {self.cores}: give 0 (the compiler's own) to 1024")

    def norm_way(self, name: str) -> str | None:
        """The way of the norm of this name, None where the compiler chooses."""
        for text in self.norms:
            pattern, _, way = text.rpartition("=")
            if covers(pattern.strip(), name):
                return way.strip()
        return None

    def merge_line(self, kind: str, name: str) -> str | None:
        """The line of `merged` that merges this kind of products of the module of this name; None: they stay apart."""
        for text in self.merged:
            pattern, what = merge_of(text)
            if what in (kind, NONE_MERGED) and covers(pattern, name):
                return text if what == kind else None
        return None

    def facts(self) -> dict[str, Any]:
        """As JSON values; what is left to the compiler is left out."""
        norms = {"norms": list(self.norms)} if self.norms else {}
        merged = {"merged": list(self.merged)} if self.merged else {}
        return {"cores": self.cores, **norms, **merged}


def merge_of(text: str) -> tuple[str, str]:
    """(pattern, kind) of a line of `GraphChoice.merged`."""
    pattern, _, kind = text.rpartition("=")
    return pattern.strip() or "*", kind.strip()


_NUMBERS: Final = re.compile(r"(?P<before>.*\blayers\.)(?P<numbers>[\d,-]+)(?P<after>\..*)")


def covers(pattern: str, name: str) -> bool:
    """Whether a name is meant: by itself, by wildcards, or as one of the layers `layers.0-3,7.input_layernorm`."""
    if fnmatchcase(name, pattern):
        return True
    wanted, found = _NUMBERS.fullmatch(pattern), _NUMBERS.fullmatch(name)
    if wanted is None or found is None or not found["numbers"].isdecimal():
        return False
    ranges = [part.split("-") for part in wanted["numbers"].split(",")]
    inside = any(part[0].isdecimal() and part[-1].isdecimal() and int(part[0]) <= int(found["numbers"]) <= int(part[-1])
                 for part in ranges)  # fmt: skip
    return inside and wanted["after"] == found["after"]


NORM_WAYS: Final = ("scratchpad", "dram", "statistics", "off")
"""Rows in the scratchpad or in DRAM, numbers per row from which products make the rows, or nothing."""
MERGES: Final = ("qkv", "gate_up")
"""The products of an attention's queries, keys and values, and those of a SwiGLU's gate and factor."""
NONE_MERGED: Final = "none"
WAYS: Final = ("none", "n", "k", "heads", "rows")
"""How a launch is cut for several cores; `none`: core 0 computes it."""


@dataclass(frozen=True, slots=True)
class CoreSplit:
    """How a launch is cut, and over how many cores at most.

    Attributes:
        by: one of `WAYS`: columns of a product (`n`), terms of its sums (`k`), heads of an attention, rows, or `none`.
        cores: cores that get a part; 1 with `none`.
    """

    by: str = "none"
    cores: int = 1

    def __post_init__(self) -> None:
        """Raises OptionError naming the value, and what is possible."""
        if self.by not in WAYS:
            raise OptionError(f"schedule: split by {self.by!r}: give {', '.join(WAYS)}")
        if not (self.cores == 1 if self.by == "none" else 2 <= self.cores <= 1024):
            limit = "1" if self.by == "none" else "2 to 1024"
            raise OptionError(f"schedule: split by {self.by} over {self.cores} cores: give {limit}")

    def text(self) -> str:
        """As reports name it."""
        return "core 0" if self.by == "none" else f"{self.by} over {self.cores} cores"


def launch_key(spec: KernelSpec) -> KernelKey:
    """The name under which a launch has its split: that of its kernel with all operands in the DRAM."""
    return kernel_key(spec, (Space.DRAM,) * (len(spec.args) + len(spec.outs)))


@dataclass(frozen=True)
class Schedules:
    """Choices by kernel; a kernel without one is scheduled as the compiler does by itself.

    On a target of several cores `splits` say how launches are cut (by `launch_key`), and `choices` belong to the
    kernels of the parts.
    """

    choices: tuple[tuple[KernelKey, Choice], ...] = ()
    graph: GraphChoice = GraphChoice()
    splits: tuple[tuple[KernelKey, CoreSplit], ...] = ()
    _by_key: dict[KernelKey, Choice] = field(default_factory=dict, repr=False, compare=False)
    _occurring: set[KernelKey] = field(default_factory=set, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Orders the choices; raises OptionError for a kernel that has two."""
        ordered = tuple(sorted(self.choices, key=lambda item: item[0]))
        object.__setattr__(self, "choices", ordered)
        self._by_key.update(ordered)
        if len(self._by_key) != len(ordered):
            twice = next(a for (a, _), (b, _) in pairwise(ordered) if a == b)
            raise OptionError(f"schedule: kernel {twice} has two choices: keep one")
        object.__setattr__(self, "splits", tuple(sorted(self.splits, key=lambda item: item[0])))

    @staticmethod
    def of(choices: dict[KernelKey, Choice], graph: GraphChoice = GraphChoice()) -> Schedules:
        """From a mapping."""
        return Schedules(tuple(choices.items()), graph)

    def get(self, spec: KernelSpec, spaces: tuple[Space, ...]) -> Choice | None:
        """The choice of a kernel, None where the compiler chooses."""
        return self._by_key.get(kernel_key(spec, spaces)) if self._by_key else None

    def split_of(self, spec: KernelSpec) -> CoreSplit | None:
        """How a launch is to be cut, None where the compiler chooses."""
        return dict(self.splits).get(launch_key(spec)) if self.splits else None

    def mark(self, kernels: Iterable[tuple[KernelSpec, tuple[Space, ...]]]) -> None:
        """Remembers that these kernels occur in a program."""
        if self.choices:
            self._occurring.update(kernel_key(spec, spaces) for spec, spaces in kernels)

    def occurring(self) -> list[KernelKey]:
        """Kernels that have a choice and were marked."""
        return [key for key, _ in self.choices if key in self._occurring]

    def absent(self) -> list[KernelKey]:
        """Kernels that have a choice and were not marked."""
        return [key for key, _ in self.choices if key not in self._occurring]

    def marked(self, keys: Iterable[str] = ()) -> Schedules:
        """The same, with these kernels marked and no others."""
        return Schedules(self.choices, self.graph, self.splits, _occurring={KernelKey(key) for key in keys})

    def facts(self) -> dict[str, Any]:
        """As JSON values."""
        splits = {"splits": {key: asdict(split) for key, split in self.splits}} if self.splits else {}
        choices = {key: facts_of(choice) for key, choice in self.choices}
        return {"graph": self.graph.facts(), "choices": choices, **splits}

    def canonical_json(self) -> str:
        """Stable text for content hashing."""
        return json.dumps(self.facts(), sort_keys=True)


NO_SCHEDULES: Final = Schedules()
