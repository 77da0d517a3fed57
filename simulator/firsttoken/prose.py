"""The text on which students are measured: prose written for this project, in pieces of several kinds."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from typing import TYPE_CHECKING, Final

from firsttoken_compiler.errors import OptionError

if TYPE_CHECKING:
    from firsttoken.student import Tokenizer

TEXT: Final = "prose.txt"


@dataclass(frozen=True, slots=True)
class Window:
    """Tokens that a student reads from position 0 on, and for each of them the one that follows it in the text."""

    ids: tuple[int, ...]
    following: tuple[int, ...]


def text() -> str:
    """The text: stories, descriptions, a letter, a dialogue, questions and answers."""
    return resources.files("firsttoken").joinpath("texts", TEXT).read_text(encoding="utf-8")


def windows(tokenizer: Tokenizer, count: int, tokens: int) -> list[Window]:
    """The first `count` windows of the text, `tokens` long, one after the other; raises OptionError past its end."""
    if count < 1 or tokens < 2:
        raise OptionError(f"--windows {count} of --tokens {tokens}: give at least 1 window of 2 tokens")
    ids = tokenizer.encode(text())
    most = (len(ids) - 1) // tokens
    if count > most:
        raise OptionError(
            f"--windows {count} of --tokens {tokens}: the text has {len(ids)} tokens of this student's, "
            f"enough for {most} windows; ask for {most or 1} of {tokens if most else len(ids) - 1} tokens at most"
        )
    starts = range(0, count * tokens, tokens)
    return [Window(tuple(ids[at : at + tokens]), tuple(ids[at + 1 : at + tokens + 1])) for at in starts]
