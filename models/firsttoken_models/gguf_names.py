"""Names of tensors in GGUF files, and what llama.cpp's converter does to a tensor besides renaming it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from firsttoken_models.weights import EMBEDDING, FINAL_NORM, LM_HEAD

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from firsttoken.student import StudentConfig

FAMILIES: Final = ("llama", "qwen2", "qwen3")
"""Families whose tensors have the names below in GGUF files."""
_OUTSIDE: Final = {EMBEDDING: "token_embd.weight", FINAL_NORM: "output_norm.weight", LM_HEAD: "output.weight"}
_MODULES: Final = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name: str) -> str:
    """Return the GGUF name of a tensor of `weights.tensor_shapes`."""
    if name in _OUTSIDE:
        return _OUTSIDE[name]
    _, _, index, rest = name.split(".", 3)
    module, _, part = rest.rpartition(".")
    return f"blk.{index}.{_MODULES[module]}.{part}"


def paired_heads(config: StudentConfig, name: str) -> int:
    """Return how many heads of a tensor have their rows in pairs: llama's queries and keys; 0 for all others."""
    module = name.split(".")[-2]
    if config.family != "llama" or module not in ("q_proj", "k_proj"):
        return 0
    layer = config.layer(int(name.split(".")[2]))
    return layer.heads if module == "q_proj" else layer.kv_heads


def in_halves(rows: NDArray[Any], heads: int) -> NDArray[Any]:
    """Undo llama.cpp's order of query and key rows: from pairs (0, 1), (2, 3) back to halves (0, d/2), (1, d/2 + 1).

    Args:
        rows: matrix [heads * head_dim, hidden] as in the GGUF file, or a bias [heads * head_dim].
        heads: number of heads in it.
    """
    return rows.reshape(heads, -1, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def in_pairs(rows: NDArray[Any], heads: int) -> NDArray[Any]:
    """Inverse of `in_halves`."""
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def as_stored(config: StudentConfig, name: str, values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return a tensor of `weights.tensor_shapes` as a GGUF file has it: rows first, queries and keys in pairs."""
    import numpy as np

    turned = values if values.ndim == 1 or name == EMBEDDING else values.T
    heads = paired_heads(config, name)
    return np.ascontiguousarray(in_pairs(turned, heads) if heads else turned)


def as_graph(config: StudentConfig, name: str, values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Inverse of `as_stored`."""
    heads = paired_heads(config, name)
    rows = in_halves(values, heads) if heads else values
    return rows if rows.ndim == 1 or name == EMBEDDING else rows.T
