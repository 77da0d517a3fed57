"""`firsttoken quantise`: a student with weights as a GGUF file, its matrices in blocks of one type or of a mixture."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from firsttoken.progress import Bar
from firsttoken_compiler.errors import OptionError
from firsttoken_compiler.formats.policy import POLICIES


def quantise(
    student: Annotated[str, typer.Argument(help="A GGUF file, or a built-in student with weights.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="The GGUF file.")],
    weights: Annotated[str, typer.Option("--weights", help=f"One of {', '.join(POLICIES)}.")] = "q8_0",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")] = False,
) -> None:
    """Write a student's weights in blocks to a GGUF file, norms and biases as floats."""
    from firsttoken.cli import print_json, table
    from firsttoken.subject import Built, subject_of

    subject = subject_of(student)
    if not isinstance(subject, Built):
        raise OptionError(f"{subject.name} is {subject.kind}: give a GGUF file, or a built-in student with weights")
    if subject.path is not None and out.exists() and out.samefile(subject.path):
        raise OptionError(f"-o {out} is the student itself: choose another file")
    with Bar() as bar:
        source = subject.name if subject.path is None else subject.path
        written = subject.provider.quantise(source, out, weights, bar.update)
    if as_json:
        rows = [{"type": entry.type, "tensors": entry.tensors, "bytes": entry.nbytes} for entry in written]
        print_json({"file": str(out), "types": rows, "bytes": sum(entry.nbytes for entry in written)})
        return
    table(["type", "tensors", "bytes"], [[entry.type, str(entry.tensors), f"{entry.nbytes:,}"] for entry in written])
    print(f"wrote {out}: {sum(entry.nbytes for entry in written):,} bytes of tensors")
