"""A student on the simulated machine: its programs executed bit by bit, in the order of the timing machine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from firsttoken.execution import Loaded, load
from firsttoken.generation import StaticCache, token_feeds
from firsttoken.options import Progress, RunOptions
from firsttoken.student import StudentConfig, StudentProvider, WeightStore
from firsttoken_simulator.memory_pool import DeviceMemory, MemoryPool

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    import numpy as np
    from numpy.typing import NDArray

    from firsttoken_compiler.target.target import Target


MAX_PROMPTS: Final = 8
"""Lengths of prompts whose programs are kept."""


class NpuSession:
    """A student on the functional machine of a target; satisfies `generation.Session`.

    Programs are compiled when first needed, or by `prepare`: one for decoding, and one for each of the latest
    `MAX_PROMPTS` lengths of prompts. All run in one memory, so that serving further prompts of these lengths allocates
    nothing: `pool` counts what was asked for and what was allocated.
    """

    def __init__(
        self,
        provider: StudentProvider,
        config: StudentConfig,
        weights: WeightStore,
        capacity: int,
        *,
        target: Target,
        options: RunOptions,
        progress: Progress | None = None,
    ) -> None:
        """Prepare a session.

        Args:
            provider: builds the graphs.
            config: the student.
            weights: its weights; the file must exist.
            capacity: most tokens of prompt and answer together.
            target: the machine.
            options: number formats and seed.
            progress: called with (stage, done, total) while programs are compiled and loaded.
        """
        self._provider, self._config, self._weights = provider, config, weights
        self._target, self._options, self._progress = target, options, progress
        self._decode: Loaded | None = None
        self._prompts: dict[int, Loaded] = {}
        self.pool = MemoryPool()
        self._memory = DeviceMemory(self.pool, target)
        self.cache = StaticCache(config, capacity, dtype="int8" if options.kv_cache == "int8" else "float16")

    def prefill(self, ids: list[int]) -> NDArray[np.float32]:
        """Forget everything, process the prompt, return the logits [vocab] of its last token."""
        if not ids:
            raise ValueError("the prompt is empty, must have at least 1 token; encode some text first")
        self.cache.reset()
        self.cache.require(len(ids))
        return self._step(self.prompt_program(len(ids)), len(ids), token_feeds(ids))

    def decode(self, token: int, position: int) -> NDArray[np.float32]:
        """Process one more token, which stands at `position` (counted from 0), and return its logits [vocab]."""
        if position != self.cache.length:
            raise ValueError(f"position is {position}, the next position is {self.cache.length}; decode in order")
        self.cache.require(1)
        return self._step(self._decoder(), 1, self.cache.feeds([token]))

    def prepare(self, lengths: Iterable[int]) -> None:
        """Compiles for prompts of these lengths, and for decoding, and allocates what the largest needs."""
        for tokens in sorted(set(lengths), reverse=True):
            self.prompt_program(tokens)
        self._decoder()

    def prompt_program(self, tokens: int) -> Loaded:
        """The program of a prompt of that length, compiled where it is not there yet."""
        found = self._prompts.pop(tokens, None) or self._load("prefill", tokens, 0)
        while len(self._prompts) >= MAX_PROMPTS:
            del self._prompts[next(iter(self._prompts))]  # the one that was not needed for longest
        self._prompts[tokens] = found
        return found

    def _decoder(self) -> Loaded:
        self._decode = self._decode or self._load("decode", 1, self.cache.capacity)
        return self._decode

    def _step(self, loaded: Loaded, tokens: int, feeds: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
        outputs = loaded.run(feeds, as_stored=True)
        self.cache.append(outputs, tokens)
        logits: NDArray[np.float32] = outputs["logits"].reshape(-1, self._config.vocab)[-1]
        return logits

    def _load(self, phase: str, tokens: int, past: int) -> Loaded:
        from firsttoken import api
        from firsttoken.subject import Built

        progress = self._staged(phase)
        subject = Built(self._provider, self._config, self._weights)
        program = api.compile_subject(subject, self._target, tokens, past, self._options, progress)
        timeline = api.simulate(program, self._target, progress=progress)
        loaded = load(program, timeline, subject.open(tokens, past), self._target, self._memory)
        if progress is not None:
            progress("load weights", 1.0, 1.0)
        return loaded

    def _staged(self, phase: str) -> Progress | None:
        progress = self._progress
        return None if progress is None else lambda stage, done, total: progress(f"{phase}: {stage}", done, total)
