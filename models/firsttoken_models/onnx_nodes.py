"""Nodes of one ONNX graph under construction; values are named after the node that makes them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from firsttoken_models.graph_weights import DOMAIN

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import onnx

OPSET: Final = 23
IR_VERSION: Final = 10


class Nodes:
    """Collects the nodes of a graph in order."""

    def __init__(self) -> None:
        self.made: list[onnx.NodeProto] = []

    def op(self, name: str, inputs: Sequence[str], *, outputs: Sequence[str] | None = None, **attributes: Any) -> str:
        """Append a node whose operator is the last part of its name (without a counter); return its first output."""
        from onnx import helper

        outputs = outputs or [f"{name}_output_0"]
        operator = name.rpartition("/")[2].partition("_")[0]
        self.made.append(helper.make_node(operator, inputs, outputs, name=name, **attributes))
        return outputs[0]

    def model(
        self, name: str, inputs: list[onnx.ValueInfoProto], outputs: list[onnx.ValueInfoProto],
        initializers: list[onnx.TensorProto], properties: Mapping[str, str],
    ) -> onnx.ModelProto:  # fmt: skip
        """Return the finished model; `properties` go into its metadata."""
        from onnx import helper

        domains = [("", OPSET), *((DOMAIN, 1) for _ in {node.domain for node in self.made} - {""})]
        model = helper.make_model(
            helper.make_graph(self.made, name, inputs, outputs, initializers),
            opset_imports=[helper.make_opsetid(domain, version) for domain, version in domains],
            ir_version=IR_VERSION,
            producer_name="firsttoken",
        )
        helper.set_model_props(model, dict(properties))
        return model


def value_info(name: str, shape: Sequence[int], element: int = 1) -> onnx.ValueInfoProto:
    """Return the declaration of an input or output, float32 unless `element` says otherwise."""
    from onnx import helper

    return helper.make_tensor_value_info(name, element, shape)
