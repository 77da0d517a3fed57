"""Which type each matrix of a student is stored in: llama.cpp's mixtures, by a tensor's role and layer.

Source of the rules: llama-quant.cpp of llama.cpp, for models without experts, with separate q, k and v, of fewer than
70 billion weights (which it gives more bits for v), and without an importance matrix. Where a row is no multiple of a
type's block, a smaller block takes over; llama.cpp gives up where even blocks of 32 do not fit the wanted type, here
the matrix is then stored in half precision.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from firsttoken_compiler.errors import OptionError
from firsttoken_compiler.formats.types import BLOCK_TYPES

ROLES: Final = (
    "attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down", "output", "token_embd", "norm",
    "other",
)  # fmt: skip
"""What a tensor does. `output` is the head, and also a table that is head and embedding; `norm` is every vector: norms
and biases; `other` is any other matrix."""
FLOAT_BYTES: Final = {"f32": 4, "f16": 2}
"""Types without blocks, and bytes of an element."""
FALLBACKS: Final = {"q3_k": "iq4_nl", "q4_k": "q5_0", "q5_k": "q5_1", "q6_k": "q8_0"}
"""What replaces a type whose blocks of 256 do not fit a row."""

_Where = Callable[[int, int], bool]
"""Whether a rule holds for a layer, of so many."""


@dataclass(frozen=True, slots=True)
class Rule:
    """Another type than the base for one role, in some layers."""

    role: str
    type: str
    where: _Where


@dataclass(frozen=True, slots=True)
class Policy:
    """A mixture of types: the first rule that holds, else the base."""

    name: str
    base: str
    """A key of `BLOCK_TYPES` or of `FLOAT_BYTES`."""
    output: str
    """Type of the head."""
    rules: tuple[Rule, ...] = ()

    def wanted(self, role: str, layer: int, layers: int) -> str:
        """The type before it is seen whether its blocks fit."""
        if role == "norm":
            return "f32"
        if role == "output":
            return self.output
        return next((rule.type for rule in self.rules if rule.role == role and rule.where(layer, layers)), self.base)


def _everywhere(_layer: int, _layers: int) -> bool:
    return True


def _more(layer: int, layers: int) -> bool:
    """The first and last eighth, and every third layer between them."""
    eighth = layers // 8
    return layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2


def _first(count: int) -> _Where:
    return lambda layer, _layers: layer < count


def _part(share: int) -> _Where:
    """The first one of so many parts of the layers."""
    return lambda layer, layers: layer < layers // share


_MEDIUM: Final = (Rule("attn_v", "q6_k", _more), Rule("ffn_down", "q6_k", _more))

POLICIES: Final = {
    made.name: made
    for made in (
        Policy("q3_k_s", "q3_k", "q6_k"),
        Policy(
            "q3_k_m", "q3_k", "q6_k",
            (
                Rule("attn_v", "q5_k", _first(2)), Rule("attn_v", "q4_k", _everywhere),
                Rule("ffn_down", "q5_k", _part(16)), Rule("ffn_down", "q4_k", _everywhere),
                Rule("attn_output", "q4_k", _everywhere),
            ),
        ),
        Policy(
            "q3_k_l", "q3_k", "q6_k",
            tuple(Rule(role, "q5_k", _everywhere) for role in ("attn_v", "ffn_down", "attn_output")),
        ),
        Policy(
            "q4_k_s", "q4_k", "q6_k", (Rule("attn_v", "q5_k", _first(4)), Rule("ffn_down", "q5_k", _part(8))),
        ),
        Policy("q4_k_m", "q4_k", "q6_k", _MEDIUM),
        Policy("q5_k_s", "q5_k", "q6_k"),
        Policy("q5_k_m", "q5_k", "q6_k", _MEDIUM),
        Policy("q6_k", "q6_k", "q6_k"),
        Policy("q4_0", "q4_0", "q6_k"),
        Policy("q4_1", "q4_1", "q6_k"),
        Policy("q5_0", "q5_0", "q6_k"),
        Policy("q5_1", "q5_1", "q6_k"),
        Policy("q8_0", "q8_0", "q8_0"),
        Policy("f16", "f16", "f16"),
        Policy("f32", "f32", "f32"),
        # One type for everything, which llama.cpp has under no name of its own.
        *(Policy(kind, kind, kind) for kind in ("q3_k", "q4_k", "q5_k", "iq4_nl")),
    )
}  # fmt: skip
"""Every name that weights can be stored under."""


def policy_of(name: str) -> Policy:
    """The mixture of that name; raises OptionError where there is none."""
    found = POLICIES.get(name)
    if found is None:
        raise OptionError(f"weights {name!r}: mixtures of block types are {', '.join(POLICIES)}")
    return found


def type_of(policy: Policy, role: str, layer: int, layers: int, k: int) -> str:
    """The type of a matrix, or of a vector: a key of `BLOCK_TYPES` or of `FLOAT_BYTES`.

    Args:
        policy: the mixture.
        role: one of `ROLES`.
        layer: the layer, from 0; of no meaning outside layers.
        layers: how many layers the student has.
        k: weights of a row.
    """
    if role not in ROLES:
        raise ValueError(f"role {role!r} is none of {', '.join(ROLES)}")
    wanted = policy.wanted(role, layer, layers)
    while wanted in BLOCK_TYPES and k % BLOCK_TYPES[wanted].block:
        wanted = FALLBACKS.get(wanted, "f16")
    return wanted


def row_bytes(kind: str, k: int) -> int:
    """Bytes of a row of k weights of a type that `type_of` names."""
    return k * FLOAT_BYTES[kind] if kind in FLOAT_BYTES else BLOCK_TYPES[kind].row_bytes(k)
