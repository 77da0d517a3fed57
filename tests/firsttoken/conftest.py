"""Small students, an empty cache folder, and a stand-in for the compiler."""

from __future__ import annotations

from pathlib import Path

import pytest
from stand_in import Compiler
from students import llama, qwen2, qwen3, tiny, uneven  # noqa: F401

from firsttoken import api


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache folder, empty."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("FIRSTTOKEN_CACHE", str(folder))
    return folder


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Compiler:
    """The stand-in, in place of the compiler."""
    stand_in = Compiler()
    monkeypatch.setattr(api, "compile_subject", stand_in)
    return stand_in
