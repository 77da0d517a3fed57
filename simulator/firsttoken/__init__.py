"""First-token latency and energy of a language model on an NPU: the names that a program needs, loaded when first used.

`import firsttoken` alone loads neither the compiler nor numpy.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from firsttoken import latency as latency
    from firsttoken.api import compile, execute, generate, quality, run, simulate
    from firsttoken.cost import CostModel, Estimate
    from firsttoken.cost_tables.space import CostSpace
    from firsttoken.cost_tables.table import CostTable
    from firsttoken.latency import EncoderWork, LlmWork, Prediction
    from firsttoken.options import RunOptions
    from firsttoken.student import find_student
    from firsttoken_compiler.target.target import Target

    __version__: str

_HOMES: Final = {
    "CostModel": "firsttoken.cost",
    "CostSpace": "firsttoken.cost_tables.space",
    "CostTable": "firsttoken.cost_tables.table",
    "EncoderWork": "firsttoken.latency",
    "Estimate": "firsttoken.cost",
    "LlmWork": "firsttoken.latency",
    "Prediction": "firsttoken.latency",
    "RunOptions": "firsttoken.options",
    "Target": "firsttoken_compiler.target.target",
    "compile": "firsttoken.api",
    "execute": "firsttoken.api",
    "find_student": "firsttoken.student",
    "generate": "firsttoken.api",
    "quality": "firsttoken.api",
    "run": "firsttoken.api",
    "simulate": "firsttoken.api",
}

__all__ = [
    "CostModel", "CostSpace", "CostTable", "EncoderWork", "Estimate", "LlmWork", "Prediction", "RunOptions", "Target",
    "__version__", "compile", "execute", "find_student", "generate", "latency", "quality", "run", "simulate",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """The name's object, from the module that defines it; kept, so that this runs once per name."""
    value: Any
    if name == "__version__":
        value = _version()
    elif name == "latency":  # the module: its function of that name times a work
        value = import_module("firsttoken.latency")
    elif name in _HOMES:
        value = getattr(import_module(_HOMES[name]), name)
    else:
        raise AttributeError(f"module 'firsttoken' has no attribute {name!r}; it has {', '.join(__all__)}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _version() -> str:
    from importlib import metadata

    try:
        return metadata.version("firsttoken")
    except metadata.PackageNotFoundError:  # run from a source tree that is not installed
        return "unknown"
