"""Boolean masks of ONNX Attention become masks that are added to the scores, once per mask, as the NPU takes them."""

from collections.abc import Collection
from dataclasses import replace
from typing import Any, Final

import numpy as np

from firsttoken_compiler.frontend.onnx_file import Initializer, OnnxStudent, with_nodes
from firsttoken_compiler.frontend.partition import value_types

BOOL, FLOAT = 9, 1
MASK: Final = 3
"""Which input of Attention the mask is."""
MASKED: Final = -1e30
"""Added to a score it leaves a weight of exactly 0, unless all of a row is masked."""
ZERO_NAME, MASKED_NAME = "firsttoken.allowed", "firsttoken.masked"


def add_masks(student: OnnxStudent) -> OnnxStudent:
    """The student with a Where behind every computed boolean mask of an Attention; itself if there is none."""
    from onnx import helper, numpy_helper

    masked = [node for node in student.graph.node if node.op_type == "Attention" and not node.domain]
    if not any(len(node.input) > MASK and node.input[MASK] for node in masked):
        return student
    types = value_types(student)
    nodes: list[Any] = []
    added: dict[str, str] = {}
    infos = []
    for node in student.graph.node:
        copy = node
        name = node.input[MASK] if node.op_type == "Attention" and not node.domain and len(node.input) > MASK else ""
        kind = types.get(name)
        if kind is not None and kind.elem_type == BOOL and name not in student.initializers:
            if name not in added:
                added[name] = f"{name}.added"
                inputs = [name, ZERO_NAME, MASKED_NAME]
                nodes.append(helper.make_node("Where", inputs, [added[name]], name=f"{node.name}.mask"))
                infos.append(helper.make_tensor_value_info(added[name], FLOAT, kind.shape))
            copy = type(node)()
            copy.CopyFrom(node)
            copy.input[MASK] = added[name]
        nodes.append(copy)
    if not added:
        return student
    values = {ZERO_NAME: np.float32(0), MASKED_NAME: np.float32(MASKED)}
    tensors = {name: numpy_helper.from_array(np.asarray(value), name) for name, value in values.items()}
    changed = replace(
        with_nodes(student, nodes),
        initializers={**student.initializers, **{name: Initializer(name, (), FLOAT, None) for name in tensors}},
        _embedded={**student._embedded, **tensors},
    )
    changed.graph.value_info.extend(infos)
    return changed


def without_masks(student: OnnxStudent, names: Collection[str]) -> OnnxStudent:
    """The student in which the Attentions of these names take the boolean masks that they had before `add_masks`.

    The host knows such masks, and rows of them that allow nothing, of which the sums know nothing.
    """
    made = {
        node.output[0]: node.input[0]
        for node in student.graph.node
        if node.op_type == "Where" and list(node.input[1:]) == [ZERO_NAME, MASKED_NAME]
    }
    if not made:
        return student
    nodes = []
    for node in student.graph.node:
        copy = node
        if node.op_type == "Attention" and node.name in names and len(node.input) > MASK and node.input[MASK] in made:
            copy = type(node)()
            copy.CopyFrom(node)
            copy.input[MASK] = made[node.input[MASK]]
        nodes.append(copy)
    return with_nodes(student, nodes)
