"""What a student language model is to the rest of the project: its dimensions, its graph, its weights, its text.

Providers of students are plug-ins: every entry point of the group `firsttoken.students` names an object that satisfies
`StudentProvider`. Nothing heavy is imported here, so a width search may build configurations by the thousand.
"""

from __future__ import annotations

import difflib
import functools
import json
import math
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import TYPE_CHECKING, Final, Protocol

from firsttoken.rope import LongRope, RopeScaling
from firsttoken_compiler.errors import FirsttokenError, OptionError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import onnx

    from firsttoken.encoder import EncoderConfig
    from firsttoken.image_network import ImageNetworkConfig
    from firsttoken.options import Progress

ENTRY_POINT_GROUP: Final = "firsttoken.students"
FAMILIES: Final = ("llama", "qwen2", "qwen3", "phi3")
WEIGHT_BITS: Final = (4, 8, 16)


class UnknownStudent(FirsttokenError, ValueError):
    """No provider knows a student of that name; the message gives the nearest names."""

    def __init__(self, name: str, known: Sequence[str]) -> None:
        self._arguments = (name, tuple(known))
        nearest = difflib.get_close_matches(name.casefold(), [k.casefold() for k in known], n=3, cutoff=0.4)
        shown = [k for k in known if k.casefold() in nearest] or list(known)
        label = "nearest names" if nearest else "known students"
        super().__init__(f"unknown student {name!r}; {label}: {', '.join(shown) or 'none (no provider is installed)'}")

    def __reduce__(self) -> tuple[type[UnknownStudent], tuple[str, tuple[str, ...]]]:
        return UnknownStudent, self._arguments


class ProviderError(FirsttokenError):
    """An installed student plug-in cannot be loaded; the message names the entry point and the remedy."""


def require_positive(where: str, what: str, value: object) -> None:
    """Raise ValueError naming what is no integer of at least 1."""
    if type(value) is not int or value < 1:
        raise ValueError(f"{where}: {what} is {value!r}, must be an integer of at least 1; give the model's own {what}")


def _require_grouping(where: str, heads: int, kv_heads: int) -> None:
    require_positive(where, "heads", heads)
    require_positive(where, "kv_heads", kv_heads)
    if heads % kv_heads:
        raise ValueError(
            f"{where}: heads is {heads}, not a multiple of kv_heads {kv_heads}; "
            f"use {heads - heads % kv_heads or kv_heads} or {heads + kv_heads - heads % kv_heads} heads"
        )


@dataclass(frozen=True, slots=True)
class LayerConfig:
    """Dimensions of one decoder layer.

    Attributes:
        heads: query heads, a multiple of `kv_heads`.
        kv_heads: key and value heads.
        intermediate: width of the gated feed-forward block, in elements.
        weight_bits: precision of this layer's matrices (4, 8 or 16 bits), None for the precision of the whole model.
    """

    heads: int
    kv_heads: int
    intermediate: int
    weight_bits: int | None = None

    def __post_init__(self) -> None:
        _require_grouping("layer", self.heads, self.kv_heads)
        require_positive("layer", "intermediate", self.intermediate)
        if self.weight_bits is not None and self.weight_bits not in WEIGHT_BITS:
            raise ValueError(
                f"layer: weight_bits is {self.weight_bits!r}, must be one of {WEIGHT_BITS} or None; "
                "use None to keep the precision of the whole model"
            )


