"""Which ONNX operator runs where: asked of the compiler itself, operator by operator, on small graphs.

An operator of ONNX's own set becomes graphs of one node (`FORMS`), and the compiler's own partitioner (`passes.split`)
says what it makes of them. Operators of other domains are those that the importer has converters for.
"""

from __future__ import annotations

import contextlib
import io
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from firsttoken_compiler.errors import FirsttokenError

NODE, FLOAT = "node", 1
QUANTISED: Final = (
    "DequantizeLinear", "DynamicQuantizeLinear", "MatMulInteger", "QLinearConv", "QLinearMatMul", "QuantizeLinear",
)  # fmt: skip
NPU, PATTERN, HOST = "NPU", "in a pattern", "host"
_X, _W, _V, _I, _K, _N, _IDS = "x", "w", "v", "i", "k", "n", "ids"
SHAPES: Final = {
    _X: (1, 4, 8), "m": (4, 8), _W: (8, 8), _V: (8,), _I: (1, 8, 6, 6), _K: (8, 8, 3, 3), _N: (1, 4, 8), _IDS: (1, 4),
}  # fmt: skip
CONSTANT: Final = (_W, _V, _K, "s", "a", "o", "f", "c")
"""What is an initialiser; the others are inputs of the graph."""
FORMS: Final = {
    "float32 rows": (_X,), "two tensors of a shape": (_X, _X), "rows and a constant vector": (_X, _V),
    "rows and two constant vectors": (_X, _V, _V), "rows and a constant matrix": (_X, _W),
    "a matrix and a constant matrix": ("m", _W),
    "a constant table and token ids": (_W, _IDS), "images": (_I,), "images and a constant kernel": (_I, _K),
    "images and four constant vectors": (_I, _V, _V, _V, _V), "images and two constant vectors": (_I, _V, _V),
    "heads of queries, keys and values": ("q", "q", "q"), "three tensors of a shape": (_X, _X, _X),
    "int64 rows": (_N,), "two int64 tensors": (_N, _N), "bool rows": ("b",),
    "two bool tensors": ("b", "b"), "a bool and two float tensors": ("b", _X, _X),
    "rows and a constant shape": (_X, "s"), "rows and a constant axis": (_X, "a"),
    "rows, constant bounds and axis": (_X, "o", "f", "a"), "rows and two constant tables of angles": (_X, "c", "c"),
}  # fmt: skip
"""Operands that a node is tried with, in this order."""
REQUIRED: Final[dict[str, Any]] = {
    "to": 1, "axis": -1, "kernel_shape": [2, 2], "size": 3, "perm": [0, 1, 2], "blocksize": 2, "direction": "LEFT",
}  # fmt: skip
"""Values of attributes that an operator must have."""
CHOSEN: Final[dict[str, dict[str, Any]]] = {
    "Attention": {"q_num_heads": 2, "kv_num_heads": 2}, "RotaryEmbedding": {"num_heads": 2},
    "Split": {"num_outputs": 2},
}  # fmt: skip
"""Further attributes, by operator."""
FITTING: Final = {"RotaryEmbedding": "rows and two constant tables of angles"}
"""The one form that an operator means, where ONNX's own checks let others through."""


@dataclass(frozen=True, slots=True)
class Operator:
    """One row of the table.

    Attributes:
        name: the operator.
        domain: empty for ONNX's own.
        versions: operator sets that changed it, among those that are read; empty where ONNX does not know it.
        types: element types of its first input, by ONNX's schema.
        runs: "NPU", "in a pattern" or "host".
        why: in which forms it runs on the NPU, or why it does not.
    """

    name: str
    domain: str
    versions: tuple[int, ...]
    types: tuple[str, ...]
    runs: str
    why: str


def operators() -> list[Operator]:
    """Every operator that the compiler knows, by domain and name."""
    from onnx import defs

    own = sorted({schema.name for schema in defs.get_all_schemas() if not schema.domain and not schema.deprecated})
    return [_own(name) for name in own] + sorted(_others(), key=lambda row: (row.domain, row.name))


