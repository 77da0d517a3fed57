"""The value of an ONNX node whose inputs are known: numpy for moves and whole numbers, onnxruntime for the rest.

What is computed here is bit for bit what onnxruntime computes from the file. The caller checks sizes beforehand.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

MAX_ELEMENTS: Final = 1 << 22
"""Elements of a value that is computed, and of each that it is computed from."""
MAX_OPERATIONS: Final = 1 << 27
"""Arithmetic of one node."""
MAX_WORK: Final = 1 << 30
"""Elements of all values that are computed or read, so that no graph takes long."""
MAX_SESSIONS: Final = 4096
"""Nodes that onnxruntime computes, about half a millisecond each."""
BOUNDED: Final = ("Compress", "NonZero", "Unique")
"""Operators whose results have no static shape, but never more than a few times the elements of their inputs."""
BY_RUNTIME: Final = frozenset((
    "Abs", "Acos", "Acosh", "And", "ArgMax", "ArgMin", "Asin", "Asinh", "Atan", "Atanh", "BitShift", "BitwiseAnd",
    "BitwiseNot", "BitwiseOr", "BitwiseXor", "Cast", "CastLike", "Ceil", "Celu", "Clip", "Compress", "Cos", "Cosh",
    "CumSum", "DequantizeLinear", "Div", "Elu", "Equal", "Erf", "Exp", "EyeLike", "Floor", "Gather", "GatherElements",
    "GatherND", "Gelu", "Gemm", "Greater", "GreaterOrEqual", "HardSigmoid", "HardSwish", "Hardmax", "IsInf", "IsNaN",
    "LayerNormalization", "LeakyRelu", "Less", "LessOrEqual", "Log", "LogSoftmax", "MatMul", "Max", "Mean", "Min",
    "Mish", "Mod", "NonZero", "Not", "OneHot", "Or", "Pad", "Pow", "QuantizeLinear", "Range", "Reciprocal", "ReduceL1",
    "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd", "ReduceSum",
    "ReduceSumSquare", "Relu", "Round", "ScatterElements", "ScatterND", "Selu", "Sigmoid", "Sign", "Sin", "Sinh",
    "Softmax", "Softplus", "Softsign", "Split", "Sqrt", "Sum", "Swish", "Tan", "Tanh", "ThresholdedRelu", "Tile",
    "TopK", "Trilu", "Unique", "Xor",
))  # fmt: skip
"""Operators of the default domain that onnxruntime may compute at import: deterministic, of bounded effort."""


@dataclass(frozen=True)
class Task:
    """A node with what is known about it."""

    node: Any
    inputs: Sequence[Array | None]
    """None for an input that is left away."""
    types: Sequence[int]
    """ONNX element types of the results."""
    shapes: Sequence[tuple[int, ...] | None]
    """Of the results; None where it is not known beforehand."""
    attributes: Mapping[str, Any]
    opset: int

    @property
    def dtype(self) -> Any:
        """Numpy type of the first result."""
        from onnx import helper

        return helper.tensor_dtype_to_np_dtype(self.types[0])

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the first result."""
        assert self.shapes[0] is not None
        return self.shapes[0]


def foldable(node: Any) -> bool:
    """Whether the node could be computed here, were its inputs known."""
    if node.op_type == "Pad" and any(a.name == "mode" and a.s != b"constant" for a in node.attribute):
        return False  # what it reads beyond the edges is not checked beforehand
    return not node.domain and (node.op_type in _NUMPY or node.op_type in BY_RUNTIME)


def by_numpy(node: Any) -> bool:
    """Whether numpy is tried first."""
    return node.op_type in _NUMPY


def evaluate(task: Task, runtime: bool = True) -> list[Array] | None:
    """Values of the results; None where they cannot be computed here, or not without onnxruntime (the node then stays).

    `runtime`: whether onnxruntime may be asked.
    """
    rule = _NUMPY.get(task.node.op_type)
    if rule is not None and (task.shapes[0] is not None):
        with np.errstate(all="ignore"):
            try:
                value = rule(task)
            except (ValueError, TypeError, IndexError, KeyError, OverflowError):
                return None
        if value is not None:
            value = np.asarray(value)
            return [value] if _fits(task, [value]) else None
    if _divides_by_zero(task):
        return None
    if task.node.op_type not in BY_RUNTIME or not runtime:
        return None
    values = _by_onnxruntime(task)
    return values if values is not None and _fits(task, values) else None


def _divides_by_zero(task: Task) -> bool:
    """Whether onnxruntime would end the process: whole numbers over zero."""
    if task.node.op_type not in ("Div", "Mod") or len(task.inputs) < 2 or task.inputs[1] is None:
        return False
    return task.inputs[1].dtype.kind in "iu" and not np.all(task.inputs[1])


def _fits(task: Task, values: list[Array]) -> bool:
    """Whether results have the types and shapes that the operator's definition gives them."""
    from onnx import helper

    for value, kind, shape in zip(values, task.types, task.shapes, strict=False):
        if value.dtype != helper.tensor_dtype_to_np_dtype(kind) or (shape is not None and value.shape != shape):
            return False
    return True


