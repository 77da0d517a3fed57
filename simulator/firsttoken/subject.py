"""What is compiled: a student that a provider builds graphs of, by name or out of a file, or an ONNX file."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

from firsttoken.encoder import EncoderConfig
from firsttoken.image_network import ImageNetworkConfig
from firsttoken.student import ProviderError, StudentConfig, StudentProvider, UnknownStudent, find_any, providers
from firsttoken_compiler.errors import OptionError, StudentError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from firsttoken.student import StudentFile, Tokenizer, WeightStore
    from firsttoken_compiler.frontend.onnx_file import OnnxStudent

DEFAULT_PROMPT: Final = 64
"""Tokens of the prompt where a graph is built and nothing was said."""

StudentLike = str | Path | StudentConfig | EncoderConfig | ImageNetworkConfig
SUFFIXES: Final = (".onnx", ".gguf")
"""Endings of names of files, whatever students are called."""


class Subject(Protocol):
    """A student from the point of view of one run."""

    @property
    def name(self) -> str:
        """How reports call it."""

    @property
    def kind(self) -> str:
        """What it is, for messages that refuse it: "an encoder"."""

    @property
    def layer_bits(self) -> tuple[int, ...]:
        """Bits of the weights that the student wants per layer, 0 for no wish; empty where it says nothing."""

    @property
    def packages(self) -> tuple[str, ...]:
        """Packages outside the facade whose code makes the graph."""

    def portable(self) -> StudentLike:
        """What another process makes the same subject of."""

    def content(self) -> str:
        """Text that is equal exactly for students with equal graphs."""

    def lengths(self, prompt: int | None, past: int | None) -> tuple[int, int]:
        """(tokens, cached rows) of the graph; raises OptionError when what is asked for cannot be had."""

    def phase(self, past: int) -> str:
        """What a graph after `past` cached rows computes: "prefill", "decode", "encode" or "inference"."""

    def open(self, tokens: int, past: int) -> OnnxStudent:
        """The graph for these lengths."""


def subject_of(student: StudentLike, bind: Mapping[str, int] | None = None) -> Subject:
    """A file by its path, a student by its name, or a configuration; raises FirsttokenError.

    A file is what the first provider that reads it makes of it, else an ONNX file.

    `bind` gives values to open dimensions of an ONNX file.
    """
    found = _subject_of(student, bind or {})
    if bind and not isinstance(found, File):
        raise OptionError(f"--bind {next(iter(bind))}: {found.name} is no ONNX file, its graphs are built as needed")
    return found


def _subject_of(student: StudentLike, bind: Mapping[str, int]) -> Subject:
    if isinstance(student, (StudentConfig, EncoderConfig, ImageNetworkConfig)):
        return _found(_provider_of(student), student)
    path = Path(student)
    if path.suffix in SUFFIXES or isinstance(student, Path):
        return _file(path, bind)
    try:
        return _found(*find_any(student))
    except UnknownStudent:
        if path.is_dir():
            raise StudentError(f"{path} is a folder, not a student; give the ONNX file in it") from None
        if path.is_file():
            return _file(path, bind)
        raise


def _found(provider: StudentProvider, config: StudentConfig | EncoderConfig | ImageNetworkConfig) -> Subject:
    if isinstance(config, StudentConfig):
        return Built(provider, config)
    return Encoder(provider, config) if isinstance(config, EncoderConfig) else ImageNetwork(provider, config)


def _file(path: Path, bind: Mapping[str, int]) -> Subject:
    from firsttoken_compiler.frontend.onnx_file import require_file

    for provider in providers():
        file = provider.file(path)
        if file is not None:
            return Built(provider, file.config, file.weights, file, path)
    require_file(path)
    return File(path, tuple(sorted(bind.items())))


def _provider_of(config: StudentConfig | EncoderConfig | ImageNetworkConfig) -> StudentProvider:
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
    file: StudentFile | None = None
    """What it was read out of."""
    path: Path | None = None
    """Where that is."""
    all_logits: bool = False
    """Whether graphs return the logits of every token."""
    host_roles: tuple[str, ...] = ()
    """What the CPU computes and graphs leave out: `token_embd`, `output`."""

    @property
    def name(self) -> str:
        """See `Subject`."""
        return self.config.name

    @property
    def kind(self) -> str:
        """See `Subject`."""
        return "a language model"

    @property
    def layer_bits(self) -> tuple[int, ...]:
        """See `Subject`."""
        return tuple(self.config.layer(i).weight_bits or 0 for i in range(self.config.layers))

    @property
    def packages(self) -> tuple[str, ...]:
        """See `Subject`."""
        return (type(self.provider).__module__.partition(".")[0],)

    def portable(self) -> StudentLike:
        """See `Subject`."""
        return self.config if self.path is None else self.path

    def content(self) -> str:
        """See `Subject`."""
        text = self.config.canonical_json() if self.file is None else self.file.content()
        text = f"{text} all logits" if self.all_logits else text
        return f"{text} without {' '.join(self.host_roles)}" if self.host_roles else text

    def stored_weights(self) -> WeightStore | None:
        """The weights that it runs with; None where there are none here."""
        return self.weights or self.provider.weights(self.name)

    def float_weights(self) -> WeightStore | None:
        """The same as float32, for a reference."""
        return self.stored_weights() if self.file is None else self.file.float_weights()

    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer; None where there is none here. Raises FirsttokenError for one that cannot be rebuilt."""
        return self.provider.tokenizer(self.name) if self.file is None else self.file.tokenizer()

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

    def phase(self, past: int) -> str:
        """See `Subject`."""
        return "decode" if past else "prefill"

    def open(self, tokens: int, past: int) -> OnnxStudent:
        """See `Subject`."""
        from firsttoken_compiler.frontend.onnx_file import from_model

        try:
            wish = {"all_logits": True} if self.all_logits else {}
            model = self.provider.graph(self.config, tokens=tokens, past=past, weights=self.weights, **wish)
        except ValueError as error:
            raise StudentError(str(error)) from error
        if self.host_roles:
            from firsttoken.placement import without

            model = without(model, self.host_roles)
        return from_model(model, Path() if self.weights is None else self.weights.path.parent, self.name)


