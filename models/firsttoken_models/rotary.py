"""Tables of the rotary embedding: which angle each frequency has at each position."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from firsttoken.rope import Llama3Scaling, LongRope

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from firsttoken.student import StudentConfig


def rotary_caches(config: StudentConfig, positions: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return the cosine and sine tables [positions, head_dim / 2] of the rotary embedding, rounded from float64."""
    import numpy as np

    angles = np.outer(np.arange(positions, dtype=np.float64), frequencies(config, positions))
    factor = attention_factor(config)
    return (np.cos(angles) * factor).astype(np.float32), (np.sin(angles) * factor).astype(np.float32)


def frequencies(config: StudentConfig, positions: int) -> NDArray[np.float64]:
    """Return the angle per position of each pair of elements, [head_dim / 2].

    `positions` is the length of the whole context, which decides between the two sets of LongRoPE's divisors. A graph
    is static, so its context is that of its cache and its tokens together, used or not.
    """
    import numpy as np

    plain = config.rope_theta ** -(np.arange(0, config.head_dim, 2, dtype=np.float64) / config.head_dim)
    scaling = config.rope_scaling
    if isinstance(scaling, Llama3Scaling):
        turns = plain * scaling.original_positions / (2 * math.pi)
        kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
        share = np.clip(kept, 0.0, 1.0)
        return plain * (share + (1 - share) / scaling.factor)
    if isinstance(scaling, LongRope):
        divisors = scaling.short if positions <= scaling.original_positions else scaling.long
        return plain / np.array(divisors, dtype=np.float64)
    return plain


def attention_factor(config: StudentConfig) -> float:
    """Return what cosines and sines are multiplied by: above 1 for LongRoPE only."""
    scaling = config.rope_scaling
    if not isinstance(scaling, LongRope) or config.max_positions <= scaling.original_positions:
        return 1.0
    stretch = config.max_positions / scaling.original_positions
    return math.sqrt(1 + math.log(stretch) / math.log(scaling.original_positions))