def _by_onnxruntime(task: Task) -> list[Array] | None:
    import onnxruntime
    from onnx import helper

    given = [(name, array) for name, array in zip(task.node.input, task.inputs, strict=True) if array is not None]
    feeds = dict(given)
    if any(array.dtype.kind not in "fiub" for array in feeds.values()):  # bfloat16, int4 and the like
        return None
    infos = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
        for name, array in feeds.items()
    ]
    names = [name for name in task.node.output if name]
    outputs = [helper.make_tensor_value_info(name, kind, None) for name, kind in zip(names, task.types, strict=False)]
    graph = helper.make_graph([task.node], "fold", infos, outputs)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", task.opset)], ir_version=8)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        return [np.asarray(value) for value in session.run(names, feeds)]
    except Exception:  # what onnxruntime refuses is left in the graph, where the reason is given again
        return None


def _first(task: Task) -> Array:
    assert task.inputs[0] is not None
    return task.inputs[0]


def _arrays(task: Task) -> list[Array]:
    return [array for array in task.inputs if array is not None]


def _reshape(task: Task) -> Array:
    return _first(task).reshape(task.shape)


def _expand(task: Task) -> Array:
    return np.array(np.broadcast_to(_first(task), task.shape))


def _gather(task: Task) -> Array:
    data, indices = _arrays(task)
    return np.asarray(np.take(data, indices, axis=task.attributes.get("axis", 0), mode="raise"))


def _concat(task: Task) -> Array:
    return np.concatenate(_arrays(task), axis=task.attributes["axis"])


def _slice(task: Task) -> Array | None:
    data, starts, ends, axes, steps = (*task.inputs, None, None)[:5]
    if data is None or starts is None or ends is None:
        return None
    first = [int(value) for value in starts]
    where = list(range(len(first))) if axes is None else [int(value) for value in axes]
    stride = [1] * len(first) if steps is None else [int(value) for value in steps]
    cut = [slice(None)] * data.ndim
    for axis, start, end, step in zip(where, first, map(int, ends), stride, strict=True):
        if step == 0:
            return None
        extent = data.shape[axis]
        if step < 0 and end < -extent:
            cut[axis] = slice(start, None, step)
        else:
            cut[axis] = slice(start, end, step)
    return np.array(data[tuple(cut)])


def _cast(task: Task) -> Array | None:
    data, dtype = _first(task), np.dtype(task.dtype)
    if data.dtype.kind not in "fiub" or dtype.kind not in "fiub":
        return None
    if data.dtype.kind == "f" and dtype.kind in "iu" and not np.all(np.abs(data) < 2.0**31):
        return None
    return data.astype(dtype)


def _constant_of_shape(task: Task) -> Array:
    from onnx import numpy_helper

    value = task.attributes.get("value")
    fill = np.zeros(1, np.float32) if value is None else numpy_helper.to_array(value)
    return np.full(task.shape, fill.reshape(-1)[0], fill.dtype)


def _range(task: Task) -> Array | None:
    start, limit, delta = (array.reshape(()) for array in _arrays(task))
    if start.dtype.kind not in "iu" or not delta:
        return None
    return np.arange(int(start), int(limit), int(delta), dtype=start.dtype)


def _divide(task: Task) -> Array | None:
    """Whole numbers are divided towards zero; by zero they are not."""
    left, right = _arrays(task)
    if left.dtype.kind not in "iu":
        return np.asarray(left / right, left.dtype) if left.dtype in (np.float32, np.float64) else None
    if not np.all(right):
        return None
    quotient = left // right
    if left.dtype.kind == "i":
        quotient += (left % right != 0) & ((left < 0) != (right < 0))
    return np.asarray(quotient, left.dtype)


def _modulo(task: Task) -> Array | None:
    left, right = _arrays(task)
    if left.dtype.kind not in "iu" or not np.all(right):
        return None
    return np.fmod(left, right) if task.attributes.get("fmod", 0) else np.mod(left, right)


def _exact(operation: Callable[..., Any]) -> Callable[[Task], Array | None]:
    """An elementwise operation of two operands whose result numpy and onnxruntime round in the same way."""

    def rule(task: Task) -> Array | None:
        left, right = _arrays(task)
        if left.dtype.kind == "f" and left.dtype.itemsize < 4:
            return None
        return np.asarray(operation(left, right))

    return rule


def _where(task: Task) -> Array:
    condition, left, right = _arrays(task)
    return np.asarray(np.where(condition, left, right))


def _transpose(task: Task) -> Array:
    return np.array(np.transpose(_first(task), task.attributes.get("perm")), order="C")


def _negate(task: Task) -> Array:
    return np.asarray(-_first(task))


def _not(task: Task) -> Array:
    return np.asarray(np.logical_not(_first(task)))


_NUMPY: Final[Mapping[str, Callable[[Task], Array | None]]] = {
    "Add": _exact(np.add), "And": _exact(np.logical_and), "Cast": _cast, "Concat": _concat,
    "ConstantOfShape": _constant_of_shape, "Div": _divide, "Equal": _exact(np.equal), "Expand": _expand,
    "Flatten": _reshape, "Gather": _gather, "Greater": _exact(np.greater),
    "GreaterOrEqual": _exact(np.greater_equal), "Identity": _reshape, "Less": _exact(np.less),
    "LessOrEqual": _exact(np.less_equal), "Mod": _modulo, "Mul": _exact(np.multiply), "Neg": _negate, "Not": _not,
    "Or": _exact(np.logical_or), "Range": _range, "Reshape": _reshape, "Slice": _slice, "Squeeze": _reshape,
    "Sub": _exact(np.subtract), "Transpose": _transpose, "Unsqueeze": _reshape, "Where": _where,
}  # fmt: skip
