"""com.microsoft GroupQueryAttention with its integer logic spelled out, so that the NPU can do the rest.

The operator finds the positions of its tokens, and which keys exist, from `seqlens_k` at run time. `prepare` adds plain
ONNX nodes that compute positions and an additive mask, which the host runs once for all layers, and hands both to the
node as further inputs. `prepared.restored` takes them away again where the node itself runs on the host.
"""

from dataclasses import dataclass, field, replace
from typing import Any, Final

import numpy as np

from firsttoken_compiler.frontend.masks import MASKED
from firsttoken_compiler.frontend.onnx_file import Initializer, OnnxStudent, with_nodes
from firsttoken_compiler.frontend.partition import TensorType, read_names, value_types
from firsttoken_compiler.frontend.prepared import DOMAIN, INPUTS, SOURCE

GROUP_QUERY_ATTENTION: Final = f"{DOMAIN}.GroupQueryAttention"
PREPARED: Final = {"positions": INPUTS, "mask": INPUTS + 1}
"""Which inputs `prepare` adds."""
FLOAT, INT64 = 1, 7
PAST_KEY, SEQLENS, COS, POSITIONS = 3, 5, 7, 9
_REFUSED: Final = ("softcap", "rotary_interleaved", "smooth_softmax", "qk_output", "kv_quant_type")
"""Attributes that must be absent or zero."""


def prepare(student: OnnxStudent) -> OnnxStudent:
    """The student with every GroupQueryAttention prepared that the NPU can run; itself if there is none."""
    if not any(node.op_type == "GroupQueryAttention" and node.domain == SOURCE for node in student.graph.node):
        return student
    work = _Preparation(student, value_types(student))
    nodes: list[Any] = []
    for node in student.graph.node:
        if node.op_type == "GroupQueryAttention" and node.domain == SOURCE and work.refusal(node) is None:
            before, changed = work.prepared(node)
            nodes += [*before, changed]
        else:
            nodes.append(node)
    changed = replace(
        with_nodes(student, nodes), initializers={**student.initializers, **work.entries()},
        _embedded={**student._embedded, **work.tensors},
    )  # fmt: skip
    changed.graph.value_info.extend(work.infos)
    return _without_empty(changed)


def _without_empty(student: OnnxStudent) -> OnnxStudent:
    """Drops inputs without elements, caches of no rows, that nothing reads any more."""
    read = {name for node in student.graph.node for name in read_names(node)}
    for value in list(student.graph.input):
        extents = [dim.dim_value for dim in value.type.tensor_type.shape.dim if dim.HasField("dim_value")]
        if 0 in extents and value.name not in read:
            student.graph.input.remove(value)
    return student


