"""Precision: what goes together, what follows when it is left open, and the message of every other choice."""

import itertools

import pytest

from firsttoken_compiler.errors import OptionError
from firsttoken_compiler.options import ACTS, GROUPS, NORM_CACHES, WEIGHTS, Precision, resolve


@pytest.mark.parametrize("combination", list(itertools.product(WEIGHTS, ACTS, GROUPS, NORM_CACHES)), ids="-".join)
def test_every_combination_is_valid_or_explained(combination: tuple[str, str, str, str]) -> None:
    weights, acts, _, norm_cache = combination
    integer_norm = norm_cache in ("int8", "int16")
    if weights == "fp16" and (acts != "fp16" or integer_norm):
        with pytest.raises(OptionError, match="--weights fp16"):
            Precision(*combination)
    else:
        assert Precision(*combination).weights == weights


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"weights": "int3"}, "--weights 'int3' is not one of int4, int8, fp16"),
        ({"acts": "fp32"}, "--acts 'fp32' is not one of int8, int16, fp16"),
        ({"group": "16"}, "--group '16' is not one of 32, 64, 128, channel"),
        ({"norm_cache": "on"}, "--norm-cache 'on' is not one of int8, int16, fp16, off"),
        ({"weights": "fp16"}, "--weights fp16 needs --acts fp16, not int8"),
        ({"weights": "fp16", "acts": "fp16"}, "--norm-cache int8 feeds integers to fp16 weights"),
        ({"layer_bits": (4, 5)}, r"bits per layer \(4, 5\): each must be 4, 8 or 16"),
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
    ],
)
def test_what_is_left_open_follows_the_weights(
    given: tuple[str, str | None, str, str | None], acts: str, norm_cache: str
) -> None:
    resolved = resolve(*given)
    assert (resolved.acts, resolved.norm_cache) == (acts, norm_cache)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_layer_bits_override_the_weights_of_their_layers(weights: str) -> None:
    whole = {"int4": 4, "int8": 8, "fp16": 16}[weights]
    acts = "fp16" if weights == "fp16" else "int8"
    precision = Precision(weights, acts, "64", "off", (8, 0, 16))
    assert [precision.weight_bits(layer) for layer in (0, 1, 2, 3, None)] == [8, whole, 16, whole, whole]


def test_json_differs_exactly_when_a_choice_does() -> None:
    variants = [Precision(), Precision(acts="int16"), Precision(group="64"), Precision(layer_bits=(4,))]
    texts = [variant.canonical_json() for variant in variants]
    assert len(set(texts)) == len(variants)
    assert Precision().canonical_json() == Precision("int4", "int8", "128", "int8").canonical_json()
