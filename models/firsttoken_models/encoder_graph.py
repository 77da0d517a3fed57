"""ONNX graphs of encoders like BERT: opset 23, standard operators, static shapes, float32, weights as external data."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from firsttoken.generation import MASKED
from firsttoken_models.encoder_weights import EMBEDDING_NORM, POSITIONS, SCORE_BIAS, TYPES, WORDS
from firsttoken_models.graph_weights import GraphWeights
from firsttoken_models.onnx_nodes import Nodes, value_info

if TYPE_CHECKING:
    import onnx
    from numpy.typing import NDArray

    from firsttoken.encoder import EncoderConfig
    from firsttoken.student import WeightStore

INT64: Final = 7
TINY: Final = 1e-12
"""Below this the length of a mean counts as this."""


def build_encoder_graph(config: EncoderConfig, *, tokens: int, weights: WeightStore | None = None) -> onnx.ModelProto:
    """Return the static graph of an input of `tokens` tokens.

    Inputs, all int64: input_ids [1, M]; attention_mask [1, M], 1 for tokens that count and 0 for padding;
    token_type_ids [1, M] where the encoder has types; mask_position [1], the position to guess, for a masked_lm head.
    Outputs: last_hidden_state [1, M, hidden] without a head, else sentence_embedding [1, hidden] (mean), or logits
    [1, labels] (classifier) or [1, vocab] (masked_lm).

    Args:
        config: the encoder.
        tokens: M, at least 1.
        weights: where the weights lie. Without it they are laid out in a file "weights.bin" that need not exist.

    Raises:
        ValueError: the length is out of range, or the weights belong to an encoder of other dimensions.
    """
    if not 1 <= tokens <= config.max_positions:
        raise ValueError(
            f"encoder {config.name!r}: tokens={tokens} is out of range, must be 1 to {config.max_positions}; "
            "shorten the input"
        )
    return _Builder(config, tokens, weights).model()


class _Builder:
    """Collects nodes and initializers of one graph."""

    def __init__(self, config: EncoderConfig, tokens: int, weights: WeightStore | None) -> None:
        self.config, self.tokens = config, tokens
        self.nodes = Nodes()
        self._op = self.nodes.op
        self.weights = GraphWeights(config, weights, self._op)
        self.inputs = [value_info(name, (1, tokens), INT64) for name in ("input_ids", "attention_mask")]
        self._root = self._number("root", config.head_dim**0.5)

    def model(self) -> onnx.ModelProto:
        """Return the finished model."""
        mask = self._mask()
        hidden = self._embeddings()
        for index in range(self.config.layers):
            hidden = self._layer(index, hidden, mask)
        output = {"none": self._none, "mean": self._mean, "classifier": self._classifier, "masked_lm": self._masked_lm}
        outputs = [output[self.config.head](hidden)]
        properties = {"firsttoken.student": self.config.canonical_json(), "firsttoken.tokens": str(self.tokens)}
        return self.nodes.model(self.config.name, self.inputs, outputs, self.weights.initializers, properties)

    def _mask(self) -> str:
        """What is added to the scores of a key, [1, 1, 1, M]: nothing, or so much that its weight is 0."""
        shaped = self._op("/mask/Reshape", ["attention_mask", self.weights.numbers((1, 1, 1, self.tokens))])
        masked = self._op("/mask/Sub", [self._number("one", 1.0), self._op("/mask/Cast", [shaped], to=1)])
        return self._op("/mask/Mul", [masked, self._number("masked", MASKED)])

    def _embeddings(self) -> str:
        import numpy as np

        node = "/embeddings"
        total = self._op(f"{node}/words/Gather", [self.weights.table(f"{node}/words", WORDS), "input_ids"], axis=0)
        positions = self._array("positions", np.arange(self.tokens, dtype=np.int64)[np.newaxis])
        table = self.weights.table(f"{node}/positions", POSITIONS)
        total = self._op(f"{node}/Add", [total, self._op(f"{node}/positions/Gather", [table, positions], axis=0)])
        if self.config.types:
            self.inputs.append(value_info("token_type_ids", (1, self.tokens), INT64))
            table = self.weights.table(f"{node}/types", TYPES)
            types = self._op(f"{node}/types/Gather", [table, "token_type_ids"], axis=0)
            total = self._op(f"{node}/Add_1", [total, types])
        return self._norm(f"{node}/norm", EMBEDDING_NORM, total)

    def _layer(self, index: int, hidden: str, mask: str) -> str:
        node, tensor = f"/encoder/layers.{index}", f"encoder.layer.{index}"
        attended = self._attention(f"{node}/attention", f"{tensor}.attention.self", hidden, mask)
        projected = self._dense(f"{node}/attention/output", f"{tensor}.attention.output.dense", attended)
        total = self._op(f"{node}/Add", [projected, hidden])
        hidden = self._norm(f"{node}/attention/norm", f"{tensor}.attention.output.LayerNorm", total)
        wide = self._dense(f"{node}/intermediate", f"{tensor}.intermediate.dense", hidden)
        wide = self._op(f"{node}/intermediate/Gelu", [wide])
        narrow = self._dense(f"{node}/output", f"{tensor}.output.dense", wide)
        return self._norm(f"{node}/norm", f"{tensor}.output.LayerNorm", self._op(f"{node}/Add_1", [narrow, hidden]))

    def _attention(self, node: str, tensor: str, hidden: str, mask: str) -> str:
        """As exporters write it: onnxruntime's Attention takes no mask with one row for all queries."""
        split = self.weights.numbers((1, self.tokens, self.config.heads, self.config.head_dim))

        def by_head(name: str, axes: tuple[int, ...]) -> str:
            made = self._dense(f"{node}/{name}", f"{tensor}.{name}", hidden)
            return self._op(
                f"{node}/{name}/Transpose", [self._op(f"{node}/{name}/Reshape", [made, split])], perm=axes
            )

        query, key, value = by_head("query", (0, 2, 1, 3)), by_head("key", (0, 2, 3, 1)), by_head("value", (0, 2, 1, 3))
        scores = self._op(f"{node}/MatMul", [query, key])
        scores = self._op(f"{node}/Div", [scores, self._root])
        shares = self._op(f"{node}/Softmax", [self._op(f"{node}/Add", [scores, mask])], axis=-1)
        heads = self._op(f"{node}/Transpose", [self._op(f"{node}/MatMul_1", [shares, value])], perm=(0, 2, 1, 3))
        return self._op(f"{node}/Reshape", [heads, self.weights.numbers((1, self.tokens, self.config.hidden))])

    def _none(self, hidden: str) -> onnx.ValueInfoProto:
        self.nodes.made[-1].output[0] = "last_hidden_state"
        return value_info("last_hidden_state", (1, self.tokens, self.config.hidden))

    def _mean(self, hidden: str) -> onnx.ValueInfoProto:
        """Mean of the tokens that count, as a product with their shares, then divided by its length."""
        row = self._op("/pooling/Cast", ["attention_mask"], to=1)
        axis = self.weights.numbers((1,))
        shares = self._op("/pooling/Div", [row, self._op("/pooling/count/ReduceSum", [row, axis], keepdims=1)])
        shares = self._op("/pooling/Reshape", [shares, self.weights.numbers((1, self.tokens, 1))])
        weighed = self._op("/pooling/Mul", [hidden, shares])
        mean = self._op("/pooling/ReduceSum", [weighed, axis], keepdims=0)
        length = self._op("/pooling/length/ReduceL2", [mean, axis], keepdims=1)
        length = self._op("/pooling/length/Max", [length, self._number("tiny", TINY)])
        self._op("/pooling/Div_1", [mean, length], outputs=["sentence_embedding"])
        return value_info("sentence_embedding", (1, self.config.hidden))

    def _classifier(self, hidden: str) -> onnx.ValueInfoProto:
        bounds = [self._integers(name, [bound]) for name, bound in (("starts", 0), ("ends", 1), ("axes", 1))]
        first = self._op("/classifier/Slice", [hidden, *bounds])
        first = self._op("/classifier/Reshape", [first, self.weights.numbers((1, self.config.hidden))])
        wide = self._op("/classifier/Relu", [self._dense("/classifier/pre", "pre_classifier", first)])
        self._dense("/classifier/logits", "classifier", wide, output="logits")
        return value_info("logits", (1, self.config.labels))

    def _masked_lm(self, hidden: str) -> onnx.ValueInfoProto:
        row = self._chosen(hidden)
        turned = self._dense("/predictions/transform", "cls.predictions.transform.dense", row)
        turned = self._op("/predictions/transform/Gelu", [turned])
        turned = self._norm("/predictions/norm", "cls.predictions.transform.LayerNorm", turned)
        table = self._op("/predictions/Transpose", [self.weights.table("/embeddings/words", WORDS)], perm=[1, 0])
        scores = self._op("/predictions/MatMul", [turned, table])
        self._op("/predictions/Add", [scores, self.weights.vector(SCORE_BIAS, "/predictions")], outputs=["logits"])
        return value_info("logits", (1, self.config.vocab))

    def _chosen(self, hidden: str) -> str:
        """The row of the token at mask_position, [1, hidden]: the sum of all rows, the others times 0."""
        node = "/predictions/position"
        self.inputs.append(value_info("mask_position", (1,), INT64))
        places = self._integers("places", list(range(self.tokens)))
        found = self._op(f"{node}/Cast", [self._op(f"{node}/Equal", [places, "mask_position"])], to=1)
        found = self._op(f"{node}/Reshape", [found, self.weights.numbers((1, self.tokens, 1))])
        chosen = self._op(f"{node}/Mul", [hidden, found])
        return self._op(f"{node}/ReduceSum", [chosen, self.weights.numbers((1,))], keepdims=0)

    def _dense(self, node: str, tensor: str, value: str, output: str | None = None) -> str:
        product = self._op(f"{node}/MatMul", [value, self.weights.matrix(f"{tensor}.weight", node)])
        outputs = None if output is None else [output]
        return self._op(f"{node}/Add", [product, self.weights.vector(f"{tensor}.bias", node)], outputs=outputs)

    def _norm(self, node: str, tensor: str, value: str) -> str:
        scales = [self.weights.vector(f"{tensor}.{part}", node) for part in ("weight", "bias")]
        return self._op(f"{node}/LayerNormalization", [value, *scales], axis=-1, epsilon=self.config.norm_eps)

    def _integers(self, name: str, values: list[int]) -> str:
        import numpy as np

        return self._array(name, np.array(values, np.int64))

    def _number(self, name: str, value: float) -> str:
        import numpy as np

        return self._array(name, np.array(value, np.float32))

    def _array(self, name: str, array: NDArray[Any]) -> str:
        """A constant of the graph."""
        from onnx import numpy_helper

        self.weights.initializers.append(numpy_helper.from_array(array, f"model.{name}"))
        return f"model.{name}"
