"""Templates and choices that this process made before, up to a limit; the ones used longest ago go first."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Final

from firsttoken_compiler.codegen.template import Template
from firsttoken_compiler.schedule.choice import Choice

LIMIT_BYTES: Final = 64 << 20
LIMIT_CHOICES: Final = 1 << 14


@dataclass
class KeptTemplates:
    """By everything that decides them. What is kept is not to be written to, so its arrays refuse that."""

    limit: int = LIMIT_BYTES
    kept: OrderedDict[Hashable, Template] = field(default_factory=OrderedDict)
    nbytes: int = 0

    def get(self, key: Hashable, make: Callable[[], Template]) -> Template:
        """The template of a key; what `make` raises is raised every time."""
        if key in self.kept:
            self.kept.move_to_end(key)
            return self.kept[key]
        template = self.kept[key] = make()
        template.code.setflags(write=False)
        template.symbols.setflags(write=False)
        self.nbytes += _bytes(template)
        while self.nbytes > self.limit and len(self.kept) > 1:
            self.nbytes -= _bytes(self.kept.popitem(last=False)[1])
        return template


@dataclass
class KeptChoices:
    """By everything that decides them."""

    limit: int = LIMIT_CHOICES
    kept: OrderedDict[Hashable, Choice | None] = field(default_factory=OrderedDict)

    def get(self, key: Hashable, make: Callable[[], Choice | None]) -> Choice | None:
        """The choice of a key; what `make` raises is raised every time."""
        if key in self.kept:
            self.kept.move_to_end(key)
            return self.kept[key]
        choice = self.kept[key] = make()
        while len(self.kept) > self.limit:
            self.kept.popitem(last=False)
        return choice


def _bytes(template: Template) -> int:
    return template.code.nbytes + template.symbols.nbytes
