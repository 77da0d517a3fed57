"""Trials kept in one SQLite file, by hashes of everything that decides them; a killed run goes on where it was.

Each result is written as soon as it is there. The database is in WAL mode: what a killed process had committed is
there, whatever it was doing. A store that cannot be opened or written is an error: who tunes for hours must know.
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from firsttoken.cache import TIMEOUT_S, cache_folder
from firsttoken_compiler.errors import OptionError

if TYPE_CHECKING:
    from collections.abc import Iterator

DATABASE: Final = "tuning.sqlite3"
_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS trial (
    subject TEXT NOT NULL, choice TEXT NOT NULL, result TEXT NOT NULL, made REAL NOT NULL, runs INTEGER NOT NULL,
    PRIMARY KEY (subject, choice)
);
"""


@dataclass(frozen=True, slots=True)
class TrialStore:
    """Results by (subject, choice): both are content hashes or canonical JSON, a result is a JSON object.

    `path` None is a file in the cache folder.
    """

    path: Path | None = None

    @property
    def file(self) -> Path:
        """The database file."""
        return self.path or cache_folder() / DATABASE

    def get(self, subject: str, choice: str) -> dict[str, Any] | None:
        """A result, or None."""
        with self._connection() as connection:
            row = connection.execute(
                "SELECT result FROM trial WHERE subject = ? AND choice = ?", (subject, choice)
            ).fetchone()
        return None if row is None else dict(json.loads(row[0]))

    def put(self, subject: str, choice: str, result: dict[str, Any]) -> None:
        """Keeps a result; of one that is there already only the count of runs changes."""
        with self._connection() as connection:
            connection.execute(
                "INSERT INTO trial VALUES (?, ?, ?, ?, 1) ON CONFLICT (subject, choice) DO UPDATE SET runs = runs + 1",
                (subject, choice, json.dumps(result, sort_keys=True), time.time()),
            )

    def counts(self) -> tuple[int, int]:
        """(results, runs that it took to get them): equal when nothing was measured twice."""
        with self._connection() as connection:
            found, runs = connection.execute("SELECT count(*), coalesce(sum(runs), 0) FROM trial").fetchone()
        return int(found), int(runs)

    @contextlib.contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        """A connection in autocommit mode; raises OptionError naming the file where it is no usable database."""
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.closing(sqlite3.connect(self.file, timeout=TIMEOUT_S, isolation_level=None)) as connection:
                connection.execute("PRAGMA journal_mode = WAL")
                connection.execute("PRAGMA synchronous = NORMAL")
                connection.executescript(_SCHEMA)
                yield connection
        except (sqlite3.Error, OSError) as error:
            raise OptionError(
                f"--store {self.file}: {error}; give a file that can be written, or remove it to start anew"
            ) from None
