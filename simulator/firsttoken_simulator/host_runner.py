"""What executes an ONNX subgraph on the host: onnxruntime, or ONNX's reference evaluator where that one cannot."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

from firsttoken_compiler.errors import ProgramError


class Runner(Protocol):
    """Executes one subgraph."""

    def __call__(self, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
        """Results in the order of the subgraph's outputs."""


def load(model: bytes, constants: dict[str, np.ndarray]) -> Runner:
    """A serialised ModelProto made ready; raises ProgramError when nothing here can run it.

    `constants` are inputs that become part of the subgraph: onnxruntime takes no arrays of some narrow types from
    outside.
    """
    import onnx

    _refuse_files(model)
    if constants:
        model = _with_constants(model, constants)
    if any(_departs(node) for node in onnx.load_model_from_string(model).graph.node):
        return _reference(model)
    try:
        return _onnxruntime(model)
    except Exception as refused:  # onnxruntime's errors derive from nothing narrower
        return _reference(model, refused)


def _refuse_files(model: bytes) -> None:
    """Raises ProgramError for tensors kept in files: a program must not read what lies around where it runs."""
    import onnx

    parsed = onnx.load_model_from_string(model)
    pending: list[Any] = [parsed.graph, *parsed.functions]
    while pending:
        body = pending.pop()
        tensors = [] if isinstance(body, onnx.FunctionProto) else list(body.initializer)
        for sparse in [] if isinstance(body, onnx.FunctionProto) else body.sparse_initializer:
            tensors += [sparse.values, sparse.indices]
        for attribute in (attribute for node in body.node for attribute in node.attribute):
            tensors += [attribute.t, *attribute.tensors]
            for sparse in (attribute.sparse_tensor, *attribute.sparse_tensors):
                tensors += [sparse.values, sparse.indices]
            pending += [attribute.g, *attribute.graphs]
        for tensor in tensors:
            if tensor.data_location == onnx.TensorProto.EXTERNAL or tensor.external_data:
                raise ProgramError(f"a subgraph of the host keeps tensor {tensor.name!r} in a file: compile again")


def _departs(node: Any) -> bool:
    """Whether onnxruntime is known to compute something else than the standard says."""
    attributes = {attribute.name: attribute for attribute in node.attribute}
    if node.op_type == "Resize":  # it computes sizes from the scales before it aligns the corners
        aligned = attributes.get("coordinate_transformation_mode")
        return aligned is not None and aligned.s == b"align_corners" and len(node.input) > 2 and bool(node.input[2])
    if node.op_type == "LpNormalization":  # it divides by norms of zero
        return True
    if node.op_type == "MaxUnpool":  # it takes the indices as those of the output shape
        return len(node.input) > 2 and bool(node.input[2])
    # its masked scores are the lowest float32, not minus infinity
    return node.op_type == "Attention" and not node.domain and len(node.output) > 3 and bool(node.output[3])


def _onnxruntime(model: bytes) -> Runner:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    known = {value.name for value in session.get_inputs()}

    def run(feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
        try:
            return _arrays(session.run(None, {name: array for name, array in feeds.items() if name in known}))
        except ProgramError:
            raise
        except Exception as refused:  # some of what onnxruntime lacks it says only when it runs
            return _reference(model, refused)(feeds)

    return run


def _reference(model: bytes, refused: Exception | None = None) -> Runner:
    """ONNX's reference evaluator; `refused` is what onnxruntime said."""
    import onnx.reference

    def failed(error: Exception) -> ProgramError:
        said = f"neither onnxruntime ({_last_words(refused)}) nor " if refused is not None else "not even "
        return ProgramError(f"{said}ONNX's reference evaluator ({_last_words(error)}) can run a subgraph of the host")

    try:
        evaluator = onnx.reference.ReferenceEvaluator(onnx.load_model_from_string(model))
    except Exception as error:
        raise failed(error) from error

    def run(feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
        try:
            return _arrays(evaluator.run(None, feeds))
        except Exception as error:
            raise failed(error) from error

    return run


def _last_words(error: Exception | None) -> str:
    return str(error).strip()[-200:]


def _with_constants(model: bytes, constants: dict[str, np.ndarray]) -> bytes:
    """The subgraph with some of its inputs as initialisers."""
    import onnx

    parsed = onnx.load_model_from_string(model)
    inputs = [value for value in parsed.graph.input if value.name not in constants]
    del parsed.graph.input[:]
    parsed.graph.input.extend(inputs)
    parsed.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in constants.items())
    return bytes(parsed.SerializeToString())


def _arrays(values: list[Any]) -> list[np.ndarray]:
    for value in values:
        if not isinstance(value, (np.ndarray, np.generic)):
            raise ProgramError(f"the host makes a {type(value).__name__}, not a tensor")
    return [np.asarray(value) for value in values]