@dataclass
class _Preparation:
    """What the added nodes need: constants, types, and the values made so far."""

    student: OnnxStudent
    types: dict[str, TensorType]
    tensors: dict[str, Any] = field(default_factory=dict)
    infos: list[Any] = field(default_factory=list)
    made: dict[Any, str] = field(default_factory=dict)

    def refusal(self, node: Any) -> str | None:
        """Why a node stays as it is; None when it can be prepared."""
        from onnx import helper

        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        given = [bool(name) for name in node.input] + [False] * INPUTS
        query = self.types.get(node.input[0])
        for name in _REFUSED:
            if attributes.get(name, 0) not in (0, 0.0, b"NONE"):
                return f"{name} {attributes[name]}"
        if any(given[POSITIONS + 1 :]):
            return "an attention bias, sinks or scales of a quantised cache"
        if query is None or len(query.shape) != 3 or query.shape[0] != 1:
            return "no static shape, or a batch of several prompts"
        if given[PAST_KEY] and node.input[PAST_KEY] not in self.types:
            return "a cache without a static shape"
        return self._partial_rotation(node, attributes, query.shape[2])

    def _partial_rotation(self, node: Any, attributes: dict[str, Any], features: int) -> str | None:
        if not attributes.get("do_rotary", 0):
            return None
        cos = self.types.get(node.input[COS]) if len(node.input) > COS else None
        heads = attributes["num_heads"] + (0 if node.input[1] else 2 * attributes["kv_num_heads"])
        if cos is None or 2 * cos.shape[1] != features // heads:
            return "rotary embedding of a part of the head"
        return None

    def prepared(self, node: Any) -> tuple[list[Any], Any]:
        """Nodes to go before it, and the node with its two further inputs."""
        from onnx import helper

        window = next((a.i for a in node.attribute if a.name == "local_window_size"), -1)
        tokens = self.types[node.input[0]].shape[1]
        past = node.input[PAST_KEY]
        rows = self.types[past].shape[2] if past else 0
        copy = helper.make_node(node.op_type, [], node.output, name=node.name, domain=DOMAIN)
        copy.attribute.extend(node.attribute)
        inputs = [*node.input, *[""] * (INPUTS - len(node.input))]
        if not rows:
            inputs[PAST_KEY] = inputs[PAST_KEY + 1] = ""
        nodes: list[Any] = []
        positions = inputs[POSITIONS] or self._positions(node, tokens, rows, nodes)
        mask = self._mask(node, tokens, rows, window, nodes)
        copy.input.extend([*inputs, positions, mask] if mask else [*inputs, positions])
        return nodes, copy

    def _positions(self, node: Any, tokens: int, rows: int, nodes: list[Any]) -> str:
        """Names the numbers `[1, tokens]` of the new tokens: from 0 for a first prompt, else up to seqlens_k."""
        steps = np.arange(tokens, dtype=np.int64)[None]
        if not rows:
            return self._constant("firsttoken.positions", steps)
        key = ("positions", node.input[SEQLENS], tokens)
        if key not in self.made:
            last = self._last(node, nodes)
            behind = self._constant("firsttoken.behind", steps - (tokens - 1))
            self.made[key] = self._node("Add", [last, behind], f"{node.name}.positions", (1, tokens), INT64, nodes)
        return self.made[key]

    def _last(self, node: Any, nodes: list[Any]) -> str:
        """Position `[1, 1]` of the last token."""
        key = ("last", node.input[SEQLENS])
        if key not in self.made:
            wide = self._node("Cast", [node.input[SEQLENS]], f"{node.name}.seqlens", (1,), INT64, nodes, to=INT64)
            shape = self._constant("firsttoken.one_by_one", np.array([1, 1], np.int64))
            self.made[key] = self._node("Reshape", [wide, shape], f"{node.name}.last", (1, 1), INT64, nodes)
        return self.made[key]

    def _mask(self, node: Any, tokens: int, rows: int, window: int, nodes: list[Any]) -> str:
        """Names what is added to the scores `[tokens, rows + tokens]`; empty where plain causality does.

        The rows of the cache hold keys 0 up to the first new token; behind them lie the new keys. With a window W a
        token sees itself and the W tokens before it, as onnxruntime counts.
        """
        key, step = np.arange(rows + tokens), np.arange(tokens)[:, None]
        causal = key - rows <= step
        if not rows:
            if not 0 <= window < tokens - 1:
                return ""
            allowed = causal & (key >= step - window)
            return self._constant("firsttoken.window", np.where(allowed, 0.0, MASKED).astype(np.float32))
        found = ("mask", node.input[SEQLENS], tokens, rows, window)
        if found not in self.made:
            self.made[found] = self._cached_mask(node, tokens, rows, window, causal, nodes)
        return self.made[found]

    def _cached_mask(
        self, node: Any, tokens: int, rows: int, window: int, causal: np.ndarray, nodes: list[Any]
    ) -> str:
        """A key of the cache counts where it is before the first new token, and inside the window."""
        shape = (tokens, rows + tokens)
        key, step = np.arange(rows + tokens), np.arange(tokens)[:, None]
        old = np.broadcast_to(key < rows, shape)
        # old keys: key < last - (tokens - 1), that is key + tokens - 1 < last; new keys as causality has it
        ahead = np.where(old, key + tokens - 1, np.where(causal, -1, np.iinfo(np.int64).max // 2))
        last = self._last(node, nodes)
        bound = self._constant("firsttoken.ahead", np.ascontiguousarray(ahead.astype(np.int64)))
        allowed = self._node("Less", [bound, last], f"{node.name}.exists", shape, 9, nodes)
        if window >= 0:
            # old keys: key >= last - (tokens - 1) + step - window; new keys: key - rows >= step - window
            near = np.where(old, key + tokens - step + window, np.where(key - rows >= step - window, np.iinfo(
                np.int64).max // 2, -1))  # fmt: skip
            limit = self._constant("firsttoken.near", np.ascontiguousarray(near.astype(np.int64)))
            inside = self._node("Less", [last, limit], f"{node.name}.inside", shape, 9, nodes)
            allowed = self._node("And", [allowed, inside], f"{node.name}.allowed", shape, 9, nodes)
        zero = self._constant("firsttoken.zero", np.float32(0))
        never = self._constant("firsttoken.never", np.float32(MASKED))
        return self._node("Where", [allowed, zero, never], f"{node.name}.mask", shape, FLOAT, nodes)

    def _node(
        self, kind: str, inputs: list[str], name: str, shape: tuple[int, ...], elem_type: int, nodes: list[Any],
        **attributes: int,
    ) -> str:  # fmt: skip
        """Appends a node whose result carries its name; returns that."""
        from onnx import helper

        nodes.append(helper.make_node(kind, inputs, [name], name=name, **attributes))
        self.infos.append(helper.make_tensor_value_info(name, elem_type, shape))
        return name

    def _constant(self, hint: str, array: Any) -> str:
        """The name of an initialiser that holds the array; equal ones share one."""
        from onnx import numpy_helper

        array = np.asarray(array)
        for name, tensor in self.tensors.items():
            held = numpy_helper.to_array(tensor)
            if held.dtype == array.dtype and held.shape == array.shape and np.array_equal(held, array):
                return name
        name = f"{hint}.{len(self.tensors)}"
        self.tensors[name] = numpy_helper.from_array(array, name)
        return name

    def entries(self) -> dict[str, Initializer]:
        """The constants as initialisers."""
        return {
            name: Initializer(name, tuple(tensor.dims), tensor.data_type, None) for name, tensor in self.tensors.items()
        }
