"""A GGUF file as a student, for the families llama and qwen2: dimensions, weights as they are stored or as float32."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Final

from firsttoken.cache import cache_folder
from firsttoken.student import LayerConfig, Place, StudentConfig
from firsttoken_compiler.errors import StudentError
from firsttoken_compiler.formats.types import BLOCK_TYPES
from firsttoken_models import gguf_file
from firsttoken_models.gguf_names import FAMILIES, as_graph, gguf_name, paired_heads
from firsttoken_models.weights import EMBEDDING, LM_HEAD, FileWeights, open_weights, tensor_shapes, write_weights

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

    from firsttoken_models.gguf_file import GgufFile
    from firsttoken_models.tokenizer import BpeTokenizer

FORMAT: Final = 1
"""Raised whenever the cached files change meaning, so that old caches are not read."""
ROPE_BASE: Final = 10000.0
"""Of files that say nothing."""
FORBIDDEN: Final = (
    "expert_count", "expert_used_count", "rope.scaling.type", "rope.scaling.factor", "rope.scaling.attn_factor",
    "rope.scale_linear", "attention.sliding_window", "attention.scale", "attention.clamp_kqv",
    "attention.max_alibi_bias", "attention.layer_norm_epsilon", "attn_logit_softcapping", "final_logit_softcapping",
    "logit_scale", "embedding_scale", "residual_scale", "use_parallel_residual",
)  # fmt: skip
"""Keys of a family that change what the model computes; only values that change nothing are taken."""
HARMLESS: Final = {"rope.scaling.type": ("none",), "rope.scaling.factor": (1.0,), "rope.scale_linear": (1.0,)}
"""By key, values that change nothing, besides 0, false and the empty text."""


@dataclass(frozen=True)
class GgufWeights:
    """The weights of a GGUF file as they are stored; satisfies `firsttoken.student.WeightStore`."""

    file: GgufFile
    config: StudentConfig

    @property
    def path(self) -> Path:
        """The GGUF file."""
        return self.file.path

    def place(self, tensor_name: str) -> Place:
        """Return where a tensor lies in the file; KeyError if it is not there."""
        tensor = self.file.tensors[gguf_name(tensor_name)]
        heads = paired_heads(self.config, tensor_name)
        rows_first = len(tensor.shape) > 1 and tensor_name != EMBEDDING
        return Place(tensor.offset, tensor.nbytes, tensor.type, rows_first, heads)


@dataclass(frozen=True)
class GgufStudent:
    """A file that was found to be a student; satisfies `firsttoken.student.StudentFile`."""

    file: GgufFile
    config: StudentConfig

    @property
    def weights(self) -> GgufWeights:
        """The weights as they are stored."""
        return GgufWeights(self.file, self.config)

    def content(self) -> str:
        """Return text that is equal exactly for files with equal graphs; values of weights do not count."""
        types = {name: tensor.type for name, tensor in self.file.tensors.items()}
        return f"gguf {self.config.canonical_json()} {json.dumps(types, sort_keys=True)}"

    @cached_property
    def folder(self) -> Path:
        """Where things made of this file are kept, by the hash of all of it."""
        with self.file.path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        return cache_folder() / f"gguf-f{FORMAT}-{digest[:32]}"

    def float_weights(self) -> FileWeights:
        """Return the weights as float32 in graph layout, unpacked into the cache folder on first use."""
        return unpacked(self, self.folder)

    def tokenizer(self) -> BpeTokenizer:
        """Return the file's tokenizer; raise StudentError where it is of a kind that cannot be rebuilt."""
        from firsttoken_models.tokenizer import from_gguf

        return from_gguf(self.file, self.config.vocab)


def unpacked(student: GgufStudent, folder: Path) -> FileWeights:
    """Return what `folder` holds of a student's float32 weights, or write them there."""
    made = open_weights(student.config, folder)
    if made is not None:
        return made

    def tensor_of(name: str) -> NDArray[np.float32]:
        return as_graph(student.config, name, floats(student.file, gguf_name(name)))

    return write_weights(student.config, folder, tensor_of)


