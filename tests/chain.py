"""Small random students and targets through the whole chain: compiled, timed, executed, and onnxruntime beside it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from harness import make_target
from hypothesis import strategies as st

from firsttoken.student import LayerConfig, StudentConfig
from firsttoken_compiler.codegen.weights import dequantise, materialise, quantise
from firsttoken_compiler.frontend.onnx_file import from_model
from firsttoken_compiler.isa.program import Program
from firsttoken_compiler.options import Precision, resolve
from firsttoken_compiler.pipeline import compile_onnx
from firsttoken_compiler.target.target import Target
from firsttoken_models.onnx_graph import build_graph
from firsttoken_models.weights import write_random_weights
from firsttoken_simulator.functional import FunctionalMachine
from firsttoken_simulator.machine import simulate_program
from firsttoken_simulator.timeline import Timeline

PAIRS = ("int8xint8", "int8xint4", "int16xint8", "int16xint4", "fp16xfp16", "fp16xint8", "fp16xint4")
MASKED = -30000.0


@dataclass
class Chain:
    """A student on a target, everything computed once when it is asked for."""

    config: StudentConfig
    tokens: int
    past: int
    precision: Precision
    target: Target
    folder: Path
    seed: int = 0

    def __post_init__(self) -> None:
        weights = write_random_weights(self.config, self.folder, self.seed)
        self.model = build_graph(self.config, tokens=self.tokens, past=self.past, weights=weights)
        self.student = from_model(self.model, self.folder, "tiny")

    @cached_property
    def program(self) -> Program:
        program = compile_onnx(self.student, self.target, self.precision)
        assert program is not None
        return program

    @cached_property
    def timeline(self) -> Timeline:
        return simulate_program(self.program, self.target)

    @cached_property
    def feeds(self) -> dict[str, np.ndarray]:
        """Random ids, and a random cache behind a causal mask."""
        r = np.random.default_rng(self.seed)
        feeds: dict[str, np.ndarray] = {
            "input_ids": r.integers(0, self.config.vocab, (1, self.tokens)),
            "position_ids": np.arange(self.past, self.past + self.tokens)[None],
        }
        if self.past:
            mask = np.triu(np.full((self.tokens, self.past + self.tokens), MASKED, np.float32), 1 + self.past)
            feeds["attention_mask"] = mask[None, None]
            for value in self.model.graph.input:
                if value.name.startswith("past_key_values"):
                    shape = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
                    feeds[value.name] = r.standard_normal(shape).astype(np.float16).astype(np.float32)
        return feeds

    def machine(self, program: Program | None = None) -> FunctionalMachine:
        """Loaded with weights, inputs and caches; of another program with the same memory map when one is given."""
        machine = FunctionalMachine(program or self.program, self.target)
        materialise(self.program, self.student.array, machine.write_bytes)
        for tensor in self.program.of_kind("input"):
            machine.write_tensor(tensor.name, self.feeds[tensor.name].reshape(tensor.shape).astype(tensor.dtype.numpy))
        for past, present in self.program.meta["kv"].items():
            tensor = self.program.tensor(present)
            cache = np.zeros(tensor.shape, tensor.dtype.numpy)
            cache[:, : self.past] = self.feeds[past][0]
            machine.write_tensor(present, cache)
        return machine

    def outputs(self, order: np.ndarray | None) -> dict[str, np.ndarray]:
        """What the program leaves in its outputs and caches."""
        machine = self.machine()
        machine.run(order)
        return {t.name: machine.read_tensor(t.name) for kind in ("output", "kv") for t in self.program.of_kind(kind)}

    def reference(self) -> dict[str, np.ndarray]:
        """onnxruntime's outputs, with weights rounded as the program's recipes round them."""
        model = onnx.ModelProto()
        model.CopyFrom(self.model)
        rounded = {}
        for tensor in self.program.tensors:
            packing = tensor.packing
            if packing is not None and packing.form == "panels" and packing.bits != 16:
                array = np.asarray(self.student.array(packing.source), np.float32)
                matrix = array.T if packing.transposed else array
                matrix = dequantise(*quantise(matrix, packing.bits, packing.group), packing.group)
                rounded[packing.source] = np.ascontiguousarray(matrix.T if packing.transposed else matrix)
        for node in model.graph.node:
            for index, name in enumerate(node.input):
                if name in rounded and node.op_type != "Gather":  # a tied embedding is looked up as it is
                    node.input[index] = f"{name}.rounded"
        for name, values in rounded.items():
            model.graph.initializer.append(onnx.numpy_helper.from_array(values, f"{name}.rounded"))
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 4
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(self.folder))
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        names = [output.name for output in session.get_outputs()]
        return dict(zip(names, session.run(names, self.feeds), strict=True))


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    x, y = a.astype(np.float64).ravel(), b.astype(np.float64).ravel()
    return float(x @ y / max(1e-300, np.linalg.norm(x) * np.linalg.norm(y)))


def onnx_macs(model: onnx.ModelProto) -> int:
    """Multiply-accumulates of a graph's MatMul, Gemm and Attention nodes, from its inferred shapes."""
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True).graph
    shapes = {
        value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in (*inferred.value_info, *inferred.input, *inferred.output)
    }
    shapes |= {initialiser.name: list(initialiser.dims) for initialiser in inferred.initializer}
    total = 0
    for node in inferred.node:
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        if node.op_type == "MatMul":
            total += math.prod(shapes[node.input[0]]) * shapes[node.input[1]][-1]
        elif node.op_type == "Gemm":
            columns = shapes[node.input[1]][0 if attributes.get("transB") else 1]
            total += math.prod(shapes[node.input[0]]) * columns
        elif node.op_type == "Attention":
            batch, tokens, features = shapes[node.input[0]]
            keys = shapes[node.output[1]][2] if len(node.output) > 1 and node.output[1] else shapes[node.input[1]][1]
            total += 2 * batch * tokens * features * keys
    return total


