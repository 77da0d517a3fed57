"""A student of one layer whose products have choices worth searching."""

from __future__ import annotations

from pathlib import Path

import pytest
from students import SMALL

from firsttoken.options import RunOptions
from firsttoken.student import StudentConfig
from firsttoken.subject import subject_of
from firsttoken.tuning.store import TrialStore
from firsttoken.tuning.whole import Graph
from firsttoken_compiler.target.target import Target

TARGET = Target.load("systolic-128")


@pytest.fixture
def student() -> StudentConfig:
    return SMALL


def opened(folder: Path, tokens: int, past: int, phase: str) -> Graph:
    """The compiled graph of the student."""
    graph = Graph(subject_of(SMALL), TARGET, RunOptions(), tokens, past, phase, TrialStore(folder / "trials.sqlite3"))
    graph.open()
    return graph


@pytest.fixture(scope="session")
def prompt(tmp_path_factory: pytest.TempPathFactory) -> Graph:
    """48 tokens."""
    return opened(tmp_path_factory.mktemp("prompt"), 48, 0, "prompt")


@pytest.fixture(scope="session")
def token(tmp_path_factory: pytest.TempPathFactory) -> Graph:
    """One token behind 47."""
    return opened(tmp_path_factory.mktemp("token"), 1, 47, "decode")
