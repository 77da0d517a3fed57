"""Byte-level BPE tokenizer rebuilt from the token table, the merges and the chat template inside a GGUF file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from firsttoken_compiler.errors import StudentError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import tokenizers

    from firsttoken_models.gguf_file import GgufFile

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
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        sandbox = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        messages = [{"role": "user", "content": user_text}]
        try:
            return sandbox.from_string(self.chat_template).render(messages=messages, add_generation_prompt=True)
        except (TemplateError, ArithmeticError, LookupError, TypeError, ValueError) as error:
            raise StudentError(f"the chat template does not work ({error}): convert the model again") from error

    def chat(self, user_text: str) -> list[int]:
        """Return the ids of the model's chat template for one user message, ready for the answer to follow."""
        return self.encode(self.chat_text(user_text))


def from_gguf(file: GgufFile, vocab: int) -> BpeTokenizer:
    """Rebuild the tokenizer of a GGUF file of the "gpt2" model with the "smollm" split (each digit alone).

    Raises StudentError for other tokenizers, malformed ones, and ones with more tokens than `vocab`.
    """
    kind = (file.fields.get("tokenizer.ggml.model"), file.fields.get("tokenizer.ggml.pre"))
    if kind != ("gpt2", "smollm"):
        raise StudentError(
            f"{file.path}: the tokenizer is {kind}, only ('gpt2', 'smollm') can be rebuilt: time the student with "
            "'firsttoken run', which needs none"
        )
    tokens, types = file.texts("tokenizer.ggml.tokens"), file.fields.get("tokenizer.ggml.token_type")
    eos, template = file.fields.get("tokenizer.ggml.eos_token_id"), file.fields.get("tokenizer.chat_template")
    if not isinstance(types, tuple) or not len(types) == len(tokens) <= vocab:
        count = len(types) if isinstance(types, tuple) else 0
        raise StudentError(
            f"{file.path}: {len(tokens)} tokens with {count} types for {vocab} rows of token_embd.weight: convert the "
            "model again"
        )
    if type(eos) is not int or not 0 <= eos < len(tokens) or not isinstance(template, str):
        raise StudentError(
            f"{file.path}: tokenizer.ggml.eos_token_id {eos!r} is no token, or there is no tokenizer.chat_template: "
            "convert the model again"
        )
    merges = [_pair(merge) for merge in file.texts("tokenizer.ggml.merges")]
    special = [token for token, kind in zip(tokens, types, strict=True) if kind == CONTROL_TOKEN]
    ends = (eos, tokens.index("<|endoftext|>")) if "<|endoftext|>" in tokens else (eos,)
    try:
        return BpeTokenizer(_build(tokens, merges, special), template, ends)
    except Exception as error:  # the library's own errors derive from nothing narrower
        raise StudentError(f"{file.path}: tokens and merges do not fit ({error}): convert the model again") from error


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
