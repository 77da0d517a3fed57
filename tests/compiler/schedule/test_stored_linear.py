"""Products with zero points: the unrolled template against numpy on values less their zero points."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from kernel_bench import Bench, small_target

from firsttoken_compiler.codegen.tir_reader import read
from firsttoken_compiler.codegen.unroll import Place, unroll
from firsttoken_compiler.isa.types import Dtype, Space
from firsttoken_compiler.schedule import linear
from firsttoken_compiler.schedule.linear import Tile
from firsttoken_compiler.schedule.product_bytes import linear_bytes
from firsttoken_compiler.schedule.spec import Arg, KernelSpec

D, S = Space.DRAM, Space.SPAD
ACTS = {"int8": Dtype.I8, "int16": Dtype.I16, "fp16": Dtype.F16}


@dataclass(frozen=True)
class Case:
    """A product; `scaled`: activations have a scale per token, or one for all."""

    acts: str
    bits: int
    group: int
    tile: Tile
    asymmetric: bool = False
    zeros: bool = False
    one_scale: bool = True
    added: tuple[str, ...] = ()
    on_chip: frozenset[str] = frozenset()
    m: int = 5
    n: int = 20
    k: int = 32
    minimum: bool = False
    """Weights are d q + m."""

    @property
    def groups(self) -> int:
        return -(-self.k // self.group)

    def arrays(self) -> dict[str, np.ndarray]:
        """Operands by name; what is integer stays small enough for exact sums."""
        r = np.random.default_rng(self.k)
        limit = 1 << (self.bits - 1)
        a = r.standard_normal((self.m, self.k)) if self.acts == "fp16" else r.integers(-128, 128, (self.m, self.k))
        a = a.astype(ACTS[self.acts].numpy)
        w = r.integers(-limit, limit, (self.k, self.n)).astype(np.int8)
        a_zero = np.full((1, 1), -37.0, np.float32)
        less = a.astype(np.float32) - (a_zero if self.asymmetric else 0)
        made: dict[str, np.ndarray] = {
            "a": a, "w": w, "a_zero": a_zero,
            "a_scale": r.uniform(1e-3, 2e-3, (1 if self.one_scale else self.m, 1)).astype(np.float32),
            "a_sum": np.add.reduceat(less, np.arange(0, self.k, self.group), axis=1).astype(np.float32),
            "w_scale": r.uniform(1e-3, 2e-3, (self.groups, self.n)).astype(np.float32),
            "w_zero": r.integers(-limit, limit, (self.groups, self.n)).astype(np.int8),
            "w_min": r.uniform(-2e-3, 2e-3, (self.groups, self.n)).astype(np.float16),
            "w_sum": np.add.reduceat(w.astype(np.float32), np.arange(0, self.k, self.group), axis=0),
            "bias": r.standard_normal(self.n).astype(np.float32),
            "residual": r.standard_normal((self.m, self.n)).astype(np.float16),
        }  # fmt: skip
        return made

    @property
    def spec(self) -> KernelSpec:
        params = {
            "acts": self.acts, "bits": self.bits, "group": self.group, "k": self.k, "n": self.n, "out": "f32",
            "asymmetric": int(self.asymmetric), "zeros": int(self.zeros), "silu": 0, "factor": 0,
            "bias": int("bias" in self.added), "residual": int("residual" in self.added),
            "minimum": int(self.minimum),
        }  # fmt: skip
        arrays = self.arrays()
        dtypes = {"a": ACTS[self.acts], "w": {4: Dtype.I4, 8: Dtype.I8}[self.bits], "w_zero": Dtype.I8,
                  "w_min": Dtype.F16, "residual": Dtype.F16}  # fmt: skip
        placeholder = KernelSpec("linear", tuple(params.items()), (Arg((1,), Dtype.F32),) * 3, ())
        names = linear.linear_names(placeholder)
        args = tuple(Arg(arrays[name].shape, dtypes.get(name, Dtype.F32)) for name in names)
        return KernelSpec("linear", tuple(params.items()), args, (Arg((self.m, self.n), Dtype.F32),))

    def run(self) -> np.ndarray:
        spec, target, arrays = self.spec, small_target(), self.arrays()
        names = linear.operand_names(spec)
        spaces = tuple(S if name in self.on_chip else D for name in names)
        scheduled = linear.schedule(spec, spaces, self.tile, target)
        body, _ = read(scheduled.lowered())
        places = [Place(space, layout) for space, layout in zip(spaces, scheduled.layouts, strict=True)]
        template = unroll(body, places, scheduled.ragged, target.scratchpad.alignment_bytes)
        scratch, acc = linear_bytes(spec, spaces, self.tile, target)
        assert template.scratch_bytes <= scratch
        assert template.acc_bytes <= acc
        panels = tuple(names.index(n) for n in ("w", "w_scale", "w_zero", "w_min", "w_sum", "bias") if n in names)
        bench = Bench(spec, spaces, target, (*spec.args, *spec.outs), panels)
        return bench.run(template, [arrays[name] for name in names[:-1]])[0]

    def expected(self) -> np.ndarray:
        """In fp64 from the definition of the zero points."""
        made = {name: array.astype(np.float64) for name, array in self.arrays().items()}
        each = np.arange(self.k) // self.group
        a = made["a"] - (made["a_zero"] if self.asymmetric else 0)
        w = (made["w"] - (made["w_zero"][each] if self.zeros else 0)) * made["w_scale"][each]
        if self.minimum:
            w = made["w"] * made["w_scale"][each] + made["w_min"][each]
        out = a @ w * (made["a_scale"] if self.acts != "fp16" else 1)
        return np.asarray(out + sum(made[name] for name in self.added))


CASES = {
    "dynamic": Case("int8", 8, 32, Tile(4, 2, 16), asymmetric=True, added=("bias",)),
    "dynamic, resident": Case("int8", 8, 32, Tile(5, 3, 32), True, on_chip=frozenset(("a", "a_zero", "out"))),
    "both zero points": Case("int8", 8, 32, Tile(2, 1, 32), True, True, added=("bias", "residual")),
    "both zero points, one tile": Case("int8", 8, 32, Tile(5, 3, 32), True, True),
    "static 16 bits": Case("int16", 8, 32, Tile(4, 2, 16), added=("bias", "residual")),
    "dynamic in groups": Case("int8", 8, 12, Tile(4, 2, 12), asymmetric=True, k=29, added=("bias",)),
    "blocks with zero points": Case("fp16", 4, 16, Tile(4, 2, 16), zeros=True, k=48, added=("bias",)),
    "blocks, sums resident": Case("fp16", 4, 8, Tile(3, 1, 32), zeros=True, on_chip=frozenset(("a", "a_sum"))),
    "channel with zero points": Case("fp16", 8, 32, Tile(4, 2, 16), zeros=True),
    "zero points per token scale": Case("int8", 4, 16, Tile(4, 3, 32), zeros=True, one_scale=False),
    "minima": Case("fp16", 4, 16, Tile(4, 2, 16), k=48, minimum=True, added=("bias", "residual")),
    "minima, sums resident": Case("fp16", 4, 8, Tile(3, 1, 32), minimum=True, on_chip=frozenset(("a", "a_sum"))),
    "minima, one token": Case("fp16", 8, 16, Tile(1, 3, 32), minimum=True, m=1),
    "one token": Case("int8", 8, 32, Tile(1, 3, 32), asymmetric=True, m=1),
}


@pytest.mark.parametrize("name", CASES)
def test_zero_points_are_taken_off(name: str) -> None:
    case = CASES[name]
    expected = case.expected()
    tolerance = 1e-5 * float(np.abs(expected).max())
    assert np.abs(case.run() - expected).max() <= tolerance


@pytest.mark.parametrize("zeros", [False, True])
def test_integers_are_exact(zeros: bool) -> None:
    """With all scales 1 the result is the integer sum of products itself."""

    class Integer(Case):
        def arrays(self) -> dict[str, np.ndarray]:
            made = super().arrays()
            return {**made, "a_scale": np.ones_like(made["a_scale"]), "w_scale": np.ones_like(made["w_scale"])}

    case = Integer("int8", 8, 32, Tile(4, 2, 16), asymmetric=True, zeros=zeros)
    assert np.array_equal(case.run(), case.expected())
