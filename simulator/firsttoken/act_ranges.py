"""Files of activation ranges: what `firsttoken ranges` writes and `--acts-range` reads.

    {"format": "firsttoken-ranges", "version": 1, "student": "smollm2-135m", "method": "minmax", "samples": 4,
     "ranges": {"/model/layers.0/mlp/Mul_output_0": [-5.1, 7.25], ...}}

A range belongs to a tensor of the student's ONNX graph that a product multiplies by weights.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

from firsttoken_compiler.errors import OptionError

if TYPE_CHECKING:
    from collections.abc import Mapping

FORMAT: Final = "firsttoken-ranges"
VERSION: Final = 1
MAX_FILE_BYTES: Final = 16 << 20
DYNAMIC: Final = "dynamic"
Method = Literal["minmax", "entropy", "percentile", "declared"]


@dataclass(frozen=True, slots=True)
class ActRanges:
    """Ranges (low, high) by tensor, and where they come from: `samples` inputs, 0 of ranges that are only declared."""

    student: str
    method: Method
    samples: int
    ranges: Mapping[str, tuple[float, float]]

    def to_json(self) -> str:
        """The text of the file; the same ranges give the same bytes."""
        document = {
            "format": FORMAT, "version": VERSION, "student": self.student, "method": self.method,
            "samples": self.samples, "ranges": {name: list(self.ranges[name]) for name in sorted(self.ranges)},
        }  # fmt: skip
        return json.dumps(document, indent=1, ensure_ascii=False) + "\n"

    def magnitudes(self) -> tuple[tuple[str, float], ...]:
        """Tensor and largest magnitude, by name: what options hold."""
        return tuple((name, max(abs(low), abs(high))) for name, (low, high) in sorted(self.ranges.items()))


def ranges_of(argument: str) -> tuple[tuple[str, float], ...]:
    """What `--acts-range` means for options: nothing for `dynamic`, else the magnitudes of a file.

    Raises OptionError naming the file and what is wrong in it.
    """
    return () if argument == DYNAMIC else read_ranges(Path(argument)).magnitudes()


def read_ranges(path: Path) -> ActRanges:
    """The ranges of a file; raises OptionError."""
    if not path.is_file():
        raise OptionError(f"--acts-range {path}: no such file; write one with 'firsttoken ranges', or say {DYNAMIC}")
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise OptionError(f"--acts-range {path}: {path.stat().st_size} bytes, the limit is {MAX_FILE_BYTES}")
        return parse_ranges(path.read_bytes(), str(path))
    except OSError as error:
        raise OptionError(f"--acts-range {path}: cannot be read: {error.strerror or error}") from error


def parse_ranges(data: bytes, origin: str) -> ActRanges:
    """The ranges in the bytes of a file; `origin` names it in messages. Raises OptionError."""
    from pydantic import ValidationError

    try:
        document = _schema().model_validate_json(data)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "document"
        raise OptionError(
            f"--acts-range {origin}: {where:.200}: {first['msg']} ({error.error_count()} problems); write the file "
            "with 'firsttoken ranges'"
        ) from error
    if (document.method == "declared") != (document.samples == 0):
        raise OptionError(
            f"--acts-range {origin}: {document.samples} samples and the method {document.method}: ranges that are "
            "declared have none, others at least 1"
        )
    for name, (low, high) in document.ranges.items():
        if low > high:
            raise OptionError(f"--acts-range {origin}: {name!r:.200}: the range {low} to {high} ends below its start")
    return ActRanges(document.student, document.method, document.samples, document.ranges)


@cache
def _schema() -> Any:
    from pydantic import BaseModel, ConfigDict, Field, FiniteFloat

    class _File(BaseModel):
        model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

        format: Literal["firsttoken-ranges"]
        version: Literal[1]
        student: str
        method: Method
        samples: int = Field(ge=0)
        ranges: dict[str, tuple[FiniteFloat, FiniteFloat]] = Field(min_length=1)

    return _File
