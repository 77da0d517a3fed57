"""Products that make their normalised rows themselves equal the norm and the product apart, to the bit."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_bench import Bench, small_target

from firsttoken_compiler.codegen.build import build
from firsttoken_compiler.errors import AllocationError
from firsttoken_compiler.isa.types import Dtype, Space
from firsttoken_compiler.schedule.norm_definitions import statistics_of
from firsttoken_compiler.schedule.normed import normalise_of, product_of
from firsttoken_compiler.schedule.spec import NAMES, Arg, KernelSpec
from firsttoken_compiler.schedule.tiling import Room

D, S = Space.DRAM, Space.SPAD
F16, F32, I8, I16 = Dtype.F16, Dtype.F32, Dtype.I8, Dtype.I16
TARGET = small_target()
WIDE = Room(1 << 18, 1 << 19)


def spec_of(m: int, k: int, n: int, norm: str, rows: Dtype, wide: bool, beta: bool) -> KernelSpec:
    """An int8 (or fp16) product with a bias."""
    integer = rows is not F16
    names = statistics_of(norm, NAMES[rows])
    before = (
        Arg((m, k), F32 if wide else F16), *(Arg((m, 1), F32) for _ in names), *(Arg((k,), F16),) * (2 if beta else 1)
    )  # fmt: skip
    after = (
        Arg((k, n), I8 if integer else F16), *((Arg((m, 1), F32), Arg((1, n), F16)) if integer else ()), Arg((n,), F16)
    )  # fmt: skip
    params = {
        "operands": len(before), "norm": norm, "rows": NAMES[rows], "acts": NAMES[rows] if integer else "fp16",
        "bits": 8 if integer else 16, "group": k if integer else 0, "k": k, "n": n, "bias": 1, "residual": 0,
        "stored": 0, "out": "float16",
    }  # fmt: skip
    return KernelSpec("normed", tuple(sorted(params.items())), before + after, (Arg((m, n), F16),))


def values_of(r: np.random.Generator, spec: KernelSpec) -> list[np.ndarray]:
    out: list[np.ndarray] = []
    for arg in spec.args:
        if arg.dtype is I8:
            out.append(r.integers(-127, 128, arg.shape).astype(np.int8))
        else:
            out.append((0.02 + np.abs(r.standard_normal(arg.shape))).astype(arg.dtype.numpy))
    return out


def run(spec: KernelSpec, spaces: tuple[Space, ...], arrays: list[np.ndarray], room: Room) -> np.ndarray:
    packed = {"normed": int(spec.get("operands")), "linear": 1}.get(spec.kind)
    integer = packed is not None and spec["group"]
    panels = () if packed is None else (packed, packed + 2) if integer else (packed,)
    bench = Bench(spec, spaces, TARGET, (*spec.args, *spec.outs), panels=panels)
    return bench.run(build(spec, spaces, TARGET, room), arrays)[0]


@settings(max_examples=12, deadline=None, print_blob=True)
@given(st.data())
def test_equals_the_kernels_apart(data: st.DataObject) -> None:
    m, k, n = data.draw(st.integers(1, 40)), data.draw(st.sampled_from([8, 24, 64, 96])), data.draw(st.integers(1, 40))
    norm = data.draw(st.sampled_from(["rms_norm", "layer_norm"]))
    rows = data.draw(st.sampled_from([F16, I8, I16]))
    spec = spec_of(m, k, n, norm, rows, data.draw(st.booleans()), norm == "layer_norm" and data.draw(st.booleans()))
    count = int(spec["operands"])
    arrays = values_of(np.random.default_rng(data.draw(st.integers(0, 99))), spec)
    spaces = tuple(data.draw(st.sampled_from([D, S])) for _ in (*spec.args, *spec.outs))
    spaces = (*spaces[:count], D, *((spaces[count + 1], D) if rows is not F16 else ()), D, spaces[-1])
    made = run(normalise_of(spec), (*spaces[:count], D), arrays[:count], WIDE)
    expected = run(product_of(spec), (D, *spaces[count:]), [made, *arrays[count:]], WIDE)
    least = 6 * 1024 + m * (k + 64) * rows.bits // 8
    room = data.draw(st.sampled_from([WIDE, Room(least, 2 * least)]))
    np.testing.assert_array_equal(run(spec, spaces, arrays, room), expected)


def test_rows_that_do_not_fit_are_an_error() -> None:
    spec = spec_of(512, 512, 64, "rms_norm", I8, wide=True, beta=False)
    target = replace(TARGET, name="little")
    with pytest.raises(AllocationError, match="target little: "):
        build(spec, (D,) * (len(spec.args) + 1), target, Room(1 << 16, 1 << 17))
