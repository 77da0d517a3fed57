"""What each attention operator of com.microsoft needs besides its own inputs: masks to add, positions, token numbers.

Every function returns the values to hand over by name, or None where the node has to stay as it is.
"""

from typing import Any, Final

import numpy as np

from firsttoken_compiler.frontend.additions import Additions
from firsttoken_compiler.frontend.onnx_file import OnnxStudent
from firsttoken_compiler.frontend.values import TensorType
from firsttoken_compiler.schedule.spec import MASKED

FLOAT, INT32, INT64, BOOL = 1, 6, 7, 9
FAR: Final = np.iinfo(np.int64).max // 2


def attributes(node: Any) -> dict[str, Any]:
    """Attributes by name."""
    from onnx import helper

    return {a.name: helper.get_attribute_value(a) for a in node.attribute}


def _input(node: Any, index: int) -> str:
    return str(node.input[index]) if index < len(node.input) else ""


def _refused(node: Any, *names: str) -> bool:
    """Whether an attribute is set that changes the meaning."""
    found = attributes(node)
    return any(found.get(name, 0) not in (0, 0.0, b"NONE") for name in names)


def _additive(allowed: str, name: str, shape: tuple[int, ...], work: Additions) -> str:
    zero, never = work.constant("firsttoken.zero", np.float32(0)), work.constant("firsttoken.never", np.float32(MASKED))
    return work.node("Where", [allowed, zero, never], name, shape, FLOAT)


# GroupQueryAttention.


def grouped(node: Any, work: Additions) -> dict[str, str] | None:
    """Positions of the new tokens, and a mask where there are cached rows or a window."""
    if _refused(node, "softcap", "rotary_interleaved", "smooth_softmax", "qk_output"):
        return None
    query, past = work.types[node.input[0]], _input(node, 3)
    if any(_input(node, i) for i in range(10, len(node.input))) or len(query.shape) != 3 or query.shape[0] != 1:
        return None  # a bias, sinks, or scales of a quantised cache; a batch of prompts
    if (past and past not in work.types) or not _whole_head(node, work):
        return None
    tokens, rows = query.shape[1], work.types[past].shape[2] if past else 0
    added = {"positions": _input(node, 9) or _positions(node, tokens, rows, work)}
    mask = _mask(node, tokens, rows, work)
    return {**added, "mask": mask} if mask else added


def _whole_head(node: Any, work: Additions) -> bool:
    """Whether the rotary tables, if there are any, are for the whole head."""
    found = attributes(node)
    if not found.get("do_rotary", 0):
        return True
    cos = work.types.get(_input(node, 7))
    heads = found["num_heads"] + (0 if _input(node, 1) else 2 * found["kv_num_heads"])
    return cos is not None and 2 * cos.shape[1] == work.types[node.input[0]].shape[2] // heads


def _positions(node: Any, tokens: int, rows: int, work: Additions) -> str:
    """Names the numbers `[1, tokens]` of the new tokens: from 0 for a first prompt, else up to seqlens_k."""
    steps = np.arange(tokens, dtype=np.int64)[None]
    if not rows:
        return work.constant("firsttoken.positions", steps)
    key = ("positions", _input(node, 5), tokens)
    if key not in work.made:
        last, behind = _last(node, work), work.constant("firsttoken.behind", steps - (tokens - 1))
        work.made[key] = work.node("Add", [last, behind], f"{node.name}.positions", (1, tokens), INT64)
    return work.made[key]


def _last(node: Any, work: Additions) -> str:
    """Position `[1]` of the last token."""
    key = ("last", _input(node, 5))
    if key not in work.made:
        work.made[key] = work.node("Cast", [key[1]], f"{node.name}.last", (1,), INT64, to=INT64)
    return work.made[key]


def _mask(node: Any, tokens: int, rows: int, work: Additions) -> str:
    """Names what is added to the scores `[tokens, rows + tokens]`; empty where plain causality does.

    The rows of the cache hold keys 0 up to the first new token; behind them lie the new keys. With a window W a token
    sees itself and the W - 1 tokens before it, as onnxruntime counts.
    """
    window = attributes(node).get("local_window_size", -1)
    key, step = np.arange(rows + tokens), np.arange(tokens)[:, None]
    causal = key - rows <= step
    if not rows:
        if not 0 < window < tokens:
            return ""
        allowed = causal & (key > step - window)
        return work.constant("firsttoken.window", np.where(allowed, 0.0, MASKED).astype(np.float32))
    found = ("mask", _input(node, 5), tokens, rows, window)
    if found not in work.made:
        work.made[found] = _cached_mask(node, causal, rows, window, work)
    return work.made[found]


def _cached_mask(node: Any, causal: np.ndarray, rows: int, window: int, work: Additions) -> str:
    """A key of the cache counts where it is before the first new token, and inside the window."""
    shape = causal.shape
    tokens = shape[0]
    key, step = np.arange(shape[1]), np.arange(tokens)[:, None]
    old = np.broadcast_to(key < rows, shape)
    # An old key is there when key < last - (tokens - 1), that is key + tokens - 1 < last.
    ahead = np.where(old, key + tokens - 1, np.where(causal, -1, FAR))
    last = _last(node, work)
    allowed = work.node(
        "Less", [work.constant("firsttoken.ahead", ahead.astype(np.int64)), last], f"{node.name}.exists", shape, BOOL
    )
    if window > 0:
        # An old key is near when key > last - (tokens - 1) + step - window.
        near = np.where(old, key + tokens - step + window - 1, np.where(key - rows > step - window, FAR, -1))
        limit = work.constant("firsttoken.near", near.astype(np.int64))
        inside = work.node("Less", [last, limit], f"{node.name}.inside", shape, BOOL)
        allowed = work.node("And", [allowed, inside], f"{node.name}.allowed", shape, BOOL)
    return _additive(allowed, f"{node.name}.mask", shape, work)


