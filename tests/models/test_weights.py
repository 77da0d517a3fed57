"""firsttoken_models.weights: layout, writing, reopening."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import numpy as np
import pytest

from firsttoken.student import StudentConfig
from firsttoken_models.students import DECODERS
from firsttoken_models.weights import (
    atomic_file,
    layout,
    open_weights,
    tensor_shapes,
    write_random_weights,
    write_weights,
)


def test_layout_covers_every_parameter(tiny: StudentConfig) -> None:
    for config in (tiny, *DECODERS.values()):
        slots = list(layout(config).values())
        assert sum(slot.length for slot in slots) == 4 * config.parameters
        assert all(slot.offset % 64 == 0 for slot in slots)
        assert all(0 <= b.offset - (a.offset + a.length) < 64 for a, b in itertools.pairwise(slots))


def test_written_tensors_read_back(tiny: StudentConfig, tmp_path: Path) -> None:
    arrays = {
        name: np.arange(np.prod(shape), dtype=np.float32).reshape(shape) for name, shape in tensor_shapes(tiny).items()
    }
    written = write_weights(tiny, tmp_path, arrays.__getitem__)
    reopened = open_weights(tiny, tmp_path)
    assert reopened == written
    for name, array in arrays.items():
        np.testing.assert_array_equal(reopened.tensor(name), array)
        place = reopened.place(name)
        assert written.path.read_bytes()[place.offset : place.offset + place.length] == array.tobytes()
    with pytest.raises(KeyError):
        reopened.place("no.such.tensor")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["index.json", "weights.bin"]


def test_unusable_files_are_not_opened(llama: StudentConfig, qwen2: StudentConfig, tmp_path: Path) -> None:
    assert open_weights(llama, tmp_path) is None
    written = write_random_weights(llama, tmp_path)
    assert open_weights(qwen2, tmp_path) is None
    with written.path.open("r+b") as file:
        file.truncate(1000)
    assert open_weights(llama, tmp_path) is None
    (tmp_path / "index.json").write_text("[1", encoding="utf-8")
    assert open_weights(llama, tmp_path) is None
    (tmp_path / "index.json").write_text("[1]", encoding="utf-8")
    assert open_weights(llama, tmp_path) is None


def test_random_weights_follow_the_seed(llama: StudentConfig, tmp_path: Path) -> None:
    files = [write_random_weights(llama, tmp_path / str(i), seed).path for i, seed in enumerate((3, 3, 4))]
    first, again, other = (path.read_bytes() for path in files)
    assert first == again != other


def test_a_transposed_matrix_is_refused(llama: StudentConfig, tmp_path: Path) -> None:
    square_free = dataclasses.replace(llama, intermediate=80)
    shapes = tensor_shapes(square_free)
    with pytest.raises(ValueError, match=r"mlp.gate_proj.weight is float32\[80, 64\], .* needs float32\[64, 80\]"):
        write_weights(
            square_free,
            tmp_path,
            lambda name: np.zeros(shapes[name][:: -1 if "gate" in name else 1], np.float32),
        )
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "file"
    target.write_text("old", encoding="utf-8")

    def write_half() -> None:
        with atomic_file(target) as temporary:
            temporary.write_text("half", encoding="utf-8")
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        write_half()
    assert target.read_text(encoding="utf-8") == "old"
    assert list(tmp_path.iterdir()) == [target]
