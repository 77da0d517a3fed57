"""Views against numpy: a view's tensor, made out of its matrix, is what reshapes and transposes make of the array."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from firsttoken_compiler.passes import views
from firsttoken_compiler.passes.views import View

Array = np.ndarray[Any, Any]


def tensor(view: View) -> Array:
    """What the axes of a view say that the ONNX tensor is, out of the matrix `[tokens, features]`."""
    if view.dims is not None:
        return np.asarray(view.base.reshape(view.dims))
    split = view.base.reshape(view.tokens, view.heads, view.width)
    split = np.repeat(split[:, :, None], view.repeat, axis=2)  # m h g d
    if "g" not in view.axes:
        split = split.reshape(view.tokens, 1, -1, 1, view.width).transpose(0, 2, 1, 3, 4)[:, :, 0]
    names = "mhgd"
    if "n" in view.axes:
        split, names = split.reshape(view.tokens, -1), "mn"
    if "y" in view.axes or "x" in view.axes:
        split, names = view.base.reshape(-1, view.line, view.features), "yxn"
    wanted = [axis for axis in view.axes if axis != "1"]
    missing = [index for index, axis in enumerate(names) if axis not in wanted]
    assert all(split.shape[index] == 1 for index in missing), f"{view.axes} leaves out an axis that is longer than 1"
    squeezed = split.squeeze(axis=tuple(missing))
    kept = [axis for axis in names if axis in wanted]
    ordered = squeezed.transpose([kept.index(axis) for axis in wanted])
    return ordered.reshape([1 if axis == "1" else view.extent(axis) for axis in view.axes])


def matrix(tokens: int, features: int, axes: str = "1mn") -> View:
    return views.matrix(np.arange(tokens * features).reshape(tokens, features), axes, tokens, features)


def assert_is(view: View | None, expected: Array) -> None:
    assert view is not None
    np.testing.assert_array_equal(tensor(view), expected)
    assert view.shape == expected.shape


SIZES = st.tuples(*[st.integers(1, 3)] * 3)
"""(tokens, heads, width); equal extents and extents of 1 are where bookkeeping by size goes wrong."""


@settings(max_examples=100, deadline=None)
@given(SIZES, st.permutations(range(4)))
def test_heads_are_split_transposed_and_merged(sizes: tuple[int, int, int], order: list[int]) -> None:
    tokens, heads, width = sizes
    view = matrix(tokens, heads * width)
    array = tensor(view)
    split = views.reshape(view, (1, tokens, heads, width))
    assert_is(split, array.reshape(1, tokens, heads, width))
    assert split is not None
    turned = views.permute(split, order)
    assert_is(turned, tensor(split).transpose(order))
    back = views.permute(turned, [order.index(axis) for axis in range(4)])
    assert_is(back, tensor(split))
    assert_is(views.reshape(back, (1, tokens, heads * width)), array)


@settings(max_examples=300, deadline=None)
@given(SIZES, st.permutations(range(4)), st.data())
def test_any_reshape_is_right_or_refused(sizes: tuple[int, int, int], order: list[int], data: st.DataObject) -> None:
    tokens, heads, width = sizes
    view = views.reshape(matrix(tokens, heads * width), (1, tokens, heads, width))
    assert view is not None
    view = views.permute(view, order)
    array = tensor(view)
    shape = data.draw(shapes(array.size))
    found = views.reshape(view, shape)
    if found is not None:
        assert_is(found, array.reshape(shape))


@settings(max_examples=300, deadline=None)
@given(SIZES, st.permutations(range(4)), st.data())
def test_images_are_transposed_and_reshaped(sizes: tuple[int, int, int], order: list[int], data: st.DataObject) -> None:
    lines, line, channels = sizes
    base = np.arange(lines * line * channels).reshape(lines * line, channels)
    view = View(base, "1nyx", lines * line, channels, line=line)
    assert_is(view, base.reshape(lines, line, channels).transpose(2, 0, 1)[None])
    turned = views.permute(view, order)
    assert_is(turned, tensor(view).transpose(order))
    shape = data.draw(shapes(base.size))
    found = views.reshape(turned, shape)
    if found is not None:
        assert_is(found, tensor(turned).reshape(shape))


def test_patches_become_tokens_and_back_without_a_copy() -> None:
    base = np.arange(30).reshape(6, 5)
    patches = View(base, "1nyx", 6, 5, line=3)
    flat = views.reshape(patches, (1, 5, 6))
    assert flat is not None
    tokens = views.permute(flat, [0, 2, 1])
    assert tokens.is_laid_out("mn")
    assert tokens.base is base
    assert_is(views.reshape(views.permute(tokens, [0, 2, 1]), (1, 5, 2, 3)), tensor(patches))


def test_channels_last_is_an_image_as_it_lies() -> None:
    base = np.arange(24).reshape(6, 4)
    view = views.permute(views.dense(base, (1, 2, 3, 4)), [0, 3, 1, 2])
    assert (view.axes, view.line, view.base is base) == ("1nyx", 3, True)
    assert_is(view, base.reshape(1, 2, 3, 4).transpose(0, 3, 1, 2))


@st.composite
def shapes(draw: st.DrawFn, size: int) -> tuple[int, ...]:
    """Any shape of `size` elements with up to five axes."""
    shape = []
    for _ in range(draw(st.integers(0, 3))):
        divisors = [d for d in range(1, size + 1) if size % d == 0]
        shape.append(draw(st.sampled_from(divisors)))
        size //= shape[-1]
    shape.append(size)
    if draw(st.booleans()):
        shape.insert(draw(st.integers(0, len(shape))), 1)
    return tuple(shape)


@settings(max_examples=100, deadline=None)
@given(SIZES, st.lists(st.integers(0, 3), max_size=2, unique=True))
def test_unit_axes_come_and_go(sizes: tuple[int, int, int], where: list[int]) -> None:
    tokens, heads, width = sizes
    view = matrix(tokens, heads * width, "mn")
    axes = [axis for axis in where if axis < 2 + len(where)]
    expanded = views.expand(view, axes)
    assert_is(expanded, np.expand_dims(tensor(view), axes) if axes else tensor(view))
    assert_is(views.reshape(expanded, (tokens, heads * width)), tensor(view))


def test_negative_axes_count_from_the_end_of_the_result() -> None:
    assert_is(views.expand(matrix(2, 3, "mn"), [-1]), np.expand_dims(tensor(matrix(2, 3, "mn")), -1))
    assert_is(views.expand(matrix(2, 3, "mn"), [-4, 1]), np.expand_dims(tensor(matrix(2, 3, "mn")), (-4, 1)))


def test_squeeze_drops_leading_units_only() -> None:
    assert views.squeeze(matrix(2, 3, "11mn"), 2).axes == "mn"
    assert views.squeeze(matrix(2, 3, "1mn"), 3).axes == "1mn"
    assert views.squeeze(matrix(2, 3, "mn"), 1).axes == "mn"


@settings(max_examples=60, deadline=None)
@given(SIZES, st.integers(1, 3))
def test_repeated_heads_are_grouped_query_keys(sizes: tuple[int, int, int], repeat: int) -> None:
    """torch's repeat_kv: [1, h, m, d] to [1, h, 1, m, d], expanded, to [1, h * repeat, m, d]."""
    tokens, heads, width = sizes
    split = views.reshape(matrix(tokens, heads * width), (1, tokens, heads, width))
    assert split is not None
    keys = views.permute(split, [0, 2, 1, 3])
    spread = views.broadcast(views.expand(keys, [2]), (1, heads, repeat, tokens, width))
    expected = np.broadcast_to(tensor(keys)[:, :, None], (1, heads, repeat, tokens, width))
    assert_is(spread, expected)
    assert spread is not None
    merged = views.reshape(spread, (1, heads * repeat, tokens, width))
    assert_is(merged, expected.reshape(1, heads * repeat, tokens, width))
    assert merged is not None
    assert (merged.heads, merged.repeat) == (heads, repeat)
    assert_is(views.permute(merged, [0, 1, 3, 2]), expected.reshape(1, -1, tokens, width).transpose(0, 1, 3, 2))


