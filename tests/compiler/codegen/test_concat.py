"""Concatenations: any number of matrices of either float type, wherever they lie, by rows and by columns."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_bench import Bench, small_target

from firsttoken_compiler.codegen import concat
from firsttoken_compiler.errors import AllocationError
from firsttoken_compiler.isa.types import Dtype, Space
from firsttoken_compiler.schedule.spec import Arg, KernelSpec

TARGET = small_target()
PART = st.tuples(
    st.integers(1, 12), st.sampled_from((Dtype.F16, Dtype.F32)), st.sampled_from((Space.DRAM, Space.SPAD))
)


@settings(max_examples=40, deadline=None)
@given(st.lists(PART, min_size=1, max_size=4), PART, st.integers(0, 1), st.sampled_from((9000, 1 << 20)))
def test_concatenation(
    parts: list[tuple[int, Dtype, Space]], out: tuple[int, Dtype, Space], axis: int, limit: int
) -> None:
    across = out[0]
    shapes = [(size, across) if axis == 0 else (across, size) for size, _, _ in parts]
    arrays = [
        np.random.default_rng(i).standard_normal(shape).astype(dtype.numpy)
        for i, (shape, (_, dtype, _)) in enumerate(zip(shapes, parts, strict=True))
    ]
    expected = np.concatenate(arrays, axis=axis).astype(out[1].numpy)
    args = tuple(Arg(array.shape, dtype) for array, (_, dtype, _) in zip(arrays, parts, strict=True))
    spec = KernelSpec("concat", (("axis", axis),), args, (Arg(expected.shape, out[1]),))
    spaces = (*(space for _, _, space in parts), out[2])
    template = concat.build(spec, spaces, TARGET, (limit, 1 << 20))
    (got,) = Bench(spec, spaces, TARGET, (*spec.args, *spec.outs)).run(template, arrays)
    np.testing.assert_array_equal(got, expected)


def test_a_row_that_does_not_fit_names_the_remedy() -> None:
    wide = Arg((2, 4096), Dtype.F16)
    spec = KernelSpec("concat", (("axis", 0),), (wide, wide), (Arg((4, 4096), Dtype.F16),))
    with pytest.raises(AllocationError, match=r"4096 elements .* raise scratchpad\.bytes"):
        concat.build(spec, (Space.DRAM,) * 3, TARGET, (4096,))
