"""A row-wise kernel with random operands and what it should compute, run on the functional machine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from kernel_bench import Bench, small_target

from firsttoken_compiler.codegen.staging import over_rows
from firsttoken_compiler.codegen.template import Template
from firsttoken_compiler.codegen.tir_reader import read
from firsttoken_compiler.codegen.unroll import Place, unroll
from firsttoken_compiler.isa.types import Dtype, Space
from firsttoken_compiler.schedule import rowwise
from firsttoken_compiler.schedule.spec import Arg, KernelSpec

D, S = Space.DRAM, Space.SPAD
F16, F32, I8, I16, I64 = Dtype.F16, Dtype.F32, Dtype.I8, Dtype.I16, Dtype.I64
TARGET = small_target()
QMAX = {I8: 127, I16: 32767}


@dataclass(frozen=True)
class Case:
    """A kernel, what it should compute in float64, and random operands for it."""

    spec: KernelSpec
    reference: Callable[..., np.ndarray]
    arrays: tuple[np.ndarray, ...]

    @property
    def operands(self) -> tuple[Arg, ...]:
        return rowwise.kernel_operands(self.spec, (*self.spec.args, *self.spec.outs))

    def template(self, spaces: tuple[Space, ...], rows: int) -> Template:
        spec = self.spec
        scheduled = rowwise.schedule(spec, spaces, rows, TARGET)
        body, params = read(scheduled.lowered(), outer=1)
        body = over_rows(
            body, params, list(spaces), rowwise.row_elements(spec), rows, rowwise.rows_of(spec), len(spec.outs),
            spec.kind in rowwise.COPIES, rowwise.row_parts(spec),
        )  # fmt: skip
        places = [Place(space, layout) for space, layout in zip(spaces, scheduled.layouts, strict=True)]
        return unroll(body, places, scheduled.ragged, TARGET.scratchpad.alignment_bytes, scheduled.tile)

    def check(self, spaces: tuple[Space, ...], rows: int) -> None:
        spec = self.spec
        bench = Bench(spec, spaces, TARGET, self.operands, results=len(spec.outs))
        got = bench.run(self.template(spaces, rows), list(self.arrays))
        expected = self.reference(*(array.astype(np.float64) for array in self.arrays))
        if len(got) == 2:
            self._check_quantised(got[0].astype(np.float64), got[1].astype(np.float64), expected)
        elif spec.kind in rowwise.COPIES:
            np.testing.assert_array_equal(got[0].astype(np.float64), expected)
        else:
            step = 2.0**-11 if spec.outs[0].dtype is F16 else 1e-6
            np.testing.assert_allclose(got[0].astype(np.float64), expected, rtol=1.01 * step, atol=1e-5)

    def _check_quantised(self, q: np.ndarray, scale: np.ndarray, expected: np.ndarray) -> None:
        """Symmetric per row, rounded to nearest, the largest at full range."""
        qmax = QMAX[self.spec.outs[0].dtype]
        peak = np.abs(expected).max(axis=1, keepdims=True)
        np.testing.assert_allclose(scale, np.maximum(peak, 1e-12) / qmax, rtol=1e-5)
        assert (np.abs(q).max(axis=1, keepdims=True)[peak > 1e-9] == qmax).all()
        assert (np.abs(q * scale - expected) <= scale * (0.5 + 1e-5 * qmax)).all()


def spec_of(kind: str, args: tuple[Arg, ...], *outs: Arg, **params: Any) -> KernelSpec:
    return KernelSpec(kind, tuple(sorted(params.items())), args, outs)


def results_of(rows: int, width: int, out: Dtype) -> tuple[Arg, ...]:
    main = Arg((rows, width), out)
    return (main, Arg((rows, 1), F32)) if out in QMAX else (main,)


def random_half(r: np.random.Generator, *shape: int) -> np.ndarray:
    return r.standard_normal(shape).astype(np.float16)
