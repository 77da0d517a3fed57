"""The text of the measurements and its windows."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from firsttoken.prose import text, windows
from firsttoken_compiler.errors import OptionError


class Letters:
    """A tokenizer whose tokens are characters."""

    eos_ids = ()

    def encode(self, text: str) -> list[int]:
        return [ord(letter) for letter in text]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(map(chr, ids))

    def chat(self, user_text: str) -> list[int]:
        return self.encode(user_text)


def test_windows_follow_one_another_and_know_what_comes_next() -> None:
    found = windows(Letters(), 3, 10)
    read = "".join(Letters().decode(window.ids) for window in found)
    assert read == text()[:30]
    assert all(window.following[:-1] == window.ids[1:] for window in found)
    assert [window.following[-1] for window in found] == [ord(text()[at]) for at in (10, 20, 30)]


@pytest.mark.parametrize(("count", "tokens"), [(0, 128), (1, 1), (100_000, 128), (1, 100_000)])
def test_what_the_text_does_not_have_is_refused(count: int, tokens: int) -> None:
    with pytest.raises(OptionError, match=f"--windows {count} of --tokens {tokens}"):
        windows(Letters(), count, tokens)


def test_the_last_window_ends_at_the_last_token() -> None:
    length = len(text()) - 1
    (window,) = windows(Letters(), 1, length)
    assert Letters().decode(window.ids[:1] + window.following) == text()