@dataclass(frozen=True, slots=True)
class Encoder:
    """An encoder whose graphs a provider builds; they describe weights that nobody reads."""

    provider: StudentProvider
    config: EncoderConfig

    @property
    def name(self) -> str:
        """See `Subject`."""
        return self.config.name

    @property
    def kind(self) -> str:
        """See `Subject`."""
        return "an encoder"

    @property
    def layer_bits(self) -> tuple[int, ...]:
        """See `Subject`."""
        return ()

    @property
    def packages(self) -> tuple[str, ...]:
        """See `Subject`."""
        return (type(self.provider).__module__.partition(".")[0],)

    def portable(self) -> StudentLike:
        """See `Subject`."""
        return self.config

    def content(self) -> str:
        """See `Subject`."""
        return f"encoder {self.config.canonical_json()}"

    def lengths(self, prompt: int | None, past: int | None) -> tuple[int, int]:
        """See `Subject`. There are never cached rows."""
        tokens = DEFAULT_PROMPT if prompt is None else prompt
        _require_lengths(tokens, past or 0)
        if past:
            raise OptionError(
                f"{self.name} is an encoder, it reads no cache and makes no tokens: leave --past and --decode away"
            )
        if tokens > self.config.max_positions:
            raise OptionError(
                f"--prompt {tokens} exceeds the {self.config.max_positions} positions of {self.name}; ask for fewer"
            )
        return tokens, 0

    def phase(self, past: int) -> str:
        """See `Subject`."""
        return "encode"

    def open(self, tokens: int, past: int) -> OnnxStudent:
        """See `Subject`."""
        from firsttoken_compiler.frontend.onnx_file import from_model

        return from_model(self.provider.encoder_graph(self.config, tokens=tokens), Path(), self.name)


@dataclass(frozen=True, slots=True)
class ImageNetwork:
    """A network for one image whose graph a provider builds; it describes weights that nobody reads."""

    provider: StudentProvider
    config: ImageNetworkConfig

    @property
    def name(self) -> str:
        """See `Subject`."""
        return self.config.name

    @property
    def kind(self) -> str:
        """See `Subject`."""
        return "an image network"

    @property
    def layer_bits(self) -> tuple[int, ...]:
        """See `Subject`."""
        return ()

    @property
    def packages(self) -> tuple[str, ...]:
        """See `Subject`."""
        return (type(self.provider).__module__.partition(".")[0],)

    def portable(self) -> StudentLike:
        """See `Subject`."""
        return self.config

    def content(self) -> str:
        """See `Subject`."""
        return f"image network {self.config.canonical_json()}"

    def declared(self) -> tuple[tuple[str, float], ...]:
        """A range, -1 to 1, for every tensor that a static scale belongs to.

        Other ranges change no instruction; scales that differ are stored apart, which moves weights in DRAM.
        """
        return tuple((tensor, 1.0) for tensor in self.provider.image_tensors(self.config))

    def lengths(self, prompt: int | None, past: int | None) -> tuple[int, int]:
        """See `Subject`. One image counts as a prompt of 1."""
        _require_lengths(1 if prompt is None else prompt, past or 0)
        if past:
            raise OptionError(
                f"{self.name} is an image network, it reads no cache and makes no tokens: "
                "leave --past and --decode away"
            )
        if prompt not in (None, 1):
            raise OptionError(
                f"--prompt {prompt}: {self.name} is an image network, it reads one image of {self.config.side} x "
                f"{self.config.side} pixels and no tokens: leave --prompt away, or give 1"
            )
        return 1, 0

    def phase(self, past: int) -> str:
        """See `Subject`."""
        return "inference"

    def open(self, tokens: int, past: int) -> OnnxStudent:
        """See `Subject`."""
        from firsttoken_compiler.frontend.onnx_file import from_model

        return from_model(self.provider.image_graph(self.config), Path(), self.name)


