"""What is compiled: a student that a provider builds graphs of, or an ONNX file that is one graph."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

from firsttoken.student import ProviderError, StudentConfig, StudentProvider, UnknownStudent, find_student, providers
from firsttoken_compiler.errors import OptionError, StudentError

if TYPE_CHECKING:
    from firsttoken.student import WeightStore
    from firsttoken_compiler.frontend.onnx_file import OnnxStudent

DEFAULT_PROMPT: Final = 64
"""Tokens of the prompt where a graph is built and nothing was said."""

StudentLike = str | Path | StudentConfig


class Subject(Protocol):
    """A student from the point of view of one run."""

    @property
    def name(self) -> str:
        """How reports call it."""

    @property
    def layer_bits(self) -> tuple[int, ...]:
        """Bits of the weights that the student wants per layer, 0 for no wish; empty where it says nothing."""

    @property
    def packages(self) -> tuple[str, ...]:
        """Packages outside the facade whose code makes the graph."""

    def content(self) -> str:
        """Text that is equal exactly for students with equal graphs."""

    def lengths(self, prompt: int | None, past: int | None) -> tuple[int, int]:
        """(tokens, cached rows) of the graph; raises OptionError when what is asked for cannot be had."""

    def open(self, tokens: int, past: int) -> OnnxStudent:
        """The graph for these lengths."""


def subject_of(student: StudentLike) -> Subject:
    """An ONNX file by its path, a student by its name, or a configuration; raises FirsttokenError."""
    if isinstance(student, StudentConfig):
        return Built(_provider_of(student), student)
    path = Path(student)
    if path.suffix == ".onnx" or isinstance(student, Path):
        return File(path)
    try:
        return Built(*find_student(student))
    except UnknownStudent:
        if path.is_dir():
            raise StudentError(f"{path} is a folder, not a student; give the ONNX file in it") from None
        if path.is_file():
            return File(path)
        raise


def _provider_of(config: StudentConfig) -> StudentProvider:
    """The provider that knows this very student, else the first one."""
    known = providers()
    if not known:
        raise ProviderError("no student plug-in is installed, so no graph can be built; install firsttoken again")
    for provider in known:
        try:
            if provider.config(config.name) == config:
                return provider
        except UnknownStudent:
            continue
    return known[0]


@dataclass(frozen=True, slots=True)
class Built:
    """A configuration whose graphs a provider builds; without `weights` they describe values that nobody reads."""

    provider: StudentProvider
    config: StudentConfig
    weights: WeightStore | None = None

    @property
    def name(self) -> str:
        """See `Subject`."""
        return self.config.name

    @property
    def layer_bits(self) -> tuple[int, ...]:
        """See `Subject`."""
        return tuple(self.config.layer(i).weight_bits or 0 for i in range(self.config.layers))

    @property
    def packages(self) -> tuple[str, ...]:
        """See `Subject`."""
        return (type(self.provider).__module__.partition(".")[0],)

    def content(self) -> str:
        """See `Subject`."""
        return self.config.canonical_json()

    def lengths(self, prompt: int | None, past: int | None) -> tuple[int, int]:
        """See `Subject`."""
        tokens, rows = DEFAULT_PROMPT if prompt is None else prompt, past or 0
        _require_lengths(tokens, rows)
        limit = self.config.max_positions
        if tokens + rows > limit:
            asked = f"{tokens} tokens after {rows} cached ones" if rows else f"--prompt {tokens}"
            raise OptionError(
                f"{asked} exceeds the {limit} positions of {self.name}; ask for at most {limit} tokens, answer included"
            )
        return tokens, rows

    def open(self, tokens: int, past: int) -> OnnxStudent:
        """See `Subject`."""
        from firsttoken_compiler.frontend.onnx_file import from_model

        try:
            model = self.provider.graph(self.config, tokens=tokens, past=past, weights=self.weights)
        except ValueError as error:
            raise StudentError(str(error)) from error
        return from_model(model, Path() if self.weights is None else self.weights.path.parent, self.name)


@dataclass(frozen=True)
class File:
    """An ONNX file: static shapes decide its lengths."""

    path: Path

    @property
    def name(self) -> str:
        """See `Subject`."""
        return self.path.stem

    @property
    def layer_bits(self) -> tuple[int, ...]:
        """See `Subject`."""
        return ()

    @property
    def packages(self) -> tuple[str, ...]:
        """See `Subject`."""
        return ()

    @cached_property
    def student(self) -> OnnxStudent:
        """The parsed file."""
        from firsttoken_compiler.frontend.onnx_file import open_student

        return open_student(self.path)

    def content(self) -> str:
        """See `Subject`. Floating-point weights outside the file do not count: no time depends on them."""
        if not self.path.is_file():
            return f"missing {self.path}"
        digest = hashlib.sha256()
        try:
            with self.path.open("rb") as file:
                while block := file.read(1 << 24):
                    digest.update(block)
        except OSError as error:
            raise StudentError(f"cannot read {self.path}: {error.strerror or error}") from error
        return f"onnx {digest.hexdigest()}"

    @property
    def self_contained(self) -> bool:
        """Whether the graph follows from the file alone: no integers, which may be shapes, lie outside it."""
        from firsttoken_compiler.frontend.importer import onnx_dtype

        outside = [entry for entry in self.student.initializers.values() if entry.external is not None]
        return not any(onnx_dtype(entry.onnx_type, entry.name).kind in "iub" for entry in outside)

    def lengths(self, prompt: int | None, past: int | None) -> tuple[int, int]:
        """See `Subject`. A graph with dynamic shapes is refused later, by the importer."""
        _require_lengths(1 if prompt is None else prompt, past or 0)
        inputs = {v.name: v for v in self.student.graph.input if v.name not in self.student.initializers}
        tokens, rows = _token_count(inputs), _cached_rows(inputs)
        for option, asked, found in (("--prompt", prompt, tokens), ("--past", past, rows)):
            if asked is not None and found and asked != found:
                raise OptionError(
                    f"{option} {asked} contradicts {self.path}, whose graph is for {found}: "
                    f"leave {option} away, or export the student for {asked}"
                )
        return tokens or prompt or 1, rows

    def open(self, tokens: int, past: int) -> OnnxStudent:
        """See `Subject`."""
        return self.student


def _require_lengths(tokens: int, past: int) -> None:
    if tokens < 1:
        raise OptionError(f"--prompt {tokens}: a prompt has at least 1 token")
    if past < 0:
        raise OptionError(f"--past {past}: a cache has 0 or more rows")


def _token_count(inputs: dict[str, Any]) -> int:
    """Tokens of a graph: the length of its ids, or the rows of its first input; 0 where that is dynamic."""
    ids = inputs.get("input_ids")
    value = ids if ids is not None else next(iter(inputs.values()), None)
    if value is None:
        return 1
    shape = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
    if value.type.tensor_type.elem_type in _INTEGERS:
        return shape[-1] if shape else 1
    return shape[-2] if len(shape) > 1 else 1


def _cached_rows(inputs: dict[str, Any]) -> int:
    for name, value in inputs.items():
        if name.startswith("past_key_values"):
            shape = value.type.tensor_type.shape.dim
            return int(shape[-2].dim_value) if len(shape) > 1 else 0
    return 0


_INTEGERS: Final = (6, 7)  # TensorProto.INT32 and INT64
