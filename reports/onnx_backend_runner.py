"""Runs cases in worker processes that may crash or hang: a worker is forked warm, and replaced when it is lost."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import resource
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any, Final

from onnx_backend_cases import Case, Outcome, run_case

TIMEOUT_SECONDS: Final = 120
MEMORY_BYTES: Final = 8 << 30
BEGINNING_SECONDS: Final = 30


def run_all(cases: list[Case], timeout: float = TIMEOUT_SECONDS) -> Iterator[tuple[Case, Outcome]]:
    """Every case with its outcome, in order. A worker that dies or takes longer than `timeout` is a crash of its case."""
    for module in ("firsttoken.onnx_backend", "firsttoken_compiler.pipeline", "firsttoken_compiler.tvm.api"):
        importlib.import_module(module)  # here, so that no worker has to

    worker = None
    for index, case in enumerate(cases):
        if worker is None:
            worker = _Worker(cases)
        begun = time.monotonic()
        outcome = worker.ask(index, timeout)
        if outcome is None:
            worker.end()
            worker, outcome = None, Outcome("crashed", f"the process died, or took {timeout:.0f} s")
        yield case, Outcome(outcome.status, outcome.detail, time.monotonic() - begun)
    if worker is not None:
        worker.end()


class _Worker:
    """A forked process that answers case numbers with outcomes."""

    def __init__(self, cases: list[Case]) -> None:
        context = multiprocessing.get_context("fork")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, cases, run_case), daemon=True)
        self._process.start()
        theirs.close()

    def ask(self, index: int, timeout: float) -> Outcome | None:
        """None when no answer came."""
        try:
            self._pipe.send(index)
            return self._pipe.recv() if self._pipe.poll(timeout) else None
        except (EOFError, OSError):
            return None

    def end(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.join(BEGINNING_SECONDS)
        self._pipe.close()


def _serve(pipe: Any, cases: list[Case], run: Callable[[Case], Outcome]) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    warnings.simplefilter("ignore")
    while True:
        try:
            index = pipe.recv()
        except EOFError:
            return
        pipe.send(run(cases[index]))