@st.composite
def students(draw: st.DrawFn) -> StudentConfig:
    """One or two layers, widths that divide by nothing, grouped heads, layers that differ, both families."""
    head_dim = 2 * draw(st.integers(1, 12))

    def layer() -> LayerConfig:
        kv_heads = draw(st.integers(1, 3))
        return LayerConfig(kv_heads * draw(st.integers(1, 3)), kv_heads, draw(st.integers(1, 150)))

    first = layer()
    layers = draw(st.integers(1, 2))
    uneven = layers == 2 and draw(st.booleans())
    qwen = draw(st.booleans())
    return StudentConfig(
        name="random", family="qwen2" if qwen else "llama", hidden=draw(st.integers(2, 100)),
        intermediate=first.intermediate, layers=layers, heads=first.heads, kv_heads=first.kv_heads, head_dim=head_dim,
        vocab=draw(st.integers(2, 150)), rope_theta=1e4, max_positions=64, rms_eps=1e-5,
        tie_embeddings=draw(st.booleans()), qkv_bias=qwen, source="made up for tests",
        per_layer=(first, layer()) if uneven else (),
    )  # fmt: skip


PRECISIONS = st.sampled_from(
    [
        resolve("fp16", None, "128", None), resolve("fp16", None, "128", "off"),
        resolve("int8", None, "channel", None), resolve("int8", "int16", "32", "int8"),
        resolve("int8", "fp16", "32", None),
        resolve("int4", None, "32", None), resolve("int4", "int16", "64", "off"), resolve("int4", "fp16", "32", "fp16"),
        resolve("int4", "int8", "128", "int16"), resolve("int4", "int8", "channel", "off"),
    ]
)  # fmt: skip


@st.composite
def targets(draw: st.DrawFn, smallest: int = 24 << 10) -> Target:
    """Arrays of odd sizes with and without double buffering, tile units, little scratchpad, 1 to 8 channels."""
    rows, columns = draw(st.integers(4, 40)), draw(st.integers(4, 40))
    kind = draw(st.sampled_from(["ws", "ws-double", "os", "tile"]))
    tile_m = draw(st.integers(1, 16)) if kind == "tile" else 0
    most = rows * columns * max(1, tile_m)
    rates = {pair: max(1, most // draw(st.sampled_from([1, 2, 3]))) for pair in PAIRS}
    target = make_target(
        name="random", matrix_kind="tile" if kind == "tile" else "systolic", matrix_rows=rows, matrix_columns=columns,
        matrix_tile_m=tile_m, matrix_dataflow=kind.removesuffix("-double"), matrix_double_buffered=kind == "ws-double",
        matrix_macs_per_cycle=rates, matrix_fill_cycles=draw(st.integers(0, 20)) if kind == "tile" else 0,
        vector_lanes=draw(st.sampled_from([8, 24, 64])), vector_contexts=draw(st.integers(1, 4)),
        scratchpad_bytes=draw(st.one_of(st.integers(smallest, 256 << 10), st.integers(smallest, 4 << 20))) // 64 * 64,
        scratchpad_banks=draw(st.sampled_from([4, 16, 32])), scratchpad_bank_bytes=draw(st.sampled_from([16, 32, 64])),
        scratchpad_accumulator_bytes=draw(st.integers(16 << 10, 256 << 10)) // 64 * 64,
        dma_outstanding=draw(st.sampled_from([8, 64])), dram_channels=draw(st.integers(1, 8)),
        dram_map=draw(st.sampled_from(["bank-interleaved", "row-linear", "group-interleaved"])),
    )  # fmt: skip
    return replace(target, energy=replace(target.energy, mac_pj={pair: 0.5 + i for i, pair in enumerate(PAIRS)}))


@st.composite
def drawn(draw: st.DrawFn) -> dict[str, Any]:
    """Everything that a `Chain` needs but its folder."""
    return {
        "config": draw(students()), "tokens": draw(st.one_of(st.just(1), st.integers(1, 40))),
        "past": draw(st.one_of(st.just(0), st.integers(0, 20))), "precision": draw(PRECISIONS),
        "target": draw(targets()), "seed": draw(st.integers(0, 99)),
    }  # fmt: skip