def floats(file: GgufFile, name: str) -> NDArray[np.float32]:
    """Return a tensor of the file as float32, rows first."""
    import numpy as np

    tensor, stored = file.tensors[name], file.bytes_of(name)
    if tensor.type in BLOCK_TYPES:
        from firsttoken_compiler.formats.dequantise import dequantise

        values = dequantise(stored, BLOCK_TYPES[tensor.type])
    elif tensor.type == "bf16":
        values = (stored.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    else:
        values = stored.view({"f32": np.float32, "f16": np.float16}[tensor.type]).astype(np.float32)
    return values.reshape(tensor.shape)


def open_gguf(path: Path) -> GgufStudent:
    """Return the student that a GGUF file is; raise StudentError naming what it lacks or has too much of."""
    file = gguf_file.read(path)
    try:
        config = _config(_Fields(file))
    except ValueError as error:
        raise StudentError(f"{path}: {error}") from error
    _check_tensors(file, config)
    return GgufStudent(file, config)


class _Fields:
    """Fields of a family by their names without it, checked for their types."""

    def __init__(self, file: GgufFile) -> None:
        self.file, self.family = file, file.fields.get("general.architecture")
        if self.family not in FAMILIES:
            raise StudentError(
                f"{file.path}: general.architecture is {self.family!r}, families that run are {', '.join(FAMILIES)}: "
                "export the model as an ONNX file instead"
            )

    def fail(self, key: str, value: object, wanted: str) -> StudentError:
        return StudentError(
            f"{self.file.path}: {self.family}.{key} is {value!r}, must be {wanted}: convert the model again"
        )

    def whole(self, key: str, default: int | None = None) -> int:
        """A whole number from 1 on."""
        value = self.file.fields.get(f"{self.family}.{key}", default)
        if type(value) is not int or not 1 <= value < 1 << 31:
            raise self.fail(key, value, "a whole number from 1 to 2147483647")
        return value

    def wholes(self, key: str, layers: int, default: tuple[int, ...] | None = None) -> tuple[int, ...]:
        """A whole number for each layer: one for all of them, or an array."""
        value = self.file.fields.get(f"{self.family}.{key}", default)
        values = value if isinstance(value, tuple) else (value,) * layers
        if len(values) != layers or any(type(entry) is not int or not 1 <= entry < 1 << 31 for entry in values):
            shown = f"{len(values)} entries" if isinstance(value, tuple) else value
            raise self.fail(key, shown, f"a whole number from 1 to 2147483647, or one for each of {layers} layers")
        return values

    def real(self, key: str, default: float | None = None) -> float:
        """A float32 number, as the shortest decimal that means it."""
        import numpy as np

        value = self.file.fields.get(f"{self.family}.{key}", default)
        if type(value) not in (int, float):
            raise self.fail(key, value, "a number")
        with np.errstate(over="ignore"):
            return float(str(np.float32(value)))

    def forbid(self) -> None:
        """Raises StudentError for what the graph does not have."""
        for key in FORBIDDEN:
            value = self.file.fields.get(f"{self.family}.{key}")
            if value and value not in HARMLESS.get(key, ()):
                raise StudentError(
                    f"{self.file.path}: {self.family}.{key} is {value!r}, which the graph of this family does not "
                    "know: export the model as an ONNX file instead"
                )
        parts = self.file.fields.get("split.count", 0)
        if parts not in (0, 1):
            raise StudentError(f"{self.file.path}: one of {parts!r} parts: join them (llama-gguf-split --merge)")


def _config(fields: _Fields) -> StudentConfig:
    """The dimensions; raises ValueError or StudentError for ones that no student has."""
    fields.forbid()
    file = fields.file
    layers = fields.whole("block_count")
    if layers > len(file.tensors):
        raise fields.fail("block_count", layers, f"at most the number of tensors, {len(file.tensors)}")
    heads = fields.wholes("attention.head_count", layers)
    kv_heads = fields.wholes("attention.head_count_kv", layers, heads)
    widths = fields.wholes("feed_forward_length", layers)
    hidden = fields.whole("embedding_length")
    dim = fields.whole("attention.key_length", max(1, hidden // heads[0]))
    for key in ("attention.value_length", "rope.dimension_count"):
        if fields.whole(key, dim) != dim:
            raise fields.fail(key, fields.whole(key), f"the width of a head, {dim}")
    table = file.tensors.get("token_embd.weight")
    uniform = len(set(zip(heads, kv_heads, widths, strict=True))) == 1
    return StudentConfig(
        name=file.path.stem, family=str(fields.family), hidden=hidden, intermediate=widths[0], layers=layers,
        heads=heads[0], kv_heads=kv_heads[0], head_dim=dim, vocab=table.shape[0] if table is not None else 1,
        rope_theta=fields.real("rope.freq_base", ROPE_BASE), max_positions=fields.whole("context_length"),
        rms_eps=fields.real("attention.layer_norm_rms_epsilon"), tie_embeddings=gguf_name(LM_HEAD) not in file.tensors,
        qkv_bias="blk.0.attn_q.bias" in file.tensors, source=f"metadata of {file.path.name}",
        qk_norm=fields.family == "qwen3",
        per_layer=() if uniform else tuple(LayerConfig(*layer) for layer in zip(heads, kv_heads, widths, strict=True)),
    )  # fmt: skip


def _check_tensors(file: GgufFile, config: StudentConfig) -> None:
    """Raises StudentError unless the file has exactly the tensors of the student, in their shapes."""
    wanted = {}
    for name, shape in tensor_shapes(config).items():
        stored, rows = gguf_name(name), shape if len(shape) == 1 or name == EMBEDDING else shape[::-1]
        wanted[stored] = rows
        found = file.tensors.get(stored)
        if found is None:
            raise StudentError(f"{file.path}: tensor {stored!r} is missing: download or convert the model again")
        if found.shape != rows:
            raise StudentError(
                f"{file.path}: tensor {stored!r} has shape {list(found.shape)}, the fields ask for {list(rows)}: "
                "download or convert the model again"
            )
        if len(rows) == 1 and found.type in BLOCK_TYPES:
            raise StudentError(f"{file.path}: tensor {stored!r} is {found.type}, must be a float: convert again")
    for name in file.tensors:
        if name not in wanted:
            raise StudentError(
                f"{file.path}: tensor {name!r} is none that the graph of {config.family!r} reads: export the model as "
                "an ONNX file instead"
            )
