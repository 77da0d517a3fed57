"""Who computes the points of a sweep: processes of this machine, or a Ray cluster. Results come as they are finished.

A worker that is lost takes nothing with it but what it was computing, which another one computes again.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from typing import Any, Final

from firsttoken.sweeping.points import Point, cost_of
from firsttoken.sweeping.store import Kept
from firsttoken_compiler.errors import FirsttokenError, OptionError

ENGINES: Final = ("joblib", "ray")
LOSSES: Final = 3
"""How often in a row workers may be lost without a point finished in between."""
PER_CPU: Final = 2
"""Points that a cluster is given ahead per CPU."""

Finished = Iterator[tuple[int, Kept]]
"""(position, result) of points, in any order."""


def computed(at: int, point: Point) -> tuple[int, Kept]:
    """A point's numbers, or the message of what is at fault with its input; what runs in a worker."""
    started = time.perf_counter()
    try:
        return at, Kept("done", cost_of(point), time.perf_counter() - started)
    except FirsttokenError as error:
        return at, Kept("refused", {"error": str(error)}, time.perf_counter() - started)


def here(points: Sequence[tuple[int, Point]], jobs: int) -> Finished:
    """By `jobs` processes of this machine, through joblib; in this one where there is one job, or one point."""
    if jobs == 1 or len(points) < 2:
        yield from (computed(at, point) for at, point in points)
        return
    from joblib import Parallel, delayed
    from joblib.externals.loky.process_executor import TerminatedWorkerError

    left, losses = dict(points), 0
    while left:
        work = Parallel(n_jobs=min(jobs, len(left)), return_as="generator_unordered", backend="loky", batch_size=1)
        try:
            for at, kept in work(delayed(computed)(at, point) for at, point in list(left.items())):
                del left[at]
                losses = 0
                yield at, kept
        except TerminatedWorkerError:
            losses += 1
            if losses >= LOSSES:
                raise OptionError(
                    f"workers ended {LOSSES} times without finishing a point, most likely for want of memory; give "
                    f"fewer than {jobs} --jobs, what was finished is kept"
                ) from None


def on_ray(points: Sequence[tuple[int, Point]], jobs: int, address: str | None = None) -> Finished:
    """By the workers of a Ray cluster at `address`, or one of `jobs` workers that is started here.

    The cluster's machines need the same package. Ray starts a task again when its worker or machine is lost.
    """
    ray = _ray()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing about a sweep leaves its machines
    own = not ray.is_initialized()
    if own:
        try:
            ray.init(address=address, num_cpus=None if address else jobs, log_to_driver=False, include_dashboard=False)
        except ConnectionError as error:
            raise OptionError(f"no Ray cluster answers at {address}: {error}") from error
    try:
        yield from _tasks(ray, points)
    finally:
        if own:
            ray.shutdown()


def _tasks(ray: Any, points: Sequence[tuple[int, Point]]) -> Finished:
    task = ray.remote(num_cpus=1, max_retries=-1)(computed)
    waiting, running = list(reversed(points)), list[Any]()
    while waiting or running:
        ahead = PER_CPU * max(1, int(ray.cluster_resources().get("CPU", 1)))
        while waiting and len(running) < ahead:
            running.append(task.remote(*waiting.pop()))
        finished, running = ray.wait(running, num_returns=1)
        for reference in finished:
            yield ray.get(reference)


def _ray() -> Any:
    try:
        import ray
    except ImportError:
        raise OptionError("--engine ray needs the package ray: pip install 'firsttoken[ray]'") from None
    return ray
