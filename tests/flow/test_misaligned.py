"""External data need not begin on any boundary: the numbers are those of aligned data; what is not there is said."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper

from firsttoken import RunOptions, api
from firsttoken_compiler.errors import StudentError

K, N = 256, 24


def model(folder: Path, offset: int, elem_type: int, inside: bool = True) -> str:
    """x [5, K] times an external matrix that begins at `offset`, gathered rows of another one right behind it."""
    rng = np.random.default_rng(0)
    kind = onnx.helper.tensor_dtype_to_np_dtype(elem_type)
    matrix, table = (rng.standard_normal(shape).astype(kind) for shape in ((K, N), (7, N)))
    graph = "g (float[5,256] x, int64[3] ids) => (float[5,24] y, float[3,24] z) { %s }"
    node = "Identity" if elem_type == TensorProto.FLOAT else "Cast <to=1>"
    body = f"v = {node} (w) u = {node} (t) y = MatMul (x, v) z = Gather <axis=0> (u, ids)"
    made = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 18]> {graph % body}')
    at = offset
    with (folder / "w.bin").open("wb") as file:
        file.write(b"\xa5" * offset)
        for name, array in (("w", matrix), ("t", table)):
            tensor = numpy_helper.from_array(array, name)
            data = tensor.raw_data
            tensor.ClearField("raw_data")
            tensor.data_location = TensorProto.EXTERNAL
            for key, value in (("location", "w.bin"), ("offset", at), ("length", len(data))):
                tensor.external_data.add(key=key, value=str(value))
            made.graph.initializer.append(tensor)
            file.write(data if inside else data[: len(data) // 2])
            at += len(data)
    path = folder / f"m{offset}.onnx"
    path.write_bytes(made.SerializeToString())
    return str(path)


def answers(path: str, weights: str) -> dict[str, np.ndarray]:
    feeds = {
        "x": np.random.default_rng(1).standard_normal((5, K)).astype(np.float32), "ids": np.array([6, 0, 3]),
    }  # fmt: skip
    return api.execute(path, "systolic-128", feeds, options=RunOptions(weights=weights, group="32"))


@pytest.mark.parametrize("elem_type", [TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16])
@pytest.mark.parametrize("weights", ["fp16", "int8", "int4", "q4_k"])
def test_an_odd_offset_changes_no_bit(weights: str, elem_type: int, tmp_path: Path) -> None:
    expected = None
    for offset in (0, 1, 7, 4097):
        folder = tmp_path / str(offset)
        folder.mkdir()
        found = answers(model(folder, offset, elem_type), weights)
        expected = expected or found
        assert set(found) == {"y", "z"}
        for name, array in found.items():
            np.testing.assert_array_equal(array, expected[name])


def test_data_beyond_the_file_is_an_error_with_offset_and_size(tmp_path: Path) -> None:
    path = model(tmp_path, 7, TensorProto.FLOAT, inside=False)
    with pytest.raises(StudentError, match=r"weight [wt] has shape .* w.bin \(\d+ bytes\) is said to hold \d+ at \d+"):
        answers(path, "fp16")
