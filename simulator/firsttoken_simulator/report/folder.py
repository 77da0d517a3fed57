"""Writes the files of a run; each appears whole or not at all."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from firsttoken_compiler.isa.program import Program
from firsttoken_simulator.report.document import RunDocument
from firsttoken_simulator.report.errors import ReportError
from firsttoken_simulator.timeline import Timeline

PROGRAM: Final = "program.npu"
DECODE: Final = "decode.npu"
"""Names of the program of the prompt and of the one that decodes, in the folder of a run."""


def write_file(path: Path, data: str | bytes) -> None:
    """Writes a file beside its final name and moves it there; raises ReportError when the place cannot be written."""
    content = data.encode("utf-8") if isinstance(data, str) else data
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
            os.chmod(name, 0o666 & ~_umask())
            os.replace(name, path)
        except BaseException:
            os.unlink(name)
            raise
    except OSError as error:
        raise ReportError(f"cannot write {path}: {error.strerror or error}") from error


def write_run(
    folder: Path, document: RunDocument, program: Program, timeline: Timeline, decode: Program | None = None
) -> list[Path]:
    """Writes run.json, ops.csv, program.txt, program.npu, trace.pftrace and report.html; returns their paths.

    With the program of a decode step it writes decode.npu too.
    """
    from firsttoken_simulator.report.html import page
    from firsttoken_simulator.report.listing import listing
    from firsttoken_simulator.report.ops_csv import ops_csv
    from firsttoken_simulator.report.trace import trace

    files: dict[str, str | bytes] = {
        "ops.csv": ops_csv(document.ops),
        "program.txt": listing(program, timeline),
        PROGRAM: program.encode(),
        **({DECODE: decode.encode()} if decode is not None else {}),
        "trace.pftrace": trace(program, timeline),
        "report.html": page(document),
        "run.json": document.to_json(),  # last: where it is, the others are
    }
    for name, data in files.items():
        write_file(folder / name, data)
    return [folder / name for name in files]


@contextlib.contextmanager
def prepared(folder: Path | None) -> Iterator[None]:
    """Makes a folder before the work that fills it, so that a bad one is refused at once; ReportError says why.

    What was made is removed again if the work fails and it is empty.
    """
    if folder is None:
        yield
        return
    try:
        made = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ReportError(f"cannot make the folder {folder}: {error.strerror or error}; choose another -o") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ReportError(f"cannot write into the folder {folder}: permission denied; choose another -o")
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):  # something lies in it
            for path in made:
                path.rmdir()
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
