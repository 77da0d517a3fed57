"""SmolLM2 with its real weights on the functional machine: the answers of onnxruntime, token by token."""

import pytest

from firsttoken import RunOptions, generate

STUDENT = "smollm2-135m"
TOKENS = 16


@pytest.mark.parametrize(
    "question",
    ["What is the capital of France?", "Name three colours of the rainbow.", "Write one sentence about the sea."],
)
def test_fp16_gives_the_reference_tokens(question: str) -> None:
    found = generate(
        STUDENT, question, max_new_tokens=TOKENS, target="snapdragon-x-elite", options=RunOptions(weights="fp16"),
        compare="onnxruntime",
    )  # fmt: skip
    assert found.ids == found.reference_ids
    assert len(found.ids) == TOKENS or found.text.strip().endswith((".", "!", "?"))
    assert found.agreement is not None
    print(f"least cosine of logits: {found.agreement.logits_cosine_min:.6f}")
    assert found.agreement.logits_cosine_min >= 0.9999


def test_int8_weights_with_int16_activations_answer_alike() -> None:
    options = RunOptions(weights="int8", acts="int16", group="channel")
    found = generate(
        STUDENT, "What is the capital of France?", max_new_tokens=8, options=options, compare="onnxruntime"
    )
    assert found.text.strip() == "The capital of France is Paris."
    assert found.agreement is not None
    assert found.agreement.logits_cosine_min >= 0.99


def test_int4_answers_readably() -> None:
    options = RunOptions(weights="int4", acts="int8", group="32")
    found = generate(STUDENT, "What is the capital of France?", max_new_tokens=8, options=options)
    assert "capital of France" in found.text


def test_table_and_head_on_the_host_give_the_reference_tokens() -> None:
    options = RunOptions(weights="fp16", host_roles=("token_embd", "output"), host_weight_bits=32)
    found = generate(
        STUDENT, "What is the capital of France?", max_new_tokens=3, options=options, compare="onnxruntime"
    )
    assert found.ids == found.reference_ids
    assert found.agreement is not None
    assert found.agreement.logits_cosine_min >= 0.9999
