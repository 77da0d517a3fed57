"""What the user chooses about numbers; everything else follows from the student and the target."""

import json
from dataclasses import asdict, dataclass
from typing import Final

from firsttoken_compiler.errors import OptionError

WEIGHTS: Final = ("int4", "int8", "fp16")
ACTS: Final = ("int8", "int16", "fp16")
GROUPS: Final = ("32", "64", "128", "channel")
NORM_CACHES: Final = ("int8", "int16", "fp16", "off")
STORAGES: Final = ("fp16", "fp32")
KV_CACHES: Final = ("fp16", "int8")


@dataclass(frozen=True, slots=True)
class Precision:
    """Types of weights and activations.

    `norm_cache` is the type in which a norm's result is kept for its consumers; an integer type is also the activation
    type of those consumers. `off`: every consumer computes the norm again.
    `layer_bits` overrides the weights' bits per layer (4, 8, 16; 0 keeps `weights`).
    `kv_cache` is the type in which keys and values are kept: int8 with a scale per token and head, or fp16.
    `storage` is the type of floating-point values between operators; with fp32 only what the matrix unit reads is fp16.
    """

    weights: str = "int4"
    acts: str = "int8"
    group: str = "128"
    norm_cache: str = "int8"
    layer_bits: tuple[int, ...] = ()
    storage: str = "fp16"
    kv_cache: str = "fp16"

    def __post_init__(self) -> None:
        """Raises OptionError naming the option, the value, and what is possible."""
        for name, value, known in (
            ("--weights", self.weights, WEIGHTS), ("--acts", self.acts, ACTS),
            ("--group", self.group, GROUPS), ("--norm-cache", self.norm_cache, NORM_CACHES),
            ("storage", self.storage, STORAGES), ("--kv-cache", self.kv_cache, KV_CACHES),
        ):  # fmt: skip
            if value not in known:
                raise OptionError(f"{name} {value!r} is not one of {', '.join(known)}")
        if self.weights == "fp16" and self.acts != "fp16":
            raise OptionError(
                f"--weights fp16 needs --acts fp16, not {self.acts}: no unit multiplies {self.acts} by fp16"
            )
        if self.weights == "fp16" and self.norm_cache in ("int8", "int16"):
            raise OptionError(
                f"--norm-cache {self.norm_cache} feeds integers to fp16 weights; choose fp16 or off with --weights fp16"
            )
        if any(bits not in (0, 4, 8, 16) for bits in self.layer_bits):
            raise OptionError(f"bits per layer {self.layer_bits}: each must be 4, 8 or 16 (0 keeps --weights)")

    def weight_bits(self, layer: int | None) -> int:
        """Bits of a linear operator's weights; `layer` None outside the layers."""
        override = self.layer_bits[layer] if layer is not None and layer < len(self.layer_bits) else 0
        return override or {"int4": 4, "int8": 8, "fp16": 16}[self.weights]

    def canonical_json(self) -> str:
        """Stable text for content hashing."""
        return json.dumps(asdict(self), sort_keys=True)


def resolve(weights: str, acts: str | None, group: str, norm_cache: str | None) -> Precision:
    """Fills what was left open: integer weights go with int8 activations and an int8 norm cache, fp16 with fp16."""
    acts = acts or ("fp16" if weights == "fp16" else "int8")
    if norm_cache is None:
        norm_cache = "fp16" if acts == "fp16" else acts
    return Precision(weights, acts, group, norm_cache)
