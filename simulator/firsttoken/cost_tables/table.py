"""Costs of students in microseconds, out of a table of measured operators.

A student's cost is the sum over its operators of the time in which each alone decides the run. An operator's cost is
bilinear between the measured values of its two widths; layers add up. `CostModel.exact` is what the table is measured
by, held against, and falls back to.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from firsttoken.cache import PACKAGES, ResultCache, code_hash, content_key
from firsttoken.cost import CostModel, Estimate, LayerCost
from firsttoken.cost_tables import file, lookup
from firsttoken.cost_tables.accuracy import Accuracy
from firsttoken.cost_tables.cells import cells_of
from firsttoken.cost_tables.file import CostTableError
from firsttoken.cost_tables.probes import METRICS, measure_all
from firsttoken.cost_tables.space import DIMS, PER_LAYER, CostSpace
from firsttoken.student import LayerConfig, StudentConfig
from firsttoken.subject import subject_of
from firsttoken_compiler.errors import OptionError
from firsttoken_compiler.formats.policy import POLICIES
from firsttoken_compiler.options import OF_BITS

if TYPE_CHECKING:
    from firsttoken.options import Progress

Outside = Literal["exact", "nan", "raise"]
"""What becomes of students that the table does not cover: the exact cost, NaN, or an OptionError."""
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
        outside: bit i is set where the table does not cover dimension `DIMS[i]`; 0 where it covers all.
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
        model: what the table is measured by.
        space: the students that it covers.
        operators: names of the operators, by group: "feed_forward.mlp.up_proj".
        accuracy: errors against exact costs of students that were not measured; empty until `checked`.
    """

    def __init__(
        self, model: CostModel, space: CostSpace, operators: Sequence[str], cells: NDArray[np.float64],
        accuracy: Sequence[Accuracy] = (),
    ) -> None:  # fmt: skip
        self.model, self.space, self.operators, self.accuracy = model, space, tuple(operators), tuple(accuracy)
        self._each = cells
        self._cells = np.ascontiguousarray(cells.sum(axis=0))
        self._grid = lookup.grid_of(space)
        self._default_bits = _default_bits(model)
        self._positions = (model.prompt or 0) + model.decode
        self._later = self._cells.shape[1] > len(METRICS)
        base = space.base
        self._kind = (base.family, base.tie_embeddings, base.qkv_bias, base.qk_norm, base.rope_scaling)

    def __reduce__(self) -> tuple[Any, ...]:
        return CostTable, (self.model, self.space, self.operators, self._each, self.accuracy)

    @staticmethod
    def build(
        model: CostModel, space: CostSpace, *, jobs: int | None = None, progress: Progress | None = None
    ) -> CostTable:
        """Measures the space's probes, or takes the table from the cache. A build that was stopped goes on.

        Raises:
            OptionError: costs are no sum over layers, because the options name layers or have layers of several kinds.
        """
        _require_additive(model)
        space = space.resolved(_default_bits(model))
        key = content_key("cost table", {"of": _question(model, space)}, subject_of(space.base).packages)
        blobs = ResultCache().get(key, (_BLOB,))
        if blobs is not None:
            try:
                return _table(blobs[_BLOB], "the kept cost table", model)
            except CostTableError:
                pass
        measured = measure_all(model, space.probes, jobs, progress)
        table = CostTable(model, space, *cells_of(space, measured))
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
            "question": _question(self.model, self.space),
            "space": self.space.to_dict(),
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

        return CostTable(
            self.model, self.space, self.operators, self._each, errors_of(self, students, seed, jobs, progress)
        )

    def estimate(self, student: StudentConfig, *, outside: Outside = "exact") -> QuickEstimate:
        """The cost of one student.

        Raises OptionError for what the table does not cover, if `outside` is "raise".
        """
        row = np.array((student.layers, student.hidden, student.head_dim, student.vocab), dtype=np.float64)
        widths = self._widths(student)
        out = np.zeros(self._cells.shape[1])
        flags = lookup.one(self._grid, self._cells, row, widths, False, out)
        kind = (student.family, student.tie_embeddings, student.qkv_bias, student.qk_norm, student.rope_scaling)
        if flags or kind != self._kind or student.max_positions < self._positions:
            return self._beyond(student, flags, outside)
        costs = out.tolist()
        later = costs[4:6] if self._later else (None, None)
        return QuickEstimate(
            costs[0], costs[1], costs[2], costs[3], later[0], later[1], "table", (),
            lambda: self._by_layer(row, widths, student.layers),
        )  # fmt: skip

    def estimate_many(
        self, columns: Mapping[str, ArrayLike], *, outside: Outside = "nan", relaxed: bool = False,
        jobs: int | None = None,
    ) -> QuickEstimates:  # fmt: skip
        """The costs of many students of the base's kind.

        Args:
            columns: numbers by name out of `DIMS`, one per student, or one for all. Those that may differ from layer to
                layer may have a line per student, of at least as many layers. What is left out is the base's.
            outside: see `Outside`; rows are flagged in any case.
            relaxed: whether widths may lie between the steps of the space, as expected widths do.
            jobs: processes that compute exact costs.

        Raises:
            OptionError: the columns do not fit together, or a row is not covered and `outside` is "raise".
        """
        shared, lines = self._columns(columns)
        n = max(len(shared[0]), len(lines[0]))
        out, flags = np.zeros((n, self._cells.shape[1])), np.zeros(n, dtype=np.int64)
        for at in range(0, n, _BLOCK):
            rows, widths = _block(shared, lines, at, _BLOCK)
            stop = at + _BLOCK
            lookup.many(self._grid, self._cells, rows, widths, relaxed, out[at:stop], flags[at:stop])
        wrong = np.flatnonzero(flags)
        exact = np.zeros(n, dtype=np.bool_)
        if len(wrong) and outside != "nan":
            if outside == "raise":
                at = int(wrong[0])
                raise OptionError(f"student {at}: {self._refusal(int(flags[at]))}")
            students = [self._student(*_block(shared, lines, at, 1)) for at in wrong.tolist()]
            for at, found in zip(wrong.tolist(), self.model.exact_many(students, jobs=jobs), strict=True):
                out[at], exact[at] = self._line(found), True
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
        rows, widths = _block(*self._columns(columns))
        ends, slopes = np.zeros((len(rows), 3)), np.zeros((*widths.shape[:2], 2))
        flags = np.zeros(len(rows), dtype=np.int64)
        lookup.slopes(self._grid, self._cells, COSTS.index(of), rows, widths, ends, slopes, flags)
        flat = slopes[:, 0] if widths.shape[1] == 1 else slopes
        return {
            "layers": ends[:, 0], "hidden": ends[:, 1], "vocab": ends[:, 2],
            "heads": flat[..., 0], "intermediate": flat[..., 1],
        }  # fmt: skip

    def by_operator(self, student: StudentConfig) -> dict[str, float]:
        """Milliseconds until the first token per operator, summed over the layers; raises OptionError outside."""
        self.estimate(student, outside="raise")
        row = np.array((student.layers, student.hidden, student.head_dim, student.vocab), dtype=np.float64)
        found = {}
        for name, cells in zip(self.operators, self._each, strict=True):
            out = np.zeros(cells.shape[1])
            lookup.one(self._grid, np.ascontiguousarray(cells), row, self._widths(student), False, out)
            found[name] = float(out[0])
        return found

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

    def _by_layer(self, row: NDArray[np.float64], widths: NDArray[np.float64], layers: int) -> tuple[LayerCost, ...]:
        out = np.zeros((len(widths) + 2, self._cells.shape[1]))
        lookup.parts(self._grid, self._cells, row, widths, out)
        lines = [LayerCost("", ms, mj, round(nbytes), round(macs)) for ms, mj, nbytes, macs in out[:, :4].tolist()]
        inner = lines[1:-1] if len(widths) > 1 else lines[1:2] * layers
        named = [replace(line, name=f"layers.{at}") for at, line in enumerate(inner)]
        return (replace(lines[0], name="start"), *named, replace(lines[-1], name="head"))

    def _beyond(self, student: StudentConfig, flags: int, outside: Outside) -> QuickEstimate:
        """A student that the table does not cover."""
        unlike = self.space.unlike(student)
        if student.max_positions < self._positions:
            unlike = (*unlike, "max_positions")
        names = (*_named(flags), *unlike)
        if outside == "raise":
            raise OptionError(f"{student.name}: {self._refusal(flags, unlike)}")
        if outside == "nan":
            nan = float("nan")
            later = nan if self._later else None
            return QuickEstimate(nan, nan, nan, nan, later, later, "table", names, tuple)
        found = self.model.exact(student)
        return QuickEstimate(
            found.ttft_ms, found.energy_mj, found.dram_read_bytes + found.dram_write_bytes, found.macs, found.tpot_ms,
            found.token_energy_mj, "exact", names, lambda: found.by_layer,
        )  # fmt: skip

    def _refusal(self, flags: int, unlike: Sequence[str] = ()) -> str:
        parts = [f"{name} ({self.space[name]})" for name in _named(flags)]
        parts += [f"{name} ({getattr(self.space.base, name)})" for name in unlike]
        return f"the cost table does not cover its {', '.join(parts)}; widen the space, or ask for exact costs"

    def _columns(self, columns: Mapping[str, ArrayLike]) -> tuple[_Columns, _Columns]:
        """Columns of the first dimensions, [students], and of the last ones, [students, layers or 1]; no copies."""
        for name in columns:
            if name not in DIMS:
                raise OptionError(f"{name!r} is no dimension of a student; columns are {', '.join(DIMS)}")
        first = self.space.base.layer(0)
        given = {name: np.asarray(values, dtype=np.float64) for name, values in columns.items()}
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
        return shared, lines

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

    def _line(self, found: Estimate) -> NDArray[np.float64]:
        line = np.full(self._cells.shape[1], np.nan)
        line[:4] = found.ttft_ms, found.energy_mj, found.dram_read_bytes + found.dram_write_bytes, found.macs
        if found.tpot_ms is not None:
            line[4:6] = found.tpot_ms, found.token_energy_mj
        return line


