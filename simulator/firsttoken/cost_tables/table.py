"""Costs of students in microseconds, out of a table of measured operators.

A student's cost is the sum over its operators of the time in which each alone decides the run. An operator's cost is
bilinear between the measured values of its two widths; layers add up. `CostModel.exact` is what the table is measured
by, held against, and falls back to.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from firsttoken.cache import PACKAGES, ResultCache, code_hash, content_key
from firsttoken.cost import CostModel, Estimate, LayerCost
from firsttoken.cost_tables import file, lookup
from firsttoken.cost_tables.accuracy import Accuracy
from firsttoken.cost_tables.cells import cells_of
from firsttoken.cost_tables.file import CostTableError
from firsttoken.cost_tables.lengths import LENGTHS, QUESTION, Lengths
from firsttoken.cost_tables.probes import METRICS, measure_all
from firsttoken.cost_tables.space import DIMS, PER_LAYER, CostSpace, Values
from firsttoken.student import LayerConfig, StudentConfig
from firsttoken.subject import subject_of
from firsttoken_compiler.errors import OptionError
from firsttoken_compiler.formats.policy import POLICIES
from firsttoken_compiler.options import OF_BITS

if TYPE_CHECKING:
    from firsttoken.options import Progress

Outside = Literal["exact", "nan", "raise"]
"""What becomes of students that the table does not cover: the exact cost, NaN, or an OptionError."""
OUTSIDE: Final = get_args(Outside)
SQUARED: Final = "attention.self_attn.attention"
"""Operators whose cost rises with the square of the prompt."""
COSTS: Final = ("ttft_ms", "energy_mj", "dram_bytes", "macs", "tpot_ms", "token_energy_mj")
"""What derivatives are of."""
_BLOB: Final = "table.npz"
_SHARED: Final = DIMS[: -len(PER_LAYER)]
_BLOCK: Final = 4096
"""Students that are looked up together, so that what they need stays near."""
_Array = NDArray[np.float64]
_Columns = Sequence[_Array]
_BITS_OF: Final = {name: bits for bits, name in OF_BITS.items()}


@dataclass(slots=True)
class QuickEstimate:
    """The cost of a student; names and units are those of `Estimate`. Not frozen, because that would double its time.

    Attributes:
        source: "table", or "exact" where the student was compiled and simulated.
        outside: dimensions that the table does not cover; empty where it does.
    """

    ttft_ms: float
    energy_mj: float
    dram_bytes: float
    macs: float
    tpot_ms: float | None
    token_energy_mj: float | None
    source: Literal["table", "exact"]
    outside: tuple[str, ...]
    _layers: Callable[[], tuple[LayerCost, ...]] = field(repr=False, compare=False)

    def __reduce__(self) -> tuple[Any, ...]:
        values = tuple(getattr(self, entry.name) for entry in fields(self)[:-1])
        return _with_layers, (values, self.by_layer)

    @property
    def by_layer(self) -> tuple[LayerCost, ...]:
        """The start (dispatch and token table), each layer, and the head; the times sum to `ttft_ms`.

        Of an exact cost they are those of `Estimate.by_layer`.
        """
        return self._layers()


def _with_layers(values: tuple[Any, ...], layers: tuple[LayerCost, ...]) -> QuickEstimate:
    every: list[Any] = [*values, lambda: layers]
    return QuickEstimate(*every)


@dataclass(frozen=True, slots=True)
class QuickEstimates:
    """Costs of many students, an entry each; `tpot_ms` and `token_energy_mj` are None where no step was measured.

    Attributes:
        outside: bit i is set where the table does not cover `QUESTION[i]`, a dimension out of `DIMS` or of `LENGTHS`; 0
            where it covers all.
        exact: whether the costs are those of `CostModel.exact`.
    """

    ttft_ms: NDArray[np.float64]
    energy_mj: NDArray[np.float64]
    dram_bytes: NDArray[np.float64]
    macs: NDArray[np.float64]
    tpot_ms: NDArray[np.float64] | None
    token_energy_mj: NDArray[np.float64] | None
    outside: NDArray[np.int64]
    exact: NDArray[np.bool_]


class CostTable:
    """A measured table for one cost model and space; picklable, safe in spawned processes, not changed once built.

    Attributes:
        model: what the table is measured by; its prompt, and its decode step, are what is meant where none is named.
        space: the students that it covers.
        lengths: the prompts that it covers, and the rows before a later token.
        operators: names of the operators, by group: "feed_forward.mlp.up_proj".
        accuracy: errors against exact costs of students that were not measured; empty until `checked`.
    """

    def __init__(
        self, model: CostModel, space: CostSpace, lengths: Lengths, operators: Sequence[str],
        cells: NDArray[np.float64], accuracy: Sequence[Accuracy] = (),
    ) -> None:  # fmt: skip
        self.model, self.space, self.lengths = model, space, lengths
        self.operators, self.accuracy = tuple(operators), tuple(accuracy)
        self._each = cells
        squared = np.array([name.startswith(SQUARED) for name in self.operators])
        self._summed = (cells[~squared].sum(axis=0), cells[squared].sum(axis=0))
        self._ready: dict[tuple[int, int], NDArray[np.float64]] = {}
        self._grid = lookup.grid_of(space)
        self._default_bits = _default_bits(model)
        self._prompt, self._behind = model.prompt or 0, max(0, model.decode - 1)
        self._later = bool(lengths.contexts.values)
        self._columns_of_one = len(METRICS) * (2 if self._later else 1)
        base = space.base
        self._kind = (base.family, base.tie_embeddings, base.qkv_bias, base.qk_norm, base.rope_scaling)

    def __reduce__(self) -> tuple[Any, ...]:
        return CostTable, (self.model, self.space, self.lengths, self.operators, self._each, self.accuracy)

    @staticmethod
    def build(
        model: CostModel, space: CostSpace, *, prompts: Values | None = None, contexts: Values | None = None,
        jobs: int | None = None, progress: Progress | None = None,
    ) -> CostTable:  # fmt: skip
        """Measures the space's probes, or takes the table from the cache. A build that was stopped goes on.

        `prompts` and `contexts` as in `CostModel.table`.

        Raises:
            OptionError: costs are no sum over layers, because the options name layers or have layers of several kinds.
        """
        _require_additive(model)
        space, lengths = space.resolved(_default_bits(model)), Lengths.of(model, prompts, contexts)
        key = content_key("cost table", {"of": _question(model, space, lengths)}, subject_of(space.base).packages)
        blobs = ResultCache().get(key, (_BLOB,))
        if blobs is not None:
            try:
                return _table(blobs[_BLOB], "the kept cost table", model)
            except CostTableError:
                pass
        measured = measure_all(model, space.probes, lengths.graphs, jobs, progress)
        table = CostTable(model, space, lengths, *cells_of(space, measured))
        ResultCache().put(key, {_BLOB: table.to_bytes()})
        return table

    @staticmethod
    def load(path: str | Path, model: CostModel) -> CostTable:
        """The table of a file. Raises CostTableError where it is damaged, or for another model or other code."""
        return _table(file.read(Path(path)), str(path), model)

    def save(self, path: str | Path) -> None:
        """Writes the table, `accuracy` included, whole or not at all. Raises CostTableError."""
        file.write(Path(path), self.to_bytes())

    def to_bytes(self) -> bytes:
        """The file's contents; equal tables give equal bytes."""
        about = {
            "question": _question(self.model, self.space, self.lengths),
            "space": self.space.to_dict(),
            "lengths": self.lengths.to_dict(),
            "code": _code(self.space),
            "operators": self.operators,
            "accuracy": [asdict(entry) for entry in self.accuracy],
        }
        return file.packed(about, {"cells": self._each})

    def checked(
        self, students: int, *, seed: int = 0, jobs: int | None = None, progress: Progress | None = None
    ) -> CostTable:
        """The same table with its errors against the exact costs of so many random students of the space."""
        from firsttoken.cost_tables.accuracy import errors_of

        found = errors_of(self, students, seed, jobs, progress)
        return CostTable(self.model, self.space, self.lengths, self.operators, self._each, found)

    def estimate(
        self, student: StudentConfig, *, prompt: int | None = None, context: int | None = None,
        outside: Outside = "exact",
    ) -> QuickEstimate:  # fmt: skip
        """The cost of one student.

        Args:
            student: of the space, or another one.
            prompt: tokens; None for those of the model.
            context: rows in the cache before the later token; None for those before the model's decode step.
            outside: see `Outside`.

        Raises:
            OptionError: the table does not cover the question, and `outside` is "raise".
        """
        _require_outside(outside)
        if not isinstance(student, StudentConfig):
            raise OptionError(f"{student!r:.80} is no configuration of a student: find_student gives that of a name")
        prompt = self._prompt if prompt is None else prompt
        context = prompt + self._behind if context is None else context
        cells = self._ready.get((prompt, context))
        if cells is None:
            cells = self._combined(prompt, context)
        row = np.array((student.layers, student.hidden, student.head_dim, student.vocab), dtype=np.float64)
        widths = self._widths(student)
        out = np.zeros(self._columns_of_one)
        flags = lookup.one(self._grid, cells, row, widths, False, out)
        kind = (student.family, student.tie_embeddings, student.qkv_bias, student.qk_norm, student.rope_scaling)
        positions = context + 1 if self._later and context >= prompt else prompt
        if flags or (prompt, context) not in self._ready or kind != self._kind or student.max_positions < positions:
            return self._beyond(student, (prompt, context), flags, outside)
        costs = out.tolist()
        later = costs[4:6] if self._later else (None, None)
        return QuickEstimate(
            costs[0], costs[1], costs[2], costs[3], later[0], later[1], "table", (),
            lambda: self._by_layer(cells, row, widths, student.layers),
        )  # fmt: skip

    def estimate_many(
        self, columns: Mapping[str, ArrayLike], *, outside: Outside = "nan", relaxed: bool = False,
        jobs: int | None = None,
    ) -> QuickEstimates:  # fmt: skip
        """The costs of many students of the base's kind.

        Args:
            columns: numbers by name out of `DIMS`, "prompt" and "context", one per student, or one for all. Those that
                may differ from layer to layer may have a line per student, of at least as many layers. What is left out
                is the base's, and as in `estimate`.
            outside: see `Outside`; rows are flagged in any case.
            relaxed: whether widths may lie between the steps of the space, as expected widths do.
            jobs: processes that compute exact costs.

        Raises:
            OptionError: the columns do not fit together, or a row is not covered and `outside` is "raise".
        """
        _require_outside(outside)
        shared, lines, lengths = self._columns(columns)
        n = max(len(shared[0]), len(lines[0]), len(lengths))
        out, flags = np.zeros((n, self._columns_of_one)), np.zeros(n, dtype=np.int64)
        for chosen, (prompt, context) in _by_lengths(lengths, n):
            cells = self._combined(prompt, context)
            for at in range(0, len(chosen) if chosen is not None else n, _BLOCK):
                some = slice(at, at + _BLOCK) if chosen is None else chosen[at : at + _BLOCK]
                rows, widths = _block(shared, lines, some)
                costs, wrongs = np.zeros((len(rows), out.shape[1])), np.zeros(len(rows), dtype=np.int64)
                lookup.many(self._grid, cells, rows, widths, relaxed, costs, wrongs)
                out[some], flags[some] = costs, wrongs | self._uncovered(prompt, context)
        out[flags != 0] = np.nan
        wrong = np.flatnonzero(flags)
        exact = np.zeros(n, dtype=np.bool_)
        if len(wrong) and outside != "nan":
            if outside == "raise":
                at = int(wrong[0])
                raise OptionError(f"student {at}: {self._refusal(int(flags[at]))}")
            asked = [
                (self._student(*_block(shared, lines, slice(at, at + 1))), *lengths[min(at, len(lengths) - 1)].tolist())
                for at in wrong.tolist()
            ]
            for at, line in zip(wrong.tolist(), self.exact_many(asked, jobs=jobs), strict=True):
                out[at, : len(line)], exact[at] = line, True
        later = self._later
        return QuickEstimates(
            out[:, 0], out[:, 1], out[:, 2], out[:, 3], out[:, 4] if later else None, out[:, 5] if later else None,
            flags, exact,
        )  # fmt: skip

    def gradient(self, columns: Mapping[str, ArrayLike], of: str = "ttft_ms") -> dict[str, NDArray[np.float64]]:
        """Derivatives of one of `COSTS` by layers, hidden, vocab, heads and intermediate; columns as `estimate_many`.

        Widths may lie between steps. Where slopes change, at a measured width, the one towards larger widths counts.
        The derivative by layers is the cost of the mean layer. Those by heads and intermediate have a line per student
        where one of the columns has. Rows that are not covered are NaN.
        """
        known = COSTS[: None if self._later else 4]
        if of not in known:
            raise OptionError(f"{of!r} is not measured; derivatives are there of {', '.join(known)}")
        shared, lines, lengths = self._columns(columns)
        n, width = max(len(shared[0]), len(lengths)), lines[0].shape[1]
        ends, slopes = np.zeros((n, 3)), np.zeros((n, width, 2))
        for chosen, (prompt, context) in _by_lengths(lengths, n):
            some = slice(None) if chosen is None else chosen
            rows, widths = _block(shared, lines, some)
            parts = np.zeros((len(rows), 3)), np.zeros((len(rows), width, 2))
            flags, cells = np.zeros(len(rows), dtype=np.int64), self._combined(prompt, context)
            lookup.slopes(self._grid, cells, COSTS.index(of), rows, widths, *parts, flags)
            ends[some], slopes[some] = (np.nan, np.nan) if self._uncovered(prompt, context) else parts
        flat = slopes[:, 0] if width == 1 else slopes
        return {
            "layers": ends[:, 0], "hidden": ends[:, 1], "vocab": ends[:, 2],
            "heads": flat[..., 0], "intermediate": flat[..., 1],
        }  # fmt: skip

    def by_operator(self, student: StudentConfig, *, prompt: int | None = None) -> dict[str, float]:
        """Milliseconds until the first token per operator, summed over the layers; raises OptionError outside."""
        prompt = self._prompt if prompt is None else prompt
        context = self.lengths.contexts.values[0] if self._later else 0
        self.estimate(student, prompt=prompt, context=context, outside="raise")
        row = np.array((student.layers, student.hidden, student.head_dim, student.vocab), dtype=np.float64)
        found = {}
        for name, each in zip(self.operators, self._each, strict=True):
            out = np.zeros(len(METRICS))
            shares = self.lengths.shares(self.lengths.at(prompt, context)[0], later=False,
                                         squared=name.startswith(SQUARED))  # fmt: skip
            cells = np.ascontiguousarray(np.einsum("g,cgm->cm", shares, each))
            lookup.one(self._grid, cells, row, self._widths(student), False, out)
            found[name] = float(out[0])
        return found

    def exact_many(
        self, asked: Sequence[tuple[StudentConfig, int, int]], *, jobs: int | None = None,
        progress: Progress | None = None,
    ) -> list[list[float]]:  # fmt: skip
        """Exact costs of (student, prompt, context), in the order of `COSTS`. Raises FirsttokenError."""
        groups: dict[tuple[int, int], list[int]] = {}
        for at, (_, prompt, context) in enumerate(asked):
            groups.setdefault((prompt, context), []).append(at)
        found: list[list[float]] = [[] for _ in asked]
        for lengths, mine in groups.items():
            students = [asked[at][0] for at in mine]
            parts = [each.exact_many(students, jobs=jobs, progress=progress) for each in self._models(*lengths)]
            for at, *answers in zip(mine, *parts, strict=True):
                found[at] = _line(*answers)
        return found

    def _models(self, prompt: int, context: int) -> list[CostModel]:
        """What answers exactly: one run of the prompt and the token behind it, or two where it is not behind it."""
        if not self._later:
            return [replace(self.model, prompt=prompt, decode=0)]
        if context >= prompt:
            return [replace(self.model, prompt=prompt, decode=context - prompt + 1)]
        return [replace(self.model, prompt=prompt, decode=0), replace(self.model, prompt=context, decode=1)]

    def _combined(self, prompt: int, context: int) -> NDArray[np.float64]:
        """[cells, columns] of a prompt and a later token; of lengths that are not covered, of others in their place."""
        found = self._ready.get((prompt, context))
        if found is None:
            at = self.lengths.at(prompt, context)
            parts = []
            for later, graph in enumerate(at[: 1 + self._later]):
                shares = (self.lengths.shares(max(0, graph), later=bool(later), squared=each) for each in (False, True))
                parts.append(sum(np.einsum("g,cgm->cm", s, c) for s, c in zip(shares, self._summed, strict=True)))
            found = np.ascontiguousarray(np.concatenate(parts, axis=1))
            if min(at) >= 0:
                self._ready[prompt, context] = found
        return found

    def _uncovered(self, prompt: int, context: int) -> int:
        """A bit for each of `LENGTHS` that is not covered."""
        positions = zip(LENGTHS, self.lengths.at(prompt, context), strict=True)
        return sum(1 << QUESTION.index(name) for name, at in positions if at < 0)

    def _widths(self, student: StudentConfig) -> NDArray[np.float64]:
        """[layers or 1, 4]: the dimensions that may differ from layer to layer."""
        bits = self._default_bits
        if not student.per_layer:
            own = (student.heads, student.kv_heads, student.intermediate, bits)
            return np.array((own,), dtype=np.float64)
        flat: list[float] = []
        for layer in student.per_layer:
            flat += (layer.heads, layer.kv_heads, layer.intermediate, layer.weight_bits or bits)
        return np.fromiter(flat, dtype=np.float64, count=len(flat)).reshape(-1, lookup.WIDTHS)

    def _by_layer(
        self, cells: NDArray[np.float64], row: NDArray[np.float64], widths: NDArray[np.float64], layers: int
    ) -> tuple[LayerCost, ...]:
        out = np.zeros((len(widths) + 2, cells.shape[1]))
        lookup.parts(self._grid, cells, row, widths, out)
        lines = [LayerCost("", ms, mj, round(nbytes), round(macs)) for ms, mj, nbytes, macs in out[:, :4].tolist()]
        inner = lines[1:-1] if len(widths) > 1 else lines[1:2] * layers
        named = [replace(line, name=f"layers.{at}") for at, line in enumerate(inner)]
        return (replace(lines[0], name="start"), *named, replace(lines[-1], name="head"))

    def _beyond(
        self, student: StudentConfig, lengths: tuple[int, int], flags: int, outside: Outside
    ) -> QuickEstimate:
        """A student that the table does not cover, or lengths."""
        flags |= self._uncovered(*lengths)
        unlike = self.space.unlike(student)
        if student.max_positions < max(lengths[0], lengths[1] + 1 if self._later else 0):
            unlike = (*unlike, "max_positions")
        names = (*_named(flags), *unlike)
        if outside == "raise":
            raise OptionError(f"{student.name}: {self._refusal(flags, unlike)}")
        if outside == "nan":
            nan = float("nan")
            later = nan if self._later else None
            return QuickEstimate(nan, nan, nan, nan, later, later, "table", names, tuple)
        found = [model.exact(student) for model in self._models(*lengths)]
        ttft, energy, nbytes, macs, *token = _line(*found)
        tpot, token_energy = token or (None, None)
        return QuickEstimate(
            ttft, energy, nbytes, macs, tpot, token_energy, "exact", names, lambda: found[0].by_layer
        )

    def _refusal(self, flags: int, unlike: Sequence[str] = ()) -> str:
        own = {"prompt": self.lengths.prompts, "context": self.lengths.contexts}
        parts = [f"{name} ({own.get(name) or self.space[name]})" for name in _named(flags)]
        parts += [f"{name} ({getattr(self.space.base, name)})" for name in unlike]
        return f"the cost table does not cover its {', '.join(parts)}; widen the space, or ask for exact costs"

    def _columns(self, columns: Mapping[str, ArrayLike]) -> tuple[_Columns, _Columns, NDArray[np.int64]]:
        """Columns of the first dimensions, [students], of the last ones, [students, layers or 1]; no copies.

        Then prompts and contexts, [students or 1, 2].
        """
        for name in columns:
            if name not in QUESTION:
                raise OptionError(f"{name!r} is no dimension of a student; columns are {', '.join(QUESTION)}")
        first = self.space.base.layer(0)
        given = {name: _numbers(name, values) for name, values in columns.items()}
        for name, array in given.items():
            if array.ndim > (2 if name in PER_LAYER else 1):
                raise OptionError(
                    f"column {name} has {array.ndim} axes: give one number per student, or a line of layers"
                )
        lengths = {array.shape[0] for array in given.values() if array.ndim}
        widest = {array.shape[1] for array in given.values() if array.ndim == 2}
        if len(lengths) > 1 or len(widest) > 1:
            raise OptionError(
                f"columns of {sorted(lengths)} students and {sorted(widest)} layers: they must be as long"
            )
        n, width = max(lengths, default=1), max(widest, default=1)
        shared = [
            np.broadcast_to(given.get(name, np.asarray(float(getattr(self.space.base, name)))), (n,))
            for name in _SHARED
        ]
        lines = []
        for name in PER_LAYER:
            array = given.get(name, np.asarray(float(getattr(first, name) or 0)))
            if name == "weight_bits":
                array = np.where(array == 0.0, self._default_bits, array)
            lines.append(np.broadcast_to(array[:, None] if array.ndim == 1 else array, (n, width)))
        return shared, lines, self._lengths(given)

    def _lengths(self, given: Mapping[str, _Array]) -> NDArray[np.int64]:
        prompts = given.get("prompt", np.asarray(float(self._prompt)))
        contexts = given.get("context", prompts + self._behind)
        both = np.stack(np.broadcast_arrays(np.atleast_1d(prompts), np.atleast_1d(contexts)), axis=1)
        if (both != np.rint(both)).any():
            raise OptionError("prompts and contexts are whole numbers of tokens, between which no slope is known")
        return both.astype(np.int64)

    def _student(self, rows: NDArray[np.float64], lines_of: NDArray[np.float64]) -> StudentConfig:
        """The one student of a block."""
        widths = lines_of[0]
        layers, hidden, head_dim, vocab = (_whole(number) for number in rows[0])
        if len(widths) > 1 and layers > len(widths):
            raise OptionError(f"{layers} layers, and columns of {len(widths)} layers: give one number per layer")
        lines = [[_whole(number) for number in line] for line in (widths[:layers] if len(widths) > 1 else widths)]
        per_layer = [LayerConfig(heads, kv, wide, bits or None) for heads, kv, wide, bits in lines]
        per_layer = per_layer * layers if len(widths) == 1 else per_layer
        one = per_layer[0]
        return replace(
            self.space.base, layers=layers, hidden=hidden, head_dim=head_dim, vocab=vocab, heads=one.heads,
            kv_heads=one.kv_heads, intermediate=one.intermediate, per_layer=tuple(per_layer),
        )  # fmt: skip


