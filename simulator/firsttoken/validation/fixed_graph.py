"""What single operators and image networks have in common as something to compile: one graph of its own length."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from firsttoken.subject import StudentLike
from firsttoken_compiler.errors import OptionError


class FixedGraph:
    """The parts of `firsttoken.subject.Subject` that are the same for every such graph."""

    __slots__ = ()

    @property
    def name(self) -> str:
        """See `Subject`."""
        raise NotImplementedError

    @property
    def layer_bits(self) -> tuple[int, ...]:
        """See `Subject`."""
        return ()

    @property
    def packages(self) -> tuple[str, ...]:
        """See `Subject`."""
        return ()

    def portable(self) -> StudentLike:
        """See `Subject`; raises OptionError, as no name stands for it."""
        raise OptionError(f"{self.name} has no name that another process could make it of")

    def lengths(self, prompt: int | None, past: int | None) -> tuple[int, int]:
        """See `Subject`; the graph has its own."""
        return 1, 0

    def phase(self, past: int) -> str:
        """See `Subject`."""
        return "encode"


def absent_weight(name: str, element: int, shape: Sequence[int], nbytes: int, location: str) -> Any:
    """A weight of an ONNX element type whose bytes, `nbytes` an element, nobody reads and need not be there."""
    from onnx import TensorProto

    made = TensorProto(name=name, data_type=element, dims=shape, data_location=TensorProto.EXTERNAL)
    for key, value in (("location", location), ("offset", "0"), ("length", str(nbytes * math.prod(shape)))):
        made.external_data.add(key=key, value=value)
    return made