def _block(shared: _Columns, lines: _Columns, at: int = 0, count: int | None = None) -> tuple[_Array, _Array]:
    """([students, 4], [students, layers or 1, 4]) of some of the students, all by default."""
    some = slice(at, None if count is None else at + count)
    return np.stack([column[some] for column in shared], axis=-1), np.stack([each[some] for each in lines], axis=-1)


def _whole(number: float) -> int:
    if number != int(number):
        raise OptionError(f"{number:g} is no width of a student: exact costs need whole numbers")
    return int(number)


def _named(flags: int) -> tuple[str, ...]:
    return tuple(name for at, name in enumerate(DIMS) if flags >> at & 1)


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


def _question(model: CostModel, space: CostSpace) -> dict[str, Any]:
    """What the numbers of a table depend on, but for the code."""
    from firsttoken.api import run_parts

    parts = run_parts(subject_of(space.base), model.target, model.prompt, model.decode, model.options)
    axes = [[name, list(axis.values), list(axis.measured)] for name, axis in space.axes]
    return {"base": parts, "axes": axes}


def _code(space: CostSpace) -> str:
    return code_hash((*PACKAGES, *subject_of(space.base).packages))


def _table(data: bytes, where: str, model: CostModel) -> CostTable:
    about, arrays = file.unpacked(data, where)
    try:
        space = CostSpace.from_dict(about["space"])
        accuracy = tuple(Accuracy(**entry) for entry in about["accuracy"])
        operators, cells = tuple(about["operators"]), arrays["cells"]
        fits = cells.ndim == 3 and cells.shape[:2] == (len(operators), int(lookup.grid_of(space).bases[-1]))
    except (KeyError, TypeError, ValueError, OptionError):
        raise CostTableError(f"{where} is no cost table of this version: build the table again") from None
    if not fits:
        raise CostTableError(f"{where} has cells of another space: build the table again")
    if about["question"] != json.loads(json.dumps(_question(model, space))):
        raise CostTableError(
            f"{where} is for another target, prompt, decode step or options: build the table for these, or load it "
            "with the model that it was built by"
        )
    if about["code"] != _code(space):
        raise CostTableError(f"{where} was measured by another version of the code: build the table again")
    return CostTable(model, space, operators, cells, accuracy)
