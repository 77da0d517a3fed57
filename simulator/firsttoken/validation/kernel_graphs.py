"""ONNX graphs of single operators, and the subjects that compile them.

Products multiply by weights that lie in DRAM; everything else reads and writes tensors that do. Operands of 16 bits
are float16 (bf16 has its bytes and rate), those of 32 bits float32. What is multiplied as int8 comes and goes as
float16. The compiler writes sums and RMS norms that leave a graph as float32, also where a table has 16 bits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from firsttoken.options import RunOptions
from firsttoken.subject import StudentLike
from firsttoken_compiler.errors import OptionError

if TYPE_CHECKING:
    from firsttoken_compiler.frontend.onnx_file import OnnxStudent

HALF: Final = 10
"""TensorProto.FLOAT16."""
FLOAT: Final = 1
OPSET: Final = 23
IR_VERSION: Final = 10
WIDTH: Final = 2048
"""Widest row of a matrix that stands for elements in a line."""
EPSILON: Final = 1e-5
BERT: Final = (512, 768, 3072, 12)
"""Tokens, width, inner width and heads of a layer of BERT-base."""


@dataclass(frozen=True, slots=True)
class Operator:
    """One operator as a table gives it.

    Attributes:
        op: matmul, gemv, layer_norm, rms_norm, softmax, silu_mul, add, rope, attention, bert.
        shape: (M, K, N) of a matmul; (outputs, K) of a gemv; (rows, width) of norms and softmax; (elements,) of add and
            silu_mul; (rows, head width) of rope; (rows of queries, rows of keys, head width, heads of queries, heads of
            keys) of attention; nothing for bert, which is one layer of BERT-base over 512 tokens: by the
            multiply-accumulates that analytic models count for the row "bert_base".
        dtypes: "bf16>fp32", operands and result, or one word for both.
        causal: of attention.
    """

    op: str
    shape: tuple[int, ...]
    dtypes: str
    causal: bool = False

    @property
    def text(self) -> str:
        """As reports show it."""
        return f"{self.op} {'x'.join(map(str, self.shape))} {self.dtypes}{' causal' if self.causal else ''}"

    @property
    def options(self) -> RunOptions:
        """Number formats of its program."""
        if self.dtypes.startswith("int8"):
            return RunOptions(weights="int8", acts="int8", group="channel")
        return RunOptions(weights="fp16", residual_spill="fp32" if "fp32" in self.dtypes else "fp16")

    def subject(self) -> OperatorSubject:
        """What is compiled."""
        return OperatorSubject(self)


@dataclass(frozen=True, slots=True)
class OperatorSubject:
    """An operator as something to compile, one graph of its own length; satisfies `firsttoken.subject.Subject`."""

    operator: Operator

    @property
    def name(self) -> str:
        """See `Subject`."""
        return self.operator.text

    @property
    def kind(self) -> str:
        """See `Subject`."""
        return "an operator"

    @property
    def layer_bits(self) -> tuple[int, ...]:
        """See `Subject`."""
        return ()

    @property
    def packages(self) -> tuple[str, ...]:
        """See `Subject`."""
        return ()

    def portable(self) -> StudentLike:
        """See `Subject`; raises OptionError, as no name stands for it."""
        raise OptionError(f"{self.name} has no name that another process could make it of")

    def lengths(self, prompt: int | None, past: int | None) -> tuple[int, int]:
        """See `Subject`; the graph has its own."""
        return 1, 0

    def phase(self, past: int) -> str:
        """See `Subject`."""
        return "encode"

    def content(self) -> str:
        """See `Subject`."""
        return f"operator {self.operator}"

    def open(self, tokens: int, past: int) -> OnnxStudent:
        """See `Subject`."""
        from firsttoken_compiler.frontend.onnx_file import from_model

        return from_model(graph_of(self.operator), Path(), self.name)


def graph_of(operator: Operator) -> Any:
    """The ONNX model of an operator; raises OptionError for one that has no graph here."""
    build = _BUILDERS.get(operator.op)
    if build is None:
        raise OptionError(f"no graph is built of {operator.op}; graphs are built of {', '.join(_BUILDERS)}")
    operands, _, result = operator.dtypes.partition(">")
    graph = _Graph(_element(operands), _element(result or operands))
    build(graph, operator)
    return graph.model(operator.op)


def _element(dtype: str) -> int:
    return FLOAT if dtype in ("fp32", "int32") else HALF


@dataclass
class _Graph:
    """A graph under construction: elements of operands and of the result."""

    operand: int
    result: int
    nodes: list[Any] = field(default_factory=list)
    inputs: list[Any] = field(default_factory=list)
    outputs: list[Any] = field(default_factory=list)
    weights: list[Any] = field(default_factory=list)

    def input(self, name: str, shape: Sequence[int]) -> str:
        """A tensor that lies in DRAM."""
        from onnx import helper

        self.inputs.append(helper.make_tensor_value_info(name, self.operand, shape))
        return name

    def weight(self, name: str, shape: Sequence[int]) -> str:
        """A weight whose values nobody reads."""
        from onnx import TensorProto

        nbytes = (4 if self.operand == FLOAT else 2) * math.prod(shape)
        made = TensorProto(name=name, data_type=self.operand, dims=shape, data_location=TensorProto.EXTERNAL)
        for key, value in (("location", f"{name}.bin"), ("offset", "0"), ("length", str(nbytes))):
            made.external_data.add(key=key, value=value)
        self.weights.append(made)
        return name

    def op(self, kind: str, *inputs: str, **attributes: Any) -> str:
        """A node; returns its output."""
        from onnx import helper

        name = f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [name], name=f"{kind}_{len(self.nodes)}", **attributes))
        return name

    def output(self, value: str, shape: Sequence[int]) -> None:
        """The result, converted where it has another type than the operands."""
        from onnx import helper

        if self.result != self.operand:
            value = self.op("Cast", value, to=self.result)
        self.outputs.append(helper.make_tensor_value_info(value, self.result, shape))

    def model(self, name: str) -> Any:
        """The finished model."""
        from onnx import helper

        return helper.make_model(
            helper.make_graph(self.nodes, name, self.inputs, self.outputs, self.weights),
            opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION,
        )  # fmt: skip


def _matmul(graph: _Graph, operator: Operator) -> None:
    m, k, n = operator.shape if operator.op == "matmul" else (1, operator.shape[1], operator.shape[0])
    graph.output(graph.op("MatMul", graph.input("x", (m, k)), graph.weight("w", (k, n))), (m, n))


def _layer_norm(graph: _Graph, operator: Operator) -> None:
    rows, width = operator.shape
    operands = graph.input("x", (rows, width)), graph.weight("scale", (width,)), graph.weight("bias", (width,))
    graph.output(graph.op("LayerNormalization", *operands, axis=-1, epsilon=EPSILON), (rows, width))


def _rms_norm(graph: _Graph, operator: Operator) -> None:
    rows, width = operator.shape
    operands = graph.input("x", (rows, width)), graph.weight("scale", (width,))
    graph.output(graph.op("RMSNormalization", *operands, axis=-1, epsilon=EPSILON), (rows, width))


def _softmax(graph: _Graph, operator: Operator) -> None:
    graph.output(graph.op("Softmax", graph.input("x", operator.shape), axis=-1), operator.shape)


def _add(graph: _Graph, operator: Operator) -> None:
    shape = _matrix(operator.shape[0])
    graph.output(graph.op("Add", graph.input("x", shape), graph.input("y", shape)), shape)


def _silu_mul(graph: _Graph, operator: Operator) -> None:
    shape = _matrix(operator.shape[0])
    gate = graph.input("gate", shape)
    silu = graph.op("Mul", gate, graph.op("Sigmoid", gate))
    graph.output(graph.op("Mul", silu, graph.input("up", shape)), shape)


def _matrix(elements: int) -> tuple[int, int]:
    """(rows, width) of a matrix of so many elements, as wide as `WIDTH` where it divides."""
    width = math.gcd(elements, WIDTH)
    return elements // width, width


def _rope(graph: _Graph, operator: Operator) -> None:
    rows, width = operator.shape
    if width % 2:
        raise OptionError(f"{operator.text}: a head that is turned has an even width, not {width}")
    tables = [graph.input(name, (1, rows, width // 2)) for name in ("cos", "sin")]
    turned = graph.op("RotaryEmbedding", graph.input("x", (1, rows, width)), *tables, num_heads=1)
    graph.output(turned, (1, rows, width))


def _attention(graph: _Graph, operator: Operator) -> None:
    queries, keys, width, heads, kv_heads = operator.shape
    if heads % kv_heads:
        raise OptionError(f"{operator.text}: {heads} heads of queries are no multiple of {kv_heads} heads of keys")
    if operator.causal and queries != keys:
        raise OptionError(f"{operator.text}: causal attention of {queries} rows to {keys} is not defined here")
    operands = (
        graph.input("q", (1, queries, heads * width)), graph.input("k", (1, keys, kv_heads * width)),
        graph.input("v", (1, keys, kv_heads * width)),
    )  # fmt: skip
    made = graph.op(
        "Attention", *operands, q_num_heads=heads, kv_num_heads=kv_heads, is_causal=int(operator.causal)
    )
    graph.output(made, (1, queries, heads * width))


def _bert(graph: _Graph, _operator: Operator) -> None:
    tokens, hidden, inner, heads = BERT

    def linear(x: str, name: str, inputs: int, outputs: int) -> str:
        product = graph.op("MatMul", x, graph.weight(f"{name}.weight", (inputs, outputs)))
        return graph.op("Add", product, graph.weight(f"{name}.bias", (outputs,)))

    def normed(x: str, name: str) -> str:
        operands = (graph.weight(f"{name}.{part}", (hidden,)) for part in ("weight", "bias"))
        return graph.op("LayerNormalization", x, *operands, axis=-1, epsilon=EPSILON)

    x = graph.input("x", (1, tokens, hidden))
    operands = [linear(x, name, hidden, hidden) for name in ("query", "key", "value")]
    seen = graph.op("Attention", *operands, q_num_heads=heads, kv_num_heads=heads)
    x = normed(graph.op("Add", linear(seen, "output", hidden, hidden), x), "attention.norm")
    wide = graph.op("Gelu", linear(x, "intermediate", hidden, inner))
    graph.output(normed(graph.op("Add", linear(wide, "dense", inner, hidden), x), "norm"), (1, tokens, hidden))


_BUILDERS: Final = {
    "matmul": _matmul, "gemv": _matmul, "layer_norm": _layer_norm, "rms_norm": _rms_norm, "softmax": _softmax,
    "add": _add, "silu_mul": _silu_mul, "rope": _rope, "attention": _attention, "bert": _bert,
}  # fmt: skip
