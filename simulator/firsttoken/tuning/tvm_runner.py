"""This machine for TVM's own meta_schedule: a builder that makes programs of candidates, a runner that simulates them.

    from firsttoken.tuning.tvm_runner import NpuBuilder, NpuRunner, ProductTask

    task = ProductTask(spec, spaces, target, room)
    database = meta_schedule.tune_tir(
        task.function, HOST, work_dir, 64, builder=NpuBuilder(task), runner=NpuRunner(target), space=task.space(),
        strategy="replay-func", cost_model="random", num_tuning_cores=1,
    )

A candidate is any schedule of the task's function that the code generator can read: tiles moved by tensorised copies,
products tensorised, loops that name their axes. What it cannot read, and what the target cannot do, comes back as the
candidate's error message.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from firsttoken.tuning.alone import alone
from firsttoken.tuning.measure import time_of
from firsttoken_compiler.errors import FirsttokenError
from firsttoken_compiler.isa.program import Program
from firsttoken_compiler.schedule import linear
from firsttoken_compiler.schedule.choice import ProductChoice
from firsttoken_compiler.schedule.choosing import default_choice, legal_choices, tile_of
from firsttoken_compiler.tvm.api import Schedule, tvm
from firsttoken_compiler.tvm.meta import HOST, derived_object, meta_schedule

if TYPE_CHECKING:
    from collections.abc import Sequence

    from firsttoken_compiler.isa.types import Space
    from firsttoken_compiler.schedule.linear import Tile
    from firsttoken_compiler.schedule.spec import KernelSpec
    from firsttoken_compiler.schedule.tiling import Room
    from firsttoken_compiler.target.target import Target

__all__ = ("HOST", "NpuBuilder", "NpuRunner", "ProductTask")
MESSAGE: Final = 2000
"""Characters of an error message that go back to TVM."""


@dataclass(frozen=True)
class ProductTask:
    """A product with weights to tune: what `codegen.build` is told of it.

    Attributes:
        spec: a kernel of kind `linear` on weights that are no blocks; `tuning.whole` lists those of a student.
        spaces: where its operands and its result lie.
        target: the NPU.
        room: what it may use of the scratchpad.
    """

    spec: KernelSpec
    spaces: tuple[Space, ...]
    target: Target
    room: Room

    @property
    def unit(self) -> Tile:
        """The smallest tile that the function's extents are whole multiples of."""
        return linear.Tile(1, 1, linear.Shape.of(self.spec).group or 1)

    @property
    def function(self) -> Any:
        """The PrimFunc without a schedule."""
        return linear.unscheduled(self.spec, self.unit, self.target).with_attr("global_symbol", "main")

    def default(self) -> Any:
        """The compiler's own choice as a `Schedule` with its trace; tiles that do not divide the extents shrink."""
        choice = default_choice(self.spec, self.spaces, self.target, self.room)
        assert isinstance(choice, ProductChoice)
        return self.scheduled(tile_of(choice, self.target))

    def scheduled(self, tile: Tile) -> Any:
        """The function scheduled by a tile, as a `Schedule` with its trace."""
        s = Schedule(self.function)
        linear.apply(s, self.spec, self.spaces, self._dividing(tile), self.target)
        return s

    def space(self) -> Any:
        """The design space: every extent and order of the compiler's own search that divides the function's."""
        legal = legal_choices(self.spec, self.spaces, self.target, self.room)
        tiles = [tile_of(choice, self.target) for choice in legal if isinstance(choice, ProductChoice)]
        fitting = [tile for tile in dict.fromkeys(tiles) if self._dividing(tile) == tile]
        values = {name: sorted({getattr(tile, name) for tile in fitting}) for name in _FIELDS}

        def sample(s: Any) -> None:
            picked = {name: _pick(s, of) for name, of in values.items()}
            tile = linear.Tile(**picked)
            linear.apply(s, self.spec, self.spaces, tile, self.target)

        return meta_schedule.space_generator.ScheduleFn(sample, sch_rules=[], postprocs=[], mutator_probs={})

    def program(self, module: Any) -> Program:
        """The program of a scheduled module, some launches in a row; raises FirsttokenError for what cannot run."""
        from firsttoken_compiler.codegen.tir_reader import read
        from firsttoken_compiler.codegen.unroll import Place, unroll
        from firsttoken_compiler.codegen.verify import verify
        from firsttoken_compiler.isa.types import Space
        from firsttoken_compiler.schedule.kernel import Scheduled

        rows, weights = (module["main"].params[index].shape for index in (0, 1))
        whole = linear.Tile(int(rows[0]), int(weights[0]), int(weights[1]))
        layouts, ragged = linear.memory(self.spec, self.spaces, whole, self.target)
        body, _ = read(Scheduled(module, layouts, ragged).lowered())
        places = [Place(space, layout) for space, layout in zip(self.spaces, layouts, strict=True)]
        align, tiles = self.target.alignment(Space.SPAD), self.target.matrix.tile_bytes
        template = unroll(body, places, ragged, align, "", tiles)
        program = alone(self.spec, self.spaces, template, self.target, self.room)
        verify(program, self.target)
        return program

    def _dividing(self, tile: Tile) -> Tile:
        """The largest tile within one whose extents divide the function's."""
        shape, unit = linear.Shape.of(self.spec), self.unit
        panels = shape.panels(linear.panel_of(self.target))
        units = -(-shape.k // unit.k)
        return replace(
            tile, m=_divisor(shape.m, tile.m), panels=_divisor(panels, tile.panels),
            k=_divisor(units, tile.k // unit.k) * unit.k,
        )  # fmt: skip


_FIELDS: Final = ("m", "panels", "k", "whole", "rows_outer", "buffers")


@derived_object
class NpuBuilder(meta_schedule.builder.PyBuilder):
    """Makes candidates of a task into program files, each in a temporary folder, which meta_schedule removes."""

    def __init__(self, task: ProductTask) -> None:
        super().__init__()
        self.task = task

    def build(self, build_inputs: Sequence[Any]) -> list[Any]:
        """A program file, or an error message, for every candidate."""
        return [self._one(item.mod) for item in build_inputs]

    def _one(self, module: Any) -> Any:
        try:
            program = self.task.program(module)
        except FirsttokenError as error:
            return _failed(error)
        except (ValueError, KeyError, TypeError, IndexError, AttributeError, tvm.error.TVMError) as error:
            return _failed(error)  # a candidate is the user's: whatever the reader trips over is its fault
        path = Path(tempfile.mkdtemp(prefix="firsttoken-")) / "candidate.ftprog"
        path.write_bytes(program.encode())
        return meta_schedule.builder.BuilderResult(str(path), None)


@derived_object
class NpuRunner(meta_schedule.runner.PyRunner):
    """Simulates program files on a target; a candidate's run time is that of one launch, in seconds."""

    def __init__(self, target: Target) -> None:
        super().__init__()
        self.target = target

    def run(self, runner_inputs: Sequence[Any]) -> list[Any]:
        """A result for every program: its time, or an error message."""
        return [_Done(self._one(Path(str(item.artifact_path)))) for item in runner_inputs]

    def _one(self, path: Path) -> Any:
        try:
            time = time_of(Program.decode(path.read_bytes()), self.target)
        except (FirsttokenError, OSError) as error:
            return meta_schedule.runner.RunnerResult(None, str(error)[:MESSAGE])
        return meta_schedule.runner.RunnerResult([time.cycles / self.target.clock_hz], None)


@derived_object
class _Done(meta_schedule.runner.PyRunnerFuture):
    """A result that is there already."""

    def __init__(self, result: Any) -> None:
        super().__init__()
        self.found = result

    def done(self) -> bool:
        return True

    def result(self) -> Any:
        return self.found


def _failed(error: Exception) -> Any:
    text = f"{type(error).__name__}: {error}" if not isinstance(error, FirsttokenError) else str(error)
    return meta_schedule.builder.BuilderResult(None, text[:MESSAGE])


def _pick(s: Any, values: Sequence[Any]) -> Any:
    """One of the values, by a random variable of the trace."""
    chosen = s.sample_categorical(list(range(len(values))), [1.0 / len(values)] * len(values))
    return values[int(s.get(chosen))]


def _divisor(total: int, most: int) -> int:
    """The largest divisor of `total` that is at most `most`."""
    return next(size for size in range(max(1, min(total, most)), 0, -1) if total % size == 0)
