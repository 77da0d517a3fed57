"""Products of int8 by int8 in groups whose runtime makes every group of weights a task of its own.

The NPU writes the sums of a group as int32, and the host reads, scales and adds them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from firsttoken.subject import Built, StudentLike, subject_of

if TYPE_CHECKING:
    from firsttoken.latency import Step
    from firsttoken.student import StudentConfig
    from firsttoken_compiler.target.target import Host, Runtime

MOVED_BYTES: Final = 8
"""Of one sum of a group: int32, written once and read once."""


def group_tasks_s(step: Step, runtime: Runtime, host: Host) -> float:
    """Seconds per launch of a graph: a task per group of every matrix, and the host over all sums.

    Zero for runtimes without such tasks, for students that no configuration describes, and for products of other types.
    """
    options = step.options
    types = (options.weights, options.precision().acts)
    if runtime.group_us == 0 or options.group == "channel" or types != ("int8", "int8"):
        return 0.0
    subject = subject_of(step.student) if isinstance(step.student, StudentLike) else None
    if not isinstance(subject, Built):
        return 0.0
    groups, sums = _groups(subject.config, int(options.group))
    return groups * runtime.group_us / 1e6 + step.tokens * sums * MOVED_BYTES / host.bytes_per_s


def _groups(config: StudentConfig, size: int) -> tuple[int, int]:
    """(pairs of matrix and group, sums per row) of the layers of a student."""
    groups = sums = 0
    for index in range(config.layers):
        layer = config.layer(index)
        query, keys, wide = layer.heads * config.head_dim, layer.kv_heads * config.head_dim, layer.intermediate
        shapes = [(config.hidden, query), *[(config.hidden, keys)] * 2, (query, config.hidden)]
        shapes += [*[(config.hidden, wide)] * 2, (wide, config.hidden)]
        for k, n in shapes:
            groups += -(-k // size)
            sums += -(-k // size) * n
    return groups, sums
