"""Boolean masks of ONNX Attention become masks that are added to the scores, once per mask, as the NPU takes them."""

from collections.abc import Collection
from typing import Any, Final

import numpy as np

from firsttoken_compiler.frontend.additions import Additions
from firsttoken_compiler.frontend.onnx_file import OnnxStudent, with_nodes
from firsttoken_compiler.frontend.values import copied, value_types
from firsttoken_compiler.schedule.spec import MASKED

BOOL, FLOAT = 9, 1
MASK: Final = 3
"""Which input of Attention the mask is."""
ALLOWED, NEVER = "firsttoken-allowed", "firsttoken-masked"
"""Names of the two numbers, up to a dot."""


def add_masks(student: OnnxStudent) -> OnnxStudent:
    """The student with a Where behind every computed boolean mask of an Attention; itself if there is none."""
    if not any(_mask_of(node) for node in student.graph.node):
        return student
    work = Additions(value_types(student))
    for node in student.graph.node:
        mask = _mask_of(node)
        kind = work.types.get(mask)
        if kind is not None and kind.elem_type == BOOL and mask not in student.initializers:
            if mask not in work.made:
                choice = [mask, work.constant(ALLOWED, np.float32(0)), work.constant(NEVER, np.float32(MASKED))]
                work.made[mask] = work.node("Where", choice, f"{mask}.added", kind.shape, FLOAT, f"{node.name}.mask")
            node = _masked_by(node, work.made[mask])
        work.nodes.append(node)
    return work.applied(student) if work.made else student


def _mask_of(node: Any) -> str:
    """The mask of an Attention; empty where there is none."""
    attention = node.op_type == "Attention" and not node.domain and len(node.input) > MASK
    return str(node.input[MASK]) if attention else ""


def _masked_by(node: Any, mask: str) -> Any:
    copy = copied(node)
    copy.input[MASK] = mask
    return copy


def without_masks(student: OnnxStudent, names: Collection[str]) -> OnnxStudent:
    """The student in which the Attentions of these names take the boolean masks that they had before `add_masks`.

    The host knows such masks, and rows of them that allow nothing, of which the sums know nothing.
    """
    made = {
        node.output[0]: node.input[0]
        for node in student.graph.node
        if node.op_type == "Where" and [name.partition(".")[0] for name in node.input[1:]] == [ALLOWED, NEVER]
    }
    if not made:
        return student
    return with_nodes(
        student,
        [
            _masked_by(node, made[_mask_of(node)]) if node.name in names and _mask_of(node) in made else node
            for node in student.graph.node
        ],
    )