def document() -> list[dict[str, Any]]:
    """The table as JSON values."""
    return [asdict(row) for row in operators()]


def page(rows: Sequence[Operator]) -> str:
    """The table as the documentation's page."""
    counts = {place: sum(row.runs == place for row in rows) for place in (NPU, HOST)}
    lines = [
        "# Operators",
        "",
        "Made by `make docs` out of `firsttoken ops`; not to be edited. Every operator was tried: a graph of one node "
        "with the operands named here, between two operators of the NPU, went through the compiler. *NPU*: with these "
        "operands the node becomes instructions, or a view that costs none. *in a pattern*: as part of a quantised "
        "product. *host*: the host computes it (`--no-fallback` makes that an error). Inside a graph an operator of "
        "the NPU still goes to the host where its operands have another form. Operators of other domains are listed "
        "with what their converter says of itself.",
        "",
        f"{counts[NPU]} operators run on the NPU in some form, {counts[HOST]} on the host alone.",
        "",
        "| operator | domain | operator sets | element types | runs on | how, or why not |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = (
            row.name, row.domain or "ai.onnx", ", ".join(map(str, row.versions)), ", ".join(row.types), row.runs,
            row.why.replace("|", "\\|"),
        )  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _own(name: str) -> Operator:
    from onnx import defs

    from firsttoken_compiler.frontend.onnx_file import MAX_OPSET, MIN_OPSET

    history = sorted(s.since_version for s in defs.get_all_schemas_with_history() if s.name == name and not s.domain)
    newest = min(MAX_OPSET, defs.onnx_opset_version())
    versions = tuple(version for version in history if MIN_OPSET < version <= newest)
    older = [version for version in history if version <= MIN_OPSET]
    schema = defs.get_schema(name, newest)
    runs, why = _tried(schema, newest)
    return Operator(name, "", (*older[-1:], *versions), _types(schema), runs, why)


def _types(schema: Any) -> tuple[str, ...]:
    """Element types of the first input, without `tensor()`."""
    listed = schema.inputs[0].types if schema.inputs else schema.outputs[0].types
    return tuple(sorted(re.sub(r"tensor\((\w+)\)", r"\1", kind) for kind in listed))


def _tried(schema: Any, version: int) -> tuple[str, str]:
    """Where nodes of an operator run, and in which forms, or why not."""
    taken, reasons = [], []
    for form, operands in FORMS.items():
        if not schema.min_input <= len(operands) <= schema.max_input or FITTING.get(schema.name, form) != form:
            continue
        model = _model(schema, version, operands)
        if model is None:
            continue
        reason = _reason(model)
        if reason is None:
            taken.append(form)
        else:
            reasons.append(reason)
    if taken:
        return NPU, "; ".join(taken)
    described = _described(schema.name)
    if schema.name in QUANTISED and described:
        return PATTERN, described
    return HOST, reasons[-1] if reasons else "none of the forms that are tried fits it"


