"""Attention of com.microsoft with its integer logic spelled out, so that the NPU can do the rest.

These operators find out at run time which keys exist, from lengths or masks of integers. `prepare` adds plain ONNX
nodes that make an additive mask (and positions) of them, which the host runs once for all layers, and hands the results
to the node as further inputs. `prepared.restored` takes them away again where the node itself runs on the host.
"""

from typing import Any, Final

from firsttoken_compiler.frontend import contrib_masks
from firsttoken_compiler.frontend.additions import Additions
from firsttoken_compiler.frontend.onnx_file import OnnxStudent
from firsttoken_compiler.frontend.prepared import DOMAIN, INPUTS, SOURCE
from firsttoken_compiler.frontend.values import copied, read_names, value_types

GROUP_QUERY_ATTENTION: Final = f"{DOMAIN}.GroupQueryAttention"
MULTI_HEAD_ATTENTION: Final = f"{DOMAIN}.MultiHeadAttention"
ATTENTION: Final = f"{DOMAIN}.Attention"
EMBEDDING: Final = f"{DOMAIN}.EmbedLayerNormalization"
ADDED: Final = {"mask": INPUTS, "positions": INPUTS + 1, "ids": INPUTS + 2, "kinds": INPUTS + 3}
"""Which inputs `prepare` adds."""
PAST: Final = {"GroupQueryAttention": 3, "MultiHeadAttention": 6}
"""Which input is the cache of keys; that of values follows."""


def prepare(student: OnnxStudent) -> OnnxStudent:
    """The student with every such node prepared that the NPU can run; itself if there is none."""
    rules = {
        "GroupQueryAttention": contrib_masks.grouped, "MultiHeadAttention": contrib_masks.multi_head,
        "Attention": contrib_masks.packed, "EmbedLayerNormalization": contrib_masks.embedding,
    }  # fmt: skip
    if not any(node.op_type in rules and node.domain == SOURCE for node in student.graph.node):
        return student
    work = Additions(value_types(student))
    work.made.update(contrib_masks.sources_of_casts(student))
    for node in student.graph.node:
        added = None
        if node.op_type in rules and node.domain == SOURCE and node.input[0] in work.types:
            added = rules[node.op_type](node, work)
        work.nodes.append(node if added is None else _with_inputs(node, added, work))
    return _without_empty(work.applied(student))


def _with_inputs(node: Any, added: dict[str, str], work: Additions) -> Any:
    """The node in its new domain; caches without rows are no inputs of it."""
    copy = copied(node)
    copy.domain = DOMAIN
    inputs = [*node.input, *[""] * (INPUTS + len(ADDED) - len(node.input))]
    at = PAST.get(node.op_type, 0)
    if at and inputs[at] and work.types[inputs[at]].shape[2] == 0:
        inputs[at] = inputs[at + 1] = ""
    for name, value in added.items():
        inputs[ADDED[name]] = value
    while not inputs[-1]:
        inputs.pop()
    if node.op_type == "EmbedLayerNormalization" and len(copy.output) > 1 and node.input[7:8] != [""]:
        copy.output[1] = ""  # made apart
    del copy.input[:]
    copy.input.extend(inputs)
    return copy


def _without_empty(student: OnnxStudent) -> OnnxStudent:
    """Drops inputs without elements, caches of no rows, that nothing reads any more."""
    read = {name for node in student.graph.node for name in read_names(node)}
    for value in list(student.graph.input):
        extents = [dim.dim_value for dim in value.type.tensor_type.shape.dim if dim.HasField("dim_value")]
        if 0 in extents and value.name not in read:
            student.graph.input.remove(value)
    return student
