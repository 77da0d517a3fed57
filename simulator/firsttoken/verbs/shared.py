"""Options that several verbs have, each written once: dataclasses whose fields are options of a command."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import MISSING, asdict, dataclass, fields
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, get_type_hints

import typer

if TYPE_CHECKING:
    from firsttoken.options import RunOptions
    from firsttoken_compiler.schedule.choice import Schedules

NEW_TOKENS: Final = 32
"""Tokens of an answer over which the time per token is the mean, unless others are asked for."""
Given = Annotated[Path | None, typer.Option("--schedule", metavar="FILE", help="As in 'run'.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]


@dataclass(frozen=True, kw_only=True)
class Formats:
    """Number formats; names and defaults are those of `run`."""

    weights: Annotated[str, typer.Option(help="As in 'run'.")] = "int4"
    acts: Annotated[Literal["int8", "int16", "fp16"] | None, typer.Option(help="As in 'run'.")] = None
    group: Annotated[Literal["32", "64", "128", "channel"], typer.Option(help="As in 'run'.")] = "128"
    asymmetric: Annotated[bool, typer.Option("--asymmetric", help="As in 'run'.")] = False
    mix: Annotated[str | None, typer.Option(metavar="RULES", help="As in 'run'.")] = None
    norm_cache: Annotated[
        Literal["int8", "int16", "fp16", "off", "statistics", "auto"] | None, typer.Option(help="As in 'run'.")
    ] = None
    norm_cache_place: Annotated[Literal["auto", "scratchpad", "dram"], typer.Option(help="As in 'run'.")] = "auto"
    residual_spill: Annotated[Literal["fp32", "fp16"], typer.Option(help="As in 'run'.")] = "fp32"
    kv_cache: Annotated[Literal["fp16", "int8"], typer.Option(help="As in 'run'.")] = "fp16"
    acts_range: Annotated[str, typer.Option(metavar="dynamic|FILE", help="As in 'run'.")] = "dynamic"

    def options(self, schedule: Schedules | None = None) -> RunOptions:
        """For the compiler; raises FirsttokenError where a file or a combination is at fault."""
        from firsttoken.act_ranges import ranges_of
        from firsttoken.options import RunOptions
        from firsttoken.weight_rules import rules_of

        chosen = asdict(self)
        mix, ranges = chosen.pop("mix"), chosen.pop("acts_range")
        rules = () if mix is None else rules_of(mix)
        return RunOptions(**chosen, rules=rules, ranges=ranges_of(ranges), schedule=schedule)


def taking(**kinds: type) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Makes a command of a function some of whose parameters are dataclasses: their fields become its options.

    `kinds`: dataclass by name of the parameter. The other parameters of the function are options as they are.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @wraps(command)
        def call(**given: Any) -> None:
            made = {name: kind(**{f.name: given.pop(f.name) for f in fields(kind)}) for name, kind in kinds.items()}
            command(**made, **given)

        types = get_type_hints(command, include_extras=True)
        found: list[inspect.Parameter] = []
        for name, own in inspect.signature(command).parameters.items():
            alone = own.replace(kind=own.KEYWORD_ONLY, annotation=types[name])
            found += _parameters(kinds[name]) if name in kinds else [alone]
        vars(call)["__signature__"] = inspect.Signature(found)
        call.__annotations__ = {parameter.name: parameter.annotation for parameter in found}
        return call

    return decorate


def _parameters(kind: type) -> list[inspect.Parameter]:
    types = get_type_hints(kind, include_extras=True)
    return [
        inspect.Parameter(
            f.name, inspect.Parameter.KEYWORD_ONLY, annotation=types[f.name],
            default=inspect.Parameter.empty if f.default is MISSING else f.default,
        )
        for f in fields(kind)
    ]  # fmt: skip
