"""From an operator of a table to what `latency` runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from firsttoken_compiler.errors import OptionError

if TYPE_CHECKING:
    from firsttoken.latency import Work
    from firsttoken.validation.kernel_rows import Operator


def work_of(operator: Operator, runtime: str | None) -> Work:
    """The work that times one operator; raises OptionError for one that is no graph here."""
    raise OptionError(f"no graph is built of {operator.op}")
