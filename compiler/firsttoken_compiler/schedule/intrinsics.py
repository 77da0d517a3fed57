"""Tensor intrinsics of the NPU for `Schedule.tensorize`: DMA copies and matrix products of one tile.

Each shape is registered once per process, built without TVMScript, whose parser takes longer than scheduling. The call
that an intrinsic becomes names the kernel's axes, so that the instruction of a ragged tile can be cut.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, Final, NamedTuple

from firsttoken_compiler.tvm.api import IRBuilder, TensorIntrin
from firsttoken_compiler.tvm.api import tir_builder as T

WEIGHTS: Final = "global.weights"
"""Scope of weight tiles in the scratchpad."""
SPAD: Final = "global.spad"
ACC: Final = "global.acc"
"""Scope of the accumulators."""


class _Operand:
    """A buffer of an intrinsic: its name, the axes that index it, its extents, type and scope."""

    def __init__(self, name: str, axes: str, extents: dict[str, int], dtype: str, scope: str) -> None:
        self.name, self.axes, self.extents, self.dtype, self.scope = name, axes, extents, dtype, scope

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.extents[axis] for axis in self.axes)

    def whole(self, buffer: Any) -> Any:
        """The region that is all of it."""
        return buffer[tuple(slice(0, extent) for extent in self.shape)]

    def point(self, at: dict[str, Any]) -> list[Any]:
        """Indices of the block's point; TVM drops dimensions of extent 1, so they are constant here."""
        return [0 if self.extents[axis] == 1 else at[axis] for axis in self.axes]

    def stride(self, axis: str) -> str:
        return f"{self.name}{axis}"


class _Product(NamedTuple):
    """What an intrinsic adds to its result: the product of its inputs in this type."""

    dtype: str


def _register(
    name: str, operands: list[_Operand], axes: str, reduced: str, value: _Product | None, call: str,
    extra: Sequence[int | str],
) -> None:  # fmt: skip
    """Registers `operands[0] = value` over `axes`, without a value a copy of the only input.

    `call` is the extern's name, `extra` its numbers: constants and names of strides.
    """
    TensorIntrin.register(name, _meaning(operands, axes, reduced, value), _becomes(operands, reduced, call, extra))


def _meaning(operands: list[_Operand], axes: str, reduced: str, value: _Product | None) -> Any:
    """The loops that the intrinsic stands for."""
    extents = {axis: extent for operand in operands for axis, extent in operand.extents.items()}
    out, *inputs = operands
    with IRBuilder() as builder, ExitStack() as stack:
        stack.enter_context(T.prim_func(s_tir=True))
        T.func_name("meaning")
        buffers = {
            o.name: T.arg(o.name, T.buffer(o.shape, o.dtype, offset_factor=1, scope=o.scope)) for o in (*inputs, out)
        }
        _enter_root(stack, operands, buffers, reduced)
        loops = {}
        for axis in axes:
            loops[axis] = _named(axis, stack.enter_context(T.serial(extents[axis])))
        stack.enter_context(T.sblock("tile"))
        at = {}
        for axis in (axis for axis in axes if extents[axis] > 1):
            kind = T.axis.reduce if axis in reduced else T.axis.spatial
            at[axis] = _named(f"v{axis}", kind(extents[axis], loops[axis]))
        to, read = out.point(at), [buffers[o.name][tuple(o.point(at))] for o in inputs]
        if value is None:
            T.buffer_store(buffers[out.name], read[0], to)
        else:
            left, right = (T.Cast(value.dtype, part) for part in read)
            T.buffer_store(buffers[out.name], buffers[out.name][tuple(to)] + left * right, to)
    return builder.get()


def _becomes(operands: list[_Operand], reduced: str, call: str, extra: Sequence[int | str]) -> Any:
    """The call that takes the place of the loops."""
    out, *inputs = operands
    with IRBuilder() as builder, ExitStack() as stack:
        stack.enter_context(T.prim_func(s_tir=True))
        T.func_name("becomes")
        handles = {o.name: T.arg(f"h{o.name}", T.handle()) for o in (*inputs, out)}
        strides = {o.stride(axis): _named(o.stride(axis), T.int32()) for o in (*inputs, out) for axis in o.axes}
        buffers = {}
        for o in (*inputs, out):
            matched = T.match_buffer(
                handles[o.name], o.shape, o.dtype, offset_factor=1, scope=o.scope,
                strides=[strides[o.stride(axis)] for axis in o.axes],
            )  # fmt: skip
            buffers[o.name] = _named(o.name, matched)
        _enter_root(stack, operands, buffers, reduced)
        pointers = [buffers[out.name].access_ptr("rw" if reduced else "w")]
        pointers += [buffers[o.name].access_ptr("r") for o in inputs]
        numbers = [strides[number] if isinstance(number, str) else number for number in extra]
        T.evaluate(T.call_extern("int32", call, *pointers, *numbers))
    return builder.get()


