"""Trials of many kernels on worker processes, through the store: what it knows is never measured again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from typing import TYPE_CHECKING, Any

from firsttoken.cache import PACKAGES, code_hash
from firsttoken.tuning.measure import KernelTime
from firsttoken.tuning.search import Kernel, Search
from firsttoken_compiler.errors import FirsttokenError

if TYPE_CHECKING:
    from firsttoken.tuning.store import TrialStore
    from firsttoken_compiler.schedule.choice import Choice

Score = Callable[[KernelTime], float]


def subject_key(kernel: Kernel) -> str:
    """Hash of what decides a trial beside the choice: the kernel, its room, the machine, and the code that measures."""
    document = {
        "spec": repr(kernel.spec), "spaces": [space.name for space in kernel.spaces], "room": asdict(kernel.room),
        "target": kernel.machine.content_hash, "code": code_hash(PACKAGES),
    }  # fmt: skip
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


def choice_text(choice: Choice) -> str:
    """A choice as it stands in the store."""
    from firsttoken_compiler.schedule.choice import facts_of

    return json.dumps({"of": type(choice).__name__, **facts_of(choice)}, sort_keys=True)


def trial(kernel: Kernel, choice: Choice) -> dict[str, Any]:
    """A trial's result: a kernel's time as JSON values, or `error` with what the choice breaks."""
    from firsttoken.tuning.measure import measure_kernel

    try:
        return measure_kernel(kernel.spec, kernel.spaces, kernel.machine, kernel.room, choice).facts()
    except FirsttokenError as error:
        return {"error": str(error)}


@contextmanager
def workers(jobs: int) -> Iterator[ProcessPoolExecutor | None]:
    """A pool of spawned processes; None for one job, which needs no process of its own."""
    if jobs == 1:
        yield None
        return
    pool = ProcessPoolExecutor(jobs, mp_context=get_context("spawn"))
    try:
        yield pool
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


@dataclass
class Trials:
    """Runs searches side by side, one round of each at a time."""

    store: TrialStore
    pool: ProcessPoolExecutor | None = None
    say: Callable[[int], None] = lambda done: None
    """Called with the trials done so far, those out of the store included."""
    measured: int = 0
    done: int = 0
    results: dict[tuple[str, Choice], dict[str, Any]] = field(default_factory=dict)
    """By kernel key and choice."""

    def run(self, searches: Sequence[tuple[Kernel, Search]], score: Score) -> None:
        """Finishes every search; raises what a worker raises that is no fault of a choice."""
        open_rounds = [_Open(kernel, search, self, score) for kernel, search in searches]
        waiting: dict[Future[dict[str, Any]], tuple[_Open, Choice]] = {}
        for one in open_rounds:
            one.advance(waiting)
        while waiting:
            ready, _ = wait(waiting, return_when=FIRST_COMPLETED)
            for future in ready:
                one, choice = waiting.pop(future)
                one.arrived(choice, future.result())
                if not one.left:
                    one.advance(waiting)

    def known(self, subject: str, choice: Choice) -> dict[str, Any] | None:
        """A result out of the store."""
        return self.store.get(subject, choice_text(choice))


@dataclass
class _Open:
    """One search under way: results are told in the order of the round, whatever order they arrive in."""

    kernel: Kernel
    search: Search
    trials: Trials
    score: Score
    left: int = 0

    def __post_init__(self) -> None:
        self.subject = subject_key(self.kernel)
        self.rounds = self.search.rounds()
        self.round: list[Choice] = []

    def advance(self, waiting: dict[Future[dict[str, Any]], tuple[_Open, Choice]]) -> None:
        """Tells a finished round and starts the next; goes on while the store knows everything."""
        while True:
            for choice in self.round:
                self.search.tell(choice, self._score(self.trials.results[self.kernel.key, choice]))
            self.round = next(self.rounds, [])
            if not self.round:
                return
            missing = [choice for choice in self.round if not self._kept(choice)]
            if self.trials.pool is not None and missing:
                for choice in missing:
                    future = self.trials.pool.submit(trial, self.kernel, choice)
                    waiting[future] = (self, choice)
                self.left = len(missing)
                return
            for choice in missing:
                self.arrived(choice, trial(self.kernel, choice))

    def arrived(self, choice: Choice, result: dict[str, Any]) -> None:
        """Keeps a result before anything else happens."""
        self.trials.store.put(self.subject, choice_text(choice), result)
        self.trials.measured += 1
        self.left -= 1
        self._take(choice, result)

    def _kept(self, choice: Choice) -> bool:
        result = self.trials.known(self.subject, choice)
        if result is not None:
            self._take(choice, result)
        return result is not None

    def _take(self, choice: Choice, result: dict[str, Any]) -> None:
        self.trials.results[self.kernel.key, choice] = result
        self.trials.done += 1
        self.trials.say(self.trials.done)

    def _score(self, result: dict[str, Any]) -> float | None:
        return None if "error" in result else self.score(KernelTime(**result))
