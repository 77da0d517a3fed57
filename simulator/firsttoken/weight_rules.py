"""Formats for some of the matrices: the argument of `--mix`, a line of rules or a TOML file of them.

    --mix "attn_v@0-3+28-29=int8,output=q6_k"

    [[rule]]
    role = "attn_v"       # a role or a pattern of roles
    layers = "0-3,28-29"  # all layers, and what is outside them, where it is left out
    weights = "int8"

The first rule that covers a matrix decides; what none covers follows the other options.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

from firsttoken_compiler.errors import OptionError
from firsttoken_compiler.options import WeightRule

MAX_FILE_BYTES: Final = 1 << 20
MAX_RULES: Final = 4096
_INLINE: Final = re.compile(r"(?P<role>[^@=]+)(?:@(?P<layers>[^@=]+))?=(?P<weights>[^@=]+)")
_RANGE: Final = re.compile(r"(\d{1,6})(?:-(\d{1,6}))?")


def rules_of(argument: str) -> tuple[WeightRule, ...]:
    """The rules of a line such as `attn_*@0-3=int8,output=q6_k`, or of the TOML file of that name.

    Raises OptionError naming the rule or the file, the value, and what is possible.
    """
    return inline_rules(argument) if "=" in argument else read_rules(Path(argument))


def inline_rules(line: str) -> tuple[WeightRule, ...]:
    """The rules of a line; raises OptionError."""
    rules = []
    for number, text in enumerate(line.split(","), 1):
        found = _INLINE.fullmatch(text.strip())
        if found is None:
            raise OptionError(
                f"--mix, rule {number}: {text.strip()!r:.80} is no rule; write ROLE=WEIGHTS or ROLE@LAYERS=WEIGHTS, "
                "e.g. attn_v@0-3+28-29=int8"
            )
        layers = (found["layers"] or "").replace("+", ",")
        rules.append(_rule(f"--mix, rule {number}", found["role"].strip(), layers, found["weights"].strip()))
    return _limited(rules, "--mix")


def read_rules(path: Path) -> tuple[WeightRule, ...]:
    """The rules of a TOML file; raises OptionError."""
    if not path.is_file():
        raise OptionError(f"--mix {path}: no such file, and no rule such as attn_*=int8")
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise OptionError(f"--mix {path}: {path.stat().st_size} bytes, the limit is {MAX_FILE_BYTES}")
        return parse_rules(path.read_bytes(), str(path))
    except OSError as error:
        raise OptionError(f"--mix {path}: cannot be read: {error.strerror or error}") from error


def parse_rules(data: bytes, origin: str) -> tuple[WeightRule, ...]:
    """The rules in the bytes of a TOML file; `origin` names it in messages. Raises OptionError."""
    from pydantic import ValidationError

    try:
        document = tomllib.loads(data.decode("utf-8"))
    except (UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
        raise OptionError(f"--mix {origin} is not valid TOML: {error}") from error
    try:
        entries = _schema().model_validate(document).rule
    except ValidationError as error:
        raise OptionError(f"--mix {origin}: {'; '.join(_explain(e) for e in error.errors()[:4])}") from error
    rules = [
        _rule(f"--mix {origin}, rule {number}", entry.role, str(entry.layers), entry.weights)
        for number, entry in enumerate(entries, 1)
    ]
    return _limited(rules, f"--mix {origin}")


def to_toml(rules: Iterable[WeightRule]) -> str:
    """The text of a file that `read_rules` makes the same rules of."""
    parts = []
    for rule in rules:
        lines = ["[[rule]]", f'role = "{rule.role}"']
        if rule.layers:
            lines.append(f'layers = "{",".join(f"{first}-{last}" for first, last in rule.layers)}"')
        parts.append("\n".join([*lines, f'weights = "{rule.weights}"', ""]))
    return "\n".join(parts)


def _schema() -> Any:
    """The pydantic model of a file."""
    from pydantic import BaseModel, ConfigDict, create_model

    class Strict(BaseModel):
        model_config = ConfigDict(extra="forbid", strict=True)

    entry = create_model("Rule", __base__=Strict, role=(str, ...), layers=(str | int, ""), weights=(str, ...))
    return create_model("Mix", __base__=Strict, rule=(list[entry], ...))  # type: ignore[valid-type]


def _explain(error: Any) -> str:
    """One pydantic error: the rule's number, the key, what is wrong."""
    path = [f"rule {part + 1}" if isinstance(part, int) else str(part) for part in error["loc"] if part != "rule"]
    where = ", ".join(dict.fromkeys(path)) or "[[rule]]"
    if error["type"] == "missing":
        return f"{where} is missing; a file is [[rule]] tables with role, weights and maybe layers"
    if error["type"] == "extra_forbidden":
        return f"{where}: unknown key; keys are role, layers, weights"
    return f"{where} is {error['input']!r:.60}: {error['msg'].lower()}"


def _rule(where: str, role: str, layers: str, weights: str) -> WeightRule:
    ranges = []
    for part in filter(None, layers.split(",")):
        found = _RANGE.fullmatch(part.strip())
        if found is None:
            raise OptionError(f"{where}: layers {layers!r:.80} are no numbers and ranges such as 0-3,7")
        ranges.append((int(found[1]), int(found[2] or found[1])))
    try:
        return WeightRule(role, weights, tuple(ranges))
    except OptionError as error:
        raise OptionError(f"{where}: {error}") from error


def _limited(rules: list[WeightRule], where: str) -> tuple[WeightRule, ...]:
    if not 0 < len(rules) <= MAX_RULES:
        raise OptionError(f"{where}: {len(rules)} rules; give 1 to {MAX_RULES}")
    return tuple(rules)