@dataclass(frozen=True)
class File:
    """An ONNX file: static shapes decide its lengths, open dimensions take those that are asked for."""

    path: Path
    bind: tuple[tuple[str, int], ...] = ()
    """Values of open dimensions, by name."""

    @property
    def name(self) -> str:
        """See `Subject`."""
        return self.path.stem

    @property
    def kind(self) -> str:
        """See `Subject`."""
        return "an ONNX file"

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

    def portable(self) -> StudentLike:
        """See `Subject`."""
        return self.path

    def content(self) -> str:
        """See `Subject`. Floating-point weights outside the file do not count: no time depends on them."""
        digest = hashlib.sha256()
        try:
            with self.path.open("rb") as file:
                while block := file.read(1 << 24):
                    digest.update(block)
        except OSError as error:
            raise StudentError(f"cannot read {self.path}: {error.strerror or error}") from error
        bound = "".join(f" {name!r}={value}" for name, value in self.bind)
        return f"onnx {digest.hexdigest()}{bound}"

    @property
    def self_contained(self) -> bool:
        """Whether the graphs opened so far follow from the file alone: integers outside it may be shapes."""
        from firsttoken_compiler.frontend.importer import onnx_dtype

        outside = [entry for entry in self.student.initializers.values() if entry.external is not None]
        integers = any(onnx_dtype(entry.onnx_type, entry.name).kind in "iub" for entry in outside)
        return not integers and not any(student.decided_by for student in self._opened.values())

    def lengths(self, prompt: int | None, past: int | None) -> tuple[int, int]:
        """See `Subject`. What is open in the file takes the asked lengths, else 64 tokens after no cached ones."""
        from firsttoken_compiler.frontend.bind import bound

        _require_lengths(1 if prompt is None else prompt, past or 0)
        graph = bound(self.student, self._bindings(prompt or DEFAULT_PROMPT, past or 0)).graph
        inputs = {v.name: v for v in graph.input if v.name not in self.student.initializers}
        tokens, rows = _token_count(inputs), _cached_rows(inputs)
        for option, asked, found in (("--prompt", prompt, tokens), ("--past", past, rows)):
            if asked is not None and found and asked != found:
                raise OptionError(
                    f"{option} {asked} contradicts {self.path}, whose graph is for {found}: "
                    f"leave {option} away, or export the student for {asked}"
                )
        if past and not rows:
            raise OptionError(
                f"--past {past}: the graph of {self.path} reads no cache: leave --past away, or export it with one"
            )
        return tokens or prompt or 1, rows

    def phase(self, past: int) -> str:
        """See `Subject`."""
        return "decode" if past else "prefill"

    def check_decode(self) -> None:
        """Raises OptionError unless the same file serves the prompt and one token after a cache of any length."""
        from firsttoken_compiler.frontend.bind import PAST, PROMPT, symbols

        given = dict(self.bind)
        roles = {symbol.role() for name, symbol in symbols(self.student).items() if name not in given}
        missing = [text for role, text in ((PROMPT, "tokens"), (PAST, "cached rows")) if role not in roles]
        if missing:
            raise OptionError(
                f"--decode needs a graph for any number of tokens and cached rows, and in {self.path} the number of "
                f"{' and '.join(missing)} is static or absent: export it with dynamic shapes and a cache, "
                "run the graph of one step by itself, or use a built-in student"
            )

    def open(self, tokens: int, past: int) -> OnnxStudent:
        """See `Subject`. The graph is specialised."""
        from firsttoken_compiler.frontend.specialise import specialise

        key = (tokens, past)
        if key not in self._opened:
            self._opened[key] = specialise(self.student, self._bindings(tokens, past))
        return self._opened[key]

    @cached_property
    def _opened(self) -> dict[tuple[int, int], OnnxStudent]:
        return {}

    @cached_property
    def _bound(self) -> dict[tuple[int, int], dict[str, int]]:
        return {}

    def _bindings(self, tokens: int, past: int) -> dict[str, int]:
        """Values of all open dimensions; raises OptionError."""
        from firsttoken_compiler.frontend.bind import bind_dims

        key = (tokens, past)
        if key not in self._bound:
            self._bound[key] = bind_dims(self.student, prompt=tokens, past=past, bind=dict(self.bind))
        return self._bound[key]


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
    from firsttoken_compiler.frontend.bind import is_cache

    for name, value in inputs.items():
        shape = value.type.tensor_type.shape.dim
        if is_cache(name, len(shape)):
            return int(shape[-2].dim_value)
    return 0


_INTEGERS: Final = (6, 7)  # TensorProto.INT32 and INT64
