"""A progress bar for the command line."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any


class Bar:
    """One line on stderr that shows the present stage where that is a terminal; silent elsewhere."""

    def __init__(self) -> None:
        self._progress: Any = None
        self._task: Any = None
        self._stage = ""

    def __enter__(self) -> Bar:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

            columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
            self._progress = Progress(*columns, console=Console(stderr=True), transient=True)
            self._task = self._progress.add_task("")
            self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._progress is not None:
            self._progress.stop()

    def update(self, stage: str, done: float = 0.0, total: float = 1.0) -> None:
        """Shows `stage` at `done` of `total`; text in brackets is not markup."""
        if self._progress is None:
            return
        if stage != self._stage:
            from rich.markup import escape

            self._stage = stage
            self._progress.reset(self._task, description=escape(stage))
        self._progress.update(self._task, completed=done, total=total)

    def prefixed(self, prefix: str) -> Callable[[str, float, float], None]:
        """`update` for stages that are shown with a prefix."""
        return lambda stage, done, total: self.update(prefix + stage, done, total)