@dataclass(frozen=True, slots=True)
class StudentConfig:
    """Dimensions of a decoder-only student: RMSNorm, rotary positions, grouped attention, gated SiLU feed-forward.

    Attributes:
        name: how commands and reports call it.
        family: one of `FAMILIES`; the other fields say in what they differ.
        hidden: width of the residual stream, in elements.
        intermediate: width of the feed-forward block where `per_layer` does not say otherwise.
        layers: number of decoder layers.
        heads: query heads where `per_layer` does not say otherwise.
        kv_heads: key and value heads where `per_layer` does not say otherwise.
        head_dim: elements per head, the same in every layer, even.
        vocab: rows of the embedding table.
        rope_theta: base of the rotary angles.
        max_positions: longest context, in tokens.
        rms_eps: epsilon of every RMSNorm.
        tie_embeddings: whether the head shares the embedding table.
        qkv_bias: whether the query, key and value projections have a bias.
        source: one line, where these numbers come from.
        per_layer: one `LayerConfig` per layer, or empty for uniform layers.
        qk_norm: whether each head of the queries and of the keys has an RMSNorm before the rotation, as in Qwen3.
        rope_scaling: how rotary frequencies are stretched, None where they are not.
    """

    name: str
    family: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    rope_theta: float
    max_positions: int
    rms_eps: float
    tie_embeddings: bool
    qkv_bias: bool
    source: str
    per_layer: tuple[LayerConfig, ...] = ()
    qk_norm: bool = False
    rope_scaling: RopeScaling | None = None

    def __post_init__(self) -> None:
        if not self.name:
            raise ValueError("student: name is empty, must be text; give the model's name")
        where = f"student {self.name!r}"
        if self.family not in FAMILIES:
            raise ValueError(
                f"{where}: family is {self.family!r}, must be one of {FAMILIES}; "
                "choose the family with the same bias and rotary rules"
            )
        for what in ("hidden", "intermediate", "layers", "head_dim", "vocab", "max_positions"):
            require_positive(where, what, getattr(self, what))
        _require_grouping(where, self.heads, self.kv_heads)
        if self.head_dim % 2:
            raise ValueError(
                f"{where}: head_dim is {self.head_dim}, must be even because rotary positions turn pairs; "
                f"use {self.head_dim + 1}"
            )
        if not (math.isfinite(self.rope_theta) and self.rope_theta > 1.0):
            raise ValueError(
                f"{where}: rope_theta is {self.rope_theta!r}, must be finite and above 1; 10000.0 is usual"
            )
        if not 0.0 < self.rms_eps < 1.0:
            raise ValueError(f"{where}: rms_eps is {self.rms_eps!r}, must lie between 0 and 1; 1e-6 is usual")
        if self.per_layer and len(self.per_layer) != self.layers:
            raise ValueError(
                f"{where}: per_layer has {len(self.per_layer)} entries, must have one for each of the {self.layers} "
                "layers; leave it empty for uniform layers"
            )
        if isinstance(self.rope_scaling, LongRope) and len(self.rope_scaling.short) != self.head_dim // 2:
            raise ValueError(
                f"{where}: rope_scaling has {len(self.rope_scaling.short)} divisors, must have one for each of the "
                f"{self.head_dim // 2} pairs of a head"
            )

    def layer(self, index: int) -> LayerConfig:
        """Return the dimensions of layer `index`, which counts from 0."""
        if not 0 <= index < self.layers:
            raise IndexError(f"student {self.name!r}: layer {index} does not exist, layers are 0 to {self.layers - 1}")
        if self.per_layer:
            return self.per_layer[index]
        return LayerConfig(self.heads, self.kv_heads, self.intermediate)

    @property
    def parameters(self) -> int:
        """Number of parameters; a tied embedding table counts once."""
        total = self.vocab * self.hidden * (1 if self.tie_embeddings else 2) + self.hidden
        if not self.per_layer:
            return total + self.layers * self._layer_parameters(self.layer(0))
        return total + sum(self._layer_parameters(layer) for layer in self.per_layer)

    def _layer_parameters(self, layer: LayerConfig) -> int:
        query, kv = layer.heads * self.head_dim, layer.kv_heads * self.head_dim
        matrices = self.hidden * (2 * query + 2 * kv + 3 * layer.intermediate)
        biases = query + 2 * kv if self.qkv_bias else 0
        return matrices + 2 * self.hidden + biases + (2 * self.head_dim if self.qk_norm else 0)

    def kv_bytes_per_token(self, bytes_per_element: int = 2) -> int:
        """Return the bytes that one token adds to the key and value caches of all layers."""
        heads = sum(layer.kv_heads for layer in self.per_layer) or self.layers * self.kv_heads
        return 2 * heads * self.head_dim * bytes_per_element

    def canonical_json(self) -> str:
        """Return stable text of everything that decides the graph, for content hashing.

        `name` and `source` are left out, and a `per_layer` that only repeats the uniform dimensions counts as empty, so
        equal students give equal text.
        """
        fields: dict[str, object] = {what: getattr(self, what) for what in _CONTENT}
        fields["rope_theta"], fields["rms_eps"] = float(self.rope_theta), float(self.rms_eps)
        uniform = LayerConfig(self.heads, self.kv_heads, self.intermediate)
        if any(layer != uniform for layer in self.per_layer):
            fields["per_layer"] = [[p.heads, p.kv_heads, p.intermediate, p.weight_bits] for p in self.per_layer]
            del fields["heads"], fields["kv_heads"], fields["intermediate"]
        if self.qk_norm:
            fields["qk_norm"] = True
        if self.rope_scaling is not None:
            fields["rope_scaling"] = [type(self.rope_scaling).__name__, asdict(self.rope_scaling)]
        return json.dumps(fields, sort_keys=True, separators=(",", ":"))


