"""GGUF files as students: written, read back by ourselves and by the library, computed by onnxruntime."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from firsttoken.generation import OrtSession, ort_session, token_feeds
from firsttoken.student import StudentConfig
from firsttoken_compiler.errors import OptionError, StudentError
from firsttoken_models.gguf_file import is_gguf, read
from firsttoken_models.gguf_names import as_graph, as_stored, gguf_name
from firsttoken_models.gguf_student import floats, open_gguf
from firsttoken_models.gguf_write import write_gguf
from firsttoken_models.registry import PROVIDER
from firsttoken_models.weights import FileWeights, tensor_shapes, write_random_weights

IDS = [3, 99, 17, 4, 120, 0]


def written(path: Path, config: StudentConfig, kind: str = "f32", seed: int = 0) -> FileWeights:
    """Random weights as a GGUF file of one type of matrices, and as they were."""
    weights = write_random_weights(config, path.parent / f"floats-{path.stem}", seed)
    write_gguf(path, config, weights.tensor, lambda _name, _width: kind)
    return weights


@pytest.mark.parametrize("kind", ["f32", "f16"])
def test_the_library_reads_what_is_written(tiny: StudentConfig, kind: str, tmp_path: Path) -> None:
    weights = written(tmp_path / "s.gguf", tiny, kind)
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "s.gguf").tensors}
    assert set(found) == {gguf_name(name) for name in tensor_shapes(tiny)}
    for name in tensor_shapes(tiny):
        stored = as_stored(tiny, name, weights.tensor(name))
        expected = stored if stored.ndim == 1 else stored.astype({"f32": np.float32, "f16": np.float16}[kind])
        np.testing.assert_array_equal(found[gguf_name(name)].data, expected)
        np.testing.assert_array_equal(as_graph(tiny, name, stored), weights.tensor(name))


@pytest.mark.parametrize("kind", ["f32", "f16"])
def test_we_read_what_the_library_reads(tiny: StudentConfig, kind: str, tmp_path: Path) -> None:
    path = tmp_path / "s.gguf"
    written(path, tiny, kind)
    mine, theirs = read(path), gguf.GGUFReader(path)
    for tensor in theirs.tensors:
        assert mine.tensors[tensor.name].offset == tensor.data_offset
        assert mine.tensors[tensor.name].nbytes == tensor.n_bytes
        assert mine.tensors[tensor.name].shape == tuple(tensor.shape.tolist()[::-1])
    for key, field in theirs.fields.items():
        if not key.startswith("GGUF."):
            value = field.contents()
            assert mine.fields[key] == (tuple(value) if isinstance(value, list) else value)


def test_the_dimensions_come_back(tiny: StudentConfig, tmp_path: Path) -> None:
    written(tmp_path / "s.gguf", tiny)
    config = open_gguf(tmp_path / "s.gguf").config
    back = dataclasses.replace(tiny, per_layer=tuple(dataclasses.replace(p, weight_bits=None) for p in tiny.per_layer))
    assert config.canonical_json() == back.canonical_json()
    assert config.name == "s"


def test_the_graph_computes_what_the_weights_say(tiny: StudentConfig, tmp_path: Path) -> None:
    weights = written(tmp_path / "s.gguf", tiny)
    file = PROVIDER.file(tmp_path / "s.gguf")
    results = []
    for config, store in ((tiny, weights), (file.config, file.weights)):
        session = ort_session(PROVIDER.graph(config, tokens=len(IDS), past=0, weights=store), store, threads=1)
        results.append(session.run(None, token_feeds(IDS)))
    for mine, theirs in zip(*results, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-5)


def test_float_weights_are_those_of_the_file(
    tiny: StudentConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FIRSTTOKEN_CACHE", str(tmp_path / "cache"))
    weights = written(tmp_path / "s.gguf", tiny, "f16")
    file = open_gguf(tmp_path / "s.gguf")
    unpacked = file.float_weights()
    for name in tensor_shapes(tiny):
        exact = weights.tensor(name) if weights.tensor(name).ndim == 1 else weights.tensor(name).astype(np.float16)
        np.testing.assert_array_equal(unpacked.tensor(name), exact)
    assert open_gguf(tmp_path / "s.gguf").float_weights() == unpacked
    assert len(list((tmp_path / "cache").iterdir())) == 1
    session = OrtSession(PROVIDER, file.config, unpacked, 8, threads=1)
    assert session.prefill(IDS).shape == (tiny.vocab,)


def test_bfloat16_is_read(llama: StudentConfig, tmp_path: Path) -> None:
    values = np.float32([[1.5, -2.25, 3e38, 1e-30]])
    writer = gguf.GGUFWriter(tmp_path / "b.gguf", "llama")
    halves = (values.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
    writer.add_tensor("t", halves, raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = read(tmp_path / "b.gguf")
    assert file.tensors["t"].type == "bf16"
    np.testing.assert_array_equal(floats(file, "t"), (values.view(np.uint32) & 0xFFFF0000).view(np.float32))


def test_what_is_a_gguf_file(tmp_path: Path) -> None:
    named, magic, other = (tmp_path / name for name in ("a.GGUF", "b", "c"))
    named.write_bytes(b"")
    magic.write_bytes(b"GGUF....")
    other.write_bytes(b"GGML")
    assert [is_gguf(path) for path in (named, magic, other, tmp_path, tmp_path / "no.gguf")] == [
        True, True, False, False, False,
    ]  # fmt: skip
    assert PROVIDER.file(other) is None


def test_equal_types_and_dimensions_are_equal_content(llama: StudentConfig, tmp_path: Path) -> None:
    for name, kind, seed in (("a", "f32", 0), ("b", "f32", 1), ("c", "f16", 0)):
        written(tmp_path / f"{name}.gguf", llama, kind, seed)
    a, b, c = (open_gguf(tmp_path / f"{name}.gguf").content() for name in "abc")
    assert a == b != c


def test_a_failed_write_leaves_nothing(llama: StudentConfig, tmp_path: Path) -> None:
    def tensor_of(name: str) -> Any:
        raise KeyError(name)

    with pytest.raises(KeyError):
        write_gguf(tmp_path / "s.gguf", llama, tensor_of, lambda _name, _width: "f32")
    assert list(tmp_path.iterdir()) == []


def test_values_beyond_half_precision_are_refused(llama: StudentConfig, tmp_path: Path) -> None:
    shapes = tensor_shapes(llama)
    with pytest.raises(OptionError, match="do not fit f16"):
        write_gguf(tmp_path / "s.gguf", llama, lambda n: np.full(shapes[n], 1e6, np.float32), lambda _n, _w: "f16")


def test_a_student_without_weights_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"deepseek-r1-distill-qwen-1\.5b has no weights here"):
        PROVIDER.quantise("deepseek-r1-distill-qwen-1.5b", tmp_path / "s.gguf", "q8_0")
    (tmp_path / "cut.gguf").write_bytes(b"GGUF")
    with pytest.raises(StudentError, match="a GGUF file has at least 24"):
        PROVIDER.quantise(tmp_path / "cut.gguf", tmp_path / "s.gguf", "q8_0")
