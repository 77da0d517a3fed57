"""A student as a GGUF file: its dimensions, its weights in the types that a rule gives them, and its tokenizer."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from firsttoken.student import StoredType
from firsttoken_compiler.errors import OptionError, StudentError
from firsttoken_compiler.formats.policy import row_bytes, type_of
from firsttoken_compiler.formats.types import BLOCK_TYPES
from firsttoken_models.gguf_file import Texts
from firsttoken_models.gguf_names import FAMILIES, as_stored, gguf_name
from firsttoken_models.weights import EMBEDDING, LM_HEAD, atomic_file, tensor_shapes

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import gguf
    import numpy as np
    from numpy.typing import NDArray

    from firsttoken.options import Progress
    from firsttoken.student import StudentConfig
    from firsttoken_compiler.formats.policy import Policy
    from firsttoken_models.gguf_file import GgufFile

    TypeOf = Callable[[str, int], str]
    """The type of a tensor by its name (of `weights.tensor_shapes`) and the width of its rows."""
    TensorOf = Callable[[str], NDArray[np.float32]]

_FLOATS: Final = {"f32": (0, "<f4"), "f16": (1, "<f2")}
"""Numbers of the float types, and how numpy writes them."""
TOKENIZER: Final = "tokenizer."
"""What the names of a tokenizer's fields begin with."""


@dataclass(frozen=True, slots=True)
class _Tensor:
    """A tensor that is to be written."""

    name: str
    stored: str
    shape: tuple[int, ...]
    type: str

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape[:-1]) * row_bytes(self.type, self.shape[-1])


_ROLES: Final = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}  # fmt: skip


def mixed(policy: Policy, config: StudentConfig) -> TypeOf:
    """Return the rule that stores a student's matrices as a policy says."""
    return lambda name, width: type_of(policy, *_role(name, config), config.layers, width)


def _role(name: str, config: StudentConfig) -> tuple[str, int]:
    """What a matrix of `weights.tensor_shapes` does, and in which layer."""
    if name == LM_HEAD or (name == EMBEDDING and config.tie_embeddings):
        return "output", 0
    if name == EMBEDDING:
        return "token_embd", 0
    _, _, index, rest = name.split(".", 3)
    return _ROLES[rest.rpartition(".")[0]], int(index)


def tensor_bytes(config: StudentConfig, policy: Policy) -> tuple[StoredType, ...]:
    """Return what a file of the student holds by type, without its header: no weights are needed."""
    return _summary(_tensors(config, mixed(policy, config)))


def _tensors(config: StudentConfig, type_of: TypeOf) -> list[_Tensor]:
    made = []
    for name, shape in tensor_shapes(config).items():
        rows = as_shape(name, shape)
        made.append(_Tensor(name, gguf_name(name), rows, type_of(name, rows[-1]) if len(rows) > 1 else "f32"))
    return made


def write_gguf(
    path: Path,
    config: StudentConfig,
    tensor_of: TensorOf,
    type_of: TypeOf,
    *,
    kind: str = "",
    tokenizer: GgufFile | None = None,
    progress: Progress | None = None,
) -> tuple[StoredType, ...]:
    """Write a GGUF file, atomically, one tensor in memory at a time; return what it holds by type.

    Args:
        path: the file.
        config: the student.
        tensor_of: gives the float32 array of a tensor name in the shape that `weights.tensor_shapes` states.
        type_of: gives the type of a tensor: "f32", "f16", or a key of `BLOCK_TYPES`.
        kind: the type of most matrices, for `general.file_type`.
        tokenizer: a file whose tokenizer is copied.
        progress: called with ("quantise", bytes done, bytes in all).

    Raises:
        FirsttokenError: the family has no such file, or the weights do not fit its types.
    """
    import gguf

    if config.family not in FAMILIES or config.rope_scaling is not None:
        raise OptionError(
            f"{config.name} is of family {config.family!r} with rotary scaling {config.rope_scaling}: GGUF files are "
            f"written for {', '.join(FAMILIES)}, without scaling"
        )
    tensors = _tensors(config, type_of)
    total, done = sum(tensor.nbytes for tensor in tensors), 0
    with atomic_file(path) as temporary:
        writer = gguf.GGUFWriter(temporary, config.family)
        try:
            _dimensions(writer, config, kind)
            if tokenizer is not None:
                _copy_tokenizer(writer, tokenizer)
            for tensor in tensors:
                _declare(writer, tensor)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for tensor in tensors:
                values = as_stored(config, tensor.name, tensor_of(tensor.name))
                writer.write_tensor_data(encoded(values, tensor.type, tensor.stored))
                done += tensor.nbytes
                if progress is not None:
                    progress("quantise", done, total)
        finally:
            writer.close()
    return _summary(tensors)


