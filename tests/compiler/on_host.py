"""Graphs split between NPU and host, in numpy and onnxruntime: the oracle of the host's part is the segment's model."""

from collections.abc import Mapping
from typing import Any
from unittest.mock import patch

import interpret
import numpy as np
import onnx
from cases import Array, session_of

from firsttoken_compiler.frontend.importer import Imported
from firsttoken_compiler.passes.canonicalise import Canonical
from firsttoken_compiler.tvm import dialect


def interpret_split(imported: Imported, canonical: Canonical, feeds: Mapping[str, Array]) -> dict[str, Array]:
    """Outputs by name of what `split` returned; every call of the host takes its operands by their strides."""

    def host(operands: list[Array], attributes: dict[str, Any]) -> tuple[Array, ...]:
        number = int(attributes["segment"])
        segment, site = imported.segments[number], canonical.hosts[number]
        given: dict[str, Array] = {name: np.asarray(imported.student.array(name)) for name in segment.weights}
        for name, base, (shape, strides) in zip(segment.inputs, operands, site.operands, strict=True):
            flat = np.ascontiguousarray(base).reshape(-1)
            steps = [stride * flat.itemsize for stride in strides]
            seen = np.lib.stride_tricks.as_strided(flat, shape, steps, writeable=False)
            given[name] = seen.astype(onnx.helper.tensor_dtype_to_np_dtype(segment.types[name].elem_type))
        made = session_of(segment.model).run(list(segment.outputs), given)
        results = dialect.decode_results(attributes["results"])
        for array, shape in zip(made, site.results, strict=True):
            assert array.shape == shape
        return tuple(array.reshape(shape).astype(dtype) for array, (shape, dtype) in zip(made, results, strict=True))

    with patch.dict(interpret._MEANING, {"npu.host": host}):
        values = interpret.interpret(canonical.module, interpret.canonical_values(imported, canonical, feeds))
    return dict(zip(canonical.outputs, values, strict=True))
