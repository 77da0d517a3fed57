"""The parts of a sweep: axes, fronts, areas, the file of results."""

import sqlite3
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from firsttoken.sweeping.area import area_proxy_mm2
from firsttoken.sweeping.axes import axes_of, axis_of, combinations
from firsttoken.sweeping.pareto import front
from firsttoken.sweeping.points import Base, point_of
from firsttoken.sweeping.store import Kept, Store
from firsttoken.sweeping.sweep import sweep
from firsttoken_compiler.errors import FirsttokenError, OptionError
from firsttoken_compiler.target.target import Target


@pytest.mark.parametrize(
    ("text", "path", "values"),
    [
        ("target.scratchpad_bytes=1M,2M,1M", "target.scratchpad_bytes", (1 << 20, 2 << 20)),
        ("target.npu.clock_hz=1.5G", "target.npu.clock_hz", (1_500_000_000,)),
        ("target.energy.static_w=0.25", "target.energy.static_w", (0.25,)),
        ("target.dram.map=row-linear", "target.dram.map", ("row-linear",)),
        ("target=systolic-128,tpu-v3", "target", ("systolic-128", "tpu-v3")),
        ("prompt=64,512", "prompt", (64, 512)),
        ("weights=int4,q4_k", "weights", ("int4", "q4_k")),
        ("kv-cache=int8", "kv_cache", ("int8",)),
        ("group=32,channel", "group", ("32", "channel")),
        ("asymmetric=true,false", "asymmetric", (True, False)),
        ("student.layers=12", "student.layers", (12,)),
    ],
)
def test_axes(text: str, path: str, values: tuple[object, ...]) -> None:
    axis = axis_of(text)
    assert (axis.path, axis.values) == (path, values)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("prompt", "give a setting and its values"),
        ("prompt=", "give a setting and its values"),
        ("prompt=64,,1", "give a setting and its values"),
        ("prompt=many", "must be a number"),
        ("promt=64", "nearest: prompt"),
        ("student.name=x", "is no setting"),
        ("student.layer=2", "nearest: student.layers"),
        ("prompt=1e999", "must be a finite number"),
    ],
)
def test_axes_that_are_refused(text: str, said: str) -> None:
    with pytest.raises(OptionError, match=said):
        axis_of(text)


def test_axes_together() -> None:
    axes = axes_of(["prompt=1,2", "weights=int4,int8"])
    assert [tuple(found.values()) for found in combinations(axes)] == [
        (1, "int4"), (1, "int8"), (2, "int4"), (2, "int8")
    ]  # fmt: skip
    with pytest.raises(OptionError, match="given twice"):
        axes_of(["prompt=1", "prompt=2"])
    many = ",".join(str(n) for n in range(1, 1100))
    with pytest.raises(OptionError, match="combinations"):
        axes_of([f"prompt={many}", f"decode={many}"])


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"target.scratchpad.bytes": 1000}, "must be a multiple of scratchpad.alignment_bytes"),
        ({"target.scratchpad.bytez": 1}, "nearest: scratchpad.bytes"),
        ({"target.matrix.rows": 2.5}, "must be a whole number"),
        ({"target": "systolic-12"}, "nearest: systolic-128"),
        ({"student.heads": 7}, "with student.heads 7"),
        ({"weights": "int5"}, "int5"),
        ({"prompt": 0}, "at least 1"),
        ({"weights": "fp16", "acts": "int8"}, "no unit multiplies"),
    ],
)
def test_points_that_are_refused(settings: dict[str, object], said: str) -> None:
    with pytest.raises(FirsttokenError, match=said):
        point_of(Base("smollm2-135m", "systolic-128"), settings)


def test_points_have_one_key_each() -> None:
    base = Base("smollm2-135m", "systolic-128")
    points = [
        point_of(base, found)
        for found in ({}, {"prompt": 32}, {"weights": "int8"}, {"target.scratchpad_bytes": 1 << 20}, {"decode": 1},
                      {"student.layers": 3}, {"target": "tpu-v3"})
    ]  # fmt: skip
    assert len({point.key for point in points}) == len(points)
    same = point_of(base, {"prompt": 64, "target.scratchpad_bytes": base_bytes()})
    assert same.key == points[0].key
    assert points[3].target.provenance["scratchpad.bytes"].grade == "assumed"


