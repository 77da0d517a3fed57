"""What the user chooses about numbers; everything else follows from the student and the target."""

import json
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from typing import Final

from firsttoken_compiler.errors import OptionError
from firsttoken_compiler.formats.policy import FLOAT_BYTES, POLICIES, ROLES, policy_of, type_of
from firsttoken_compiler.formats.types import BLOCK_TYPES

INTEGERS: Final = {"int4": 4, "int8": 8}
"""Integer weights and their bits: a scale, with `asymmetric` a zero point, per group and column."""
FORMATS: Final = (*INTEGERS, "fp16", *BLOCK_TYPES)
"""What one matrix can be stored in."""
WEIGHTS: Final = (*INTEGERS, "fp16", *(name for name in POLICIES if name not in FLOAT_BYTES))
"""Formats and mixtures of them. A name that is both is the mixture: its type everywhere, but for the head."""
ACTS: Final = ("int8", "int16", "fp16")
GROUPS: Final = ("32", "64", "128", "channel")
NORM_CACHES: Final = ("int8", "int16", "fp16", "off", "statistics", "auto")
NORM_PLACES: Final = ("auto", "scratchpad", "dram")
STORAGES: Final = ("fp16", "fp32")
KV_CACHES: Final = ("fp16", "int8")
OF_BITS: Final = {4: "int4", 8: "int8", 16: "fp16"}
MATRICES: Final = tuple(role for role in ROLES if role != "norm")
"""Roles whose format can be chosen."""
EMBEDDING: Final = "token_embd"
HOST_ROLES: Final = (EMBEDDING, "output")
"""What a CPU can compute beside the NPU because that was asked for."""
HALF: Final = "fp16"


@dataclass(frozen=True, slots=True)
class WeightRule:
    """A format for some matrices.

    Attributes:
        role: a role of `formats.policy.ROLES`, or a pattern of them such as `attn_*`.
        weights: one of `FORMATS`.
        layers: first and last layer of each range; empty for every matrix of the role, in layers or not.
    """

    role: str
    weights: str
    layers: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        """Raises OptionError naming the value, and what is possible."""
        object.__setattr__(self, "layers", tuple((int(first), int(last)) for first, last in self.layers))
        if not any(fnmatchcase(role, self.role) for role in MATRICES):
            raise OptionError(f"role {self.role!r} is none of {', '.join(MATRICES)}, nor a pattern of them")
        if self.weights not in FORMATS:
            raise OptionError(f"weights {self.weights!r} is not one of {', '.join(FORMATS)}")
        if self.role == EMBEDDING and self.weights in INTEGERS:
            raise OptionError(
                f"weights {self.weights!r}: rows of the token table are gathered from fp16 or blocks "
                f"({', '.join(BLOCK_TYPES)}), not from {self.weights}"
            )
        if any(not 0 <= first <= last for first, last in self.layers):
            raise OptionError(f"layers {self.layers}: each range is from a layer of at least 0 to one not before it")

    def covers(self, role: str, layer: int | None) -> bool:
        """Whether it is for a matrix; `layer` None outside the layers."""
        if not fnmatchcase(role, self.role):
            return False
        return not self.layers or (layer is not None and any(first <= layer <= last for first, last in self.layers))

    def text(self) -> str:
        """As `--mix` reads it."""
        ranges = "+".join(str(first) if first == last else f"{first}-{last}" for first, last in self.layers)
        return f"{self.role}{'@' if ranges else ''}{ranges}={self.weights}"


