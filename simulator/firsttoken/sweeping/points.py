"""A combination of settings as a run: student, target, lengths and options, and what it costs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final

from firsttoken.options import RunOptions
from firsttoken.sweeping.axes import Value, said
from firsttoken_compiler.errors import FirsttokenError, OptionError
from firsttoken_compiler.target.target import Target

if TYPE_CHECKING:
    from firsttoken.subject import StudentLike

OBJECTIVES: Final = ("ttft_ms", "energy_mj", "area_proxy_mm2")
"""What the Pareto front is of."""
NUMBERS: Final = (
    "ttft_ms", "tpot_ms", "energy_mj", "energy_low_mj", "energy_high_mj", "token_energy_mj", "area_proxy_mm2",
    "host_ms", "weight_bytes", "dram_read_bytes", "dram_write_bytes", "sram_peak_bytes", "macs", "mac_util_pct",
    "host_fallbacks",
)  # fmt: skip
"""Columns of a finished point."""


@dataclass(frozen=True, slots=True)
class Point:
    """One run of a sweep; picklable."""

    student: StudentLike
    target: Target
    prompt: int
    decode: int
    options: RunOptions
    key: str


@dataclass(frozen=True, slots=True)
class Base:
    """What holds where no axis says otherwise."""

    student: str
    target: str
    prompt: int = 64
    decode: int = 0
    options: RunOptions = field(default_factory=RunOptions)


def point_of(base: Base, settings: Mapping[str, Value], loaded: dict[str, Target] | None = None) -> Point:
    """The run of a combination; raises FirsttokenError where settings cannot go together, naming them.

    `loaded` keeps targets by name, so that the combinations of a sweep read each file once.
    """
    try:
        return _point(base, settings, {} if loaded is None else loaded)
    except FirsttokenError as error:
        raise type(error)(f"with {said(settings)}: {error}") from error


def _point(base: Base, settings: Mapping[str, Value], loaded: dict[str, Target]) -> Point:
    from firsttoken.api import run_parts
    from firsttoken.cache import content_key
    from firsttoken.subject import subject_of

    student = _student(str(settings.get("student", base.student)), settings)
    target = _target(str(settings.get("target", base.target)), settings, loaded)
    lengths = {name: _length(name, settings.get(name, getattr(base, name))) for name in ("prompt", "decode")}
    known: dict[str, Any] = {path: value for path, value in settings.items() if path in RunOptions.__dataclass_fields__}
    options = replace(base.options, **known)
    subject = subject_of(student)
    parts = run_parts(subject, target, lengths["prompt"], lengths["decode"], options)
    key = content_key("sweep", parts, subject.packages)
    return Point(subject.portable(), target, lengths["prompt"], lengths["decode"], options, key)


def _length(name: str, value: Value) -> int:
    least = 1 if name == "prompt" else 0
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise OptionError(f"{name} is {value!r:.80}, must be a whole number of at least {least}")
    return value


def _student(name: str, settings: Mapping[str, Value]) -> StudentLike:
    from pathlib import Path

    from firsttoken.student import find_student
    from firsttoken.subject import SUFFIXES

    dimensions: dict[str, Any] = {
        path.partition(".")[2]: value for path, value in settings.items() if path.startswith("student.")
    }
    if not dimensions:
        return Path(name) if name.endswith(SUFFIXES) else name
    if name.endswith(SUFFIXES):
        raise OptionError(f"student.{next(iter(dimensions))} is of built-in students, and {name} is a file")
    _, config = find_student(name)
    if config.per_layer and {"layers", "heads", "kv_heads", "intermediate"} & set(dimensions):
        raise OptionError(f"student {name} has dimensions of its own in each layer; sweep a uniform one")
    words = "-".join(f"{field}{value}" for field, value in dimensions.items())
    try:
        return replace(config, name=f"{name}-{words}", **dimensions)
    except (ValueError, TypeError) as error:
        raise OptionError(str(error)) from error


def _target(name: str, settings: Mapping[str, Value], loaded: dict[str, Target]) -> Target:
    from firsttoken.api import target_of
    from firsttoken_compiler.target.changed import checked, path_of

    target = loaded[name] = loaded.get(name) or target_of(name)
    values = {
        path_of(target, path.partition(".")[2]): value for path, value in settings.items() if path.startswith("target.")
    }
    return checked(target, values, "set by a sweep") if values else target


def cost_of(point: Point) -> dict[str, Any]:
    """The numbers of a run by name, `NUMBERS`; from the cache where it was made before. Raises FirsttokenError."""
    from firsttoken.cost import CostModel
    from firsttoken.sweeping.area import area_proxy_mm2

    found = CostModel(point.target, point.prompt, point.decode, point.options).exact(point.student)
    return {
        **{name: getattr(found, name, None) for name in NUMBERS},
        "energy_low_mj": found.energy_band_mj[0],
        "energy_high_mj": found.energy_band_mj[1],
        "host_fallbacks": len(found.host_fallbacks),
        "area_proxy_mm2": area_proxy_mm2(point.target),
    }