# MultiHeadAttention and Attention.


def multi_head(node: Any, work: Additions) -> dict[str, str] | None:
    """A mask from the padding of the keys, or the bias of the scores itself."""
    query, key = work.types[node.input[0]], work.types.get(_input(node, 1))
    plain = key is not None and len(query.shape) == len(key.shape) == 3 and query.shape[0] == 1
    if not plain or key is None or any(_input(node, i) for i in range(8, len(node.input))):
        return None  # packed, or several prompts, or a shared cache
    past = work.types.get(_input(node, 6))
    keys = key.shape[1] + (past.shape[2] if past is not None else 0)
    if _input(node, 6) and past is None:
        return None
    return _padding_or_bias(node, 4, 5, (query.shape[1], keys), work)


def packed(node: Any, work: Additions) -> dict[str, str] | None:
    """The same for Attention, which has one weight for queries, keys and values."""
    x = work.types[node.input[0]]
    found = attributes(node)
    sizes = found.get("qkv_hidden_sizes", [])
    if len(x.shape) != 3 or x.shape[0] != 1 or _input(node, 4) or len([n for n in node.output if n]) > 1:
        return None
    if _refused(node, "do_rotary", "past_present_share_buffer") or len(set(sizes)) > 1:
        return None
    return _padding_or_bias(node, 3, 5, (x.shape[1], x.shape[1]), work)


def _padding_or_bias(node: Any, mask_at: int, bias_at: int, shape: tuple[int, int], work: Additions) -> Any:
    mask, bias = _input(node, mask_at), _input(node, bias_at)
    if bias:
        kind = work.types.get(bias)
        whole = kind is not None and kind.elem_type == FLOAT and kind.shape[-2:] == shape
        single = kind is not None and int(np.prod(kind.shape[:-2])) == 1
        return {"mask": bias} if whole and single and not mask else None
    if not mask:
        return {}
    key = ("padding", mask, shape[1])
    if key not in work.made:
        made = _padding(node, mask, shape[1], work)
        if made is None:
            return None
        work.made[key] = made
    return {"mask": work.made[key]}


def _padding(node: Any, mask: str, keys: int, work: Additions) -> str | None:
    """`[1, keys]` from the number of keys `[1]`, or from a 1 for every key that counts `[1, keys]`."""
    kind = work.types.get(mask)
    if kind is None or kind.elem_type != INT32 or kind.shape not in ((1,), (1, keys)):
        return None
    if kind.shape == (1,):
        order = work.constant("firsttoken.order", np.arange(keys, dtype=np.int32)[None])
        allowed = work.node("Less", [order, mask], f"{node.name}.exists", (1, keys), BOOL)
    else:
        none = work.constant("firsttoken.none", np.int32(0))
        allowed = work.node("Greater", [mask, none], f"{node.name}.exists", (1, keys), BOOL)
    return _additive(allowed, f"{node.name}.mask", (1, keys), work)


# EmbedLayerNormalization.


def sources_of_casts(student: OnnxStudent) -> dict[Any, str]:
    """By value that is an int64 value in int32: the value as it was."""
    found: dict[Any, str] = {}
    for node in student.graph.node:
        if node.op_type == "Cast" and not node.domain and attributes(node).get("to") == INT32:
            found["wide", node.output[0]] = node.input[0]
    return found


def embedding(node: Any, work: Additions) -> dict[str, str] | None:
    """Token numbers and segment numbers as int64, and the positions; the count of the mask is made apart."""
    from onnx import helper

    ids = work.types[node.input[0]]
    if len(ids.shape) != 2 or ids.shape[0] != 1 or _input(node, 8) or _refused(node, "mask_index_type"):
        return None
    mask, counted = _input(node, 7), node.output[1] if len(node.output) > 1 else ""
    added = {"ids": _wide(node.input[0], work)}
    if _input(node, 1):
        added["kinds"] = _wide(node.input[1], work)
    added["positions"] = work.constant("firsttoken.positions", np.arange(ids.shape[1], dtype=np.int64)[None])
    if not all(added.values()):
        return None
    if counted and mask:
        flat = work.constant("firsttoken.flat", np.array([1], np.int64))
        total = work.node("ReduceSum", [mask], f"{node.name}.count", (), INT32, keepdims=0)
        work.nodes.append(helper.make_node("Reshape", [total, flat], [counted], name=f"{node.name}.mask_index"))
        work.types.setdefault(counted, TensorType(INT32, (1,)))
    return added


def _wide(name: str, work: Additions) -> str:
    """The int64 value of which this is made; empty where there is none."""
    return name if work.types[name].elem_type == INT64 else work.made.get(("wide", name), "")
