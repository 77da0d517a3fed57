"""Every way known to us in which a GGUF file can be bad: what makes it, and what must be said about it."""

import struct
from collections.abc import Callable
from dataclasses import replace

import gguf_making as g
from bad_cases import Case
from gguf_making import Gguf, Tensor

CASES: list[Case] = []


def case(name: str, message: str, make: Callable[[], Gguf | bytes]) -> None:
    """A file of that name; `message` is part of what the one error says."""

    def data(_folder: object) -> bytes:
        made = make()
        return made.encode() if isinstance(made, Gguf) else made

    CASES.append(Case(f"GGUF: {name}", message, data, "bad.gguf"))


def damage(name: str, message: str, change: Callable[[Gguf], Gguf]) -> None:
    """The sound file after a change."""
    case(name, message, lambda: change(g.small()))


def field(name: str, message: str, key: str, value: tuple[int, bytes]) -> None:
    """The sound file with another value of a field."""
    damage(name, message, lambda x: x.with_fields(**{key: value}))


def _headers() -> None:
    whole = g.small().encode()
    case("empty", "0 bytes, a GGUF file has at least 24", lambda: b"")
    case("only the magic", "4 bytes, a GGUF file has at least 24", lambda: whole[:4])
    case("another format", "begins with b'GGML'", lambda: b"GGML" + whole[4:])
    case("zeros", "begins with b'\\x00\\x00\\x00\\x00'", lambda: bytes(4096))
    case("version 1", "GGUF version 1, versions 2 and 3 are read", lambda: replace(g.small(), version=1))
    case("version of the future", "GGUF version 4000000000", lambda: replace(g.small(), version=4_000_000_000))
    case("big-endian", "version 3 of big-endian numbers", lambda: replace(g.small(), version=3 << 24))
    case("truncated in the fields", "the file ends at byte 100, inside", lambda: whole[:100])
    case("truncated in the tensors", "inside tensor", lambda: whole[: whole.index(b"blk.0.attn_v") + 20])
    case("truncated in the data", "needs", lambda: whole[:-200])
    damage("2^63 tensors", "declares 9223372036854775808 tensors", lambda x: replace(x, tensor_count=1 << 63))
    damage("2^63 fields", "declares 9223372036854775808 fields", lambda x: replace(x, field_count=1 << 63))
    damage("more tensors than there is room for", "inside the list of 90000 tensors", lambda x: replace(
        x, tensor_count=90_000))  # fmt: skip
    damage("one tensor more than there is", "tensor '' has 0 dimensions", lambda x: replace(x, tensor_count=12))
    damage("one field less than there is", "has", lambda x: replace(x, field_count=8))
    damage("a field twice", "field 'llama.block_count' is there twice", lambda x: replace(
        x, doubled=("llama.block_count",)))  # fmt: skip
    damage("alignment 0", "general.alignment is 0", lambda x: x.with_fields(**{"general.alignment": g.u32(0)}))
    damage("alignment 48", "general.alignment is 48", lambda x: x.with_fields(**{"general.alignment": g.u32(48)}))
    damage("alignment 2^31", "general.alignment is 2147483648", lambda x: x.with_fields(
        **{"general.alignment": g.u32(1 << 31)}))  # fmt: skip


def _fields() -> None:
    key = "general.name"
    field("string of 2^63 bytes", "has 9223372036854775808 bytes", key, (g.STRING, struct.pack("<Q", 1 << 63)))
    field("string beyond the end", "inside field 'general.name'", key, (g.STRING, struct.pack("<Q", 1 << 19)))
    field("array of 2^62 numbers", "the elements of all arrays", key, g.array(g.U64, 1 << 62, b""))
    field("array of 2^62 strings", "the elements of all arrays", key, g.array(g.STRING, 1 << 62, b""))
    field("array of 2 million strings that are not there", "inside field", key, g.array(g.STRING, 2_000_000, b""))
    field("array of arrays", "is an array of an array", key, g.array(g.ARRAY, 1, g.array(g.U32, 1, bytes(4))[1]))
    field("array of an unknown type", "an array of the unknown type 77", key, g.array(77, 1, bytes(4)))
    field("unknown type", "field 'general.name' has the unknown type 99", key, (99, b""))
    damage("name of a field of 1 MB", "has 1000000 bytes, the limit is 256", lambda x: x.with_fields(
        **{"k" * 1_000_000: g.u32(1)}))  # fmt: skip