def _model(schema: Any, version: int, operands: tuple[str, ...]) -> Any:
    """A graph of one node, or None where these operands do not fit the operator."""
    from onnx import checker, helper, numpy_helper, shape_inference

    wanted = {n: REQUIRED.get(n) for n, attribute in schema.attributes.items() if attribute.required}
    wanted |= CHOSEN.get(schema.name, {})
    if any(value is None for value in wanted.values()):
        return None
    names = [f"{kind}{index}" for index, kind in enumerate(operands)]
    results = [f"y{index}" for index in range(max(1, schema.min_output, wanted.get("num_outputs", 1)))]
    inputs, constants, nodes = [], [], []
    for index, kind in enumerate(operands):
        array, name = _array(kind), names[index]
        if kind in CONSTANT:
            constants.append(numpy_helper.from_array(array, name))
            continue
        if array.dtype == np.float32:  # made by the NPU, so that a view has something to view
            nodes.append(helper.make_node("Neg", [name], [f"{name}.made"], name=f"before{index}"))
            names[index] = f"{name}.made"
        kind_of = helper.np_dtype_to_tensor_dtype(array.dtype)
        inputs.append(helper.make_tensor_value_info(name, kind_of, array.shape))
    nodes.append(helper.make_node(schema.name, names, results, name=NODE, **wanted))
    made = [helper.make_empty_tensor_value_info(name) for name in results]
    graph = helper.make_graph(nodes, schema.name, inputs, made, constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", version)])
    try:
        inferred = shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)
        checker.check_model(inferred)
    except Exception:  # errors of the inference and the checker derive from nothing narrower
        return None
    typed = all(value.type.tensor_type.HasField("shape") for value in inferred.graph.output)
    return _followed(inferred) if typed else None


def _followed(model: Any) -> Any:
    """The graph with an operator of the NPU behind its first result, where that holds floats."""
    from onnx import helper

    output = model.graph.output[0]
    if output.type.tensor_type.elem_type == FLOAT:
        model.graph.value_info.append(output)
        model.graph.node.append(helper.make_node("Neg", [output.name], ["after"], name="after"))
        shape = [dim.dim_value for dim in output.type.tensor_type.shape.dim]
        model.graph.output[0].CopyFrom(helper.make_tensor_value_info("after", FLOAT, shape))
    return model


def _array(kind: str) -> Any:
    """What stands for an operand."""
    special = {
        "q": np.ones((1, 2, 4, 8), np.float32), "c": np.ones((1, 4, 2), np.float32),
        "b": np.ones(SHAPES[_X], np.bool_), "s": np.array(SHAPES[_X], np.int64), "a": np.array([-1], np.int64),
        "o": np.array([0], np.int64), "f": np.array([4], np.int64),
    }  # fmt: skip
    if kind in special:
        return special[kind]
    dtype = np.int64 if kind in (_N, _IDS) else np.float32
    return np.linspace(0.5, 1.5, int(np.prod(SHAPES[kind]))).reshape(SHAPES[kind]).astype(dtype)


def _reason(model: Any) -> str | None:
    """Why the node of a graph does not run on the NPU; None where it does."""
    from firsttoken_compiler.frontend.onnx_file import from_model
    from firsttoken_compiler.frontend.specialise import specialise
    from firsttoken_compiler.passes.split import split

    with _quiet():
        try:
            imported, _ = split(specialise(from_model(model, Path(), "operator")), True)
        except FirsttokenError as error:
            return " ".join(str(error).split())[:200]
    for segment in imported.segments:
        if NODE in segment.nodes:
            return segment.reason
    return None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def _others() -> Iterator[Operator]:
    """Operators of other domains, which have converters: what a converter takes, its description says."""
    from firsttoken_compiler.frontend.blocks import OPERATOR
    from firsttoken_compiler.frontend.converters import CONVERTERS
    from firsttoken_compiler.frontend.prepared import DOMAIN, SOURCE

    for name in sorted(CONVERTERS):
        domain, dot, operator = name.rpartition(".")
        domain = SOURCE if domain == DOMAIN else domain
        if dot:
            types = ("uint8",) if operator == OPERATOR else ("float", "float16")
            yield Operator(operator, domain, (1,), types, NPU, _described(name))


def _described(name: str) -> str:
    """The first line of what the operator's converter says about itself."""
    from firsttoken_compiler.frontend.converters import CONVERTERS

    text = (getattr(CONVERTERS.get(name), "__doc__", "") or "").strip().splitlines()
    return text[0] if text else ""


def main() -> None:
    """Writes the page to the file named on the command line."""
    Path(sys.argv[1]).write_text(page(operators()), encoding="utf-8")


if __name__ == "__main__":
    main()
