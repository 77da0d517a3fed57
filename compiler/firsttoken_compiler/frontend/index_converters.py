"""Gather, GatherND and ScatterND whose constant indices only say, in other words, "all elements in their order".

Exporters write them for the indexing of masks; as reshapes they cost nothing. The rest is TVM's.
"""

import math
from typing import Any

import numpy as np

from firsttoken_compiler.frontend.conversion import Converter
from firsttoken_compiler.tvm.api import GenericConst, dtype_of, onnx_frontend, relax, shape_of


def _offsets(indices: Any, shape: tuple[int, ...]) -> np.ndarray | None:
    """Flat offsets of the elements that index tuples of full length name; None for computed or partial ones."""
    if not isinstance(indices, GenericConst):
        return None
    array = np.asarray(indices.value.numpy())
    if not array.ndim or array.shape[-1] != len(shape) or 0 in (*shape, *array.shape):
        return None
    extents = np.array(shape)
    if ((array < -extents) | (array >= extents)).any():
        return None
    return np.ravel_multi_index(tuple(np.moveaxis(array % extents, -1, 0)), shape)


def _in_order(indices: Any, shape: tuple[int, ...]) -> bool:
    offsets = _offsets(indices, shape)
    return offsets is not None and np.array_equal(offsets.reshape(-1), np.arange(math.prod(shape)))


def is_whole(table: Any, ids: Any, attrs: dict[str, Any]) -> bool:
    """Whether a Gather along the first axis takes all of it, in order."""
    if int(attrs.get("axis", 0)) or not isinstance(table, relax.Var) or not isinstance(ids, GenericConst):
        return False
    return bool(shape_of(table)) and math.prod(shape_of(ids)) > 1 and _in_order(ids_of_rows(ids), shape_of(table)[:1])


def ids_of_rows(ids: Any) -> Any:
    """Row numbers as index tuples of one number."""
    array = ids.value.numpy()
    return relax.const(array.reshape(*array.shape, 1))


def gather_nd(builder: Any, inputs: Any, attrs: dict[str, Any], params: Any) -> Any:
    """A reshape where every element is gathered once, in order."""
    data, indices = inputs
    if not int(attrs.get("batch_dims", 0)) and _in_order(indices, shape_of(data)):
        return relax.op.reshape(data, shape_of(indices)[:-1])
    return onnx_frontend.GatherND._impl_v13(builder, inputs, attrs, params)


def scatter_nd(builder: Any, inputs: Any, attrs: dict[str, Any], params: Any) -> Any:
    """The updates themselves where every element is written once, in order."""
    data, indices, updates = inputs
    plain = attrs.get("reduction", b"none") in (b"none", "none")
    if plain and dtype_of(data) == dtype_of(updates) and _in_order(indices, shape_of(data)):
        return relax.op.reshape(updates, shape_of(data))
    return onnx_frontend.ScatterND._impl_v18(builder, inputs, attrs, params)


CONVERTERS: dict[str, Converter] = {
    "GatherND": gather_nd,
    "ScatterND": scatter_nd,
}
