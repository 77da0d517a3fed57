"""Activations get the scale of a range that is known before the run, in place of one per token.

A range belongs to the tensor of the ONNX graph that a product multiplies by weights: the module's variables know their
nodes, and these the tensors that they read, whatever the passes have made of them. Operators that quantise with a scale
of their own (norms, SwiGLU, npu.quantise) become `static`: they read the inverse of the scale and fold nothing. What
quantises the result of a product or an attention, and nothing else reads, moves into these.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

import numpy as np

from firsttoken_compiler.errors import OptionError
from firsttoken_compiler.isa.vector_kernel import MAX_SOURCES
from firsttoken_compiler.passes.canonicalise import Canonical
from firsttoken_compiler.passes.quantise import INTEGER, Quantised
from firsttoken_compiler.passes.rebuild import Rebuild, reads, rebuild
from firsttoken_compiler.schedule.definitions import MIN_SCALE, QMAX
from firsttoken_compiler.tvm import dialect
from firsttoken_compiler.tvm.api import Call, bindings_of, operator_name, relax

PRODUCTS: Final = ("MatMul", "Gemm", "Conv", "FusedMatMul")
"""ONNX operators that multiply a tensor by weights."""
VIEWS: Final = (
    "Transpose", "Reshape", "Squeeze", "Unsqueeze", "Identity", "Cast", "DequantizeLinear", "DequantizeBlocks",
)  # fmt: skip
"""ONNX operators whose results of weights are weights."""
QUANTISING: Final = ("npu.rms_norm", "npu.layer_norm", "npu.swiglu", "npu.quantise")
_SHOWN: Final = 3


def multiplied(nodes: Iterable[Any], weights: Iterable[str]) -> dict[str, str]:
    """ONNX node → the tensor that it multiplies by weights, of those that multiply one; nodes are in order."""
    known, found = set(weights), dict[str, str]()
    for node in nodes:
        if node.op_type in VIEWS and node.input[0] in known:
            known.update(node.output)
        elif node.op_type in PRODUCTS and len(node.input) > 1:
            tensors = [name for name in node.input[:2] if name not in known]
            if len(tensors) == 1:
                found[node.name] = tensors[0]
    return found


@dataclass(frozen=True)
class StaticRanges:
    """See the module's docstring. Without ranges everything stays as it is.

    `ranges`: tensor → its largest magnitude. `tensors`: ONNX node → the tensor that it multiplies by weights.
    Raises OptionError naming the tensors that have no range.
    """

    ranges: Mapping[str, float]
    tensors: Mapping[str, str]

    def run(self, quantised: Quantised, canonical: Canonical) -> tuple[Quantised, Canonical]:
        """The typed module, and the scales among the constants."""
        return _State(self, quantised, canonical).run() if self.ranges else (quantised, canonical)


@dataclass
class _Scale:
    """A static scale: its parameters, and what they hold."""

    scale: Any
    inverse: Any


@dataclass
class _State:
    options: StaticRanges
    quantised: Quantised
    canonical: Canonical
    values: dict[Any, Any] = field(default_factory=dict)
    scales: dict[Any, _Scale] = field(default_factory=dict)
    """Variable of a pair (integers, scales) → its static scale."""
    narrowed: dict[Any, Any] = field(default_factory=dict)
    """Product → the pair that is made of its result."""
    constants: dict[str, np.ndarray] = field(default_factory=dict)
    parameters: dict[str, Any] = field(default_factory=dict)
    """The scales and their inverses, by name."""

    def run(self) -> tuple[Quantised, Canonical]:
        bindings = bindings_of(self.quantised.module["main"])
        self.values = {binding.var: binding.value for binding in bindings}
        for pair, (tensor, largest) in self._largest().items():
            self._declare(pair, tensor, largest)
        if not self.scales:
            raise OptionError(
                "--acts-range: no product has integer activations whose scales the options make (what the graph stores "
                "quantised keeps its own): leave it out"
            )
        self._find_narrowed(bindings)
        parameters = list(self.quantised.module["main"].params)
        env = {parameter: parameter for parameter in parameters}
        module, names = rebuild(self.quantised.module, [*parameters, *self.parameters.values()], env, self._visit)
        constants = {**self.canonical.constants, **self.constants}
        return self.quantised.rebuilt(module, names), replace(self.canonical, constants=constants)

    def _largest(self) -> dict[Any, tuple[str, float]]:
        """Pair → the tensor it quantises and the largest magnitude, of pairs that only products of ours read."""
        readers: dict[Any, list[Any]] = {}
        for variable, value in self.values.items():
            for pair in self._scales_read(value):
                readers.setdefault(pair, []).append(variable)
        found: dict[Any, tuple[str, float]] = {}
        lost: dict[str, str] = {}
        for pair, products in readers.items():
            if not all(self._is_ours(self.values[product]) for product in products):
                continue
            for product in products:
                tensor = self._tensor(product)
                if tensor not in self.options.ranges:
                    lost[tensor] = self._named(product)
                    continue
                largest = self.options.ranges[tensor]
                if pair not in found or largest > found[pair][1]:
                    found[pair] = (tensor, largest)
        if lost:
            shown = ", ".join(f"{tensor!r} (read by {node})" for tensor, node in list(lost.items())[:_SHOWN])
            raise OptionError(
                f"--acts-range: {len(lost)} of the tensors that products read have no range: {shown}"
                f"{', ...' if len(lost) > _SHOWN else ''}; run 'firsttoken ranges' on this student"
            )
        return found

    def _scales_read(self, value: Any) -> list[Any]:
        """Pairs whose scales an operator reads."""
        items = [self.values.get(a) for a in value.args] if isinstance(value, Call) else []
        return [
            item.tuple_value
            for item in items
            if isinstance(item, relax.TupleGetItem)
            and int(item.index) == 1
            and operator_name(self.values.get(item.tuple_value)) in QUANTISING
        ]

    @staticmethod
    def _is_ours(value: Any) -> bool:
        """Whether this is a product on weights that the compiler quantised."""
        return operator_name(value) == "npu.linear" and not int(value.attrs["stored"])

    def _nodes(self, product: Any) -> tuple[str, ...]:
        return self.canonical.nodes.get(self.quantised.names.get(product.name, product.name), ())

    def _tensor(self, product: Any) -> str:
        """The ONNX tensor that a product multiplies by weights."""
        return next((self.options.tensors[node] for node in self._nodes(product) if node in self.options.tensors), "")

    def _named(self, product: Any) -> str:
        return next(iter(self._nodes(product)), product.name)

    def _declare(self, pair: Any, tensor: str, largest: float) -> None:
        dtype = str(self.values[pair].attrs["out"])
        scale = np.float32(max(largest / QMAX[dtype], MIN_SCALE))
        kinds = {f"{tensor}.{dtype}.scale": scale, f"{tensor}.{dtype}.inverse": np.float32(1) / scale}
        for name, value in kinds.items():
            self.constants[name] = np.full((1, 1), value, np.float32)
            if name not in self.parameters:
                self.parameters[name] = relax.Var(name, relax.TensorType([1, 1], "float32"))
        self.scales[pair] = _Scale(*(self.parameters[name] for name in kinds))

    def _find_narrowed(self, bindings: list[Any]) -> None:
        """Products and attentions whose results only a static quantisation reads.

        A product's last instruction must have an operand free.
        """
        uses = Counter(argument for binding in bindings for argument in reads(binding.value))
        for pair in self.scales:
            call = self.values[pair]
            source = call.args[0]
            product = self.values.get(source)
            if call.op.name != "npu.quantise" or uses[source] != 1 or product is None:
                continue
            if operator_name(product) == "npu.attention":
                self.narrowed[source] = pair
                continue
            if not self._is_ours(product):
                continue
            plain = "blocks" not in product.attrs and not int(product.attrs.get("zeros", 0))
            if plain and len(product.args) <= MAX_SOURCES:
                self.narrowed[source] = pair

    def _visit(self, state: Rebuild, variable: Any, call: Any, args: list[Any]) -> Any:
        attrs = dialect.plain_attributes(call) if call.attrs is not None else {}
        if variable in self.narrowed:
            pair = self.narrowed[variable]
            attrs.update(narrow=1, out=str(self.values[pair].attrs["out"]))
            return state.emit(dialect.call(call.op.name, [*args, self.scales[pair].inverse], **attrs))
        if variable not in self.scales:
            return state.emit(Call(call.op, args, call.attrs))
        known = self.scales[variable]
        if self.narrowed.get(call.args[0]) == variable:
            return relax.Tuple([args[0], known.scale])
        assert attrs["out"] in INTEGER
        made = state.emit(dialect.call(call.op.name, [*args, known.inverse], **attrs, static=1))
        return relax.Tuple([made, known.scale])
