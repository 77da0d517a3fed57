"""TVM's traces of kernels: the steps from a kernel's definition to its schedule, to keep and to replay.

A kernel has one scheduled function, or two: rows that are normalised, then their product. What follows (windows and
blocks made in place of fetches, blocks of rows, slots, instructions) is code generation and in no trace. Nor is an
attention with online softmax, whose loops carry a state that no step of TVM makes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from firsttoken_compiler.errors import OptionError
from firsttoken_compiler.isa.types import Space
from firsttoken_compiler.schedule import attention, block_linear, intrinsics, linear, normed, rowwise
from firsttoken_compiler.schedule.choice import AttentionChoice, Choice, ProductChoice, RowsChoice
from firsttoken_compiler.schedule.choosing import attention_tile, tile_of
from firsttoken_compiler.schedule.kernel import Scheduled
from firsttoken_compiler.schedule.spec import KernelSpec
from firsttoken_compiler.schedule.windows import product_of
from firsttoken_compiler.target.target import Target
from firsttoken_compiler.tvm.api import Schedule, Trace, module_of, parse_module


@dataclass(frozen=True)
class Traced:
    """A scheduled function of a kernel: what it is of it, the module before and after, the steps between as JSON."""

    name: str
    source: Any
    module: Any
    steps: list[Any]
    text: str
    """The steps as a Python function on a TVM schedule."""
    spaces: tuple[Space, ...]
    """Where operands and results lie; for a block of rows they are in the scratchpad."""


def traces(spec: KernelSpec, spaces: tuple[Space, ...], target: Target, choice: Choice) -> list[Traced]:
    """The scheduled functions of a kernel with a choice that fits it."""
    return [
        Traced(name, module_of(made.source), made.module, plain(made.trace.as_json()), str(made.trace), where)
        for name, made, where in _scheduled(spec, spaces, target, choice)
    ]


def replay(source: str, steps: list[Any]) -> Any:
    """The scheduled module of a definition in TVMScript and a trace's JSON; raises OptionError for steps of none."""
    try:
        schedule = Schedule(parse_module(source))
        for instruction in steps[0]:
            if instruction[0] == "Tensorize":
                intrinsics.of_name(next(text for text in instruction[2] if isinstance(text, str)))
        Trace.apply_json_to_schedule(steps, schedule)
    except (ValueError, TypeError, LookupError, StopIteration, RuntimeError) as error:
        raise OptionError(f"no trace of this function: {str(error).strip().splitlines()[-1]}") from error
    return schedule.mod


def plain(value: Any) -> Any:
    """TVM's containers and numbers as JSON values."""
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    if type(value).__name__ in ("IntImm", "FloatImm"):
        return value.value
    if hasattr(value, "items"):
        return {str(key): plain(part) for key, part in value.items()}
    return [plain(part) for part in value]


def _scheduled(
    spec: KernelSpec, spaces: tuple[Space, ...], target: Target, choice: Choice
) -> list[tuple[str, Scheduled, tuple[Space, ...]]]:
    if isinstance(choice, RowsChoice):
        return [("rows", rowwise.schedule(spec, spaces, choice.rows, target), (Space.SPAD,) * len(spaces))]
    if isinstance(choice, AttentionChoice):
        tile = attention_tile(choice, spec, target)
        if tile.online:
            return []
        return [("attention", attention.schedule(spec, spaces, tile, target), spaces)]
    return _products(spec, spaces, target, choice)


def _products(
    spec: KernelSpec, spaces: tuple[Space, ...], target: Target, choice: ProductChoice
) -> list[tuple[str, Scheduled, tuple[Space, ...]]]:
    tile = tile_of(choice, target)
    if spec.kind == "conv":
        where = (Space.DRAM, *spaces[1:])
        return [("product", linear.schedule(product_of(spec), where, tile, target), where)]
    if spec.kind == "normed":
        first, then = normed.spaces_of(spec, spaces)
        rows = rowwise.schedule(normed.normalise_of(spec), first, choice.block, target)
        product = linear.schedule(normed.product_of(spec), then, tile, target)
        return [("rows", rows, (Space.SPAD,) * len(first)), ("product", product, then)]
    plan = block_linear.plan(spec, spaces, choice.method, target) if spec.get("blocks") else None
    if plan is not None:
        return [("product", linear.schedule(plan.product, plan.spaces, tile, target), plan.spaces)]
    return [("product", linear.schedule(spec, spaces, tile, target), spaces)]
