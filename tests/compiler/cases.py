"""Students small enough to run through onnxruntime and the interpreter, and the exports of torch."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from hypothesis import strategies as st
from numpy.typing import NDArray

from firsttoken.student import LayerConfig, StudentConfig
from firsttoken_compiler.frontend.importer import Imported, import_onnx
from firsttoken_compiler.frontend.onnx_file import OnnxStudent, from_model, open_student
from firsttoken_models.onnx_graph import build_graph
from firsttoken_models.weights import write_random_weights

Array = NDArray[Any]
TORCH = sorted((Path(__file__).resolve().parents[1] / "fixtures" / "torch").glob("*.onnx"))
TINY = StudentConfig(
    name="tiny", family="qwen2", hidden=48, intermediate=80, layers=2, heads=4, kv_heads=2, head_dim=16, vocab=96,
    rope_theta=1e4, max_positions=64, rms_eps=1e-6, tie_embeddings=False, qkv_bias=True, source="made up for tests",
)  # fmt: skip


@dataclass
class Case:
    """An imported student with inputs and what onnxruntime says of them, by output name."""

    imported: Imported
    feeds: dict[str, NDArray[Any]]
    expected: dict[str, NDArray[Any]]


def torch_case(path: Path, seed: int = 0) -> Case:
    """One of torch's exports on random ids."""
    ids = np.random.default_rng(seed).integers(0, 128, (1, 16))
    return case(onnx.load(path), path.parent, {"input_ids": ids})


def built_case(config: StudentConfig, folder: Path, *, tokens: int, past: int, seed: int = 0) -> Case:
    """A student of the models room with random weights; with `past`, a random cache of which some rows are masked."""
    generator = np.random.default_rng(seed)
    model = build_graph(config, tokens=tokens, past=past, weights=write_random_weights(config, folder, seed))
    feeds: dict[str, NDArray[Any]] = {
        "input_ids": generator.integers(0, config.vocab, (1, tokens)),
        "position_ids": np.arange(past, past + tokens)[None],
    }
    if past:
        mask = np.triu(np.full((tokens, past + tokens), -30000.0, np.float32), 1 + past)
        mask[:, : generator.integers(0, past)] = -30000.0
        feeds["attention_mask"] = mask[None, None]
        for value in model.graph.input:
            if value.name.startswith("past_key_values"):
                shape = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
                feeds[value.name] = generator.standard_normal(shape).astype(np.float32)
    return case(model, folder, feeds)


def case(model: onnx.ModelProto, folder: Path, feeds: dict[str, NDArray[Any]]) -> Case:
    """Imports a model and runs it in onnxruntime beside its weights."""
    return Case(import_onnx(from_model(model, folder, "tiny")), feeds, run(model, folder, feeds))


def run(model: onnx.ModelProto, folder: Path, feeds: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """onnxruntime's outputs by name."""
    session = session_of(model.SerializeToString(), folder)
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds), strict=True))


def session_of(model: bytes, folder: Path = Path()) -> Any:
    """A session of onnxruntime on one thread, beside the weights in `folder`."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def imported_file(path: Path) -> Imported:
    """A file opened and imported as the command line does it."""
    return import_onnx(open_student(path))


@st.composite
def configs(draw: st.DrawFn) -> StudentConfig:
    """Any student: widths that divide by nothing, grouped heads, one head, layers that differ."""

    def layer() -> LayerConfig:
        kv_heads = draw(st.integers(1, 3))
        return LayerConfig(kv_heads * draw(st.integers(1, 3)), kv_heads, draw(st.integers(1, 70)))

    layers = [layer() for _ in range(draw(st.integers(1, 3)))]
    return StudentConfig(
        name="random", family="qwen2", hidden=draw(st.integers(1, 40)), intermediate=layers[0].intermediate,
        layers=len(layers), heads=layers[0].heads, kv_heads=layers[0].kv_heads, head_dim=2 * draw(st.integers(1, 12)),
        vocab=draw(st.integers(1, 90)), rope_theta=1e4, max_positions=64, rms_eps=draw(st.sampled_from([1e-6, 1e-5])),
        tie_embeddings=draw(st.booleans()), qkv_bias=draw(st.booleans()), source="made up for tests",
        per_layer=tuple(layers),
    )  # fmt: skip


def written(signature: str, body: str, opset: int = 18, **arrays: NDArray[Any]) -> onnx.ModelProto:
    """A model in ONNX's text form, with these initialisers: `(float[1,4,8] x) => (float[1,4,8] y)` and its nodes."""
    text = f'<ir_version: 10, opset_import: ["" : {opset}]> written {signature} {{ {body} }}'
    model = onnx.parser.parse_model(text)
    model.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in arrays.items())
    return model


def whole(student: OnnxStudent) -> onnx.ModelProto:
    """The student's model with its initialisers in it."""
    model = onnx.ModelProto()
    model.CopyFrom(student.model)
    for name in student.initializers:
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(student.array(name)), name))
    return model


def written_case(model: onnx.ModelProto, seed: int = 0, ids: int = 8) -> Case:
    """A written model on random inputs: floats of variance 1, ids below `ids`."""
    generator = np.random.default_rng(seed)
    feeds: dict[str, NDArray[Any]] = {}
    for value in model.graph.input:
        shape = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        if value.type.tensor_type.elem_type == onnx.TensorProto.INT64:
            feeds[value.name] = generator.integers(0, ids, shape)
        else:
            feeds[value.name] = generator.standard_normal(shape).astype(np.float32)
    return case(model, Path(), feeds)


def random(*shape: int, seed: int = 1) -> NDArray[np.float32]:
    """A weight of variance 1/K."""
    values = np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)
    return values * np.float32(shape[0] ** -0.5)
