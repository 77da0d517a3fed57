"""Reads a target file: TOML in, a validated `Target` out, and every mistake named by its dotted path.

Every value in a file is a table `{ value = ..., grade = "...", source = "..." }`. Plain are only `npu.name`,
`npu.description` and `npu.not_modelled`, `dram.preset`, the name of a DRAM whose values stand where the file states
none, and the tables of `calibration.py`. The schema is built from the dataclasses of `target.py`, so a field is
declared once; a field with a default there may be left out. A value of [energy] may have `low` and `high` beside it.
"""

from __future__ import annotations

import difflib
import functools
import re
import tomllib
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, fields, replace
from importlib import resources
from pathlib import Path
from types import GenericAlias
from typing import TYPE_CHECKING, Any, Final, get_type_hints

from firsttoken_compiler.errors import TargetError
from firsttoken_compiler.isa.vector_kernel import COST_CLASSES
from firsttoken_compiler.target import calibration
from firsttoken_compiler.target.dram_presets import dram_sections
from firsttoken_compiler.target.limits import CHOICES, LIMITS, POWERS_OF_TWO, contradictions
from firsttoken_compiler.target.target import (
    GRADES,
    Attention,
    Dma,
    Dram,
    DramCommands,
    Energy,
    Host,
    Matrix,
    Provenance,
    Runtime,
    Scratchpad,
    Target,
    Vector,
)

if TYPE_CHECKING:
    from pydantic import BaseModel

MAX_FILE_BYTES: Final = 1 << 20
MAX_ERRORS_SHOWN: Final = 8
HOST_ROLES: Final = ("token_embd", "output")
"""Weights that a runtime may leave to the CPU."""
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_PAIR: Final = re.compile(r"(?:fp32|fp16|int16|int8)x(?:fp32|fp16|int16|int8|int4)")


@dataclass(frozen=True, slots=True)
class _Npu:
    """The graded part of the section [npu]."""

    clock_hz: float
    cores: int


_SECTIONS: Final[dict[str, type]] = {
    "npu": _Npu, "matrix": Matrix, "vector": Vector, "attention": Attention, "scratchpad": Scratchpad, "dma": Dma,
    "dram": Dram, "dram_commands": DramCommands, "host": Host, "energy": Energy,
}  # fmt: skip
RUNTIMES: Final = "runtimes"
"""Section with a table for every runtime."""
MAX_RUNTIMES: Final = 32
MAX_BUCKETS: Final = 64
MAX_CONTEXT: Final = 1 << 24
_OPTIONAL: Final = ("attention", "dram_commands")
"""Sections that a file may leave out."""
_LISTS: Final[dict[Any, Any]] = {tuple[int, ...]: list[int], tuple[str, ...]: list[str]}
"""What a TOML file has for tuples."""
_PLAIN: Final = ("name", "description", "not_modelled")
_BAND: Final = ("low", "high")
"""Keys beside the value of an energy."""


def preset_names() -> tuple[str, ...]:
    """Names of the targets that come with the package, sorted."""
    return tuple(sorted(entry.name[:-5] for entry in _presets().iterdir() if entry.name.endswith(".toml")))


def load_target(name_or_path: str | Path) -> Target:
    """The preset of that name, or the target in a `.toml` file.

    Raises TargetError: an unknown name (with the nearest ones), an unreadable or malformed file, an unknown or missing
    key, a value outside its limits. The message names the dotted path, the value and the limit.
    """
    text = str(name_or_path)
    if isinstance(name_or_path, Path) or text.endswith(".toml") or "/" in text or "\\" in text:
        return parse_target(_read(Path(text)), text)
    if text not in preset_names():
        known = preset_names()
        nearest = difflib.get_close_matches(text.casefold(), known, n=3, cutoff=0.4)
        hint = f"nearest: {', '.join(nearest)}; " if nearest else ""
        raise TargetError(f"unknown target {text!r}; {hint}known targets: {', '.join(known)}; or give a .toml file")
    return parse_target(_presets().joinpath(f"{text}.toml").read_bytes(), text)


