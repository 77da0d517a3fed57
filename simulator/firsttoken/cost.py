"""What a student costs on a target, for a search or a training loop to ask; answers are kept on disk.

`exact` compiles and simulates; `table` measures a space of students once and then answers in microseconds. Answers
depend on nothing but student, target and options, and the same question gives the same answer in every process.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from typing import TYPE_CHECKING, Any, Final

from firsttoken.api import DEFAULTS, measure, run_parts
from firsttoken.cache import ResultCache, content_key
from firsttoken.options import Progress, RunOptions
from firsttoken.subject import File, StudentLike, Subject, subject_of
from firsttoken_compiler.errors import OptionError
from firsttoken_compiler.target.target import Target

if TYPE_CHECKING:
    from firsttoken.cost_tables.space import CostSpace, Values
    from firsttoken.cost_tables.table import CostTable
    from firsttoken_simulator.report.document import RunDocument

_BLOB: Final = "estimate.json"


@dataclass(frozen=True, slots=True)
class LayerCost:
    """One decoder layer, or one operator outside the layers; times are its share of the time to first token."""

    name: str
    ms: float
    energy_mj: float
    dram_bytes: int
    macs: int


@dataclass(frozen=True, slots=True)
class Estimate:
    """Cost of one prompt. `tpot_ms` and `token_energy_mj` are of one decode step, None where none was asked for.

    `energy_band_mj` and `token_energy_band_mj` are (low, high): every energy of the target at its bound.
    The layers' `ms` and the host's time sum to `ttft_ms`; their `macs` sum to `macs`.
    """

    ttft_ms: float
    energy_mj: float
    tpot_ms: float | None
    token_energy_mj: float | None
    energy_band_mj: tuple[float, float]
    token_energy_band_mj: tuple[float, float] | None
    host_ms: float
    by_layer: tuple[LayerCost, ...]
    weight_bytes: int
    macs: int
    dram_read_bytes: int
    dram_write_bytes: int
    sram_peak_bytes: int
    mac_util_pct: float
    host_fallbacks: tuple[str, ...] = ()

    @staticmethod
    def of(document: RunDocument) -> Estimate:
        """The cost that a run document states."""
        from firsttoken_simulator.report.energy_table import low_high

        later = document.decode
        return Estimate(
            ttft_ms=document.ttft_ms,
            energy_mj=document.energy_mj,
            tpot_ms=document.tpot_ms,
            token_energy_mj=None if later is None else later.energy_mj,
            energy_band_mj=low_high(document),
            token_energy_band_mj=None if later is None else low_high(later),
            host_ms=document.host_ms,
            by_layer=tuple(
                LayerCost(layer.name, layer.ms, layer.energy_mj, layer.dram_bytes, layer.macs)
                for layer in document.layers
            ),
            weight_bytes=document.weight_bytes,
            macs=document.macs,
            dram_read_bytes=document.dram_read_bytes,
            dram_write_bytes=document.dram_write_bytes,
            sram_peak_bytes=document.sram_peak_bytes,
            mac_util_pct=document.mac_util_pct,
            host_fallbacks=tuple(document.host_fallbacks),
        )

    def to_json(self) -> str:
        """One document; equal estimates give equal text."""
        return json.dumps(asdict(self), sort_keys=True)

    @staticmethod
    def from_json(text: str | bytes) -> Estimate:
        """Inverse of `to_json`; raises ValueError, KeyError or TypeError on anything else."""
        fields: dict[str, Any] = json.loads(text)
        layers = tuple(LayerCost(**layer) for layer in fields.pop("by_layer"))
        fallbacks = tuple(fields.pop("host_fallbacks"))
        later = fields.pop("token_energy_band_mj")
        return Estimate(
            by_layer=layers,
            host_fallbacks=fallbacks,
            energy_band_mj=tuple(fields.pop("energy_band_mj")),
            token_energy_band_mj=None if later is None else tuple(later),
            **fields,
        )


@dataclass(frozen=True, slots=True)
class CostModel:
    """Answers for one target and one kind of run; picklable, and safe in spawned processes.

    Attributes:
        target: the NPU.
        prompt: tokens of the prompt; an ONNX file has its own length, which must then be this one.
        decode: which token of the answer to measure as well, 0 for none.
        options: number formats and seed; a student's own bits per layer hold where the options say nothing.
    """

    target: Target
    prompt: int | None = 64
    decode: int = 0
    options: RunOptions = DEFAULTS

    def exact(self, student: StudentLike, progress: Progress | None = None) -> Estimate:
        """The cost by compiling and simulating, or from the cache.

        Raises FirsttokenError where the student cannot run so; `progress` is called with (stage, done, total).
        """
        subject = subject_of(student)
        key = self._key(subject)
        return _known(key) or self._computed(subject, key, progress)

    def exact_many(
        self, students: Iterable[StudentLike], *, jobs: int | None = None, progress: Progress | None = None
    ) -> list[Estimate]:
        """The costs of many students, in their order; equal students are computed once.

        `jobs` processes work side by side (default: one per CPU), each needs the memory of a compilation. They are
        spawned, so a script must call this under `if __name__ == "__main__"`. The first error stops the rest.
        """
        if jobs is not None and jobs < 1:
            raise OptionError(f"jobs is {jobs}, must be at least 1; leave it away for one per CPU")
        subjects = [subject_of(student) for student in students]
        keys = [self._key(subject) for subject in subjects]
        known = {key: _known(key) for key in dict.fromkeys(keys)}
        missing: dict[str, Subject] = {}
        for key, subject in zip(keys, subjects, strict=True):
            if known[key] is None:
                missing.setdefault(key, subject)
        workers = min(jobs or os.cpu_count() or 1, len(missing))
        if workers > 1:
            found = self._spread(missing, workers, progress)
        else:
            found = {key: self._computed(subject, key, progress) for key, subject in missing.items()}
        return [found.get(key) or _present(known[key]) for key in keys]

    def table(
        self, space: CostSpace, *, prompts: Values | None = None, contexts: Values | None = None,
        jobs: int | None = None, progress: Progress | None = None,
    ) -> CostTable:  # fmt: skip
        """Costs of the space's students in microseconds; the table is built, or taken from the cache.

        Args:
            space: the students.
            prompts: tokens, as a dimension of the space is given; None for the model's own alone.
            contexts: rows in the cache before a later token; None for those before the model's decode step, behind each
                prompt, and for none without such a step.
            jobs: as in `exact_many`.
            progress: called with (stage, done, total).

        Raises:
            FirsttokenError: a student of the space cannot run so, or values are at fault.
        """
        from firsttoken.cost_tables.table import CostTable

        return CostTable.build(self, space, prompts=prompts, contexts=contexts, jobs=jobs, progress=progress)

    def _spread(self, missing: dict[str, Subject], workers: int, progress: Progress | None) -> dict[str, Estimate]:
        found: dict[str, Estimate] = {}
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            futures: dict[Future[str], str] = {
                pool.submit(_work, self, subject.portable()): key for key, subject in missing.items()
            }
            try:
                for future in as_completed(futures):
                    found[futures[future]] = Estimate.from_json(future.result())
                    if progress is not None:
                        progress("students", len(found), len(missing))
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return found

    def _key(self, subject: Subject) -> str:
        parts = run_parts(subject, self.target, self.prompt, self.decode, self.options)
        return content_key("estimate", parts, subject.packages)

    def _computed(self, subject: Subject, key: str, progress: Progress | None = None) -> Estimate:
        document, _, _ = measure(subject, self.target, self.prompt, self.decode, self.options, progress)
        estimate = Estimate.of(document)
        if not isinstance(subject, File) or subject.self_contained:
            ResultCache().put(key, {_BLOB: estimate.to_json().encode()})
        return estimate


def _work(model: CostModel, student: StudentLike) -> str:
    return model.exact(student).to_json()


def _known(key: str) -> Estimate | None:
    blobs = ResultCache().get(key, (_BLOB,))
    try:
        return None if blobs is None else Estimate.from_json(blobs[_BLOB])
    except (ValueError, KeyError, TypeError):
        return None


def _present(estimate: Estimate | None) -> Estimate:
    assert estimate is not None
    return estimate


__all__: Sequence[str] = ("CostModel", "Estimate", "LayerCost")