def _line(first: Estimate, second: Estimate | None = None) -> list[float]:
    """The costs of an exact answer in the order of `COSTS`; of a later token where one was measured."""
    found: list[float] = [first.ttft_ms, first.energy_mj, first.dram_read_bytes + first.dram_write_bytes, first.macs]
    later = second or first
    if later.tpot_ms is not None and later.token_energy_mj is not None:
        found += [later.tpot_ms, later.token_energy_mj]
    return found


def _by_lengths(lengths: NDArray[np.int64], n: int) -> Iterator[tuple[NDArray[np.int64] | None, tuple[int, int]]]:
    """(rows, lengths) of each pair of lengths; None for all `n` rows."""
    if len(lengths) == 1:
        yield None, (int(lengths[0, 0]), int(lengths[0, 1]))
        return
    pairs, which = np.unique(lengths, axis=0, return_inverse=True)
    order = np.argsort(which.reshape(-1), kind="stable")
    ends = np.cumsum(np.bincount(which.reshape(-1), minlength=len(pairs)))
    for pair, first, last in zip(pairs.tolist(), [0, *ends[:-1].tolist()], ends.tolist(), strict=True):
        yield order[first:last], (pair[0], pair[1])


def _block(shared: _Columns, lines: _Columns, some: slice | NDArray[np.int64]) -> tuple[_Array, _Array]:
    """([students, 4], [students, layers or 1, 4]) of some of the students."""
    return np.stack([column[some] for column in shared], axis=-1), np.stack([each[some] for each in lines], axis=-1)