def test_other_broadcasts_are_refused() -> None:
    keys = View(np.zeros((4, 6)), "1hmd", 4, 6, 2)
    assert views.broadcast(views.expand(keys, [1]), (1, 3, 2, 4, 3)) is None  # in front of the heads: tiles them
    assert views.broadcast(keys, (5, 2, 4, 3)) is None  # a batch
    assert views.broadcast(matrix(2, 3), (4, 2, 3)) is None
    twice = View(np.zeros((4, 6)), "1hgm1d", 4, 6, 2, 3)
    assert views.broadcast(twice, (1, 2, 3, 4, 5, 3)) is None
    one_token = View(np.zeros((1, 6)), "1hmd", 1, 6, 2)
    assert views.broadcast(one_token, (1, 2, 5, 3)) is None  # tokens that grow are not copies of heads
    same = views.broadcast(keys, (1, 2, 4, 3))
    assert same == keys


def test_repeated_heads_are_not_features() -> None:
    """Merging repeated heads into features would need the copies to exist."""
    keys = View(np.zeros((4, 6)), "1mhgd", 4, 6, 2, 3)
    assert views.reshape(keys, (1, 4, 18)) is None


@pytest.mark.parametrize(
    ("view", "axes", "expected"),
    [
        (View(None, "1mn", 4, 6), "mn", True),
        (View(None, "1nm", 4, 6), "mn", False),
        (View(None, "n1m", 1, 6), "mn", True),
        (View(None, "1mhd", 4, 6, 2), "mhd", True),
        (View(None, "1hmd", 4, 6, 2), "mhd", False),
        (View(None, "1hmd", 1, 6, 2), "mhd", True),
        (View(None, "1hmd", 4, 6, 1), "mn", True),
        (View(None, "1hmd", 4, 6, 2), "mn", False),
        (View(None, "???", 4, 6), "mn", False),
    ],
)
def test_layout_leaves_out_axes_of_one(view: View, axes: str, expected: bool) -> None:
    assert view.is_laid_out(axes) is expected


def test_extents_multiply_to_the_elements() -> None:
    for view in (View(None, "1hgmd", 4, 6, 2, 3), View(None, "1hmd", 4, 6, 2, 3)):
        assert math.prod(view.shape) == 4 * 6 * 3
