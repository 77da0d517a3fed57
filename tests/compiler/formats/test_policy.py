"""firsttoken_compiler.formats.policy: which layers get more bits, and what takes over where blocks do not fit."""

from __future__ import annotations

import pytest

from firsttoken_compiler.errors import OptionError
from firsttoken_compiler.formats.policy import POLICIES, ROLES, Policy, policy_of, row_bytes, type_of
from firsttoken_compiler.formats.types import BLOCK_TYPES


def layers_of(policy: str, role: str, kind: str, layers: int = 28, k: int = 1536) -> list[int]:
    """Layers in which a policy stores a role in a type."""
    return [layer for layer in range(layers) if type_of(POLICIES[policy], role, layer, layers, k) == kind]


@pytest.mark.parametrize("policy", ["q4_k_m", "q5_k_m"])
@pytest.mark.parametrize("role", ["attn_v", "ffn_down"])
def test_medium_mixtures_give_more_bits_to_a_half_of_the_layers(policy: str, role: str) -> None:
    more = [0, 1, 2, 5, 8, 11, 14, 17, 20, 23, 24, 25, 26, 27]
    assert layers_of(policy, role, "q6_k") == more
    assert layers_of(policy, role, policy[:4]) == [layer for layer in range(28) if layer not in more]


def test_small_and_large_mixtures() -> None:
    assert layers_of("q4_k_s", "attn_v", "q5_k") == [0, 1, 2, 3]
    assert layers_of("q4_k_s", "ffn_down", "q5_k") == [0, 1, 2]
    assert layers_of("q3_k_m", "attn_v", "q5_k") == [0, 1]
    assert layers_of("q3_k_m", "ffn_down", "q5_k") == [0]
    for role in ("attn_v", "ffn_down", "attn_output"):
        assert layers_of("q3_k_l", role, "q5_k") == list(range(28))
        assert not layers_of("q3_k_m", role, "q3_k")
    assert layers_of("q3_k_m", "attn_output", "q4_k") == list(range(28))
    for policy in ("q3_k_s", "q5_k_s", "q6_k", "q8_0", "q4_0"):
        for role in ("attn_q", "attn_v", "ffn_down", "token_embd", "other"):
            assert layers_of(policy, role, POLICIES[policy].base) == list(range(28))


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_heads_and_vectors(policy: Policy) -> None:
    one_type = policy.name in (*BLOCK_TYPES, "f16", "f32") and policy.name[1:] not in ("4_0", "4_1", "5_0", "5_1")
    assert type_of(policy, "output", 0, 1, 1536) == (policy.base if one_type else "q6_k")
    assert type_of(policy, "norm", 0, 1, 1536) == "f32"


@pytest.mark.parametrize(
    ("policy", "role", "k", "kind"),
    [
        ("q3_k_s", "attn_q", 896, "iq4_nl"), ("q4_k_s", "attn_q", 896, "q5_0"), ("q5_k_s", "attn_q", 896, "q5_1"),
        ("q6_k", "attn_q", 896, "q8_0"), ("q4_k_m", "attn_v", 896, "q8_0"), ("q4_k_m", "output", 896, "q8_0"),
        ("q4_1", "output", 576, "q8_0"), ("q4_1", "attn_q", 576, "q4_1"), ("q3_k_s", "attn_q", 48, "f16"),
        ("q8_0", "output", 48, "f16"), ("q4_0", "attn_k", 36, "f16"), ("f32", "attn_k", 36, "f32"),
    ],
)  # fmt: skip
def test_rows_that_blocks_do_not_fit(policy: str, role: str, k: int, kind: str) -> None:
    assert type_of(POLICIES[policy], role, 0, 24, k) == kind


def test_every_type_fits_its_rows() -> None:
    for policy in POLICIES.values():
        for role in ROLES:
            for k in (1, 32, 576, 1536):
                kind = type_of(policy, role, 3, 30, k)
                assert k % (BLOCK_TYPES[kind].block if kind in BLOCK_TYPES else 1) == 0
                assert row_bytes(kind, k) > 0


def test_names_that_do_not_exist() -> None:
    with pytest.raises(OptionError, match="weights 'q4_k_x': mixtures of block types are q3_k_s, "):
        policy_of("q4_k_x")
    with pytest.raises(ValueError, match="role 'attn' is none of attn_q, "):
        type_of(POLICIES["q8_0"], "attn", 0, 1, 32)
