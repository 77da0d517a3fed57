"""DRAM devices by name: `ddr4-3200aa-8gb-x8`, `lpddr5x-8533-16gb-x16`, `hbm2-2000-8gb-x64`.

A file in `dram/` describes one standard: what all its devices share, then tables by speed (and its bins), density and
width. A name picks one of each. A speed that says what is `assumed` of it gives its timings that grade. The result is
the sections `dram` and `dram_commands` of a target file, every value with grade and source; a target that names the
device (`[dram] preset = "..."`) may replace any of them.
"""

import difflib
import functools
import tomllib
from dataclasses import fields
from importlib import resources
from typing import Any, Final

from firsttoken_compiler.errors import TargetError
from firsttoken_compiler.target.target import Dram, DramCommands

Sections = dict[str, dict[str, Any]]
"""The sections `dram` and `dram_commands`, as a target file would state them."""

_CONTROLLER: Final[dict[str, Any]] = {
    "channels": 1, "interleave_bytes": 256, "map": "group-interleaved", "queue_depth": 32, "refresh": "all-bank",
    "controller_ns": 0.0, "ranks": 1, "stagger_refresh": False, "shared_data_bus": True, "command_buses": 1,
    "queue": "shared", "bank_queue_depth": 8, "row_hit_limit": 0, "page": "open", "write_low": 0.2, "write_high": 0.8,
}  # fmt: skip
"""What is not the device's: the usual controller, of one channel, that adds no delay of its own."""
_FALL_BACK: Final = {
    "trp_ab": "trp", "trcd_wr": "trcd", "tccd_l_wr": "tccd_l", "trrd_l": "trrd", "twtr_s": "twtr", "trfc_pb": "trfc",
}  # fmt: skip
"""Timings that a standard without the distinction has from the other one."""
_NONE: Final = ("tppd", "trank", "tpbr2act", "tpbr2pbr", "taad", "twck_post")
"""Timings that a standard may lack."""


@functools.cache
def _standards() -> dict[str, dict[str, Any]]:
    """The files of the standards by name."""
    folder = resources.files("firsttoken_compiler.target") / "dram"
    entries = sorted((entry for entry in folder.iterdir() if entry.name.endswith(".toml")), key=lambda e: e.name)
    return {entry.name[:-5]: tomllib.loads(entry.read_text(encoding="utf-8")) for entry in entries}


@functools.cache
def dram_names() -> tuple[str, ...]:
    """Names of all devices, sorted."""
    return tuple(
        sorted(
            f"{standard}-{speed}{bin_name}-{density}-{width}"
            for standard, tables in _standards().items()
            for speed, values in tables["speed"].items()
            for bin_name in values.get("bins", {"": {}})
            for density in tables["density"]
            for width in tables["width"]
        )
    )


def dram_sections(name: str) -> Sections:
    """The sections of the device of that name. Raises TargetError with the nearest names."""
    if name not in dram_names():
        nearest = difflib.get_close_matches(name.casefold(), dram_names(), n=3, cutoff=0.0)
        standards = ", ".join(_standards())
        raise TargetError(
            f"unknown DRAM {name!r}; nearest: {', '.join(nearest)}; names are standard-speed-density-width, "
            f"standards: {standards}"
        )
    standard, speed, density, width = name.split("-")
    tables = _standards()[standard]
    values, clocks = _gather(tables, speed, density, width)
    rate = tables["speed"][_rate(tables, speed)]
    source = f"{tables['source']}; {name}"
    stated, supposed = {"grade": "datasheet", "source": source}, {"grade": "assumed", "source": rate.get("assumed", "")}
    of_speed = {f"{key}_ns" for key in rate["clocks"]} if "assumed" in rate else set()
    flat = _flatten(values, clocks)
    flat["standard"] = f"{tables['standard']}-{values['data_rate_mtps']}"
    sections: Sections = {"dram": {}, "dram_commands": {}}
    for section, cls in (("dram", Dram), ("dram_commands", DramCommands)):
        for field in fields(cls):
            if field.name in flat:
                origin = supposed if field.name in of_speed else stated
                sections[section][field.name] = {"value": flat[field.name], **origin}
            elif field.name in _CONTROLLER:
                sections[section][field.name] = {
                    "value": _CONTROLLER[field.name], "grade": "assumed",
                    "source": "the usual controller; not the device's",
                }  # fmt: skip
    return sections


def dram_device(name: str, **changes: Any) -> tuple[Dram, DramCommands]:
    """The device of that name as values, some of them changed."""
    sections = dram_sections(name)

    def values(section: str, cls: type) -> dict[str, Any]:
        stated = {key: entry["value"] for key, entry in sections[section].items()}
        return stated | {field.name: changes[field.name] for field in fields(cls) if field.name in changes}

    return Dram(**values("dram", Dram)), DramCommands(**values("dram_commands", DramCommands))


def _rate(tables: dict[str, Any], speed: str) -> str:
    """The table of a speed, whose name may go on with a bin."""
    return next(key for key in sorted(tables["speed"], key=len, reverse=True) if speed.startswith(key))


def _gather(tables: dict[str, Any], speed: str, density: str, width: str) -> tuple[dict[str, Any], dict[str, int]]:
    """(values in units, timings in clocks) of one device; later tables replace earlier ones."""
    rate = _rate(tables, speed)
    of_speed = tables["speed"][rate]
    layers = (tables["values"], tables["density"][density], tables["width"][width])
    values: dict[str, Any] = {}
    clocks: dict[str, int] = dict(tables.get("clocks", {}))
    for layer in (*layers, of_speed):
        values |= {key: value for key, value in layer.items() if key != "assumed" and not isinstance(value, dict)}
        clocks |= layer.get("clocks", {})
    clocks |= of_speed.get(width, {}) | of_speed.get("bins", {}).get(speed[len(rate) :], {})
    return values, clocks


def _flatten(values: dict[str, Any], clocks: dict[str, int]) -> dict[str, Any]:
    """Every value under the name that it has in a target: timings in nanoseconds, derived ones filled in."""
    clock_ns = round(values["clock_ps"] / 1000, 6)
    flat = {key: value for key, value in values.items() if key not in ("clock_ps", "turn_clocks")}
    flat |= {f"{key}_ns": round(count * clock_ns, 6) for key, count in clocks.items()}
    flat["clock_ns"] = clock_ns
    for key, other in _FALL_BACK.items():
        flat.setdefault(f"{key}_ns", flat[f"{other}_ns"])
    for key in _NONE:
        flat.setdefault(f"{key}_ns", 0.0)
    flat.setdefault("trc_ns", round(flat["tras_ns"] + flat["trp_ns"], 6))
    flat.setdefault("activate_clocks", 1)
    flat.setdefault("column_clocks", 1)
    burst_ns = flat["burst_length"] * 1e3 / flat["data_rate_mtps"]
    turn = flat["tcl_ns"] + burst_ns + values["turn_clocks"] * clock_ns - flat["tcwl_ns"]
    flat.setdefault("trtw_ns", round(max(turn, clock_ns), 6))
    return flat