def parse_target(data: bytes, origin: str) -> Target:
    """The target in the bytes of a TOML file; `origin` names it in messages. Raises TargetError."""
    if len(data) > MAX_FILE_BYTES:
        raise TargetError(f"target {origin}: {len(data)} bytes, the limit is {MAX_FILE_BYTES}")
    try:
        document = tomllib.loads(data.decode("utf-8"))
    except (UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
        raise TargetError(f"target {origin} is not valid TOML: {error}") from error
    document, tunables, fit = calibration.split(_named_dram(document, origin))
    target = _build(_validate(document, origin), document, origin)
    values = {path: target.value(path) for path in target.provenance}
    return replace(
        target, calibration=calibration.tunables(tunables, values, origin), fit=calibration.fit_of(fit, origin)
    )


def _named_dram(document: dict[str, Any], origin: str) -> dict[str, Any]:
    """The document with the values of the device that `dram.preset` names, under those that it states itself."""
    own = document.get("dram")
    if not isinstance(own, dict) or "preset" not in own:
        return document
    if not isinstance(own["preset"], str):
        given = f"{own['preset']!r:.80}"
        _refuse(origin, [f"dram.preset is {given}, must be the name of a DRAM such as lpddr5-6400-16gb-x16"])
    try:
        named = dram_sections(own["preset"])
    except TargetError as error:
        _refuse(origin, [f"dram.preset: {error}"])
    changed = {**named["dram"], **{key: value for key, value in own.items() if key != "preset"}}
    commands = document.get("dram_commands", {})
    merged = {**named["dram_commands"], **commands} if isinstance(commands, dict) else commands
    return {**document, "dram": changed, "dram_commands": merged}


def _presets() -> Any:
    return resources.files("firsttoken_compiler.target") / "presets"


def _read(path: Path) -> bytes:
    if not path.is_file():
        raise TargetError(f"no such target file: {path}; known targets: {', '.join(preset_names())}")
    try:
        size = path.stat().st_size
        if size > MAX_FILE_BYTES:
            raise TargetError(f"target {path}: {size} bytes, the limit is {MAX_FILE_BYTES}")
        return path.read_bytes()
    except OSError as error:
        raise TargetError(f"cannot read target file {path}: {error}") from error


@functools.cache
def _schema() -> type[BaseModel]:
    """The pydantic model of a target file."""
    from pydantic import ConfigDict, Field, create_model

    config = ConfigDict(extra="forbid", strict=True)

    def entry(path: str, kind: type) -> Any:
        bounds: dict[str, Any] = {}
        if kind in (int, float):
            low, high = LIMITS[path]
            bounds = {"ge": low, "le": high}
        if kind is float:
            bounds["allow_inf_nan"] = False
        optional: Any = kind | None
        sides = _BAND if path.startswith("energy.") else ()
        band: dict[str, Any] = {side: (optional, Field(None, **bounds)) for side in sides}
        return create_model(
            f"entry:{path}",
            __config__=config,
            value=(kind, Field(**bounds)),
            grade=(str, Field(pattern=f"^(?:{'|'.join(GRADES)})$")),
            source=(str, Field(min_length=1, max_length=1000)),
            **band,
        )

    def section(name: str, cls: type) -> Any:
        members: dict[str, Any] = {}
        defaults = _defaults(cls)
        for field, kind in get_type_hints(cls).items():
            path = f"{name}.{field}"
            kind = _LISTS.get(kind, kind)
            if kind in (dict[str, int], dict[str, float]):
                table = GenericAlias(dict, (str, entry(path, kind.__args__[1])))
                members[field] = (table, None if field in defaults else ...)
            elif field in defaults:
                members[field] = (entry(path, kind), None)
            else:
                members[field] = (entry(path, kind), ...)
        if name == "npu":
            members["name"] = (str, Field(min_length=1, max_length=64))
            members["description"] = (str, Field(min_length=1, max_length=1000))
            members["not_modelled"] = (list[str], Field(max_length=64))
        return create_model(f"section:{name}", __config__=config, **members)

    sections: dict[str, Any] = {
        name: (section(name, cls), None if name in _OPTIONAL else ...) for name, cls in _SECTIONS.items()
    }
    sections[RUNTIMES] = (GenericAlias(dict, (str, section(RUNTIMES, Runtime))), None)
    # pydantic's overloads do not know a model whose fields come as a dictionary
    return create_model("target", __config__=config, **sections)


def _validate(document: dict[str, Any], origin: str) -> dict[str, Any]:
    """The document as plain values by section; raises TargetError listing what is wrong."""
    from pydantic import ValidationError

    try:
        model = _schema().model_validate(document)
    except ValidationError as error:
        _refuse(origin, [_explain(dict(item)) for item in error.errors(include_url=False)])
    checked: dict[str, Any] = {name: body for name, body in model.model_dump().items() if body is not None}
    problems = list(_name_problems(checked))
    if not problems:
        runtimes = checked.pop(RUNTIMES, {})
        plain = {
            name: _defaults(_SECTIONS[name]) | {f: _plain(value) for f, value in body.items() if value is not None}
            for name, body in checked.items()
        }
        problems = [*contradictions(plain), *_runtime_problems(runtimes)]
        plain[RUNTIMES] = {name: _plain(_given(body)) for name, body in runtimes.items()}
    if problems:
        _refuse(origin, problems)
    return plain


def _defaults(cls: type) -> dict[str, Any]:
    """Values of the fields that a file may leave out."""
    made = {field.name: field.default_factory() for field in fields(cls) if field.default_factory is not MISSING}
    return made | {field.name: field.default for field in fields(cls) if field.default is not MISSING}


def _refuse(origin: str, problems: list[str]) -> Any:
    shown = problems[:MAX_ERRORS_SHOWN]
    more = f"\n  and {len(problems) - len(shown)} more" if len(problems) > len(shown) else ""
    raise TargetError(f"target {origin}: " + "\n  ".join(shown) + more)


def _given(body: dict[str, Any]) -> dict[str, Any]:
    """Without the fields that the file leaves out."""
    return {field: entry for field, entry in body.items() if entry is not None}


def _plain(entry: Any) -> Any:
    if isinstance(entry, dict):
        return entry["value"] if "grade" in entry else {key: item["value"] for key, item in entry.items()}
    return entry


def _known_keys(path: tuple[str, ...]) -> tuple[str, ...]:
    """Keys allowed in the table at `path`."""
    if not path:
        return (*_SECTIONS, RUNTIMES, "calibration", "fit")
    if path[0] == RUNTIMES and len(path) == 2:
        return tuple(field.name for field in fields(Runtime))
    if len(path) == 1 and path[0] in _SECTIONS:
        return tuple(field.name for field in fields(_SECTIONS[path[0]])) + (_PLAIN if path[0] == "npu" else ())
    return ("value", *_BAND, "grade", "source") if path[0] == "energy" else ("value", "grade", "source")


def _explain(error: dict[str, Any]) -> str:
    """One pydantic error in the words of this project."""
    path = tuple(str(part) for part in error["loc"])
    dotted, kind, context = ".".join(path), error["type"], error.get("ctx", {})
    if kind == "extra_forbidden":
        known = _known_keys(path[:-1])
        nearest = difflib.get_close_matches(path[-1], known, n=1, cutoff=0.0)
        return f"unknown key {dotted}; nearest known key: {nearest[0] if nearest else ', '.join(known)}"
    if kind == "missing":
        return f"missing key {dotted}"
    if path[-1] == "value":
        dotted = ".".join(path[:-1])
    given = f"{error['input']!r:.80}"
    if kind == "greater_than_equal":
        return f"{dotted} is {given}, must be at least {context['ge']:g}"
    if kind == "less_than_equal":
        return f"{dotted} is {given}, must be at most {context['le']:g}"
    if kind in ("model_type", "model_attributes_type"):
        return f'{dotted} is {given}, must be a table {{ value = ..., grade = "...", source = "..." }}'
    if kind == "string_pattern_mismatch":
        return f"{dotted} is {given}, must be one of {', '.join(GRADES)}"
    return f"{dotted} is {given}: {error['msg'].lower()}"


def _name_problems(document: dict[str, Any]) -> Iterator[str]:
    """What types and ranges cannot say: words, table keys, powers of two, printable text."""
    npu = document["npu"]
    if not _NAME.fullmatch(npu["name"]):
        yield f"npu.name is {npu['name']!r}, must be letters, digits, '.', '_' or '-', at most 64"
    for text in (npu["description"], *npu["not_modelled"]):
        if not text.isprintable():
            yield f"npu has text with control characters: {text!r:.80}"
    for path, allowed in CHOICES.items():
        section, field = path.split(".")
        if section not in document:
            continue
        value = document[section][field]["value"]
        if value not in allowed:
            yield f"{path} is {value!r}, must be one of {', '.join(allowed)}"
    for path in POWERS_OF_TWO:
        section, field = path.split(".")
        given = document[section][field]
        if given is not None and given["value"] & (given["value"] - 1):
            yield f"{path} is {given['value']}, must be a power of two"
    for path in ("matrix.macs_per_cycle", "energy.mac_pj"):
        section, field = path.split(".")
        for key in document[section][field]:
            if not _PAIR.fullmatch(key):
                yield f"unknown key {path}.{key}; keys are pairs of element types such as int8xint4 or fp16xfp16"
    costs = document["vector"]["cycles"]
    for key in costs:
        if key not in COST_CLASSES:
            nearest = difflib.get_close_matches(key, COST_CLASSES, n=1, cutoff=0.0)
            yield f"unknown key vector.cycles.{key}; nearest known key: {nearest[0]}"
    yield from (f"missing key vector.cycles.{key}" for key in COST_CLASSES if key not in costs)
    for path, entry in _entries(document):
        if not entry["source"].isprintable():
            yield f"{path}.source has control characters"
        low, high = _bounds(entry)
        if low > entry["value"]:
            yield f"{path} has low {low:g} above its value {entry['value']:g}, must be at most that"
        if high < entry["value"]:
            yield f"{path} has high {high:g} below its value {entry['value']:g}, must be at least that"


def _runtime_problems(runtimes: dict[str, Any]) -> Iterator[str]:
    """What types and ranges cannot say of runtimes: names, contexts, roles."""
    if len(runtimes) > MAX_RUNTIMES:
        yield f"runtimes has {len(runtimes)} tables, the limit is {MAX_RUNTIMES}"
    for name, body in runtimes.items():
        if not _NAME.fullmatch(name):
            yield f"runtimes.{name!r:.80}: names are letters, digits, '.', '_' or '-', at most 64"
        buckets = (body["context_buckets"] or {"value": []})["value"]
        if buckets != sorted(set(buckets)) or len(buckets) > MAX_BUCKETS or not all(
            0 < bucket <= MAX_CONTEXT for bucket in buckets
        ):
            yield (
                f"runtimes.{name}.context_buckets is {buckets!r:.80}, must be at most {MAX_BUCKETS} different contexts "
                f"of 1 to {MAX_CONTEXT} rows, the smallest first"
            )
        for role in (body["host_roles"] or {"value": []})["value"]:
            if role not in HOST_ROLES:
                yield f"runtimes.{name}.host_roles has {role!r:.80}, must be of {', '.join(HOST_ROLES)}"


def _entries(document: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every graded value with its dotted path, in the order of the file."""
    for section, body in document.items():
        for field, entry in body.items():
            if not isinstance(entry, dict):
                continue
            if "grade" in entry:
                yield f"{section}.{field}", entry
            else:
                yield from ((f"{section}.{field}.{key}", item) for key, item in entry.items() if item is not None)


def _bounds(entry: dict[str, Any]) -> tuple[Any, Any]:
    """Lowest and highest value of an entry; the value itself where it states none."""
    low, high = entry.get("low"), entry.get("high")
    return entry["value"] if low is None else low, entry["value"] if high is None else high


def _build(plain: dict[str, Any], document: dict[str, Any], origin: str) -> Target:
    parts: dict[str, Any] = {}
    for name, cls in _SECTIONS.items():
        if name != "npu" and name in plain:
            hints = get_type_hints(cls)
            parts[name] = cls(**{field: _typed(value, hints[field]) for field, value in plain[name].items()})
    hints = get_type_hints(Runtime)
    parts[RUNTIMES] = {
        name: Runtime(**{field: _typed(value, hints[field]) for field, value in body.items()})
        for name, body in plain[RUNTIMES].items()
    }
    npu = plain["npu"]
    return Target(
        name=npu["name"],
        description=npu["description"],
        clock_hz=float(npu["clock_hz"]),
        cores=npu["cores"],
        not_modelled=tuple(npu["not_modelled"]),
        provenance={path: Provenance(item["grade"], item["source"]) for path, item in _entries(document)},
        bounds={
            path: (float(_bounds(item)[0]), float(_bounds(item)[1]))
            for path, item in _entries(document)
            if any(item.get(side) is not None for side in _BAND)
        },
        **parts,
    )


def _typed(value: Any, kind: Any) -> Any:
    """Integers where a float is meant become floats, so that equal targets hash alike; tables sort their keys."""
    if kind is float:
        return float(value)
    if kind in _LISTS:
        return tuple(value)
    if kind == dict[str, float]:
        return {key: float(value[key]) for key in sorted(value)}
    return dict(sorted(value.items())) if isinstance(value, dict) else value
