"""Operators of a program: names a reader knows from the model, dimensions, and multiply-accumulates."""

from __future__ import annotations

from firsttoken_compiler.frontend.importer import Imported, onnx_dtype
from firsttoken_compiler.frontend.partition import Segment
from firsttoken_compiler.frontend.values import value_types
from firsttoken_compiler.frontend.widen import declared_types
from firsttoken_compiler.isa.program import OpInfo
from firsttoken_compiler.passes.lower import Launch, Launches
from firsttoken_compiler.schedule.normed import product_of
from firsttoken_compiler.schedule.spec import KernelSpec

_OWN_NAME = ("linear", "normed", "conv", "rms_norm", "layer_norm", "gather", "row", "columns", "add")
"""Kinds that the module's path names well enough."""
PRODUCTS = ("linear", "normed", "conv")
"""Kinds of products with weights."""


class OperatorNames:
    """Names launches after the ONNX nodes behind them; every name once."""

    def __init__(self, nodes: dict[str, tuple[str, ...]]) -> None:
        self._nodes = nodes
        self._used: dict[str, int] = {}

    def describe(self, launch: Launch, tile: str, first: int, last: int) -> OpInfo:
        """The operator of a launch whose instructions are `[first, last)`."""
        nodes = self._nodes.get(launch.label, ())
        spec = launch.spec
        path = launch.title or (module_path(nodes[0]) if nodes else spec.kind)
        name = self._unique(path if spec.kind in _OWN_NAME else f"{path}.{spec.kind}")
        m, n, k, batch = dimensions(spec)
        of = product_of(spec) if spec.kind == "normed" else spec
        w_bits = weight_bits(of)
        return OpInfo(
            name=name, kind=spec.kind, onnx_nodes=nodes, module=path.rpartition(".")[0] if nodes else "", first=first,
            last=last, m=m, n=n, k=k, batch=batch, w_bits=w_bits, a_bits=of.args[0].dtype.bits, macs=macs(spec),
            tile=tile,
        )  # fmt: skip


    def describe_host(self, segment: Segment, first: int, last: int) -> OpInfo:
        """The operator of a call of the host; nodes that only look at its results in another way are its own too."""
        behind = next((nodes for nodes in self._nodes.values() if segment.name in nodes), ())
        nodes = (*segment.nodes, *(node for node in behind if node != segment.name))
        path = module_path(nodes[0])
        name = self._unique(f"{path}.host")
        return OpInfo(name, "host", nodes, path.rpartition(".")[0], first, last)

    def _unique(self, name: str) -> str:
        self._used[name] = self._used.get(name, 0) + 1
        return f"{name}#{self._used[name]}" if self._used[name] > 1 else name


def module_path(node: str) -> str:
    """`/model/layers.3/mlp/gate_proj/MatMul` → `layers.3.mlp.gate_proj`; other names stay as they are."""
    parts = [part for part in node.split("/") if part]
    if len(parts) < 2:
        return node
    if parts[0] == "model":
        parts = parts[1:]
    return ".".join(parts[:-1]) or parts[-1]


def weight_bits(spec: KernelSpec) -> int:
    """Bits of an element of the second factor of a product: of blocks, those of their codes."""
    if spec.get("blocks"):
        return int(spec["bits"])
    return spec.args[1].dtype.bits if spec.kind in ("linear", "conv", "attention") else 0


def dimensions(spec: KernelSpec) -> tuple[int, int, int, int]:
    """(m, n, k, batch) of a product, scores of an attention, or rows and columns of anything else."""
    rows = spec.args[0].shape[0]
    if spec.kind in PRODUCTS:
        return spec.rows, int(spec["n"]), int(spec["k"]), 1
    if spec.kind == "attention":
        heads = int(spec["heads"])
        keys = spec.args[1].shape
        return rows, keys[1] if len(keys) == 3 else keys[0], spec.args[0].shape[1] // heads, heads
    return spec.outs[0].shape[0], spec.outs[0].shape[-1], 0, 1


def macs(spec: KernelSpec) -> int:
    """Multiply-accumulates that the ONNX operators define: m n k, twice over all heads for an attention."""
    m, n, k, batch = dimensions(spec)
    if spec.kind in PRODUCTS:
        return m * n * k
    return 2 * batch * m * n * k if spec.kind == "attention" else 0


def signature(imported: Imported) -> dict[str, dict[str, tuple[str, list[int]]]]:
    """Numpy type and shape of the ONNX graph's inputs and outputs by name, as a program's `meta` keeps them."""
    types, declared = value_types(imported.student), declared_types(imported.student)
    names = {"inputs": imported.inputs, "outputs": [value.name for value in imported.student.graph.output]}
    return {
        side: {
            name: (_returned(declared[name], name), list(types[name].shape))
            for name in listed
            if name in types
        }
        for side, listed in names.items()
    }


def _returned(elem_type: int, name: str) -> str:
    """Numpy has no bfloat16: such values are given and returned as float32."""
    found = str(onnx_dtype(elem_type, name).name)
    return "float32" if found == "bfloat16" else found


def stored_lines(launches: Launches) -> list[str]:
    """A line per type of stored weights: how many products read it, with what activations."""
    kinds: dict[str, int] = {}
    for launch in launches.launches:
        spec = launch.spec
        if spec.kind == "linear" and spec.get("stored"):
            group = int(spec["group"])
            scales = f"blocks of {group}" if group < int(spec["k"]) else "a scale per column"
            zeros = " with zero points" if spec.get("zeros") else ""
            stored = str(spec.get("blocks") or f"int{spec['bits']} ({scales}{zeros})")
            kind = f"{stored} with {spec['acts']} activations"
            kinds[kind] = kinds.get(kind, 0) + 1
    return [f"{count} products as the graph stores their weights: {kind}" for kind, count in kinds.items()]
