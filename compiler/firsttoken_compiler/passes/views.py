"""Layouts of a matrix `[tokens, features]` as ONNX graphs spell them: reshapes and transposes become bookkeeping."""

import math
from dataclasses import dataclass, replace
from typing import Any


class UnsupportedView(Exception):
    """A layout, type or shape that no npu operator takes; what asked for it runs on the host."""


@dataclass(frozen=True)
class View:
    """A tensor of the ONNX graph seen as a matrix `base` of shape `[tokens, heads * width]`.

    `axes` names the ONNX tensor's dimensions: `1` unit, `m` tokens, `n` features, `h` heads, `g` repeats of a head, `d`
    head width; of an image, whose tokens are pixels and whose features are channels, `y` lines and `x` pixels in each.
    `repeat` > 1: each head stands for that many consecutive heads (grouped-query attention's expanded keys).
    `dims`: a dense view, any tensor whose elements lie in the base in row-major order; its axes are `?`.
    """

    base: Any
    axes: str
    tokens: int
    features: int
    heads: int = 1
    repeat: int = 1
    dims: tuple[int, ...] | None = None
    line: int = 1
    """Pixels of a line of an image."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The ONNX tensor's shape."""
        return self.dims if self.dims is not None else tuple(self.extent(axis) for axis in self.axes)

    @property
    def layout(self) -> str:
        """The axes that are longer than 1, in order: what decides how the elements lie in memory."""
        return self._significant(self.axes)

    def is_laid_out(self, axes: str) -> bool:
        """Whether the tensor is `axes` (such as `mn` or `hmd`) once axes of extent 1 are left out of both."""
        if self.dims is not None:
            return axes == "mn"
        return self.layout == self._significant(axes)

    def _significant(self, axes: str) -> str:
        longer = "".join(axis for axis in axes if self.extent(axis) != 1).replace("yx", "m")
        if not ("y" in longer and "x" in longer):
            longer = longer.replace("y", "m").replace("x", "m")  # one line, or one pixel a line
        return longer.replace("d", "n") if self.heads == self.repeat == 1 else longer  # one head is all features

    @property
    def width(self) -> int:
        """Features per head."""
        return self.features // self.heads

    def extent(self, axis: str) -> int:
        """Extent of a named axis; heads count their repeats unless these have an axis of their own."""
        heads = self.heads if "g" in self.axes else self.heads * self.repeat
        known = {"1": 1, "m": self.tokens, "n": self.features, "h": heads, "g": self.repeat, "d": self.width}
        known |= {"y": self.tokens // self.line, "x": self.line}
        return known.get(axis, -1)


def matrix(base: Any, axes: str, tokens: int, features: int) -> View:
    """A plain matrix, axes such as `1mn` or `mn`."""
    return View(base, axes, tokens, features)


def dense(base: Any, shape: tuple[int, ...]) -> View:
    """A tensor of any shape that lies row-major over a base `[prod(shape[:-1]), shape[-1]]` (`[n]` for one axis).

    A batch of one is a matrix view, which heads can be split from.
    """
    tokens, features = math.prod(shape[:-1]), shape[-1] if shape else 1
    if shape and math.prod(shape[:-2]) == 1:
        return View(base, ("1" * (len(shape) - 2) + "mn") if len(shape) > 1 else "n", tokens, features)
    return View(base, "?" * len(shape), tokens, features, dims=shape)


def image(base: Any, lines: int, line: int, channels: int) -> View:
    """An image `[1, channels, lines, line]` whose base is `[lines * line, channels]`."""
    return View(base, "1nyx", lines * line, channels, line=line)


def is_row_major(view: View) -> bool:
    """Whether the tensor's elements lie in the base in the tensor's own order."""
    return view.dims is not None or (view.repeat == 1 and (view.is_laid_out("mn") or view.is_laid_out("mhd")))


def strides(view: View) -> tuple[int, ...]:
    """Strides of the ONNX tensor's axes in elements of the base; 0 along repeats.

    The base is a matrix `[tokens, features]`, or a cache `[heads, tokens, width]`.
    """
    if view.dims is not None:
        return tuple(math.prod(view.dims[i + 1 :]) for i in range(len(view.dims)))
    cache = len(view.base.ty.shape) == 3
    across = view.tokens * view.width if cache else view.width
    down = view.width if cache else view.features
    if view.repeat > 1 and "g" not in view.axes and "h" in view.axes:
        raise UnsupportedView(f"repeated heads merged into an axis of {view.extent('h')}")
    known = {"1": 0, "m": down, "n": 1, "h": across, "g": 0, "d": 1, "y": view.line * down, "x": down}
    if any(axis not in known for axis in view.axes) or (cache and "n" in view.axes and view.heads > 1):
        raise UnsupportedView(f"a tensor laid out as {view.axes}")
    return tuple(known[axis] for axis in view.axes)


def permute(view: View, order: list[int]) -> View:
    """Transposes the axes; of a dense view only those of extent 1 can move."""
    if view.dims is not None:
        if order == [0, 3, 1, 2] and view.dims[0] == 1:  # channels last: an image as it lies here
            return image(view.base, *view.dims[1:])
        longer = [axis for axis in order if view.dims[axis] != 1]
        if longer != sorted(longer):
            raise UnsupportedView(f"a transpose of {list(view.dims)} by {order}")
        return dense(view.base, tuple(view.dims[axis] for axis in order))
    return replace(view, axes="".join(view.axes[i] for i in order))


def expand(view: View, axes: list[int]) -> View:
    """Inserts unit axes."""
    if view.dims is not None:
        dims = list(view.dims)
        for axis in sorted(axis % (len(dims) + len(axes)) for axis in axes):
            dims.insert(axis, 1)
        return dense(view.base, tuple(dims))
    names = list(view.axes)
    for axis in sorted(axis % (len(view.axes) + len(axes)) for axis in axes):
        names.insert(axis, "1")
    return replace(view, axes="".join(names))


def squeeze(view: View, rank: int) -> View:
    """Drops leading unit axes down to `rank`."""
    axes = view.axes
    while len(axes) > rank and axes[0] == "1":
        axes = axes[1:]
    return replace(view, axes=axes)


def broadcast(view: View, shape: tuple[int, ...]) -> View | None:
    """A unit axis right behind the heads that grows becomes the repeat axis; None for any other broadcast."""
    if view.dims is not None:
        return dense(view.base, shape) if math.prod(shape) == math.prod(view.dims) else None
    axes = ["1"] * (len(shape) - len(view.axes)) + list(view.axes)
    repeat = view.repeat
    for index, (axis, extent) in enumerate(zip(axes, shape, strict=True)):
        if extent == view.extent(axis):
            continue
        if axis != "1" or index == 0 or axes[index - 1] != "h" or repeat != 1:
            return None
        axes[index], repeat = "g", extent
    return replace(view, axes="".join(axes), repeat=repeat)


def reshape(view: View, shape: tuple[int, ...]) -> View | None:
    """Splits features into heads, merges heads into features or repeats, moves unit axes.

    Any other reshape of a row-major tensor is a dense view; of anything else None.
    """
    if shape == view.shape:
        return view
    if view.dims is not None:
        return dense(view.base, shape)
    for candidate in _respellings(view, view.axes.replace("1", "")):
        split = _split_heads(candidate, shape) or _split_pixels(candidate, shape)
        if split is not None:
            return split
        axes = _with_units(candidate, shape)
        if axes is not None:
            return replace(candidate, axes=axes)
    return dense(view.base, shape) if is_row_major(view) else None


def _respellings(view: View, core: str) -> list[View]:
    """The view with its heads merged into features, or its repeats into heads, where the memory order allows it."""
    found = [replace(view, axes=core)]
    if "yx" in core:
        found.append(replace(view, axes=core.replace("yx", "m")))
    if "hd" in core and view.repeat == 1:
        found.append(replace(view, axes=core.replace("hd", "n"), heads=1))
    if "hg" in core:
        found.append(replace(view, axes=core.replace("hg", "h")))
    return found


def _split_heads(view: View, shape: tuple[int, ...]) -> View | None:
    """`[.., m, n]` to `[.., m, heads, width]`."""
    if not (view.axes == "mn" or (view.axes == "n" and view.tokens == 1)) or len(shape) < 3:
        return None
    *leading, tokens, heads, width = shape
    if heads == 1 and not leading:
        return None
    if heads * width != view.features or tokens != view.tokens or any(extent != 1 for extent in leading):
        return None
    return replace(view, axes="1" * len(leading) + "mhd", heads=heads)


def _split_pixels(view: View, shape: tuple[int, ...]) -> View | None:
    """`[.., n, m]` to `[.., n, lines, pixels of a line]`."""
    if view.axes != "nm" or len(shape) < 3 or any(extent != 1 for extent in shape[:-3]):
        return None
    if shape[-3] != view.features or shape[-2] * shape[-1] != view.tokens:
        return None
    return replace(view, axes="1" * (len(shape) - 3) + "nyx", line=shape[-1])


def _with_units(view: View, shape: tuple[int, ...]) -> str | None:
    """Names for the axes of `shape`: those longer than 1 in their order, names of extent 1 to the left of them.

    None when the longer axes are not those of the view. A name of extent 1 that finds no axis is left out.
    """
    names: list[str] = []
    left = list(view.axes)
    for extent in reversed(shape):
        while left and extent != 1 and view.extent(left[-1]) == 1:
            left.pop()
        if left and view.extent(left[-1]) == extent:
            names.append(left.pop())
        elif extent == 1:
            names.append("1")
        else:
            return None
    return None if any(view.extent(axis) != 1 for axis in left) else "".join(reversed(names))
