"""TVM 0.27 behind one door: every name of it that the compiler uses, and the check of its two pins.

Each minor release of TVM has moved or dropped part of this surface, so a change of version is a change of this file.
"""

import importlib.metadata
from typing import Any, Final

import tvm
import tvm_ffi
from tvm import relax, s_tir, te, tirx
from tvm.ir import Call, GenericConst, GlobalVar, IRModule, Op
from tvm.relax import dpl, transform
from tvm.relax.dpl import is_op, wildcard
from tvm.relax.frontend.onnx import onnx_frontend
from tvm.s_tir import Schedule as CheckedSchedule
from tvm.s_tir import TensorIntrin
from tvm.s_tir.schedule import Trace
from tvm.script import from_source
from tvm.script import ir as I
from tvm.script import tirx as T
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as tir_builder

PINS: Final = {"apache-tvm": "0.27.0.post1", "apache-tvm-ffi": "0.1.14.post1"}

for _package, _version in PINS.items():
    _found = importlib.metadata.version(_package)
    if _found != _version:
        # ffi 0.1.15 ends in a segmentation fault inside Schedule.tensorize; better a sentence than a crash.
        raise ImportError(
            f"firsttoken needs {_package}=={_version}, found {_found}: pip install {_package}=={_version}"
        )

__all__ = [
    "Call", "GenericConst", "GlobalVar", "IRBuilder", "IRModule", "Op", "Schedule", "TensorIntrin", "Trace",
    "bindings_of", "dpl", "is_op", "is_static", "items", "onnx_frontend", "parse_function", "relax", "s_tir", "te",
    "tir_builder", "tirx", "transform", "tvm", "wildcard",
]  # fmt: skip


class Schedule(CheckedSchedule):
    """TVM's schedule without its checks of the Python types of all arguments, which take a third of its time."""


for _name, _method in vars(CheckedSchedule).items():
    if hasattr(_method, "__wrapped__"):
        setattr(Schedule, _name, _method.__wrapped__)

_element, _length = (tvm_ffi.get_global_func(f"ffi.Array{name}") for name in ("GetItem", "Size"))


def items(array: Any) -> list[Any]:
    """Elements of an array of TVM, whose own iterator asks for the length again and again."""
    return [_element(array, index) for index in range(_length(array))]


def bindings_of(function: Any) -> list[Any]:
    """The bindings of a Relax function, in order."""
    return [binding for block in items(function.body.blocks) for binding in items(block.bindings)]


def attributes(**values: object) -> object:
    """Attribute dictionary of a Relax call."""
    return tvm.ir.make_node("ir.DictAttrs", **values)


def shape_of(expr: Any) -> tuple[int, ...]:
    """Static shape of a typed Relax expression."""
    shape = expr.ty.shape
    if type(shape) is not relax.ShapeExpr:
        return tuple(int(extent) for extent in shape)  # raises
    return tuple([int(extent) for extent in items(shape.values)])


def operator_name(value: Any) -> str:
    """Name of a call's operator, such as `npu.linear`; empty for everything that is no call of one."""
    return str(getattr(value.op, "name", "")) if isinstance(value, Call) else ""


def is_static(expr: Any) -> bool:
    """Whether every extent of a tensor is known."""
    shape = expr.ty.shape  # a variable where the shape is computed
    known = shape is not None and not isinstance(shape, relax.Var)
    extents = items(shape.values) if type(shape) is relax.ShapeExpr else shape
    return known and all(isinstance(extent, (int, tirx.IntImm)) for extent in extents)


def dtype_of(expr: Any) -> str:
    """Element type of a typed Relax expression."""
    return str(expr.ty.dtype.dtype)


def parse_function(text: str) -> object:
    """The PrimFunc of a TVMScript text."""
    return from_source(text, {"T": T})


def module_of(function: Any) -> Any:
    """The module whose `main` is a PrimFunc; a module itself."""
    return function if isinstance(function, IRModule) else IRModule({"main": function})


def parse_module(text: str) -> Any:
    """The module of a TVMScript text."""
    return from_source(text, {"T": T, "I": I})


def same_structure(a: Any, b: Any) -> bool:
    """Whether two modules are equal but for the names of their variables."""
    try:
        tvm.ir.assert_structural_equal(a, b)
    except ValueError:
        return False
    return True