def _require_outside(outside: str) -> None:
    if outside not in OUTSIDE:
        raise OptionError(f"outside is {outside!r:.40}: give {', '.join(map(repr, OUTSIDE))}")


def _numbers(name: str, values: ArrayLike) -> _Array:
    try:
        return np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise OptionError(f"column {name} holds no numbers, or lines of unequal length: {error}") from None


def _whole(number: float) -> int:
    if number != int(number):
        raise OptionError(f"{number:g} is no width of a student: exact costs need whole numbers")
    return int(number)


def _named(flags: int) -> tuple[str, ...]:
    return tuple(name for at, name in enumerate(QUESTION) if flags >> at & 1)


def _default_bits(model: CostModel) -> int:
    """Bits of the weights where a student wishes none; 0 where the options give them blocks."""
    return _BITS_OF.get(model.options.weights, 0)


def _require_additive(model: CostModel) -> None:
    options = model.options
    named = [what for what in ("layer_bits", "rules", "ranges") if getattr(options, what)]
    if named:
        raise OptionError(
            f"{named[0]} names layers, which a cost table has none of: vary weight_bits of the space instead"
        )
    if options.weights in POLICIES and options.weights not in _BITS_OF:
        raise OptionError(
            f"weights {options.weights} differ from layer to layer: a cost table needs one format for all"
        )


