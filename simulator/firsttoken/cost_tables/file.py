"""A cost table as one file: arrays and their description in a .npz, with a digest that a damaged file fails."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import tempfile
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from firsttoken_compiler.errors import FirsttokenError

FORMAT: Final = 2
_ABOUT: Final = "about"


class CostTableError(FirsttokenError):
    """The file of a cost table cannot be read, is damaged, or is for another question."""


def packed(about: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> bytes:
    """One file; equal contents give equal bytes."""
    document = {"format": FORMAT, "digest": _digest(about, arrays), "about": about}
    text = np.frombuffer(json.dumps(document, sort_keys=True).encode(), dtype=np.uint8)
    stream = io.BytesIO()
    named: dict[str, Any] = {_ABOUT: text, **arrays}
    np.savez_compressed(stream, **named)
    return stream.getvalue()


def unpacked(data: bytes, where: str) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """Inverse of `packed`; raises CostTableError naming `where` the data came from."""
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
        document = json.loads(arrays.pop(_ABOUT).tobytes())
        if document["format"] != FORMAT:
            raise CostTableError(
                f"{where} has format {document['format']!r}, this version reads {FORMAT}: build the table again"
            )
        about: dict[str, Any] = document["about"]
        whole = document["digest"] == _digest(about, arrays)
    except (ValueError, KeyError, TypeError, OSError, EOFError, zlib.error, zipfile.BadZipFile, NotImplementedError):
        raise CostTableError(f"{where} is damaged or no cost table: build the table again") from None
    if not whole:
        raise CostTableError(f"{where} is damaged, its contents fail their digest: build the table again")
    return about, arrays


def write(path: Path, data: bytes) -> None:
    """Writes a file whole or not at all; raises CostTableError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
            os.chmod(name, 0o644)
            os.replace(name, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(name)
            raise
    except OSError as error:
        raise CostTableError(f"cannot write {path}: {error.strerror or error}") from error


def read(path: Path) -> bytes:
    """The bytes of a file; raises CostTableError."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise CostTableError(f"cannot read {path}: {error.strerror or error}") from error


def _digest(about: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> str:
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        digest.update(f"{name} {array.dtype.str} {array.shape}".encode() + array.tobytes())
    return digest.hexdigest()
