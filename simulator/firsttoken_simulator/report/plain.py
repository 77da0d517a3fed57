"""Names of an untrusted file as text that no terminal, spreadsheet or log takes for more than text."""

import json
import re
from typing import Final

_FORMULA: Final = ("=", "+", "-", "@", "\uff1d", "\uff0b", "\uff0d", "\uff20")
"""What begins a formula in some spreadsheet, the wide forms of East Asia included."""


def plain(text: str) -> str:
    """One line in which everything that is not printable is escaped."""
    return text if text.isprintable() else text.encode("unicode_escape").decode("ascii")


def plain_lines(text: str) -> str:
    """The same line by line."""
    return "\n".join(plain(line) for line in text.split("\n"))


def plain_json(text: str) -> str:
    """Equal JSON without characters that steer a terminal: those of control and direction are written as escapes."""
    return re.sub(r"[^\n -~]", lambda found: found[0] if found[0].isprintable() else json.dumps(found[0])[1:-1], text)


def cell(value: object) -> object:
    """A value of a table for a spreadsheet: text on one line, with an apostrophe where it would be run as a formula."""
    if not isinstance(value, str):
        return value
    shown = plain(value)
    return f"'{shown}" if shown.lstrip().startswith(_FORMULA) or value[:1] in ("\t", "\r", "\n") else shown
