"""Greedy generation over a static graph pair: one graph for the prompt, one for each further token.

`StaticCache` keeps the cache rows for any backend that runs these graphs; `OrtSession` is the onnxruntime backend and
the numerical reference of the project.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, Protocol

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from firsttoken.student import StudentConfig, StudentProvider, WeightStore

MASKED: Final = -30000.0
"""Added to the score of an unused cache row. It is finite in float16 as in float32, leaves float16 room for the score
itself, and its exponential is exactly 0 in both, so an unused row has no influence at all."""


class Session(Protocol):
    """Anything that turns tokens into logits and remembers the tokens before: onnxruntime or a simulated machine."""

    def prefill(self, ids: list[int]) -> NDArray[np.float32]:
        """Forget everything, process the prompt, return the logits [vocab] of its last token."""

    def decode(self, token: int, position: int) -> NDArray[np.float32]:
        """Process one more token, which stands at `position` (counted from 0), and return its logits [vocab]."""


def greedy(session: Session, ids: list[int], max_new_tokens: int, eos_ids: Collection[int]) -> list[int]:
    """Return the likeliest continuation of `ids`, token by token, at most `max_new_tokens`, without the end token."""
    answer: list[int] = []
    if max_new_tokens < 1:
        return answer
    logits = session.prefill(ids)
    while True:
        token = int(logits.argmax())
        if token in eos_ids:
            return answer
        answer.append(token)
        if len(answer) == max_new_tokens:
            return answer
        logits = session.decode(token, len(ids) + len(answer) - 1)


class StaticCache:
    """Cache rows of every layer in buffers of fixed size, as the graphs with `past == capacity` read them.

    The graph cannot write into its inputs: it returns present keys and values of `capacity + tokens` rows, the new rows
    last, and `append` copies those rows to where the next step expects them. Unused rows are finite and masked.

    Attributes:
        capacity: rows of each buffer, the graph's `past`.
        length: rows in use, which is also the position of the next token.
        keys: one array [1, kv_heads, capacity, head_dim] per layer.
        values: the same for values.
        parts: all buffers by the last part of their names in the graph; int8 ones with fp16 scales
            [1, kv_heads, capacity, 1] under `key.scales` and `value.scales`.
    """

    def __init__(self, config: StudentConfig, capacity: int, dtype: str = "float32") -> None:
        import numpy as np

        if capacity < 1:
            raise ValueError(f"cache capacity is {capacity} rows, must be at least 1; give prompt plus answer length")
        shapes = [(1, config.layer(i).kv_heads, capacity, config.head_dim) for i in range(config.layers)]
        self.capacity, self.length = capacity, 0
        self.keys: list[NDArray[Any]] = [np.zeros(shape, dtype) for shape in shapes]
        self.values: list[NDArray[Any]] = [np.zeros(shape, dtype) for shape in shapes]
        self.parts = {"key": self.keys, "value": self.values}
        if dtype == "int8":
            for part in ("key", "value"):
                self.parts[f"{part}.scales"] = [np.zeros((*shape[:3], 1), np.float16) for shape in shapes]

    def reset(self) -> None:
        """Forget every row."""
        for buffers in self.parts.values():
            for buffer in buffers:
                buffer[...] = 0
        self.length = 0

    def rewind(self, length: int) -> None:
        """Forget the rows from `length` on; ValueError if there are fewer. They stay in the buffers, masked."""
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot go back to {length} rows, the cache has {self.length}; give 0 to {self.length}")
        self.length = length

    def append(self, outputs: Mapping[str, NDArray[Any]], tokens: int) -> None:
        """Take over the last `tokens` rows of every present.{i}.key and .value (and .scales) in `outputs`.

        This serves a prompt graph (all its rows are new) and a graph with past (its last rows are new) alike.
        """
        end = self.require(tokens)
        for part, buffers in self.parts.items():
            for index, buffer in enumerate(buffers):
                present = outputs[f"present.{index}.{part}"]
                buffer[:, :, self.length : end] = present[:, :, present.shape[2] - tokens :]
        self.length = end

    def require(self, tokens: int) -> int:
        """Return the length after `tokens` more rows; ValueError if they do not fit."""
        end = self.length + tokens
        if end > self.capacity:
            raise ValueError(
                f"{tokens} more tokens after {self.length} do not fit the cache of {self.capacity} rows; "
                f"use a capacity of at least {end} or ask for fewer tokens"
            )
        return end

    def mask(self, tokens: int = 1) -> NDArray[np.float32]:
        """Return the additive mask [1, 1, tokens, capacity + tokens]: used rows and earlier new tokens are visible."""
        import numpy as np

        mask = np.full((1, 1, tokens, self.capacity + tokens), MASKED, dtype=np.float32)
        mask[..., : self.length] = 0.0
        mask[0, 0, :, self.capacity :] = np.triu(np.full((tokens, tokens), MASKED, dtype=np.float32), k=1)
        return mask

    def feeds(self, ids: Sequence[int]) -> dict[str, NDArray[Any]]:
        """Return the complete inputs of a graph with `past == capacity` for `ids` at the next positions.

        The cache arrays are the buffers themselves, not copies: do not keep them across `append`.
        """
        feeds = {**token_feeds(ids, self.length), "attention_mask": self.mask(len(ids))}
        for part, buffers in self.parts.items():
            feeds |= {f"past_key_values.{index}.{part}": buffer for index, buffer in enumerate(buffers)}
        return feeds


def token_feeds(ids: Sequence[int], position: int = 0) -> dict[str, NDArray[Any]]:
    """Return input_ids and position_ids [1, len(ids)] for tokens that start at `position`."""
    import numpy as np

    return {
        "input_ids": np.array([ids], dtype=np.int64),
        "position_ids": np.arange(position, position + len(ids), dtype=np.int64)[np.newaxis],
    }


class OrtSession:
    """A student in onnxruntime, float32 on the CPU; satisfies `Session`.

    Graphs are compiled when first needed: one per prompt length, and one for decoding.
    """

    def __init__(
        self,
        provider: StudentProvider,
        config: StudentConfig,
        weights: WeightStore,
        capacity: int,
        *,
        threads: int = 0,
    ) -> None:
        """Prepare a session.

        Args:
            provider: builds the graphs.
            config: the student.
            weights: its weights; the file must exist.
            capacity: most tokens of prompt and answer together.
            threads: worker threads of onnxruntime, 0 for its own choice.
        """
        self._provider, self._config, self._weights, self._threads = provider, config, weights, threads
        self._sessions: dict[tuple[int, int], Any] = {}
        self.cache = StaticCache(config, capacity)

    def prefill(self, ids: list[int]) -> NDArray[np.float32]:
        """Forget everything, process the prompt, return the logits [vocab] of its last token."""
        if not ids:
            raise ValueError("the prompt is empty, must have at least 1 token; encode some text first")
        self.cache.reset()
        self.cache.require(len(ids))
        return self._run(len(ids), 0, token_feeds(ids))

    def decode(self, token: int, position: int) -> NDArray[np.float32]:
        """Process one more token, which stands at `position` (counted from 0), and return its logits [vocab]."""
        if position != self.cache.length:
            raise ValueError(f"position is {position}, the next position is {self.cache.length}; decode in order")
        self.cache.require(1)
        return self._run(1, self.cache.capacity, self.cache.feeds([token]))

    def _run(self, tokens: int, past: int, feeds: dict[str, NDArray[Any]]) -> NDArray[np.float32]:
        session = self._session(tokens, past)
        names = [output.name for output in session.get_outputs()]
        outputs = dict(zip(names, session.run(names, feeds), strict=True))
        self.cache.append(outputs, tokens)
        logits: NDArray[np.float32] = outputs["logits"].reshape(-1)
        return logits

    def _session(self, tokens: int, past: int) -> Any:
        if (tokens, past) not in self._sessions:
            model = self._provider.graph(self._config, tokens=tokens, past=past, weights=self._weights)
            self._sessions[tokens, past] = ort_session(model, self._weights, threads=self._threads)
        return self._sessions[tokens, past]


def ort_session(model: Any, weights: WeightStore, *, threads: int = 0) -> Any:
    """Return an onnxruntime InferenceSession of an in-memory model whose external data lies in `weights.path`."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(weights.path.parent))
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
