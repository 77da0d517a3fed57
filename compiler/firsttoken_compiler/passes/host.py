"""Calls of the host in the canonical module: how their operands lie in memory, and views of their results."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from firsttoken_compiler.passes import views
from firsttoken_compiler.passes.patterns import Context, Env, Match, Rule
from firsttoken_compiler.passes.views import View
from firsttoken_compiler.tvm import dialect
from firsttoken_compiler.tvm.api import GenericConst, relax


@dataclass(frozen=True)
class HostSite:
    """One call: (shape, strides in elements of the base) of every operand, and shapes of the results."""

    operands: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]
    results: tuple[tuple[int, ...], ...]


class RawHost(Rule):
    """npu.raw_host: any operands whose elements can be reached by strides."""

    def match(self, context: Context, variable: Any, value: Any) -> Match | None:
        """Captures the call."""
        return Match({"call": value}, tuple(a for a in value.args if isinstance(a, relax.Var)), (variable,))

    def emit(self, context: Context, builder: Any, match: Match, env: Env) -> View:
        """Emits the call on the bases of its operands; the result stands for the tuple."""
        call = match.captured["call"]
        sources = [_operand(context, argument, env) for argument in call.args]
        results = dialect.decode_results(str(call.attrs["results"]))
        flat = [(base_shape(shape), dtype) for shape, dtype in results]
        segment = int(call.attrs["segment"])
        bases = [view.base for view in sources]
        made = context.emit(builder, "npu.host", bases, segment=segment, results=dialect.encode_results(flat))
        context.hosts[segment] = HostSite(
            tuple((view.shape, views.strides(view)) for view in sources), tuple(shape for shape, _ in results)
        )
        return View(made, "", 1, 1)


def base_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The matrix under a row-major tensor."""
    return (math.prod(shape[:-1]), shape[-1]) if len(shape) > 1 else (shape or (1,))


def _operand(context: Context, argument: Any, env: Env) -> View:
    if argument in env:
        return env[argument]
    array = np.asarray(argument.value.numpy()) if isinstance(argument, GenericConst) else context.known(argument)
    if array is None:
        raise views.UnsupportedView("an operand of the host that is neither computed nor constant")
    return views.dense(context.constant(array.reshape(base_shape(array.shape)), "host"), array.shape)


RAW_HOST = RawHost()