def _dimensions() -> None:
    name = "general.architecture"
    field("another family", "general.architecture is 'falcon', families that run are llama, qwen2", name, g.string(
        "falcon"))  # fmt: skip
    field("a family that is a number", "general.architecture is 7", name, g.u32(7))
    field("terminal codes as a family", "general.architecture is '\\x1b[2J'", name, g.string("\x1b[2J"))
    damage("no family", "general.architecture is None", lambda x: x.without(name))
    damage("no layers said", "llama.block_count is None", lambda x: x.without("llama.block_count"))
    field("0 layers", "llama.block_count is 0", "llama.block_count", g.u32(0))
    field("2^32 - 1 layers", "llama.block_count is 4294967295", "llama.block_count", g.u32((1 << 32) - 1))
    field("2 layers", "tensor 'blk.1.attn_norm.weight' is missing", "llama.block_count", g.u32(2))
    field("0 heads", "llama.attention.head_count is 0", "llama.attention.head_count", g.u32(0))
    field("a million heads", "head_dim is 1, must be even", "llama.attention.head_count", g.u32(1_000_000))
    field("heads as a string", "llama.attention.head_count is '2'", "llama.attention.head_count", g.string("2"))
    field("heads as an array of 2", "is '2 entries'", "llama.attention.head_count", g.array(g.U32, 2, bytes(8)))
    field("3 heads over 2", "not a multiple of kv_heads", "llama.attention.head_count_kv", g.u32(3))
    field("width of 2^31 - 4", "has shape", "llama.embedding_length", g.u32((1 << 31) - 4))
    field("another width of the middle", "'blk.0.ffn_gate.weight' has shape", "llama.feed_forward_length", g.u32(96))
    field("odd heads", "head_dim is 31", "llama.attention.key_length", g.u32(31))
    field("rotary positions of a part", "llama.rope.dimension_count is 16", "llama.rope.dimension_count", g.u32(16))
    field("values of another width", "llama.attention.value_length is 8", "llama.attention.value_length", g.u32(8))
    eps = "llama.attention.layer_norm_rms_epsilon"
    field("epsilon that is no number", "rms_eps is nan", eps, g.f32(float("nan")))
    field("epsilon as a string", f"{eps} is '1e-5'", eps, g.string("1e-5"))
    damage("no epsilon", f"{eps} is None", lambda x: x.without(eps))
    field("infinite base", "rope_theta is inf", "llama.rope.freq_base", g.f32(float("inf")))
    field("base 1", "rope_theta is 1.0", "llama.rope.freq_base", g.f32(1.0))
    field("no positions", "llama.context_length is 0", "llama.context_length", g.u32(0))
    field("scaled positions", "llama.rope.scaling.type is 'yarn'", "llama.rope.scaling.type", g.string("yarn"))
    field("linear scaling", "llama.rope.scale_linear is 4.0", "llama.rope.scale_linear", g.f32(4.0))
    field("experts", "llama.expert_count is 8", "llama.expert_count", g.u32(8))
    field("one of two parts", "one of 2 parts", "split.count", g.u32(2))


def _tensors() -> None:
    q, norm = "blk.0.attn_q.weight", "blk.0.attn_norm.weight"
    damage("a missing tensor", f"tensor '{q}' is missing", lambda x: x.lacking(q))
    damage("no embedding", "tensor 'token_embd.weight' is missing", lambda x: x.lacking("token_embd.weight"))
    damage("a tensor twice", f"tensor '{q}' is there twice", lambda x: x.having(Tensor(q, (64, 64), 8)))
    damage("a tensor too many", "tensor 'rope_freqs.weight' is none that", lambda x: x.having(
        Tensor("rope_freqs.weight", (16,))))  # fmt: skip
    damage("a bias too many", "tensor 'blk.0.attn_output.bias' is none", lambda x: x.having(
        Tensor("blk.0.attn_output.bias", (g.HIDDEN,))))  # fmt: skip
    damage("name of a tensor of 65 bytes", "has 65 bytes, the limit is 64", lambda x: x.having(Tensor("t" * 65, (4,))))
    damage("another shape", "has shape [32, 64], the fields ask for [64, 64]", lambda x: x.with_tensor(
        q, dims=(64, 32)))  # fmt: skip
    damage("a matrix of one dimension", "has shape [4096]", lambda x: x.with_tensor(q, dims=(4096,)))
    damage("0 dimensions", "has 0 dimensions", lambda x: x.with_tensor(q, dims=()))
    damage("5 dimensions", "has 5 dimensions", lambda x: x.with_tensor(q, dims=(64, 64, 1, 1, 1)))
    damage("2^32 dimensions", "has 4294967295 dimensions", lambda _x: _many_dimensions())
    damage("a dimension of 0", "declares the dimensions [64, 0]", lambda x: x.with_tensor(q, dims=(64, 0), offset=0))
    damage("dimensions that overflow", "declares the dimensions", lambda x: x.with_tensor(
        q, dims=(1 << 33, 1 << 33), offset=0))  # fmt: skip
    damage("a tensor of 4 GB", "needs 4563402752 bytes", lambda x: x.with_tensor(
        q, dims=(1 << 16, 1 << 16), offset=0))  # fmt: skip
    damage("an offset beyond the file", "at 1099511", lambda x: x.with_tensor(q, offset=1 << 40))
    damage("an offset that overflows", "the file has", lambda x: x.with_tensor(q, offset=(1 << 64) - 32))
    damage("a misaligned offset", "which is no multiple of the alignment 32", lambda x: x.with_tensor(q, offset=33))
    damage("an unknown type", "is of type 1234, which ggml does not know", lambda x: x.with_tensor(q, type=1234))
    damage("a type that does not run", "is of type IQ2_XXS; types that run are", lambda x: x.with_tensor(q, type=16))
    damage("rows that are no blocks", "blocks of q6_k hold 256", lambda x: x.with_tensor(q, type=14))
    damage("a norm in blocks", f"tensor '{norm}' is q8_0, must be a float", lambda x: x.with_tensor(norm, type=8))


def _many_dimensions() -> Gguf:
    """A number of dimensions that no file holds."""

    class Damaged(Gguf):
        def encode(self) -> bytes:
            whole, name = super().encode(), b"blk.0.attn_q.weight"
            at = whole.index(name) + len(name)
            return whole[:at] + b"\xff\xff\xff\xff" + whole[at + 4 :]

    sound = g.small()
    return Damaged(sound.fields, sound.tensors)


for group in (_headers, _fields, _dimensions, _tensors):
    group()
assert len({entry.name for entry in CASES}) == len(CASES), "names of cases repeat"