def base_bytes() -> int:
    return Target.load("systolic-128").scratchpad.bytes


@settings(deadline=None)
@given(st.lists(st.tuples(*[st.integers(0, 4)] * 3), max_size=30))
def test_the_front_is_what_nothing_beats(costs: list[tuple[int, ...]]) -> None:
    on = front(costs)
    assert on.shape == (len(costs),)
    matrix = np.array(costs).reshape(-1, 3)
    for at, cost in enumerate(matrix):
        beaten = any((other <= cost).all() and (other < cost).any() for other in matrix)
        assert bool(on[at]) is not beaten


def test_the_area_proxy_grows_with_what_it_counts() -> None:
    target = Target.load("systolic-128")
    area = area_proxy_mm2(target)
    wider = replace(target, scratchpad=replace(target.scratchpad, bytes=2 * target.scratchpad.bytes))
    assert area_proxy_mm2(wider) - area == pytest.approx(8 * target.scratchpad.bytes * 0.346 / 0.7 / 1e6)
    twice = replace(target, cores=2)
    assert area_proxy_mm2(twice) == 2 * area
    lanes = replace(target, vector=replace(target.vector, lanes=target.vector.lanes + 1))
    assert area_proxy_mm2(lanes) - area == pytest.approx(target.vector.contexts * 11884 / 1e6)
    rates = target.matrix.macs_per_cycle
    only = replace(target, matrix=replace(target.matrix, macs_per_cycle={"int8xint8": rates["int8xint8"]}))
    none = area_proxy_mm2(replace(target, matrix=replace(target.matrix, macs_per_cycle={"int8xint4": 1})))
    assert area_proxy_mm2(only) - none == pytest.approx((419 * rates["int8xint8"] - 278) / 1e6)


def test_a_store_keeps_the_first_result(tmp_path: Path) -> None:
    path = tmp_path / "a.sqlite3"
    with Store(path) as store:
        store.put("k", {"prompt": 1}, Kept("done", {"ttft_ms": 1.5}, 0.1))
        store.put("k", {"prompt": 1}, Kept("done", {"ttft_ms": 9.0}, 0.1))
        with pytest.raises(OptionError, match="another sweep writes"), Store(path):
            pass
    with Store(path) as store:
        assert store.known(["k", "other"])["k"].result == {"ttft_ms": 1.5}
        assert store.count() == 1


def test_files_that_are_no_store(tmp_path: Path) -> None:
    other = tmp_path / "other.sqlite3"
    connection = sqlite3.connect(other)
    connection.execute("CREATE TABLE mine (x)")
    connection.commit()
    connection.close()
    text = tmp_path / "text.sqlite3"
    text.write_text("not a database, but something long enough to be read as one\n" * 50)
    for path in (other, text):
        before = path.read_bytes()
        with pytest.raises(OptionError, match="no sweep"), Store(path):
            pass
        assert path.read_bytes() == before
    with pytest.raises(OptionError, match="no folder"), Store(tmp_path / "absent" / "a.sqlite3"):
        pass


def test_what_a_sweep_refuses(tmp_path: Path) -> None:
    base = Base("smollm2-135m", "systolic-128")
    with pytest.raises(OptionError, match="--engine"):
        sweep(base, axes_of(["prompt=8"]), tmp_path / "a.sqlite3", engine="dask")
    with pytest.raises(OptionError, match="--jobs 0"):
        sweep(base, axes_of(["prompt=8"]), tmp_path / "a.sqlite3", jobs=0)
    with pytest.raises(OptionError, match="no combination can be run"):
        sweep(base, axes_of(["target.scratchpad.bytes=100,200"]), tmp_path / "a.sqlite3")
    assert not list(tmp_path.iterdir())
