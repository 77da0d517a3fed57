"""Precision: what goes together, what follows when it is left open, and the message of every other choice."""

import itertools
from typing import Any

import pytest

from firsttoken_compiler.errors import OptionError
from firsttoken_compiler.options import (
    ACTS,
    FORMATS,
    GROUPS,
    MATRICES,
    NORM_CACHES,
    WEIGHTS,
    Precision,
    WeightRule,
    resolve,
)

COMBINATIONS = list(itertools.product(("int4", "int8", "fp16", "q4_k", "q5_k_m"), ACTS, GROUPS, NORM_CACHES))


@pytest.mark.parametrize("combination", COMBINATIONS, ids="-".join)
def test_every_combination_is_valid_or_explained(combination: tuple[str, str, str, str]) -> None:
    weights, acts, _, norm_cache = combination
    integer_norm = norm_cache in ("int8", "int16")
    if weights == "fp16" and (acts != "fp16" or integer_norm):
        with pytest.raises(OptionError, match="--weights fp16"):
            Precision(*combination)
    elif weights.startswith("q") and "int16" in (acts, norm_cache):
        with pytest.raises(OptionError, match="int16 does not go with weights in blocks"):
            Precision(*combination)
    else:
        assert Precision(*combination).weights == weights


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"weights": "int3"}, "--weights 'int3' is not one of int4, int8, fp16, q3_k_s"),
        ({"acts": "fp32"}, "--acts 'fp32' is not one of int8, int16, fp16"),
        ({"group": "16"}, "--group '16' is not one of 32, 64, 128, channel"),
        ({"norm_cache": "on"}, "--norm-cache 'on' is not one of int8, int16, fp16, off"),
        ({"weights": "fp16"}, "--weights fp16 needs --acts fp16, not int8"),
        ({"weights": "fp16", "acts": "fp16"}, "--norm-cache int8 feeds integers to fp16 weights"),
        ({"layer_bits": (4, 5)}, r"bits per layer \(4, 5\): each must be 4, 8 or 16"),
        ({"weights": "q4_k_m", "acts": "fp16", "norm_cache": "fp16", "asymmetric": True}, "--asymmetric gives int4"),
        ({"weights": "f16"}, "--weights 'f16' is not one of int4"),
    ],
)
def test_messages_name_option_value_and_choices(fields: dict[str, object], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        Precision(**fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("given", "acts", "norm_cache"),
    [
        (("int4", None, "128", None), "int8", "int8"),
        (("int8", "int16", "128", None), "int16", "int16"),
        (("int4", "fp16", "128", None), "fp16", "fp16"),
        (("fp16", None, "128", None), "fp16", "fp16"),
        (("fp16", None, "128", "off"), "fp16", "off"),
        (("int4", None, "128", "off"), "int8", "off"),
        (("int4", "int8", "128", "fp16"), "int8", "fp16"),
        (("q6_k", None, "128", None), "fp16", "fp16"),
        (("q6_k", "int8", "128", None), "int8", "int8"),
    ],
)
def test_what_is_left_open_follows_the_weights(
    given: tuple[str, str | None, str, str | None], acts: str, norm_cache: str
) -> None:
    resolved = resolve(*given)
    assert (resolved.acts, resolved.norm_cache) == (acts, norm_cache)


@pytest.mark.parametrize("weights", ["int4", "int8", "fp16"])
def test_layer_bits_override_the_weights_of_their_layers(weights: str) -> None:
    acts = "fp16" if weights == "fp16" else "int8"
    precision = Precision(weights, acts, "64", "off", (8, 0, 16))
    assert [precision.format_of("ffn_up", i) for i in (0, 1, 2, 3, None)] == ["int8", weights, "fp16", weights, weights]


@pytest.mark.parametrize("weights", WEIGHTS)
def test_every_weight_is_one_of_the_formats_for_every_role(weights: str) -> None:
    acts = "fp16"
    precision = Precision(weights, acts, "64", "off")
    found = {precision.format_of(role, 1, 8, k) for role in MATRICES for k in (256, 96, 40)}
    assert found <= set(FORMATS)


def test_a_mixture_places_types_by_role_and_layer() -> None:
    precision = resolve("q4_k_m", None, "128", None)
    assert (precision.acts, precision.norm_cache) == ("fp16", "fp16")
    assert [precision.format_of("ffn_down", i, 28, 8960) for i in (0, 3, 4)] == ["q6_k", "q4_k", "q4_k"]
    assert precision.format_of("output", None, 28, 1536) == "q6_k"
    assert precision.format_of("token_embd", None, 28, 1536) == "q4_k"
    assert precision.format_of("attn_q", 0, 28, 96) == "q5_0"  # no multiple of 256
    assert precision.format_of("attn_q", 0, 28, 40) == "fp16"  # no multiple of 32


def test_the_first_rule_that_covers_a_matrix_decides() -> None:
    rules = (WeightRule("attn_v", "fp16", ((0, 1), (4, 4))), WeightRule("attn_*", "int8"), WeightRule("output", "q6_k"))
    precision = resolve("int4", None, "32", None, rules=rules)
    assert [precision.format_of("attn_v", i) for i in (0, 1, 2, 4)] == ["fp16", "fp16", "int8", "fp16"]
    assert precision.format_of("attn_q", 0) == "int8"
    assert precision.format_of("output", None, 8, 512) == "q6_k"
    assert precision.format_of("ffn_up", 0) == "int4"
    assert precision.format_of("token_embd", None, 8, 512) == "fp16"
    assert [rule.text() for rule in rules] == ["attn_v@0-1+4=fp16", "attn_*=int8", "output=q6_k"]


def test_int16_activations_meet_no_blocks_of_rules() -> None:
    with pytest.raises(OptionError, match=r"--acts int16 does not go with weights in blocks \(q6_k\)"):
        resolve("int8", "int16", "32", None, rules=(WeightRule("output", "q6_k"),))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (("atn_v", "int8"), r"role 'atn_v' is none of attn_q, .*other, nor a pattern"),
        (("attn_v", "q4_k_m"), "weights 'q4_k_m' is not one of int4, int8, fp16, q4_0"),
        (("token_embd", "int8"), "weights 'int8': rows of the token table are gathered from fp16 or blocks"),
        (("attn_v", "int8", ((3, 1),)), r"layers \(\(3, 1\),\): each range"),
    ],
)
def test_rules_that_cannot_be(fields: tuple[Any, ...], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        WeightRule(*fields)


def test_json_differs_exactly_when_a_choice_does() -> None:
    variants = [Precision(), Precision(acts="int16"), Precision(group="64"), Precision(layer_bits=(4,))]
    texts = [variant.canonical_json() for variant in variants]
    assert len(set(texts)) == len(variants)
    assert Precision().canonical_json() == Precision("int4", "int8", "128", "int8").canonical_json()
