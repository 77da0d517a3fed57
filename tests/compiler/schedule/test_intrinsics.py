"""Intrinsics, built node by node, are the functions that TVMScript would make of their meaning and of their call."""

from __future__ import annotations

from typing import Any

import pytest

from firsttoken_compiler.schedule import intrinsics
from firsttoken_compiler.tvm.api import TensorIntrin, parse_function, tvm

HEAD = "@T.prim_func(s_tir=True)\n"
COPY = (
    HEAD
    + """def meaning(
    S: T.Buffer((1, 5, 8), "float16", offset_factor=1, scope="global"),
    D: T.Buffer((1, 5, 8), "float16", offset_factor=1, scope="global.spad"),
):
    with T.sblock("root"):
        T.reads(S[0:1, 0:5, 0:8])
        T.writes(D[0:1, 0:5, 0:8])
        for x in T.serial(1):
            for y in T.serial(5):
                for z in T.serial(8):
                    with T.sblock("tile"):
                        vy = T.axis.spatial(5, y)
                        vz = T.axis.spatial(8, z)
                        D[0, vy, vz] = S[0, vy, vz]
""",
    HEAD
    + """def becomes(hS: T.handle, hD: T.handle):
    Sx = T.int32()
    Sy = T.int32()
    Sz = T.int32()
    Dx = T.int32()
    Dy = T.int32()
    Dz = T.int32()
    S = T.match_buffer(hS, (1, 5, 8), "float16", offset_factor=1, scope="global", strides=[Sx, Sy, Sz])
    D = T.match_buffer(hD, (1, 5, 8), "float16", offset_factor=1, scope="global.spad", strides=[Dx, Dy, Dz])
    with T.sblock("root"):
        T.reads(S[0:1, 0:5, 0:8])
        T.writes(D[0:1, 0:5, 0:8])
        T.evaluate(T.call_extern(
            "int32", "npu.copy:p,k,j", D.access_ptr("w"), S.access_ptr("r"), 1, 5, 8, Dx, Dy, Dz, Sx, Sy, Sz))
""",
)
PRODUCT = (
    HEAD
    + """def meaning(
    A: T.Buffer((4, 64), "int8", offset_factor=1, scope="global.spad"),
    W: T.Buffer((2, 64, 32), "int4", offset_factor=1, scope="global.weights"),
    C: T.Buffer((4, 2, 32), "int32", offset_factor=1, scope="global.acc"),
):
    with T.sblock("root"):
        T.reads(C[0:4, 0:2, 0:32], A[0:4, 0:64], W[0:2, 0:64, 0:32])
        T.writes(C[0:4, 0:2, 0:32])
        for m in T.serial(4):
            for p in T.serial(2):
                for j in T.serial(32):
                    for k in T.serial(64):
                        with T.sblock("tile"):
                            vm = T.axis.spatial(4, m)
                            vp = T.axis.spatial(2, p)
                            vj = T.axis.spatial(32, j)
                            vk = T.axis.reduce(64, k)
                            C[vm, vp, vj] = C[vm, vp, vj] + T.Cast("int32", A[vm, vk]) * T.Cast("int32", W[vp, vk, vj])
""",
    HEAD
    + """def becomes(hA: T.handle, hW: T.handle, hC: T.handle):
    Am = T.int32()
    Ak = T.int32()
    Wp = T.int32()
    Wk = T.int32()
    Wj = T.int32()
    Cm = T.int32()
    Cp = T.int32()
    Cj = T.int32()
    A = T.match_buffer(hA, (4, 64), "int8", offset_factor=1, scope="global.spad", strides=[Am, Ak])
    W = T.match_buffer(hW, (2, 64, 32), "int4", offset_factor=1, scope="global.weights", strides=[Wp, Wk, Wj])
    C = T.match_buffer(hC, (4, 2, 32), "int32", offset_factor=1, scope="global.acc", strides=[Cm, Cp, Cj])
    with T.sblock("root"):
        T.reads(C[0:4, 0:2, 0:32], A[0:4, 0:64], W[0:2, 0:64, 0:32])
        T.writes(C[0:4, 0:2, 0:32])
        T.evaluate(T.call_extern("int32", "npu.matmul:m,p,k", C.access_ptr("rw"), A.access_ptr("r"),
            W.access_ptr("r"), 4, 64, 64, 32, Cm, Am, Wp, Wk))
""",
)


@pytest.mark.parametrize(
    ("texts", "name"),
    [
        (COPY, lambda: intrinsics.copy((1, 5, 8), "float16", "global", intrinsics.SPAD, "p,k,j")),
        (PRODUCT, lambda: intrinsics.matmul(4, 2, 64, 32, "int8", "int4", "int32", intrinsics.SPAD)),
    ],
)
def test_functions_are_those_of_the_script(texts: tuple[str, str], name: Any) -> None:
    made = TensorIntrin.get(name())
    for function, text in zip((made.desc, made.impl), texts, strict=True):
        tvm.ir.assert_structural_equal(function, parse_function(text), map_free_vars=True)
        assert str(function) == str(parse_function(text))


def test_a_shape_is_registered_once() -> None:
    first = intrinsics.attend(3, 7, 16, "m,n,k", True, "global", intrinsics.SPAD, "float16")
    made = TensorIntrin.get(first)
    assert intrinsics.attend(3, 7, 16, "m,n,k", True, "global", intrinsics.SPAD, "float16") == first
    assert TensorIntrin.get(first).same_as(made)
    assert intrinsics.attend(3, 7, 16, "m,n,k", False, "global", intrinsics.SPAD, "float16") != first