def as_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of a tensor in a GGUF file, rows first."""
    return shape if len(shape) == 1 or name == EMBEDDING else shape[::-1]


def encoded(values: NDArray[np.float32], kind: str, name: str) -> NDArray[Any]:
    """Return values [n, k] as a file of that type has them; raise a FirsttokenError naming the tensor."""
    import numpy as np

    if kind in BLOCK_TYPES:
        from firsttoken_compiler.formats.quantise import quantise

        try:
            return quantise(values, BLOCK_TYPES[kind])
        except StudentError as error:
            raise StudentError(f"{name} in {kind}: {error}") from error
    with np.errstate(over="ignore"):
        made = values.astype(_FLOATS[kind][1])
    if kind == "f16" and not np.isfinite(made).all():
        raise OptionError(f"{name}: values up to {np.abs(values).max()} do not fit f16: choose another --weights")
    return made


def _dimensions(writer: gguf.GGUFWriter, config: StudentConfig, kind: str) -> None:
    """Fields of the family; numbers of layers that differ are arrays."""
    import gguf

    layers = [config.layer(index) for index in range(config.layers)]

    def each(values: list[int]) -> int | list[int]:
        return values[0] if len(set(values)) == 1 else values

    writer.add_name(config.name)
    writer.add_block_count(config.layers)
    writer.add_context_length(config.max_positions)
    writer.add_embedding_length(config.hidden)
    writer.add_feed_forward_length(each([layer.intermediate for layer in layers]))
    writer.add_head_count(each([layer.heads for layer in layers]))
    writer.add_head_count_kv(each([layer.kv_heads for layer in layers]))
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_eps)
    writer.add_vocab_size(config.vocab)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    number = getattr(gguf.LlamaFileType, f"{'ALL' if kind == 'f32' else 'MOSTLY'}_{kind.upper()}", None)
    if number is not None:
        writer.add_file_type(number)


def _copy_tokenizer(writer: gguf.GGUFWriter, file: GgufFile) -> None:
    for key, value in file.fields.items():
        if not key.startswith(TOKENIZER):
            continue
        if isinstance(value, Texts):
            writer.add_array(key, file.texts(key))
        elif isinstance(value, tuple):
            writer.add_array(key, list(value))
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        else:
            writer.add_string(key, value)


def _declare(writer: gguf.GGUFWriter, tensor: _Tensor) -> None:
    import gguf
    import numpy as np

    blocks = BLOCK_TYPES.get(tensor.type)
    number = _FLOATS[tensor.type][0] if blocks is None else blocks.ggml
    shape = tensor.shape if blocks is None else (*tensor.shape[:-1], blocks.row_bytes(tensor.shape[-1]))
    dtype = np.dtype(_FLOATS[tensor.type][1]) if blocks is None else np.dtype(np.uint8)
    writer.add_tensor_info(tensor.stored, shape, dtype, tensor.nbytes, gguf.GGMLQuantizationType(number))


def _summary(tensors: list[_Tensor]) -> tuple[StoredType, ...]:
    found: dict[str, list[int]] = {}
    for tensor in tensors:
        found.setdefault(tensor.type, []).append(tensor.nbytes)
    return tuple(StoredType(kind, len(sizes), sum(sizes)) for kind, sizes in sorted(found.items()))
