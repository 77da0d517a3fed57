"""Tensor intrinsics of the NPU for `Schedule.tensorize`: DMA copies and matrix products of one tile.

Each shape is registered once per process: parsing one takes longer than scheduling with it. The call that an
intrinsic becomes names the kernel's axes, so that the instruction of a ragged tile can be cut.
"""

from __future__ import annotations

import functools
from typing import Final

from firsttoken_compiler.tvm.api import TensorIntrin, parse_function

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
    def shape(self) -> str:
        return "(" + "".join(f"{self.extents[axis]}, " for axis in self.axes) + ")"

    @property
    def whole(self) -> str:
        """The region that is all of it."""
        return f"{self.name}[{', '.join(f'0:{self.extents[axis]}' for axis in self.axes)}]"

    @property
    def element(self) -> str:
        """The element at the block's point; TVM drops dimensions of extent 1, so they are constant here."""
        return f"{self.name}[{', '.join('0' if self.extents[axis] == 1 else f'v{axis}' for axis in self.axes)}]"

    def stride(self, axis: str) -> str:
        return f"{self.name}{axis}"

    def declaration(self, strides: bool) -> str:
        names = f", strides=[{', '.join(self.stride(a) for a in self.axes)}]" if strides else ""
        return f'{self.shape}, "{self.dtype}", offset_factor=1, scope="{self.scope}"{names}'


def _register(
    name: str, operands: list[_Operand], axes: str, reduced: str, value: str, call: str, extra: list[str]
) -> None:
    """Registers `operands[0] = value` over `axes`; `call` is the extern's name, `extra` its numbers."""
    extents = {axis: extent for operand in operands for axis, extent in operand.extents.items()}
    out, *inputs = operands
    reads = ([out.whole] if reduced else []) + [operand.whole for operand in inputs]
    meaning = ["@T.prim_func(s_tir=True)", "def meaning("]
    meaning += [f"    {o.name}: T.Buffer({o.declaration(False)})," for o in (*inputs, out)]
    meaning += [
        "):",
        '    with T.sblock("root"):',
        f"        T.reads({', '.join(reads)})",
        f"        T.writes({out.whole})",
    ]
    indent = "        "
    for axis in axes:
        meaning.append(f"{indent}for {axis} in T.serial({extents[axis]}):")
        indent += "    "
    meaning.append(f'{indent}with T.sblock("tile"):')
    for axis in (axis for axis in axes if extents[axis] > 1):
        kind = "reduce" if axis in reduced else "spatial"
        meaning.append(f"{indent}    v{axis} = T.axis.{kind}({extents[axis]}, {axis})")
    meaning.append(f"{indent}    {out.element} = {value}")
    becomes = ["@T.prim_func(s_tir=True)", f"def becomes({', '.join(f'h{o.name}: T.handle' for o in (*inputs, out))}):"]
    for operand in (*inputs, out):
        becomes += [f"    {operand.stride(axis)} = T.int32()" for axis in operand.axes]
    becomes += [f"    {o.name} = T.match_buffer(h{o.name}, {o.declaration(True)})" for o in (*inputs, out)]
    becomes += ['    with T.sblock("root"):', f"        T.reads({', '.join(reads)})", f"        T.writes({out.whole})"]
    pointers = [f'{out.name}.access_ptr("{"rw" if reduced else "w"}")', *(f'{o.name}.access_ptr("r")' for o in inputs)]
    becomes.append(f'        T.evaluate(T.call_extern("int32", "{call}", {", ".join([*pointers, *extra])}))')
    TensorIntrin.register(name, parse_function("\n".join(meaning)), parse_function("\n".join(becomes)))


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
    numbers = [*map(str, extents), *(out.stride(a) for a in letters), *(of.stride(a) for a in letters)]
    name = f"npu_copy_{'x'.join(map(str, extents))}_{dtype}_{source}_{destination}_{axes}"
    _register(name, [out, of], letters, "", of.element, f"npu.copy:{axes}", numbers)
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
    numbers = [
        str(m),
        str(p * panel),
        str(k),
        str(panel),
        c.stride("m"),
        left.stride("m"),
        right.stride("p"),
        right.stride("k"),
    ]
    name = f"npu_matmul_{m}x{p}x{k}x{panel}_{a}_{w}_{acc}_{a_scope}"
    value = f'{c.element} + T.Cast("{acc}", {left.element}) * T.Cast("{acc}", {right.element})'
    _register(name, [c, left, right], "mpjk", "k", value, "npu.matmul:m,p,k", numbers)
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
    numbers = [str(m), str(n), str(k), str(panel), c.stride("m"), left.stride("m"), "0", right.stride(right.axes[1])]
    name = f"npu_attend_{m}x{n}x{k}_{axes}_{transposed}_{a_scope}_{w_scope}_{w}"
    value = f'{c.element} + T.Cast("float32", {left.element}) * T.Cast("float32", {right.element})'
    _register(name, [c, left, right], "bmnk", "k", value, f"npu.matmul:{axes}", numbers)
    return name
