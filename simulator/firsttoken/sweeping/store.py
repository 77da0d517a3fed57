"""Results of sweeps in one SQLite file: every finished point once, whatever ends the process."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Literal

from firsttoken_compiler.errors import OptionError

SUFFIX: Final = ".sqlite3"
APPLICATION: Final = 0x66747377
"""Written into the file's header, so that no other database is taken for a store."""
_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS point (
    key TEXT PRIMARY KEY,
    settings TEXT NOT NULL,
    state TEXT NOT NULL CHECK (state IN ('done', 'refused')),
    result TEXT NOT NULL,
    seconds REAL NOT NULL
) WITHOUT ROWID;
"""
State = Literal["done", "refused"]


@dataclass(frozen=True, slots=True)
class Kept:
    """A finished point: its numbers, or the message that refused it."""

    state: State
    result: Mapping[str, Any]
    seconds: float


class Store:
    """The file, held by one sweep at a time; a context manager.

    Each `put` is one transaction, so that a process that is killed loses what it was computing and nothing else.
    Raises OptionError where the file is no store, or another sweep holds it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> Store:
        if not self.path.parent.is_dir():
            raise OptionError(f"there is no folder {self.path.parent}; make it, or write the sweep elsewhere")
        self._connection = sqlite3.connect(self.path, timeout=1.0, isolation_level=None)
        try:
            self._connection.execute("PRAGMA locking_mode = EXCLUSIVE")
            (found,) = self._connection.execute("PRAGMA application_id").fetchone()
            tables = self._connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
            if tables and found != APPLICATION:
                raise OptionError(f"{self.path} is another database, no sweep; move it, or write the sweep elsewhere")
            self._connection.execute("BEGIN EXCLUSIVE")
            self._connection.execute(f"PRAGMA application_id = {APPLICATION}")
            self._connection.execute(_SCHEMA)
            self._connection.execute("COMMIT")
        except BaseException as error:
            self._connection.close()
            if isinstance(error, sqlite3.OperationalError) and "locked" in str(error):
                raise OptionError(
                    f"another sweep writes {self.path}; wait for it, or write this one elsewhere"
                ) from None
            if isinstance(error, sqlite3.Error):
                raise OptionError(f"{self.path} is no sweep that can be gone on with ({error}); move it away") from None
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._connection.close()

    def known(self, keys: Iterable[str]) -> dict[str, Kept]:
        """The finished ones of these points."""
        found = {}
        for key in keys:
            row = self._connection.execute("SELECT state, result, seconds FROM point WHERE key = ?", (key,)).fetchone()
            if row is not None:
                found[key] = Kept(row[0], json.loads(row[1]), row[2])
        return found

    def put(self, key: str, settings: Mapping[str, Any], kept: Kept) -> None:
        """Keeps a point that is not there yet; one that is stays as it is."""
        self._connection.execute(
            "INSERT OR IGNORE INTO point VALUES (?, ?, ?, ?, ?)",
            (key, json.dumps(dict(settings)), kept.state, json.dumps(dict(kept.result)), kept.seconds),
        )

    def count(self) -> int:
        """Points of all sweeps in the file."""
        return int(self._connection.execute("SELECT count(*) FROM point").fetchone()[0])
