"""firsttoken.tuning.store: trials on disk."""

from __future__ import annotations

from pathlib import Path

import pytest

from firsttoken.tuning.store import TrialStore
from firsttoken_compiler.errors import OptionError


def test_results_by_subject_and_choice(tmp_path: Path) -> None:
    store = TrialStore(tmp_path / "folder" / "trials.sqlite3")
    assert store.get("a", "x") is None
    store.put("a", "x", {"cycles": 5.5, "error": None})
    store.put("a", "y", {"cycles": 1})
    assert TrialStore(store.path).get("a", "x") == {"cycles": 5.5, "error": None}
    assert store.get("b", "x") is None
    assert store.counts() == (2, 2)


def test_a_second_run_is_counted_and_changes_nothing(tmp_path: Path) -> None:
    store = TrialStore(tmp_path / "trials.sqlite3")
    store.put("a", "x", {"cycles": 5})
    store.put("a", "x", {"cycles": 6})
    assert store.get("a", "x") == {"cycles": 5}
    assert store.counts() == (1, 2)


def test_it_lies_in_the_cache_folder(cache: Path) -> None:
    TrialStore().put("a", "x", {})
    assert (cache / "tuning.sqlite3").is_file()


def test_a_file_that_is_no_database_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("these are my notes, not a database\n" * 100)
    with pytest.raises(OptionError, match=r"--store .*notes\.txt: file is not a database; give a file"):
        TrialStore(path).get("a", "x")
    assert path.read_text().startswith("these are my notes")
    with pytest.raises(OptionError, match="--store"):
        TrialStore(path / "below").get("a", "x")
