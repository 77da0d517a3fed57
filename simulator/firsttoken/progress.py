"""A progress bar for the command line."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any


class Bar:
    """A bar per stage on stderr where that is a terminal; silent elsewhere."""

    def __init__(self) -> None:
        self._progress: Any = None
        self._tasks: dict[str, Any] = {}

    def __enter__(self) -> Bar:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import Progress

            self._progress = Progress(console=Console(stderr=True), transient=True)
            self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._progress is not None:
            self._progress.stop()

    def update(self, stage: str, done: float = 0.0, total: float = 1.0) -> None:
        """Shows `stage` at `done` of `total`."""
        if self._progress is None:
            return
        if stage not in self._tasks:
            self._tasks[stage] = self._progress.add_task(stage)
        self._progress.update(self._tasks[stage], completed=done, total=total)

    def of(self, stage: str) -> Callable[[float], None]:
        """A callback that takes the fraction done of one stage."""
        return lambda fraction: self.update(stage, fraction)