_CONTENT: Final = (
    "family", "hidden", "intermediate", "layers", "heads", "kv_heads", "head_dim", "vocab", "rope_theta",
    "max_positions", "rms_eps", "tie_embeddings", "qkv_bias",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor lies in its file, and how.

    Attributes:
        offset: its first byte.
        length: its bytes.
        type: "f32", "f16", "bf16", or a type of blocks (a key of `firsttoken_compiler.formats.types.BLOCK_TYPES`).
        rows_first: whether a matrix lies [N, K], output width first, as in GGUF files; else it lies [K, N].
        heads: heads whose rows lie in pairs, (0, d/2), (1, d/2 + 1), ...; 0 where all rows lie in their order.
    """

    offset: int
    length: int
    type: str = "f32"
    rows_first: bool = False
    heads: int = 0


class WeightStore(Protocol):
    """Weights of a student in one file, row-major, which graphs read as ONNX external data."""

    @property
    def path(self) -> Path:
        """The external data file."""

    def place(self, tensor_name: str) -> Place:
        """Return where a tensor lies in the file; KeyError if it is not there."""


class Tokenizer(Protocol):
    """Text to token ids and back."""

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Ids that end an answer."""

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`, without any added token; special tokens spelled out in it are recognised."""

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of `ids`, special tokens spelled out."""

    def chat(self, user_text: str) -> list[int]:
        """Return the ids of the model's chat template for one user message, ready for the answer to follow."""


@dataclass(frozen=True, slots=True)
class StoredType:
    """Weights of one type in a file: how many tensors, and their bytes."""

    type: str
    tensors: int
    nbytes: int


class StudentFile(Protocol):
    """A file that is a student by itself: dimensions, weights, and maybe a tokenizer."""

    @property
    def config(self) -> StudentConfig:
        """Its dimensions."""

    @property
    def weights(self) -> WeightStore:
        """Its weights as they are stored."""

    def content(self) -> str:
        """Return text that is equal exactly for files with equal graphs; values of weights do not count."""

    def float_weights(self) -> WeightStore:
        """Return its weights as float32, kept in the cache folder."""

    def tokenizer(self) -> Tokenizer:
        """Return its tokenizer; raise a FirsttokenError where there is none that can be rebuilt."""


class StudentProvider(Protocol):
    """A source of students, reached through the entry point group `firsttoken.students`."""

    def names(self) -> tuple[str, ...]:
        """Return the names of the students, in the order to show them."""

    def config(self, name: str) -> StudentConfig | EncoderConfig | ImageNetworkConfig:
        """Return the student of that name or alias, in any case; raise `UnknownStudent` otherwise."""

    def encoder_graph(
        self, config: EncoderConfig, *, tokens: int, weights: WeightStore | None = None
    ) -> onnx.ModelProto:
        """Return the static graph of an encoder for an input of `tokens` tokens."""

    def image_graph(self, config: ImageNetworkConfig) -> onnx.ModelProto:
        """Return the static graph of a network for one image; its weights' values need not be there."""

    def image_tensors(self, config: ImageNetworkConfig) -> tuple[str, ...]:
        """Return the tensors of that graph whose ranges decide all static scales of activations."""

    def graph(
        self, config: StudentConfig, *, tokens: int, past: int, weights: WeightStore | None = None,
        all_logits: bool = False,
    ) -> onnx.ModelProto:  # fmt: skip
        """Return the static graph that processes `tokens` new tokens after a cache of `past` rows.

        Its logits are those of the last token, or with `all_logits` of every new one.
        """

    def weights(self, name: str) -> WeightStore | None:
        """Return the weights, or None where the student has none here."""

    def tokenizer(self, name: str) -> Tokenizer | None:
        """Return the tokenizer, or None where the student has none here."""

    def file(self, path: Path) -> StudentFile | None:
        """Return the student that a file is, or None where it is of no format that this provider reads.

        Raises a FirsttokenError where it is, but cannot be read.
        """

    def quantise(
        self, source: str | Path, path: Path, kind: str, progress: Progress | None = None
    ) -> tuple[StoredType, ...]:
        """Write a student, by its name or its file, as a file with weights in blocks; return what that holds.

        `kind` is a key of `firsttoken_compiler.formats.policy.POLICIES`. Raises a FirsttokenError where the student has
        no weights here, there is no such policy, or the weights do not fit its types.
        """


@functools.cache
def providers() -> tuple[StudentProvider, ...]:
    """Return every installed provider, ordered by entry point name; `providers.cache_clear()` looks again."""
    found: list[StudentProvider] = []
    for entry in sorted(metadata.entry_points(group=ENTRY_POINT_GROUP), key=lambda entry: entry.name):
        try:
            found.append(entry.load())
        except Exception as error:  # a plug-in may fail in any way; the reader needs to know which one it was
            raise ProviderError(
                f"student plug-in {entry.name!r} ({entry.value}) cannot be loaded: {error}; "
                "repair or uninstall the distribution that declares it"
            ) from error
    return tuple(found)


def find_any(name: str) -> tuple[StudentProvider, StudentConfig | EncoderConfig | ImageNetworkConfig]:
    """Return the first provider that knows `name`, with the configuration; raise `UnknownStudent` otherwise."""
    known: list[str] = []
    for provider in providers():
        try:
            return provider, provider.config(name)
        except UnknownStudent:
            known.extend(provider.names())
    raise UnknownStudent(name, known)


def find_student(name: str) -> tuple[StudentProvider, StudentConfig]:
    """Return what `find_any` does of a language model; raise OptionError for anything else."""
    from firsttoken.encoder import EncoderConfig

    provider, config = find_any(name)
    if not isinstance(config, StudentConfig):
        kind = "an encoder" if isinstance(config, EncoderConfig) else "an image network"
        raise OptionError(f"{config.name} is {kind}, which has no cache and makes no tokens: give a language model")
    return provider, config
