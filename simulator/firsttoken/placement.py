"""Which part of a language model's graph the CPU computes beside the NPU: the token table's rows, the head, or both.

The graph that is compiled then begins with embedded rows or ends with normalised ones, and the host's time for the rest
is a roofline over the weights as they are stored on its side.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from firsttoken_compiler.errors import StudentError

if TYPE_CHECKING:
    import onnx

    from firsttoken.student import StudentConfig
    from firsttoken_compiler.target.target import Host, Runtime

EMBEDDING: Final = "token_embd"
HEAD: Final = "output"
IDS: Final = "input_ids"
LOGITS: Final = "logits"
EMBEDDED: Final = "inputs_embeds"
NORMED: Final = "normed_hidden_states"
_FLOAT_BYTES: Final = 4
"""Of an embedded row, which graphs take as float32."""


def without(model: onnx.ModelProto, roles: tuple[str, ...]) -> onnx.ModelProto:
    """The graph without the operators of these roles, changed in place.

    Without `token_embd` it reads inputs_embeds [1, M, hidden] in place of input_ids; without `output` it makes
    normed_hidden_states [1, 1 or M, hidden] in place of logits. Initializers that nothing reads any more are gone.

    Raises:
        StudentError: the graph gathers no rows by `input_ids`, or no product makes its `logits`.
    """
    graph = model.graph
    if EMBEDDING in roles:
        gather = next((n for n in graph.node if n.op_type == "Gather" and len(n.input) > 1 and n.input[1] == IDS), None)
        if gather is None:
            raise StudentError(f"{graph.name}: no Gather reads {IDS!r}, so the token table cannot lie on the host")
        _replace(graph.input, IDS, EMBEDDED, (1, _tokens(graph), _table_columns(graph, gather)))
        _rename(graph, gather.output[0], EMBEDDED)
        graph.node.remove(gather)
    if HEAD in roles:
        product = next((n for n in graph.node if LOGITS in n.output), None)
        if product is None or product.op_type not in ("MatMul", "Gemm"):
            raise StudentError(f"{graph.name}: no MatMul makes {LOGITS!r}, so the head cannot be computed by the host")
        rows = next(v for v in graph.output if v.name == LOGITS).type.tensor_type.shape.dim[1].dim_value
        normed = product.input[0]
        graph.node.remove(product)
        _replace(graph.output, LOGITS, NORMED, (1, rows, _columns(graph, normed)))
        _rename(graph, normed, NORMED)
    _drop_unread(graph)
    return model


def host_s(config: StudentConfig, embedded: float, heads: float, runtime: Runtime, host: Host) -> float:
    """Seconds of the host for its part of the graph.

    Args:
        config: the student.
        embedded: rows gathered from the token table.
        heads: how often the head is computed, for one row each.
        runtime: what lies on the host, and its bits per weight there.
        host: its rates.
    """
    bits, seconds = runtime.host_weight_bits, 0.0
    if EMBEDDING in runtime.host_roles:
        seconds += embedded * config.hidden * (bits / 8 + _FLOAT_BYTES) / host.bytes_per_s
    if HEAD in runtime.host_roles:
        weights = config.hidden * config.vocab
        seconds += heads * max(weights * bits / 8 / host.bytes_per_s, 2 * weights / host.flops)
    return seconds


def _tokens(graph: Any) -> int:
    return int(next(v for v in graph.input if v.name == IDS).type.tensor_type.shape.dim[1].dim_value)


def _table_columns(graph: Any, gather: Any) -> int:
    """Columns of the token table; it may be made of blocks, then its type is inferred."""
    for initializer in graph.initializer:
        if initializer.name == gather.input[0]:
            return int(initializer.dims[-1])
    return _columns(graph, gather.output[0])


def _columns(graph: Any, name: str) -> int:
    """Width of rows that a norm scales: as many as the norm has factors."""
    factors = {initializer.name: initializer.dims[-1] for initializer in graph.initializer if initializer.dims}
    for node in graph.node:
        if name in node.output or (node.op_type.endswith("Normalization") and name in node.input):
            found = [factors[value] for value in node.input[1:] if value in factors]
            if found:
                return int(found[0])
    raise StudentError(f"{graph.name}: the width of {name!r} does not follow from a norm beside it")


def _replace(values: Any, old: str, new: str, shape: tuple[int, ...]) -> None:
    from onnx import TensorProto, helper

    at = next(i for i, value in enumerate(values) if value.name == old)
    values[at].CopyFrom(helper.make_tensor_value_info(new, TensorProto.FLOAT, shape))


def _rename(graph: Any, old: str, new: str) -> None:
    for node in graph.node:
        for names in (node.input, node.output):
            for at, name in enumerate(names):
                if name == old:
                    names[at] = new


def _drop_unread(graph: Any) -> None:
    """Nodes whose results nothing reads, then initializers and inputs likewise."""
    kept = {value.name for value in graph.output}
    for node in reversed(list(graph.node)):
        if kept.isdisjoint(node.output):
            graph.node.remove(node)
        else:
            kept.update(node.input)
    for values in (graph.initializer, graph.input):
        for value in [value for value in values if value.name not in kept]:
            values.remove(value)
