"""Sweeps survive what ends processes: nothing is lost, nothing computed twice, the table is the same."""

import csv
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from firsttoken import RunOptions, run
from firsttoken.sweeping.axes import axes_of
from firsttoken.sweeping.points import Base
from firsttoken.sweeping.store import Store
from firsttoken.sweeping.sweep import sweep

SETTINGS = ("student.layers=1", "prompt=8,16,24", "weights=int4,int8")


def command(out: Path, *more: str) -> list[str]:
    sets = [word for setting in SETTINGS for word in ("--set", setting)]
    call = "from firsttoken.cli import main; main()"
    return [sys.executable, "-c", call, "sweep", "smollm2-135m", "--target", "systolic-128", *sets, "-o", str(out),
            "--json", *more]  # fmt: skip


def environment(cache: Path) -> dict[str, str]:
    """A cache of results of its own, so that only the sweep's own file can know anything."""
    return {**os.environ, "FIRSTTOKEN_CACHE": str(cache)}


def kept(store: Path) -> int:
    """Points that are finished, seen from outside; 0 while the file is being made or held."""
    if not store.is_file():
        return 0
    try:
        connection = sqlite3.connect(f"file:{store}?mode=ro&immutable=1", uri=True)
        return int(connection.execute("SELECT count(*) FROM point").fetchone()[0])
    except sqlite3.Error:
        return 0
    finally:
        connection.close()


def test_a_killed_sweep_goes_on(tmp_path: Path) -> None:
    out, whole = tmp_path / "sweep.csv", tmp_path / "whole.csv"
    with subprocess.Popen(command(out), env=environment(tmp_path / "a"), stdout=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 300
        while kept(out.with_suffix(".sqlite3")) < 2:
            assert process.poll() is None, "it ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    with Store(out.with_suffix(".sqlite3")) as store:  # takes back what was half written
        before = store.count()
    assert 2 <= before < 6
    assert not out.exists()
    done = subprocess.run(command(out), env=environment(tmp_path / "b"), capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["computed"] == 6 - before
    subprocess.run(command(whole, "--jobs", "2"), env=environment(tmp_path / "c"), capture_output=True, check=True)
    assert out.read_bytes() == whole.read_bytes()
    assert kept(out.with_suffix(".sqlite3")) == 6


def test_rows_are_what_run_says(tmp_path: Path) -> None:
    axes = axes_of(["target.scratchpad_bytes=1M,2M", "weights=int4,int8"])
    base = Base("smollm2-135m", "systolic-128", 8)
    found = sweep(base, axes_of(["target=systolic-128", "weights=int4"]), tmp_path / "a.sqlite3")
    document = run("smollm2-135m", "systolic-128", prompt=8, options=RunOptions(weights="int4"))
    assert found.rows[0].result["ttft_ms"] == document.ttft_ms
    assert found.rows[0].result["energy_mj"] == document.energy_mj
    varied = sweep(base, axes, tmp_path / "b.sqlite3")
    bytes_of = [row.settings["target.scratchpad_bytes"] for row in varied.rows]
    assert bytes_of == [1 << 20, 1 << 20, 2 << 20, 2 << 20]
    areas = {row.settings["target.scratchpad_bytes"]: row.result["area_proxy_mm2"] for row in varied.rows}
    assert areas[1 << 20] < areas[2 << 20]
    assert varied.front
    assert not any(row.error for row in varied.rows)


def test_a_point_that_cannot_run_is_a_row(tmp_path: Path) -> None:
    axes = axes_of(["target.scratchpad.bytes=8192,1M"])
    found = sweep(Base("smollm2-135m", "systolic-128", 8), axes, tmp_path / "a.sqlite3")
    first, second = found.rows
    assert "scratchpad.bytes" in first.error
    assert not first.result
    assert second.pareto
    table = list(csv.DictReader(found.csv().splitlines()))
    assert [bool(row["error"]) for row in table] == [True, False]


def workers_here() -> list[int]:
    """Processes that joblib has started for this one."""
    found = []
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            parent = next(line for line in status.read_text().splitlines() if line.startswith("PPid:"))
            if int(parent.split()[1]) == os.getpid() and b"popen_loky" in (status.parent / "cmdline").read_bytes():
                found.append(int(status.parent.name))
        except OSError:  # it ended meanwhile
            continue
    return sorted(found)


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="finds processes by Linux's /proc")
def test_a_worker_that_dies_loses_no_point(tmp_path: Path) -> None:
    """A process of joblib that is killed takes its point with it; another one computes it."""
    killed = []

    def progress(stage: str, done: float, total: float) -> None:
        if done == 1 and not killed:
            killed.append(workers_here()[0])
            os.kill(killed[0], signal.SIGKILL)

    axes = axes_of(["student.layers=1", "prompt=8,9,10,11"])
    found = sweep(Base("smollm2-135m", "systolic-128"), axes, tmp_path / "a.sqlite3", jobs=2, progress=progress)
    assert killed
    assert found.computed == 4
    assert not any(row.error for row in found.rows)


@pytest.mark.skipif(sys.platform == "win32", reason="clusters of Ray on one machine need a POSIX system")
def test_a_cluster_that_loses_a_worker_loses_no_point(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    script = Path(__file__).with_name("ray_sweep.py")
    done = subprocess.run(
        [sys.executable, script, tmp_path / "a.sqlite3"], env=environment(tmp_path / "a"), capture_output=True,
        text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    said = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))
    assert said["killed_after"] == [1.0]
    assert (said["computed"], said["again"], said["kept"]) == (6, 0, 6)
    axes = axes_of(["student.layers=1,2", "prompt=8,16,24"])
    here = sweep(Base("smollm2-135m", "systolic-128"), axes, tmp_path / "b.sqlite3")
    assert said["ttft_ms"] == [row.result["ttft_ms"] for row in here.rows]
