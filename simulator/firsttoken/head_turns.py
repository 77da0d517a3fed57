"""Host transposes around an attention whose kernel takes heads one after the other, not the rows of a graph."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from firsttoken.subject import Built, StudentLike, subject_of

if TYPE_CHECKING:
    from firsttoken.latency import Step
    from firsttoken_compiler.target.target import Target

MOVED_BYTES: Final = 4
"""Of one element of 16 bits: read once and written once."""


def head_turns_s(step: Step, rate: float, target: Target) -> float:
    """Seconds in which the host turns queries, keys, values and results of a prompt's layers, at `rate` bytes a second.

    Zero without a rate, for a single row, for students that no configuration describes, and for heads that the target's
    kernel of attention makes in one part, as it reads those where they lie (`attention.value_columns`).
    """
    own = target.attention
    if not rate or step.tokens == 1 or own is None:
        return 0.0
    subject = subject_of(step.student) if isinstance(step.student, StudentLike) else None
    if not isinstance(subject, Built) or subject.config.head_dim <= own.value_columns:
        return 0.0
    config = subject.config
    layers = [config.layer(index) for index in range(config.layers)]
    elements = sum(2 * (layer.heads + layer.kv_heads) for layer in layers) * config.head_dim
    return step.tokens * elements * MOVED_BYTES / rate
