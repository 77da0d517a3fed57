"""Kernels on packed integers and sums per group, over every placement of their operands."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from rowwise_case import F16, F32, I8, Case, D, S, spec_of

from firsttoken_compiler.schedule.spec import Arg


def unpack(rows: int, width: int) -> Case:
    values = np.random.default_rng(width).integers(-8, 8, (rows, 2 * width))
    bytes_ = ((values[:, 0::2] & 15) | (values[:, 1::2] << 4)).astype(np.int8)
    return Case(spec_of("unpack", (Arg((rows, width), I8),), Arg((rows, 2 * width), I8)), lambda _: values, (bytes_,))


def group_sums(rows: int, groups: int, width: int, zero: bool) -> Case:
    r = np.random.default_rng(width)
    x = r.integers(-128, 128, (rows, groups * width)).astype(np.int8) if zero else None
    x = r.standard_normal((rows, groups * width)).astype(np.float16) if x is None else x
    args = [Arg(x.shape, I8 if zero else F16), *([Arg((1, 1), F32)] if zero else [])]
    arrays = (x, *([np.full((1, 1), -37.0, np.float32)] if zero else []))

    def expected(a: np.ndarray, less: np.ndarray | None = None) -> np.ndarray:
        return a.reshape(rows, groups, width).sum(axis=2) - (0 if less is None else less * width)

    return Case(spec_of("group_sums", tuple(args), Arg((rows, groups), F32), groups=groups), expected, arrays)


@pytest.mark.parametrize(("rows", "width"), [(1, 1), (5, 8), (7, 33)])
@pytest.mark.parametrize("spaces", list(product((D, S), repeat=2)))
def test_both_halves_of_every_byte(rows: int, width: int, spaces: tuple) -> None:
    unpack(rows, width).check(spaces, min(rows, 3))


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("spaces", list(product((D, S), repeat=2)))
def test_sums_of_groups(groups: int, zero: bool, spaces: tuple) -> None:
    case = group_sums(5, groups, 16, zero)
    case.check((spaces[0], D, spaces[1]) if zero else spaces, 2)
