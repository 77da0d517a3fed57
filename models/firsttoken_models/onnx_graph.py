"""ONNX graphs of students: opset 23, standard operators, static shapes, float32, weights as external data.

Weights in blocks are the exception: see `graph_weights`.

One graph processes `tokens` new tokens after `past` cached ones. With `past == 0` attention is causal, no mask;
with `past > 0` the caller passes an additive mask and the cached keys and values, whose rows need not all be in use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from firsttoken_models.graph_weights import GraphWeights
from firsttoken_models.onnx_nodes import Nodes, value_info
from firsttoken_models.rotary import rotary_caches
from firsttoken_models.weights import FINAL_NORM, LM_HEAD

if TYPE_CHECKING:
    import onnx
    from numpy.typing import NDArray

    from firsttoken.student import StudentConfig, WeightStore

COS_CACHE: Final = "model.rotary_emb.cos_cache"
SIN_CACHE: Final = "model.rotary_emb.sin_cache"


def build_graph(
    config: StudentConfig, *, tokens: int, past: int, weights: WeightStore | None = None, all_logits: bool = False
) -> onnx.ModelProto:
    """Return the static graph of `tokens` new tokens after a cache of `past` rows.

    Inputs: input_ids and position_ids [1, M] int64; for past > 0 also attention_mask [1, 1, M, C + M] float32, which
    is added to the scores, and past_key_values.{i}.key and .value [1, kv_heads, C, head_dim] float32.
    Outputs: logits [1, 1, vocab] of the last token, or [1, M, vocab] of all; present.{i}.key and .value
    [1, kv_heads, C + M, head_dim], the new rows last. Positions run from 0 to C + M - 1.

    Args:
        config: the student.
        tokens: M, new tokens, at least 1.
        past: C, rows of the cache, 0 for none.
        weights: where the weights lie. Without it they are laid out in a file "weights.bin" that need not exist.
        all_logits: whether the head computes every new token instead of the last one.

    Raises:
        ValueError: a length is out of range, or the weights belong to a student of other dimensions.
    """
    if tokens < 1 or past < 0 or tokens + past > config.max_positions:
        raise ValueError(
            f"student {config.name!r}: tokens={tokens} after past={past} is out of range, needs tokens >= 1, past >= 0 "
            f"and tokens + past <= {config.max_positions}; shorten the prompt or the cache"
        )
    return _Builder(config, tokens, past, weights, all_logits).model()


class _Builder:
    """Collects nodes and initializers of one graph."""

    def __init__(
        self, config: StudentConfig, tokens: int, past: int, weights: WeightStore | None, all_logits: bool
    ) -> None:
        self.config, self.tokens, self.past = config, tokens, past
        self.slices = tokens > 1 and not all_logits
        self.nodes = Nodes()
        self._op = self.nodes.op
        self.weights = GraphWeights(config, weights, self._op)
        self.initializers = self.weights.initializers

    def model(self) -> onnx.ModelProto:
        """Return the finished model."""
        self._constants()
        table = self.weights.table("/model/embed_tokens")
        hidden = self._op("/model/embed_tokens/Gather", [table, "input_ids"], axis=0)
        for index in range(self.config.layers):
            hidden = self._layer(index, hidden)
        self._head(hidden)
        properties = {
            "firsttoken.student": self.config.canonical_json(),
            "firsttoken.tokens": str(self.tokens),
            "firsttoken.past": str(self.past),
        }
        return self.nodes.model(self.config.name, *self._interface(), self.initializers, properties)

    def _layer(self, index: int, hidden: str) -> str:
        node, tensor = f"/model/layers.{index}", f"model.layers.{index}"
        normed = self._norm(f"{node}/input_layernorm", f"{tensor}.input_layernorm.weight", hidden)
        attended = self._attention(index, normed)
        hidden = self._op(f"{node}/Add", [hidden, attended])
        normed = self._norm(f"{node}/post_attention_layernorm", f"{tensor}.post_attention_layernorm.weight", hidden)
        gate = self._linear(f"{node}/mlp/gate_proj", f"{tensor}.mlp.gate_proj", normed)
        up = self._linear(f"{node}/mlp/up_proj", f"{tensor}.mlp.up_proj", normed)
        sigmoid = self._op(f"{node}/mlp/act_fn/Sigmoid", [gate])
        silu = self._op(f"{node}/mlp/act_fn/Mul", [gate, sigmoid])
        product = self._op(f"{node}/mlp/Mul", [silu, up])
        down = self._linear(f"{node}/mlp/down_proj", f"{tensor}.mlp.down_proj", product)
        return self._op(f"{node}/Add_1", [hidden, down])

    def _attention(self, index: int, normed: str) -> str:
        node, tensor = f"/model/layers.{index}/self_attn", f"model.layers.{index}.self_attn"
        layer, bias = self.config.layer(index), self.config.qkv_bias
        query, key, value = (
            self._linear(f"{node}/{name}_proj", f"{tensor}.{name}_proj", normed, bias=bias) for name in "qkv"
        )
        if self.config.qk_norm:
            query = self._head_norm(f"{node}/q_norm", f"{tensor}.q_norm.weight", query, layer.heads)
            key = self._head_norm(f"{node}/k_norm", f"{tensor}.k_norm.weight", key, layer.kv_heads)
        query = self._rotate(f"{node}/q_rotary", query, layer.heads)
        key = self._rotate(f"{node}/k_rotary", key, layer.kv_heads)
        inputs, causal = [query, key, value], {"is_causal": 1}
        if self.past:
            past = [f"past_key_values.{index}.{part}" for part in ("key", "value")]
            inputs, causal = [*inputs, "attention_mask", *past], {}
        attended = self._op(
            f"{node}/Attention",
            inputs,
            outputs=[f"{node}/Attention_output_0", f"present.{index}.key", f"present.{index}.value"],
            q_num_heads=layer.heads,
            kv_num_heads=layer.kv_heads,
            **causal,
        )
        return self._linear(f"{node}/o_proj", f"{tensor}.o_proj", attended)

    def _head(self, hidden: str) -> None:
        if self.slices:
            bounds = ["model.slice.starts", "model.slice.ends", "model.slice.axes"]
            hidden = self._op("/model/Slice", [hidden, *bounds])
        normed = self._norm("/model/norm", FINAL_NORM, hidden)
        if self.config.tie_embeddings:
            table = self._op("/lm_head/Transpose", [self.weights.table("/model/embed_tokens")], perm=[1, 0])
        else:
            table = self.weights.matrix(LM_HEAD, "/lm_head")
        self._op("/lm_head/MatMul", [normed, table], outputs=["logits"])

    def _norm(self, node: str, tensor: str, value: str) -> str:
        gamma = self.weights.vector(tensor, node)
        return self._op(f"{node}/RMSNormalization", [value, gamma], axis=-1, epsilon=self.config.rms_eps)

    def _head_norm(self, node: str, tensor: str, value: str, heads: int) -> str:
        """RMSNorm of each head by itself, with the same factors for all."""
        dim = self.config.head_dim
        split, joined = (1, self.tokens, heads, dim), (1, self.tokens, heads * dim)
        normed = self._norm(node, tensor, self._op(f"{node}/Reshape", [value, self.weights.numbers(split)]))
        return self._op(f"{node}/Reshape_1", [normed, self.weights.numbers(joined)])

    def _linear(self, node: str, tensor: str, value: str, *, bias: bool = False) -> str:
        product = self._op(f"{node}/MatMul", [value, self.weights.matrix(f"{tensor}.weight", node)])
        return self._op(f"{node}/Add", [product, self.weights.vector(f"{tensor}.bias", node)]) if bias else product

    def _rotate(self, node: str, value: str, heads: int) -> str:
        inputs = [value, COS_CACHE, SIN_CACHE, "position_ids"]
        return self._op(f"{node}/RotaryEmbedding", inputs, num_heads=heads, interleaved=0)

    def _constants(self) -> None:
        """Append the small embedded initializers: rotary tables and the bounds of the last-token slice."""
        import numpy as np
        from onnx import numpy_helper

        cos, sin = rotary_caches(self.config, self.tokens + self.past)
        arrays: dict[str, NDArray[Any]] = {COS_CACHE: cos, SIN_CACHE: sin}
        if self.slices:
            bounds = {"starts": self.tokens - 1, "ends": self.tokens, "axes": 1}
            arrays |= {f"model.slice.{name}": np.array([bound], dtype=np.int64) for name, bound in bounds.items()}
        self.initializers.extend(numpy_helper.from_array(array, name) for name, array in arrays.items())

    def _interface(self) -> tuple[list[onnx.ValueInfoProto], list[onnx.ValueInfoProto]]:
        from onnx import TensorProto

        rows = self.past + self.tokens
        inputs = [value_info(name, [1, self.tokens], TensorProto.INT64) for name in ("input_ids", "position_ids")]
        outputs = [value_info("logits", [1, 1 if self.slices else self.tokens, self.config.vocab])]
        if self.past:
            inputs.append(value_info("attention_mask", [1, 1, self.tokens, rows]))
        for index in range(self.config.layers):
            heads, dim = self.config.layer(index).kv_heads, self.config.head_dim
            for part in ("key", "value"):
                if self.past:
                    inputs.append(value_info(f"past_key_values.{index}.{part}", [1, heads, self.past, dim]))
                outputs.append(value_info(f"present.{index}.{part}", [1, heads, rows, dim]))
        return inputs, outputs
