"""What a network for images is to the rest of the project: its dimensions. It reads one image and no tokens."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Final

from firsttoken.student import require_positive

FAMILIES: Final = ("resnet",)
SIDES: Final = (32, 1024)
"""Smallest and largest side of an image, in pixels."""
EXPANSION: Final = 4
"""Channels that a block makes over those inside it."""
STEM_KERNEL: Final = 7
"""Side of the first convolution's kernel."""


@dataclass(frozen=True, slots=True)
class ImageNetworkConfig:
    """Dimensions of a ResNet of bottlenecks: a 7x7 convolution, stages of blocks, the mean, and scores of classes.

    Attributes:
        name: how commands and reports call it.
        family: one of `FAMILIES`.
        side: pixels of a side of the square image.
        stem: channels of the first convolution.
        stages: (blocks, channels inside a block) of each; every stage after the first halves the image's side.
        classes: scores that come out.
        source: one line, where these numbers come from.
    """

    name: str
    family: str
    side: int
    stem: int
    stages: tuple[tuple[int, int], ...]
    classes: int
    source: str

    def __post_init__(self) -> None:
        where = f"image network {self.name!r}"
        if self.family not in FAMILIES:
            raise ValueError(f"{where}: family is {self.family!r}, must be one of {FAMILIES}; no other graph is built")
        for what in ("side", "stem", "classes"):
            require_positive(where, what, getattr(self, what))
        if not SIDES[0] <= self.side <= SIDES[1]:
            raise ValueError(f"{where}: an image of {self.side} pixels a side; it takes {SIDES[0]} to {SIDES[1]}")
        if not self.stages:
            raise ValueError(f"{where}: stages is empty, must have at least one; give (blocks, channels)")
        for blocks, narrow in self.stages:
            require_positive(where, "blocks of a stage", blocks)
            require_positive(where, "channels of a stage", narrow)

    @property
    def layers(self) -> int:
        """Layers with weights on the longest way: what the name of the network counts."""
        return 2 + 3 * sum(blocks for blocks, _ in self.stages)

    @property
    def hidden(self) -> int:
        """Features that the scores are made of."""
        return EXPANSION * self.stages[-1][1]

    @property
    def parameters(self) -> int:
        """Number of parameters of the published model: a factor and an offset for each channel of a convolution.

        The graph has them folded, the factor into the weights and the offset as the bias.
        """
        total, wide = _convolution(3, self.stem, STEM_KERNEL), self.stem
        for stage, (blocks, narrow) in enumerate(self.stages):
            made = EXPANSION * narrow
            for index in range(blocks):
                total += _convolution(wide, narrow, 1) + _convolution(narrow, narrow, 3) + _convolution(narrow, made, 1)
                if self.convolves_shortcut(stage, index, wide):
                    total += _convolution(wide, made, 1)
                wide = made
        return total + (wide + 1) * self.classes

    def convolves_shortcut(self, stage: int, index: int, wide: int) -> bool:
        """Whether a block that reads `wide` channels convolves what it adds to its result: where the shapes differ."""
        return wide != EXPANSION * self.stages[stage][1] or self.reduces(stage, index)

    @staticmethod
    def reduces(stage: int, index: int) -> bool:
        """Whether a block halves the image's side."""
        return stage > 0 and index == 0

    def canonical_json(self) -> str:
        """Return stable text of everything that decides the graph, for content hashing."""
        return json.dumps({what: getattr(self, what) for what in _CONTENT}, sort_keys=True, separators=(",", ":"))


_CONTENT: Final = ("family", "side", "stem", "stages", "classes")


def _convolution(inner: int, outer: int, kernel: int) -> int:
    return inner * outer * kernel * kernel + 2 * outer
