"""firsttoken.cache: folder, keys, blobs, several processes, and everything that may be wrong with the file."""

from __future__ import annotations

import multiprocessing
import random
import sqlite3
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import workers

from firsttoken.cache import DATABASE, ResultCache, cache_folder, code_hash, content_key


def test_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FIRSTTOKEN_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.delenv("FIRSTTOKEN_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    monkeypatch.setattr("sys.platform", "linux")
    assert cache_folder() == Path("/somewhere/firsttoken")
    monkeypatch.setattr("sys.platform", "darwin")
    assert cache_folder() == Path.home() / "Library" / "Caches" / "firsttoken"


def test_key_follows_kind_parts_and_code(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    source = tmp_path / "some_provider" / "graph.py"
    source.parent.mkdir()
    (source.parent / "__init__.py").touch()
    source.write_text("x = 1\n")

    def key(kind: str = "run", **parts: int) -> str:
        code_hash.cache_clear()
        return content_key(kind, parts, ["some_provider"])

    base = key(a=1, b=2)
    assert key(b=2, a=1) == base
    changed = {key("estimate", a=1, b=2), key(a=1, b=3), content_key("run", {"a": 1, "b": 2})}
    source.write_text("x = 2\n")
    changed.add(key(a=1, b=2))
    source.rename(source.with_name("other.py"))
    changed.add(key(a=1, b=2))
    code_hash.cache_clear()
    assert len(changed - {base}) == 5


def test_a_provider_may_be_a_single_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    keys = set()
    for text in ("x = 1", "x = 2", "x = 3\n"):
        (tmp_path / "single_provider.py").write_text(text)
        code_hash.cache_clear()
        keys.add(content_key("run", {}, ["single_provider"]))
    keys.add(content_key("run", {}, ["no_such_package"]))
    content_key("run", {}, ["__main__"])
    code_hash.cache_clear()
    assert len(keys) == 4


def test_blobs_come_back_all_or_none(tmp_path: Path) -> None:
    cache = ResultCache(tmp_path / "deep" / "folder")
    assert cache.get("k", ["a"]) is None
    assert not cache.path.exists()
    cache.put("k", {"a": b"one", "b": bytes(10_000)})
    assert cache.get("k", ["b", "a"]) == {"b": bytes(10_000), "a": b"one"}
    assert cache.get("k", ["a", "c"]) is None
    assert cache.get("other", ["a"]) is None
    cache.put("k", {"c": b"three", "a": b"two"})
    assert cache.get("k", ["a", "c", "b"]) == {"a": b"two", "c": b"three", "b": bytes(10_000)}


def test_the_longest_unused_go_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1_000_000
    monkeypatch.setattr("time.time", lambda: now)
    cache = ResultCache(tmp_path, limit_bytes=2500)
    data = {name: random.Random(name).randbytes(1000) for name in "abc"}
    for name in "ab":
        cache.put(name, {"x": data[name]})
        now += 10_000
    assert cache.get("a", ["x"]) is not None  # now used after b
    now += 10_000
    cache.put("c", {"x": data["c"]})
    with sqlite3.connect(cache.path) as connection:
        kept = {row[0] for row in connection.execute("SELECT DISTINCT key FROM blob")}
        total = connection.execute("SELECT sum(length(data)) FROM blob").fetchone()[0]
    connection.close()
    assert kept == {"a", "c"}
    assert total <= 2500


def test_a_file_that_is_no_database_is_replaced(tmp_path: Path) -> None:
    cache = ResultCache(tmp_path)
    cache.path.write_bytes(b"not a database" * 1000)
    assert cache.get("k", ["a"]) is None
    cache.put("k", {"a": b"1"})
    assert cache.get("k", ["a"]) == {"a": b"1"}


def test_a_damaged_database_never_gives_wrong_bytes(tmp_path: Path) -> None:
    cache = ResultCache(tmp_path)
    blob = bytes(i % 7 for i in range(50_000))
    cache.put("k", {"a": blob})
    with sqlite3.connect(cache.path) as connection:
        connection.execute("UPDATE blob SET data = x'789c0102'")
    connection.close()
    assert cache.get("k", ["a"]) is None
    whole = cache.path.read_bytes()
    for cut in (10, 100, len(whole) // 2):
        cache.path.write_bytes(whole[:cut] + b"\xff" * 64)
        assert cache.get("k", ["a"]) is None
        cache.put("k", {"a": blob})
        cache.get("k", ["a"])


def test_no_place_to_write_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    cache = ResultCache(tmp_path / "file")
    cache.put("k", {"a": b"1"})
    assert cache.get("k", ["a"]) is None
    (tmp_path / DATABASE).mkdir()
    ResultCache(tmp_path).put("k", {"a": b"1"})
    assert ResultCache(tmp_path).get("k", ["a"]) is None


def test_several_processes_share_it(tmp_path: Path) -> None:
    with ProcessPoolExecutor(3, mp_context=multiprocessing.get_context("spawn")) as pool:
        wrong = list(pool.map(workers.hammer, [tmp_path] * 3, range(3)))
    assert wrong == [0, 0, 0]
    assert ResultCache(tmp_path).get("3", ["shared", "own0", "own1", "own2"]) is not None
