"""What measurements would be on a changed target: clocks that keep programs, and one that only extrapolates.

A step is compiled once, for the target that a fit starts from, and the same program is simulated on every changed
target. Of a student with many layers two short versions are compiled, of `SHORT` layers, and the time of the whole is
the line through theirs: T(L) = T4 + (L - 4) / 2 * (T4 - T2).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Final, Protocol

from firsttoken_compiler.isa import word
from firsttoken_compiler.isa.matmul import Matmul
from firsttoken_compiler.isa.types import Dtype
from firsttoken_compiler.isa.vector_kernel import COST_CLASSES
from firsttoken_compiler.target.rates import pair_name
from firsttoken_compiler.target.target import Target

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from firsttoken_compiler.isa.program import Program

SHORT: Final = (2, 4)
"""Layers of the short versions of a student."""
WHOLE_BELOW: Final = 6
"""Students of at most so many layers are compiled as they are."""


class Machinery(Protocol):
    """How steps become programs and programs times; `latency` has the real one."""

    def compile(self, step: Any, target: Target) -> Program:
        """The program of a step."""

    def time(self, step: Any, program: Program, target: Target) -> Any:
        """A record of numbers, `device_s` among them, from simulating the program."""

    def layers(self, step: Any) -> int:
        """Layers of the step's student; 0 where it has none that repeat."""

    def cut(self, step: Any, layers: int) -> Any:
        """The same step of the student cut to so many layers."""


class Clock(Protocol):
    """Times of steps on a target."""

    def seconds(self, step: Any, target: Target) -> Any:
        """A record of numbers, `device_s` among them."""


@dataclass
class KeptClock:
    """Compiles each step once, for `origin`, and simulates the program on whatever target is asked for."""

    origin: Target
    machinery: Machinery
    progress: Callable[[str, float, float], None] | None = None
    programs: dict[Hashable, Program] = field(default_factory=dict)
    simulated: int = 0
    """Programs simulated so far."""
    _times: dict[tuple[Hashable, str], Any] = field(default_factory=dict)
    _keys: dict[int, tuple[Target, str]] = field(default_factory=dict)
    _needs: dict[Hashable, frozenset[str]] = field(default_factory=dict)

    def seconds(self, step: Any, target: Target) -> Any:
        """See `Clock`."""
        pieces = self.pieces(step)
        times = [self._one(piece, target) for piece in pieces]
        if len(times) == 1:
            return times[0]
        short, longer = SHORT
        return _line(times[0], times[1], (self.machinery.layers(step) - short) / (longer - short))

    def anew(self, target: Target) -> KeptClock:
        """A clock that has compiled nothing yet, for another target."""
        return type(self)(target, self.machinery, self.progress)

    def pieces(self, step: Any) -> tuple[Any, ...]:
        """The steps that are compiled for a step: itself, or its student cut twice."""
        if self.machinery.layers(step) <= WHOLE_BELOW:
            return (step,)
        return tuple(self.machinery.cut(step, layers) for layers in SHORT)

    def depends(self, step: Any, paths: Sequence[str]) -> bool:
        """Whether the step's programs can feel one of the values; those of rates and costs must occur in them."""
        for piece in self.pieces(step):
            needs = self._needs.get(piece)
            if needs is None:
                needs = self._needs[piece] = _needs(self.program(piece))
            for path in paths:
                section, _, rest = path.partition(".")
                table = path.startswith(("matrix.macs_per_cycle.", "vector.cycles."))
                if (section == "host" and "host" not in needs) or section in ("runtimes", "energy"):
                    continue
                if not table or rest in needs:
                    return True
        return False

    def program(self, piece: Any) -> Program:
        """The program of a step as it is, for `origin`."""
        if piece not in self.programs:
            self.programs[piece] = self.machinery.compile(piece, self.origin)
            if self.progress is not None:
                self.progress("compile", len(self.programs), 0.0)
        return self.programs[piece]

    def _one(self, piece: Any, target: Target) -> Any:
        program = self.program(piece)
        key = (piece, self._key(target, bool(program.hosts)))
        if key not in self._times:
            self._times[key] = self.machinery.time(piece, program, target)
            self.simulated += 1
        return self._times[key]

    def _key(self, target: Target, calls_host: bool) -> str:
        """Hash of what can change a program's time: the host's sections only where the program calls the host."""
        known = self._keys.get(2 * id(target) + calls_host)
        if known is None:
            host = target.host if calls_host else self.origin.host
            changes: dict[str, Any] = {"runtimes": {}} if hasattr(target, "runtimes") else {}
            seen = replace(target, host=host, energy=self.origin.energy, **changes)
            known = self._keys[2 * id(target) + calls_host] = (target, seen.content_hash)
        return known[1]


@dataclass
class RecordingClock:
    """Passes questions on and keeps the steps that they were about, in order."""

    clock: Clock
    steps: dict[Any, None] = field(default_factory=dict)

    def seconds(self, step: Any, target: Target) -> Any:
        """See `Clock`."""
        self.steps.setdefault(step)
        return self.clock.seconds(step, target)


@dataclass(frozen=True)
class LineClock:
    """Times on straight lines in logarithms, from one place: `device_s` grows as exp(slope . (x - place))."""

    times: Mapping[Any, Any]
    slopes: Mapping[Any, NDArray[np.float64]]
    delta: NDArray[np.float64]
    """x - place."""

    def seconds(self, step: Any, target: Target) -> Any:
        """See `Clock`; the target plays no part."""
        time = self.times[step]
        return replace(time, device_s=time.device_s * math.exp(float(self.slopes[step] @ self.delta)))


def _line(short: Any, longer: Any, share: float) -> Any:
    """The record `share` of the way from one to the other (beyond it above 1), number by number."""
    changes = {}
    for entry in fields(short):
        a, b = getattr(short, entry.name), getattr(longer, entry.name)
        if type(a) in (int, float) and type(b) in (int, float):
            value = a + share * (b - a)
            changes[entry.name] = round(value) if type(a) is int and type(b) is int else value
    return replace(longer, **changes)


def _needs(program: Program) -> frozenset[str]:
    """What a program contains of rates (`macs_per_cycle.int8xint8`), costs (`cycles.exp`) and calls (`host`)."""
    import numpy as np

    code = program.code
    operands = [word.operand_column(1), word.operand_column(2)]
    kinds = np.unique(word.dtype_of(code[code[:, word.OPCODE] == Matmul.OPCODE][:, operands]), axis=0)
    found = {f"macs_per_cycle.{pair_name(Dtype(a), Dtype(w))}" for a, w in kinds.tolist()}
    for kernel in program.kernels:
        found |= {f"cycles.{name}" for name, count in zip(COST_CLASSES, kernel.cost, strict=True) if count}
    if program.kernels:
        found.add("cycles.convert")  # elements of less than a byte convert on the way in
    if program.hosts:
        found.add("host")
    return frozenset(found)