def _enter_root(stack: ExitStack, operands: list[_Operand], buffers: dict[str, Any], reduced: str) -> None:
    """The block around everything, which says what is read and written."""
    out, *inputs = operands
    stack.enter_context(T.sblock("root"))
    T.reads(*(o.whole(buffers[o.name]) for o in ((out, *inputs) if reduced else inputs)))
    T.writes(out.whole(buffers[out.name]))


def _named(name: str, value: Any) -> Any:
    IRBuilder.name(name, value)
    return value


def of_name(name: str) -> None:
    """Registers the intrinsic of a name that `copy`, `matmul` or `attend` made; raises ValueError for another name."""
    maker, _, rest = name.removeprefix("npu_").partition("_")
    sizes, *words = rest.split("_")
    extents = tuple(int(extent) for extent in sizes.split("x"))
    if maker == "copy":
        made = copy(extents, *words)
    elif maker == "matmul":
        made = matmul(*extents, *words)
    elif maker == "attend":
        axes, transposed, *more = words
        made = attend(*extents, axes, transposed == "True", *more)
    else:
        raise ValueError(f"{name!r} is no intrinsic of an NPU")
    if made != name:
        raise ValueError(f"{name!r} is no intrinsic of an NPU; it reads as {made!r}")


@functools.cache
def copy(extents: tuple[int, ...], dtype: str, source: str, destination: str, axes: str) -> str:
    """Name of the intrinsic that copies a block of rank 1 to 3 between DRAM (`global`) and the scratchpad.

    Becomes `npu.copy:axes(destination, source, extents..., destination strides..., source strides...)`.
    """
    letters = "xyz"[: len(extents)]
    sizes = dict(zip(letters, extents, strict=True))
    out, of = _Operand("D", letters, sizes, dtype, destination), _Operand("S", letters, sizes, dtype, source)
    numbers: list[int | str] = [*extents, *(out.stride(a) for a in letters), *(of.stride(a) for a in letters)]
    name = f"npu_copy_{'x'.join(map(str, extents))}_{dtype}_{source}_{destination}_{axes}"
    _register(name, [out, of], letters, "", None, f"npu.copy:{axes}", numbers)
    return name


@functools.cache
def matmul(m: int, p: int, k: int, panel: int, a: str, w: str, acc: str, a_scope: str) -> str:
    """Name of the intrinsic acc[m, p, panel] += a[m, k] x w[p, k, panel].

    Becomes `npu.matmul:m,p,k(acc, a, w, m, n, k, panel, strides: acc row, a row, w panel, w row)`.
    """
    sizes = {"m": m, "p": p, "j": panel, "k": k}
    c, left, right = (
        _Operand("C", "mpj", sizes, acc, ACC), _Operand("A", "mk", sizes, a, a_scope),
        _Operand("W", "pkj", sizes, w, WEIGHTS),
    )  # fmt: skip
    strides = [c.stride("m"), left.stride("m"), right.stride("p"), right.stride("k")]
    numbers: list[int | str] = [m, p * panel, k, panel, *strides]
    name = f"npu_matmul_{m}x{p}x{k}x{panel}_{a}_{w}_{acc}_{a_scope}"
    _register(name, [c, left, right], "mpjk", "k", _Product(acc), "npu.matmul:m,p,k", numbers)
    return name


@functools.cache
def attend(m: int, n: int, k: int, axes: str, transposed: bool, a_scope: str, w_scope: str, w: str) -> str:
    """Name of the intrinsic acc[b, m, n] += a[b, m, k] x w of fp16 by the type `w` with fp32 sums, b = 1.

    w is [b, n, k] when transposed, else [b, k, n].

    Becomes `npu.matmul:axes(acc, a, w, m, n, k, panel, strides: acc row, a row, 0, w row)`, panel 0 when transposed.
    """
    sizes = {"b": 1, "m": m, "n": n, "k": k}
    c, left = _Operand("C", "bmn", sizes, "float32", ACC), _Operand("A", "bmk", sizes, "float16", a_scope)
    right = _Operand("W", "bnk" if transposed else "bkn", sizes, w, w_scope)
    panel = 0 if transposed else n
    numbers: list[int | str] = [m, n, k, panel, c.stride("m"), left.stride("m"), 0, right.stride(right.axes[1])]
    name = f"npu_attend_{m}x{n}x{k}_{axes}_{transposed}_{a_scope}_{w_scope}_{w}"
    _register(name, [c, left, right], "bmnk", "k", _Product("float32"), f"npu.matmul:{axes}", numbers)
    return name
