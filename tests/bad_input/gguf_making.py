"""A tiny GGUF file, written byte by byte, with every part open to damage."""

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

U32, F32, BOOL, STRING, ARRAY, U64 = 4, 6, 7, 8, 9, 10
HIDDEN, WIDTH, VOCAB = 64, 64, 8


def text(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def u32(value: int) -> tuple[int, bytes]:
    return U32, struct.pack("<I", value)


def f32(value: float) -> tuple[int, bytes]:
    return F32, struct.pack("<f", value)


def string(value: str) -> tuple[int, bytes]:
    return STRING, text(value)


def array(kind: int, count: int, data: bytes) -> tuple[int, bytes]:
    return ARRAY, struct.pack("<IQ", kind, count) + data


@dataclass(frozen=True)
class Tensor:
    name: str
    dims: Sequence[int]
    """Innermost first."""
    type: int = 0
    offset: int | None = None
    """None: behind the tensor before."""

    @property
    def nbytes(self) -> int:
        elements = 1
        for extent in self.dims:
            elements *= extent
        return {0: elements * 4, 1: elements * 2, 3: elements // 32 * 20, 8: elements // 32 * 34}.get(self.type, 64)


@dataclass(frozen=True)
class Gguf:
    """The file; what is None is counted."""

    fields: dict[str, tuple[int, bytes]]
    tensors: tuple[Tensor, ...]
    magic: bytes = b"GGUF"
    version: int = 3
    tensor_count: int | None = None
    field_count: int | None = None
    room: int | None = None
    """Bytes of data."""
    doubled: tuple[str, ...] = field(default=())
    """Fields that are written twice."""

    def encode(self) -> bytes:
        made = [self.magic, struct.pack("<I", self.version)]
        entries = [*self.fields.items(), *((name, self.fields[name]) for name in self.doubled)]
        counts = (self.tensor_count, len(self.tensors)), (self.field_count, len(entries))
        made += [struct.pack("<Q", found if said is None else said) for said, found in counts]
        made += [text(name) + struct.pack("<I", kind) + data for name, (kind, data) in entries]
        end = 0
        for tensor in self.tensors:
            offset = end if tensor.offset is None else tensor.offset
            made.append(text(tensor.name) + struct.pack(f"<I{len(tensor.dims)}Q", len(tensor.dims), *tensor.dims))
            made.append(struct.pack("<IQ", tensor.type, offset))
            end = -(-(offset + tensor.nbytes) // 32) * 32 if tensor.offset is None else end
        head = b"".join(made)
        return head + bytes(-len(head) % 32) + bytes(end if self.room is None else self.room)

    def with_fields(self, **changed: Any) -> "Gguf":
        """Fields of the family replaced (`_` for `.` is not translated: give names in a dictionary)."""
        return replace(self, fields={**self.fields, **changed})

    def without(self, *names: str) -> "Gguf":
        """Fields taken away."""
        return replace(self, fields={name: value for name, value in self.fields.items() if name not in names})

    def with_tensor(self, name: str, **changed: Any) -> "Gguf":
        """One tensor changed."""
        tensors = tuple(replace(t, **changed) if t.name == name else t for t in self.tensors)
        return replace(self, tensors=tensors)

    def lacking(self, name: str) -> "Gguf":
        """Without a tensor."""
        return replace(self, tensors=tuple(t for t in self.tensors if t.name != name))

    def having(self, *tensors: Tensor) -> "Gguf":
        """With further tensors."""
        return replace(self, tensors=(*self.tensors, *tensors))


def small() -> Gguf:
    """A sound one: one layer of 2 heads over 1, matrices in Q8_0."""
    fields = {
        "general.architecture": string("llama"), "llama.block_count": u32(1), "llama.context_length": u32(64),
        "llama.embedding_length": u32(HIDDEN), "llama.feed_forward_length": u32(WIDTH),
        "llama.attention.head_count": u32(2), "llama.attention.head_count_kv": u32(1),
        "llama.attention.layer_norm_rms_epsilon": f32(1e-5), "llama.rope.freq_base": f32(1e4),
    }  # fmt: skip
    matrices = {
        "attn_q": 64, "attn_k": 32, "attn_v": 32, "attn_output": HIDDEN, "ffn_gate": WIDTH, "ffn_up": WIDTH,
        "ffn_down": HIDDEN,
    }  # fmt: skip
    tensors = [Tensor("token_embd.weight", (HIDDEN, VOCAB), 8), Tensor("output_norm.weight", (HIDDEN,))]
    tensors += [Tensor(f"blk.0.{name}.weight", (64, rows), 8) for name, rows in matrices.items()]
    tensors += [Tensor(f"blk.0.{name}.weight", (HIDDEN,)) for name in ("attn_norm", "ffn_norm")]
    return Gguf(fields, tuple(tensors))
