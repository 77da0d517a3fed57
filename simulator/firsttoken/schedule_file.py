"""Schedule files: the choices for the kernels of a student on a target, as TOML that people read and change.

    version = 1
    student = "qwen2.5-0.5b"
    target = "snapdragon-x-elite"

    [[kernel]]
    key = "linear-64x4864x896-cfff42c1d011"
    operators = ["layers.*.mlp.up_proj"]   # what it covers, for people
    M = 64
    N = 4864
    K = 896
    choice = { m = 64, n = 256, k = 128, order = "columns", buffers = 2 }

A kernel that the file does not name is scheduled by the compiler. Files are untrusted input.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from firsttoken_compiler.errors import OptionError

if TYPE_CHECKING:
    from firsttoken_compiler.schedule.choice import Choice, CoreSplit, GraphChoice, KernelKey, Schedules

VERSION: Final = 1
MAX_FILE_BYTES: Final = 4 << 20
MAX_KERNELS: Final = 10_000
MAX_EXTENT: Final = 1 << 31
PRODUCT: Final = ("m", "n", "k", "whole", "order", "buffers", "method", "block")
ATTENTION: Final = ("rows", "keys", "buffers", "softmax")
_KEY: Final = re.compile(r"[a-z_0-9]{1,40}-[a-z0-9]{1,100}-[0-9a-f]{12}")
_LAYER: Final = re.compile(r"(?P<before>.*?\blayers\.)(?P<number>\d+)(?P<after>\..*)")


@dataclass(frozen=True)
class Entry:
    """A kernel of a file: its choice, and for people what it is and what was found about it.

    Attributes:
        key: of the kernel.
        choice: its schedule.
        operators: names of those that it computes, `layers.*` standing for all layers.
        dims: rows, columns and depth of a product, empty for other kernels.
        graph: which graph it is of ("prompt", "decode").
        note: why, in a line.
    """

    key: KernelKey
    choice: Choice
    operators: tuple[str, ...] = ()
    dims: tuple[int, ...] = ()
    graph: str = ""
    note: str = ""


@dataclass(frozen=True)
class ScheduleFile:
    """What a file says."""

    student: str
    target: str
    kernels: tuple[Entry, ...]
    graph: GraphChoice
    target_hash: str = ""
    made_by: str = ""
    splits: tuple[tuple[KernelKey, CoreSplit], ...] = ()
    """How launches are cut for several cores; kernels are those of the parts."""

    @property
    def schedules(self) -> Schedules:
        """For the compiler; raises OptionError for a kernel with two different choices."""
        from firsttoken_compiler.schedule.choice import Schedules

        choices = tuple(dict.fromkeys((entry.key, entry.choice) for entry in self.kernels))
        return Schedules(choices, self.graph, self.splits)

    def check_target(self, name: str, content_hash: str, origin: str) -> list[str]:
        """Warnings where the target has changed since; raises OptionError where it is another one.

        Tiles of another target may fit and be bad, so that is an error and not a surprise.
        """
        if self.target and self.target != name:
            raise OptionError(
                f"{origin} is a schedule for target {self.target}, and the target is {name}: give that target, or "
                f"export a schedule for this one, or take the line target = out of the file to try it all the same"
            )
        if self.target_hash and self.target_hash != content_hash:
            return [f"{origin} was written for {name} with hash {self.target_hash}, which now has {content_hash}"]
        return []


def read_schedule(path: Path) -> ScheduleFile:
    """The file's contents; raises OptionError naming the file, the line, the key and what is possible."""
    try:
        if not path.is_file():
            raise OptionError(f"--schedule {path}: no such file")
        if path.stat().st_size > MAX_FILE_BYTES:
            raise OptionError(f"--schedule {path}: {path.stat().st_size:,} bytes, the limit is {MAX_FILE_BYTES:,}")
        return parse_schedule(path.read_bytes(), f"--schedule {path}")
    except OSError as error:
        raise OptionError(f"--schedule {path}: cannot be read: {error.strerror or error}") from error


