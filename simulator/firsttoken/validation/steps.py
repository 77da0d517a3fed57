"""Times of the distinct steps behind many rows: kept ones are read, the others measured, the longest first."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import TYPE_CHECKING, Any

from firsttoken_compiler.errors import FirsttokenError, OptionError

if TYPE_CHECKING:
    from firsttoken.options import Progress
    from firsttoken_compiler.target.target import Target

Key = tuple[str, Any]
"""(hash of the target, step)."""


def times(
    wanted: Iterable[tuple[Target, Any]], jobs: int, progress: Progress | None = None,
    measure: Callable[[Any, Target], Any] | None = None,
) -> dict[Key, Any]:  # fmt: skip
    """The time of every step on its target, or the message of the error that it ended in.

    What was measured before is read from the cache. Interrupted, everything that was finished is in the cache.

    Args:
        wanted: targets and steps, repeated ones are measured once.
        jobs: processes; 1 for this one alone.
        progress: called with (stage, done, total).
        measure: in place of the clock that compiles and simulates; for one process only.
    """
    distinct = {(target.content_hash, step): target for target, step in wanted}
    known: dict[Key, Any] = {}
    order = sorted(distinct, key=lambda key: -cost(key[1]))
    if measure is None:
        from firsttoken.latency import ExactClock

        kept = ExactClock().kept
        known = {key: found for key in order if (found := kept(key[1], distinct[key])) is not None}
    open_keys = [key for key in order if key not in known]
    total = float(len(order))

    def done(key: Key, value: Any) -> None:
        known[key] = value
        if progress is not None:
            progress("compile and simulate", float(len(known)), total)

    if jobs <= 1 or len(open_keys) < 2 or measure is not None:
        for key in open_keys:
            done(key, timed(key[1], distinct[key], measure))
        return known
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(min(jobs, len(open_keys)), context, _worker)
    try:
        futures = {pool.submit(timed, key[1], distinct[key]): key for key in open_keys}
        for future in as_completed(futures):
            done(futures[future], future.result())
    except BrokenProcessPool:
        raise OptionError(
            f"a process that compiles ended by itself, most likely for want of memory; give fewer than {jobs} --jobs, "
            "what was finished is kept"
        ) from None
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    pool.shutdown()
    return known


def timed(step: Any, target: Target, measure: Callable[[Any, Target], Any] | None = None) -> Any:
    """The time of a step, kept for the next run, or the message of what is at fault with it."""
    try:
        if measure is not None:
            return measure(step, target)
        from firsttoken.latency import ExactClock

        return ExactClock().seconds(step, target)
    except FirsttokenError as error:
        return str(error)
    except Exception as error:  # one row of many: a defect that it meets must not take the others with it
        return f"a defect of the compiler or simulator, please report it: {type(error).__name__}: {error!s:.300}"


def cost(step: Any) -> float:
    """How long a step may take to compile and simulate, in no unit: by layers and rows."""
    student = getattr(step, "student", None)
    layers = getattr(student, "layers", 1) or 1
    width = getattr(student, "hidden", 1) or 1
    return float(layers) * width * (256 + getattr(step, "tokens", 1) + 0.1 * getattr(step, "past", 0))


def _worker() -> None:
    """An interrupt ends a worker without a word; the process that started it says what there is to say."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
