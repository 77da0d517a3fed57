"""Results kept on disk: a folder, a database of named blobs in it, and the hash that makes a stale result impossible.

A cache never decides whether a run succeeds: whatever goes wrong with it counts as "not there".
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import sqlite3
import sys
import time
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path
from typing import Any, Final

ENVIRONMENT: Final = "FIRSTTOKEN_CACHE"
DATABASE: Final = "results.sqlite3"
TIMEOUT_S: Final = 10.0
"""How long a process waits for another one that is writing."""
LIMIT_BYTES: Final = 2 << 30
"""Compressed bytes that are kept; beyond it the entries used longest ago go."""
TOUCH_S: Final = 3600
"""An entry's last use is recorded this coarsely, so that reading seldom writes."""
PACKAGES: Final = ("firsttoken_compiler", "firsttoken_simulator", "firsttoken")
_SOURCES: Final = (".py", ".toml", ".j2")
_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS entry (key TEXT PRIMARY KEY, used INTEGER NOT NULL, nbytes INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS blob (key TEXT NOT NULL, name TEXT NOT NULL, data BLOB NOT NULL, PRIMARY KEY (key, name));
"""


def cache_folder() -> Path:
    """The project's cache folder: FIRSTTOKEN_CACHE, or the platform's place for caches."""
    if chosen := os.environ.get(ENVIRONMENT):
        return Path(chosen)
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local")) / "firsttoken"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "firsttoken"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "firsttoken"


def content_key(kind: str, parts: Mapping[str, Any], packages: Iterable[str] = ()) -> str:
    """Key of a result: its kind, what it was computed from (JSON values), and the code that computes it.

    `packages` are further top-level packages whose source files count, such as a student provider's.
    """
    document = {"kind": kind, "parts": dict(parts), "code": code_hash((*PACKAGES, *packages))}
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


@functools.cache
def code_hash(packages: tuple[str, ...]) -> str:
    """Hash of the version, of the compiler framework's version, and of every source file of the packages."""
    digest = hashlib.sha256()
    for distribution in ("firsttoken", "apache-tvm"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            digest.update(f"{distribution} {metadata.version(distribution)}\n".encode())
    for package in sorted(set(packages)):
        for name, path in _sources(package):
            data = path.read_bytes()
            digest.update(f"{package}/{name} {len(data)}\n".encode() + data)
    return digest.hexdigest()


def _sources(package: str) -> list[tuple[str, Path]]:
    """Source files of a package, or the one of a module, by their names inside it."""
    try:
        spec = util.find_spec(package)
    except ValueError:  # __main__, which has no specification
        spec = None
    if spec is None:
        file = getattr(sys.modules.get(package), "__file__", None)
        return [("", Path(file))] if file else []
    if spec.submodule_search_locations is None:
        return [("", Path(spec.origin))] if spec.origin and Path(spec.origin).is_file() else []
    found = []
    for folder in map(Path, spec.submodule_search_locations):
        found += [(p.relative_to(folder).as_posix(), p) for p in folder.rglob("*") if p.suffix in _SOURCES]
    return sorted(found)


@dataclass(frozen=True, slots=True)
class ResultCache:
    """Named blobs by key in one SQLite file; safe under several processes, picklable, opened per call.

    `folder` None is `cache_folder()` at the time of the call.
    """

    folder: Path | None = None
    limit_bytes: int = LIMIT_BYTES

    @property
    def path(self) -> Path:
        """The database file."""
        return (self.folder or cache_folder()) / DATABASE

    def get(self, key: str, names: Iterable[str]) -> dict[str, bytes] | None:
        """The blobs of those names, or None unless every one is there and whole."""
        wanted = tuple(names)
        with self._quietly():
            return self._read(key, wanted) if self.path.is_file() else None
        return None

    def _read(self, key: str, wanted: tuple[str, ...]) -> dict[str, bytes] | None:
        with self._connection() as connection:
            found: dict[str, bytes] = {}
            for name in wanted:
                row = connection.execute("SELECT data FROM blob WHERE key = ? AND name = ?", (key, name)).fetchone()
                if row is None:
                    return None
                found[name] = zlib.decompress(row[0])
            self._touch(connection, key)
            return found

    def put(self, key: str, blobs: Mapping[str, bytes]) -> None:
        """Keeps the blobs beside those that the key already has; one of the same name is replaced."""
        packed = {name: zlib.compress(data, 1) for name, data in blobs.items()}
        with self._quietly():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self._connection() as connection:
                connection.execute("BEGIN IMMEDIATE")
                for name, data in packed.items():
                    connection.execute("INSERT OR REPLACE INTO blob VALUES (?, ?, ?)", (key, name, data))
                connection.execute(
                    "INSERT OR REPLACE INTO entry SELECT key, ?, sum(length(data)) FROM blob WHERE key = ?",
                    (int(time.time()), key),
                )
                self._evict(connection)
                connection.execute("COMMIT")

    def _evict(self, connection: sqlite3.Connection) -> None:
        rows = connection.execute("SELECT key, nbytes FROM entry ORDER BY used DESC, key").fetchall()
        total = 0
        for key, nbytes in rows:
            total += nbytes
            if total > self.limit_bytes:
                connection.execute("DELETE FROM blob WHERE key = ?", (key,))
                connection.execute("DELETE FROM entry WHERE key = ?", (key,))

    @staticmethod
    def _touch(connection: sqlite3.Connection, key: str) -> None:
        now = int(time.time())
        with contextlib.suppress(sqlite3.OperationalError):  # a cache that can only be read still serves
            connection.execute("UPDATE entry SET used = ? WHERE key = ? AND used < ?", (now, key, now - TOUCH_S))

    @contextlib.contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        """A connection in autocommit mode; closing it rolls back what was not committed."""
        with contextlib.closing(sqlite3.connect(self.path, timeout=TIMEOUT_S, isolation_level=None)) as connection:
            with contextlib.suppress(sqlite3.OperationalError):  # read-only, or a file system without shared memory
                connection.execute("PRAGMA journal_mode = WAL")
                connection.execute("PRAGMA synchronous = NORMAL")
                connection.executescript(_SCHEMA)
            yield connection

    @contextlib.contextmanager
    def _quietly(self) -> Iterator[None]:
        """Turns every failure into nothing; a file that is no database is removed, so that the next run starts anew."""
        try:
            yield
        except (OSError, OverflowError, RuntimeError, zlib.error):  # RuntimeError: there is no home directory
            pass
        except sqlite3.Error as error:
            if type(error) is not sqlite3.DatabaseError:  # busy, read-only, too large: the file itself is in order
                return
            for suffix in ("", "-wal", "-shm"):
                with contextlib.suppress(OSError):
                    self.path.with_name(self.path.name + suffix).unlink()