def _question(model: CostModel, space: CostSpace, lengths: Lengths) -> dict[str, Any]:
    """What the numbers of a table depend on, but for the code."""
    from firsttoken.api import run_parts

    parts = run_parts(subject_of(space.base), model.target, 1, 0, model.options)
    axes = [[name, *map(list, (axis.values, axis.measured, axis.line))] for name, axis in space.axes]
    return {"base": parts, "axes": axes, "lines": space.lines, "lengths": lengths.to_dict()}


def _code(space: CostSpace) -> str:
    return code_hash((*PACKAGES, *subject_of(space.base).packages))


def _table(data: bytes, where: str, model: CostModel) -> CostTable:
    about, arrays = file.unpacked(data, where)
    try:
        space, lengths = CostSpace.from_dict(about["space"]), Lengths.from_dict(about["lengths"])
        accuracy = tuple(Accuracy(**entry) for entry in about["accuracy"])
        operators, cells = tuple(about["operators"]), arrays["cells"]
        shape = (len(operators), int(lookup.grid_of(space).bases[-1]), len(lengths.graphs), len(METRICS))
        fits = cells.shape == shape
    except (KeyError, TypeError, ValueError, OptionError):
        raise CostTableError(f"{where} is no cost table of this version: build the table again") from None
    if not fits:
        raise CostTableError(f"{where} has cells of another space: build the table again")
    if about["question"] != json.loads(json.dumps(_question(model, space, lengths))) or not _has(lengths, model):
        raise CostTableError(
            f"{where} is for another target, prompt, decode step or options: build the table for these, or load it "
            "with the model that it was built by"
        )
    if about["code"] != _code(space):
        raise CostTableError(f"{where} was measured by another version of the code: build the table again")
    return CostTable(model, space, lengths, operators, cells, accuracy)


def _has(lengths: Lengths, model: CostModel) -> bool:
    """Whether the model's own prompt and decode step are among the lengths of a table."""
    own = model.prompt or 0
    later = not model.decode or own + model.decode - 1 in lengths.contexts.values
    return own in lengths.prompts.values and later