@dataclass(frozen=True, slots=True)
class Precision:
    """Types of weights and activations.

    `weights` is one of `WEIGHTS`; `rules` come before it, the first that covers a matrix decides, and after them
    `layer_bits`, the weights' bits per layer (4, 8, 16; 0 keeps `weights`).
    `asymmetric` gives integer weights zero points.
    `norm_cache` is the type in which a norm's result is kept for its consumers; an integer type is also the activation
    type of those consumers. `off`: every consumer computes the norm again; `statistics`: from the numbers of each row,
    which are kept; `auto`: what costs least of these and of rows in the type of the activations.
    `norm_cache_place` is where rows that are kept lie; `auto` lets what is touched most per byte have the scratchpad.
    `residual_spill` is the type of those sums of the residual stream that lie in DRAM.
    `ranges`: ONNX tensors that products read, each with its largest magnitude, for integer activations with a static
    scale; without any, each token has a scale of its own.
    `kv_cache` is the type in which keys and values are kept: int8 with a scale per token and head, or fp16.
    `kv_concat`: attention reads a copy of rows before and rows of this run, as graphs do that concatenate the two.
    `storage` is the type of floating-point values between operators; with fp32 only what the matrix unit reads is fp16.
    `host_roles`, of `HOST_ROLES`: what the host computes, on weights of `host_weight_bits` there, scales included.
    """

    weights: str = "int4"
    acts: str = "int8"
    group: str = "128"
    norm_cache: str = "int8"
    layer_bits: tuple[int, ...] = ()
    storage: str = "fp16"
    kv_cache: str = "fp16"
    ranges: tuple[tuple[str, float], ...] = ()
    asymmetric: bool = False
    rules: tuple[WeightRule, ...] = ()
    norm_cache_place: str = "auto"
    residual_spill: str = "fp32"
    host_roles: tuple[str, ...] = ()
    host_weight_bits: float = 16.0
    kv_concat: bool = False

    def __post_init__(self) -> None:
        """Raises OptionError naming the option, the value, and what is possible."""
        for name, value, known in (
            ("--weights", self.weights, WEIGHTS), ("--acts", self.acts, ACTS),
            ("--group", self.group, GROUPS), ("--norm-cache", self.norm_cache, NORM_CACHES),
            ("storage", self.storage, STORAGES), ("--kv-cache", self.kv_cache, KV_CACHES),
            ("--norm-cache-place", self.norm_cache_place, NORM_PLACES),
            ("--residual-spill", self.residual_spill, STORAGES),
        ):  # fmt: skip
            if value not in known:
                raise OptionError(f"{name} {value!r} is not one of {', '.join(known)}")
        if any(bits not in (0, *OF_BITS) for bits in self.layer_bits):
            raise OptionError(f"bits per layer {self.layer_bits}: each must be 4, 8 or 16 (0 keeps --weights)")
        unknown = [role for role in self.host_roles if role not in HOST_ROLES]
        if unknown:
            raise OptionError(f"--host-roles has {unknown[0]!r}: the host computes {', '.join(HOST_ROLES)}, or nothing")
        if not 1 <= self.host_weight_bits <= 32:
            raise OptionError(f"--host-weight-bits {self.host_weight_bits}: from 1 to 32")
        self._check_pairs()

    def _check_pairs(self) -> None:
        """Combinations that do not exist."""
        if self.weights == HALF and self.acts != HALF:
            raise OptionError(
                f"--weights fp16 needs --acts fp16, not {self.acts}: no unit multiplies {self.acts} by fp16"
            )
        if self.norm_cache == "statistics" and self.ranges:
            raise OptionError(
                "--norm-cache statistics keeps a scale per token, and --acts-range gives one for all: choose another"
            )
        if self.norm_cache in ("off", "statistics") and self.norm_cache_place != "auto":
            raise OptionError(
                f"--norm-cache {self.norm_cache} keeps no rows that could lie in {self.norm_cache_place}: "
                "leave out --norm-cache-place"
            )
        if self.ranges and self.acts == HALF and self.norm_cache not in ("int8", "int16"):
            raise OptionError(f"--acts-range gives integer activations their scales, and --acts is {self.acts}")
        if self.weights == HALF and self.norm_cache in ("int8", "int16"):
            raise OptionError(
                f"--norm-cache {self.norm_cache} feeds integers to fp16 weights; choose fp16 or off with --weights fp16"
            )
        chosen = (self.weights, *(rule.weights for rule in self.rules))
        blocks = next((name for name in chosen if name in POLICIES), None)
        for option, value in (("--acts", self.acts), ("--norm-cache", self.norm_cache)):
            if blocks is not None and value == "int16":
                raise OptionError(
                    f"{option} int16 does not go with weights in blocks ({blocks}): their products are of fp16, which "
                    "holds all integers up to 2048 only; choose int8 or fp16, or int4 or int8 weights"
                )
        integers = any(name in INTEGERS for name in chosen) or any(OF_BITS.get(b) in INTEGERS for b in self.layer_bits)
        if self.asymmetric and not integers:
            raise OptionError(f"--asymmetric gives int4 and int8 weights zero points, and --weights is {self.weights}")

    def format_of(self, role: str = "other", layer: int | None = None, layers: int = 0, k: int = 0) -> str:
        """The format of a matrix, one of `FORMATS`.

        Args:
            role: what it does, one of `formats.policy.ROLES`.
            layer: the layer that it is in; None outside the layers.
            layers: how many layers the student has.
            k: weights of a row, along which blocks lie.
        """
        rule = next((rule for rule in self.rules if rule.covers(role, layer)), None)
        bits = self.layer_bits[layer] if layer is not None and layer < len(self.layer_bits) else 0
        wanted = rule.weights if rule is not None else OF_BITS.get(bits, self.weights)
        if wanted in POLICIES:
            found = type_of(policy_of(wanted), role if rule is None else "other", layer or 0, layers, k)
            return HALF if found in FLOAT_BYTES else found
        return HALF if role == EMBEDDING else wanted

    def canonical_json(self) -> str:
        """Stable text for content hashing."""
        return json.dumps(asdict(self), sort_keys=True)


def resolve(
    weights: str, acts: str | None, group: str, norm_cache: str | None, *, asymmetric: bool = False,
    rules: tuple[WeightRule, ...] = (),
) -> Precision:  # fmt: skip
    """Fills what was left open: integer weights go with int8 activations and an int8 norm cache, others with fp16."""
    acts = acts or ("int8" if weights in INTEGERS else HALF)
    if norm_cache is None:
        norm_cache = acts
    return Precision(weights, acts, group, norm_cache, asymmetric=asymmetric, rules=rules)