def parse_schedule(data: bytes, origin: str) -> ScheduleFile:
    """The schedule in the bytes of a file; `origin` names it in messages. Raises OptionError."""
    from pydantic import ValidationError

    from firsttoken_compiler.schedule.choice import CoreSplit, GraphChoice, KernelKey

    try:
        text = data.decode("utf-8")
        document = tomllib.loads(text)
    except (UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
        raise OptionError(f"{origin} is not valid TOML: {error}") from error
    if document.get("version", VERSION) != VERSION:
        raise OptionError(f"{origin}: version is {document['version']!r:.40}, {VERSION} is read here: export anew")
    if isinstance(document.get("kernel"), list) and len(document["kernel"]) > MAX_KERNELS:
        raise OptionError(f"{origin} has {len(document['kernel']):,} kernels, the limit is {MAX_KERNELS:,}")
    try:
        found = _schema().model_validate(document)
    except ValidationError as error:
        raise OptionError(f"{origin}, {'; '.join(_explain(e, text) for e in error.errors()[:4])}") from error
    entries = []
    for number, kernel in enumerate(found.kernel):
        if not _KEY.fullmatch(kernel.key):
            raise OptionError(f"{origin}, {_at(text, number, 'key')}: {kernel.key!r:.80} is no key of a kernel")
        dims = tuple(value for value in (kernel.M, kernel.N, kernel.K) if value)
        choice = _choice(kernel.choice.model_dump(exclude_none=True), f"{origin}, {_at(text, number, 'choice')}")
        entries.append(
            Entry(KernelKey(kernel.key), choice, tuple(kernel.operators), dims, kernel.graph, kernel.note)
        )
    try:
        graph = GraphChoice(**(found.graph.model_dump() if found.graph is not None else {}))
        splits = tuple((KernelKey(each.key), CoreSplit(each.by, each.cores)) for each in found.split)
        head = (found.student, found.target, tuple(entries), graph, found.target_hash, found.made_by)
        made = ScheduleFile(*head, splits)
        made.schedules  # noqa: B018  a kernel with two choices is refused here
    except OptionError as error:
        raise OptionError(f"{origin}: {error}") from error
    return made


def _choice(values: dict[str, Any], where: str) -> Choice:
    """The choice that these keys make."""
    from firsttoken_compiler.schedule.choice import AttentionChoice, ProductChoice, RowsChoice

    for made, needed, known in (
        (ProductChoice, {"m", "n", "k"}, PRODUCT), (AttentionChoice, {"rows", "keys"}, ATTENTION),
        (RowsChoice, {"rows"}, ("rows",)),
    ):  # fmt: skip
        if needed <= values.keys():
            other = sorted(values.keys() - set(known))
            if other:
                raise OptionError(f"{where}: {other[0]} does not go with {', '.join(sorted(needed))}")
            return made(**values)
    raise OptionError(
        f"{where}: {', '.join(values) or 'nothing'} is no choice: a product has m, n, k, an attention rows and keys, "
        "other kernels rows"
    )


def to_toml(file: ScheduleFile) -> str:
    """The text of a file that `read_schedule` makes the same schedule of."""
    from firsttoken_compiler.schedule.choice import facts_of

    head = {"student": file.student, "target": file.target, "target_hash": file.target_hash, "made_by": file.made_by}
    lines = [f"version = {VERSION}", *(f"{name} = {_text(value)}" for name, value in head.items() if value)]
    chosen = {name: value for name, value in asdict(file.graph).items() if value}
    if chosen:
        lines += ["", "[graph]", *(f"{name} = {_value(value)}" for name, value in chosen.items())]
    for entry in file.kernels:
        lines += ["", "[[kernel]]", f"key = {_text(entry.key)}"]
        if entry.operators:
            lines.append(f"operators = [{', '.join(map(_text, entry.operators))}]")
        lines += [f"{name} = {_text(value)}" for name in ("graph", "note") if (value := getattr(entry, name))]
        lines += [f"{name} = {value}" for name, value in zip("MNK", entry.dims, strict=False)]
        given = facts_of(entry.choice)
        kept = (f"{k} = {_value(v)}" for k, v in given.items() if k not in ("method", "block") or v)
        lines.append(f"choice = {{ {', '.join(kept)} }}")
    for key, split in file.splits:
        lines += ["", "[[split]]", f"key = {_text(key)}", f"by = {_text(split.by)}", f"cores = {split.cores}"]
    return "\n".join([*lines, ""])


def patterns(names: Iterable[str], all_names: Iterable[str]) -> tuple[str, ...]:
    """Names with `layers.*` where all layers that have such an operator are meant, and else the layers' numbers."""
    everywhere = _by_layer(all_names)
    found = []
    for (before, after), numbers in _by_layer(names).items():
        if not before:
            found.append(after)
        elif len(numbers) > 1 and numbers == everywhere[before, after]:
            found.append(f"{before}*{after}")
        else:
            found.append(f"{before}{_ranges(sorted(numbers))}{after}")
    return tuple(found)


def _by_layer(names: Iterable[str]) -> dict[tuple[str, str], set[int]]:
    out: dict[tuple[str, str], set[int]] = {}
    for name in names:
        found = _LAYER.fullmatch(name)
        key = (found["before"], found["after"]) if found else ("", name)
        out.setdefault(key, set()).update((int(found["number"]),) if found else ())
    return out


def _ranges(numbers: list[int]) -> str:
    """`0-3,7` of sorted numbers."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)


def _text(value: str) -> str:
    """A TOML string: JSON's escapes are TOML's."""
    import json

    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _value(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_value, value))}]"
    return _text(value) if isinstance(value, str) else str(value)


def _schema() -> Any:
    """The pydantic model of a file."""
    from typing import Annotated

    from pydantic import BaseModel, ConfigDict, Field, create_model

    from firsttoken_compiler.schedule.choice import ORDERS, SOFTMAXES, GraphChoice

    class Strict(BaseModel):
        model_config = ConfigDict(extra="forbid", strict=True)

    extent = Annotated[int, Field(ge=0, lt=MAX_EXTENT)]
    words = Annotated[str, Field(max_length=4096)]
    numbers = dict.fromkeys(("m", "n", "k", "rows", "keys", "buffers", "block"), (extent | None, None))
    order = (Annotated[str, Field(pattern=f"^({'|'.join(ORDERS)})$")] | None, None)
    method = (Annotated[str, Field(pattern="^(floats|codes)$")] | None, None)
    softmax = (Annotated[str, Field(pattern=f"^({'|'.join(SOFTMAXES)})$")] | None, None)
    choice: Any = create_model(  # type: ignore[call-overload]
        "Choice", __base__=Strict, **numbers, whole=(bool | None, None), order=order, method=method, softmax=softmax
    )
    kernel: Any = create_model(
        "Kernel", __base__=Strict, key=(words, ...), operators=(list[words], []), graph=(words, ""), note=(words, ""),
        M=(extent, 0), N=(extent, 0), K=(extent, 0), choice=(choice, ...),
    )  # fmt: skip
    split: Any = create_model("Split", __base__=Strict, key=(words, ...), by=(words, ...), cores=(extent, 1))
    default = GraphChoice()
    graph: Any = create_model(  # type: ignore[call-overload]
        "Graph", __base__=Strict,
        **{
            f.name: (list[words], []) if isinstance(getattr(default, f.name), tuple) else (extent, 0)
            for f in fields(GraphChoice)
        },
    )  # fmt: skip
    return create_model(
        "Schedule", __base__=Strict, version=(int, ...), student=(words, ""), target=(words, ""),
        target_hash=(words, ""), made_by=(words, ""), graph=(graph | None, None), kernel=(list[kernel], []),
        split=(list[split], []),
    )  # fmt: skip


def _explain(error: Any, text: str) -> str:
    """One pydantic error: the line, the key, what is wrong."""
    loc = [part for part in error["loc"] if not str(part).startswith(("nullable", "function"))]
    number = next((part for part in loc if isinstance(part, int)), None)
    key = str(loc[-1]) if loc and not isinstance(loc[-1], int) else ""
    where = _at(text, number, key)
    if error["type"] == "missing":
        return f"{_at(text, number, '')}: {key} is missing"
    if error["type"] == "extra_forbidden":
        known = _known(loc)
        return f"{where}: unknown key {key!r:.60}; keys are {', '.join(known)}"
    return f"{where}: {key} is {error['input']!r:.60}: {error['msg'].lower()}"


def _known(loc: list[Any]) -> list[str]:
    model = _schema()
    for part in loc[:-1]:
        if isinstance(part, str):
            annotation = model.model_fields[part].annotation
            parts = [annotation, *getattr(annotation, "__args__", ())]
            model = next((each for each in parts if hasattr(each, "model_fields")), model)
    return list(model.model_fields)


def _at(text: str, number: int | None, key: str) -> str:
    """`line 12 (kernel 3)` of a key in the file's text; the table's own line where the key is not found."""
    lines, table = text.splitlines(), -1
    first = 0
    for index, line in enumerate(lines):
        if line.strip().startswith("[[kernel]]"):
            table += 1
            if table == number:
                first = index
    pattern = re.compile(rf"(^|[{{,\s]){re.escape(key)}\s*=") if key else None
    found = first
    for index in range(first, len(lines)):
        if index > first and lines[index].strip().startswith("[[") and number is not None:
            break
        if pattern is not None and pattern.search(lines[index].partition("#")[0]):
            found = index
            break
    return f"line {found + 1}" + ("" if number is None else f" (kernel {number + 1})")
