"""Float32 weight files: which tensors a student has, where each lies in the file, and how such a file is written.

The layout follows from the configuration alone: tensors in graph order, each at the next multiple of 64 bytes. Matrices
are [K, N] (input width first), so that a graph multiplies by them without a transpose.
"""

from __future__ import annotations

import json
import math
import os
import uuid
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from firsttoken.student import Place, StudentConfig
from firsttoken_models.encoder_weights import TABLES, encoder_shapes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

    from firsttoken.encoder import EncoderConfig

    Config = StudentConfig | EncoderConfig

ALIGNMENT_BYTES: Final = 64
FLOAT32_BYTES: Final = 4
WEIGHTS_FILE: Final = "weights.bin"
INDEX_FILE: Final = "index.json"
EMBEDDING: Final = "model.embed_tokens.weight"
FINAL_NORM: Final = "model.norm.weight"
LM_HEAD: Final = "lm_head.weight"


@dataclass(frozen=True, slots=True)
class Slot:
    """Place of one float32 tensor in the file: shape in elements, offset and length in bytes."""

    shape: tuple[int, ...]
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class FileWeights:
    """Weights of one student in one file; satisfies `firsttoken.student.WeightStore`."""

    path: Path
    slots: Mapping[str, Slot]

    def place(self, tensor_name: str) -> Place:
        """Return where a tensor lies in the file; KeyError if it is not there."""
        slot = self.slots[tensor_name]
        return Place(slot.offset, slot.length)

    def tensor(self, tensor_name: str) -> NDArray[np.float32]:
        """Return a read-only view of a tensor, mapped from the file."""
        import numpy as np

        slot = self.slots[tensor_name]
        return np.memmap(self.path, dtype=np.float32, mode="r", offset=slot.offset, shape=slot.shape)


def tensor_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Return every weight tensor of the student by name, in graph order; matrices are [K, N]."""
    return _decoder_shapes(config) if isinstance(config, StudentConfig) else encoder_shapes(config)


def _decoder_shapes(config: StudentConfig) -> dict[str, tuple[int, ...]]:
    hidden, dim = config.hidden, config.head_dim
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (config.vocab, hidden)}
    for index in range(config.layers):
        layer, prefix = config.layer(index), f"model.layers.{index}"
        shapes[f"{prefix}.input_layernorm.weight"] = (hidden,)
        for name, heads in (("q", layer.heads), ("k", layer.kv_heads), ("v", layer.kv_heads)):
            shapes[f"{prefix}.self_attn.{name}_proj.weight"] = (hidden, heads * dim)
            if config.qkv_bias:
                shapes[f"{prefix}.self_attn.{name}_proj.bias"] = (heads * dim,)
        if config.qk_norm:
            shapes[f"{prefix}.self_attn.q_norm.weight"] = shapes[f"{prefix}.self_attn.k_norm.weight"] = (dim,)
        shapes[f"{prefix}.self_attn.o_proj.weight"] = (layer.heads * dim, hidden)
        shapes[f"{prefix}.post_attention_layernorm.weight"] = (hidden,)
        shapes[f"{prefix}.mlp.gate_proj.weight"] = (hidden, layer.intermediate)
        shapes[f"{prefix}.mlp.up_proj.weight"] = (hidden, layer.intermediate)
        shapes[f"{prefix}.mlp.down_proj.weight"] = (layer.intermediate, hidden)
    shapes[FINAL_NORM] = (hidden,)
    if not config.tie_embeddings:
        shapes[LM_HEAD] = (hidden, config.vocab)
    return shapes


def layout(config: Config) -> dict[str, Slot]:
    """Return the place of every weight tensor of the student in its file."""
    slots: dict[str, Slot] = {}
    end = 0
    for name, shape in tensor_shapes(config).items():
        offset = -(-end // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        slots[name] = Slot(shape, offset, math.prod(shape) * FLOAT32_BYTES)
        end = offset + slots[name].length
    return slots


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path` and move it there on success, so that readers see all of it or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_weights(config: Config, folder: Path, tensor_of: Callable[[str], NDArray[np.float32]]) -> FileWeights:
    """Write weights.bin and index.json into `folder`, atomically, the index last; one tensor is in memory at a time.

    Args:
        config: the student, which decides names, shapes and offsets.
        folder: where the two files go; created when absent.
        tensor_of: gives the float32 array of a tensor name in the shape that `tensor_shapes` states.

    Raises:
        ValueError: an array has another shape or is not float32.
    """
    slots = layout(config)
    path = folder / WEIGHTS_FILE
    with atomic_file(path) as temporary, temporary.open("wb") as file:
        for name, slot in slots.items():
            array = tensor_of(name)
            if array.shape != slot.shape or array.dtype != "float32":
                raise ValueError(
                    f"tensor {name} is {array.dtype}{list(array.shape)}, student {config.name!r} needs "
                    f"float32{list(slot.shape)}; matrices are [K, N], transpose them if they are [N, K]"
                )
            file.seek(slot.offset)
            file.write(array.tobytes())
    index = {name: {"shape": slot.shape, "offset": slot.offset, "length": slot.length} for name, slot in slots.items()}
    with atomic_file(folder / INDEX_FILE) as temporary:
        temporary.write_text(json.dumps(index, indent=1), encoding="utf-8")
    return FileWeights(path, slots)


def open_weights(config: Config, folder: Path) -> FileWeights | None:
    """Return what `write_weights` left in `folder`, or None if it is absent, cut short or of another layout."""
    try:
        index = json.loads((folder / INDEX_FILE).read_text(encoding="utf-8"))
        size = (folder / WEIGHTS_FILE).stat().st_size
        found = {n: Slot(tuple(s["shape"]), s["offset"], s["length"]) for n, s in index.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    slots = layout(config)
    if found != slots or size != max(slot.offset + slot.length for slot in slots.values()):
        return None
    return FileWeights(folder / WEIGHTS_FILE, slots)


def write_random_weights(config: Config, folder: Path, seed: int = 0) -> FileWeights:
    """Write reproducible random weights: matrices of variance 1/K, norm weights near 1, biases near 0."""
    import numpy as np

    generator = np.random.default_rng(seed)

    def tensor_of(name: str) -> NDArray[np.float32]:
        shape = shapes[name]
        values = generator.standard_normal(shape, dtype=np.float32)
        if len(shape) == 1:
            return values * np.float32(0.1) + np.float32(name.casefold().endswith("norm.weight"))
        fan_in = config.hidden if name in (EMBEDDING, *TABLES) else shape[0]
        return values * np.float32(fan_in**-0.5)

    shapes = tensor_shapes(config)
    return write_weights(config, folder, tensor_of)
