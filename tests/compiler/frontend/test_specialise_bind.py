"""Values of open dimensions: by name, by place, by sums, by what the graph implies; and what stays open is listed."""

from pathlib import Path

import numpy as np
import pytest
from cases import written
from onnx import TensorProto, helper

from firsttoken_compiler.errors import OptionError
from firsttoken_compiler.frontend.bind import bind_dims, bound, parse_bindings, symbols
from firsttoken_compiler.frontend.onnx_file import OnnxStudent, from_model, open_student

Dim = int | str | None
ROUTES = Path(__file__).parents[2] / "fixtures" / "routes"


def student_of(inputs: dict[str, tuple[Dim, ...]]) -> OnnxStudent:
    """A graph with these inputs, of which it returns the first."""
    infos = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in inputs.items()]
    first = infos[0].name
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)]
    graph = helper.make_graph([helper.make_node("Relu", [first], ["y"])], "g", infos, outputs)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    return from_model(model, Path(), "s")


KEY = "past_key_values.0.key"


@pytest.mark.parametrize(
    ("inputs", "expected"),
    [
        ({"input_ids": ("batch_size", "sequence_length")}, {"batch_size": 1, "sequence_length": 7}),
        ({"input_ids": ("b", "seq")}, {"b": 1, "seq": 7}),
        ({"input_ids": ("s77", "s12")}, {"s77": 1, "s12": 7}),
        ({"input_ids": (None, None)}, {"input_ids[0]": 1, "input_ids[1]": 7}),
        ({"input_ids": (1, "s70"), "attention_mask": (1, "s53"), KEY: (1, 2, "s15", 16),
          "past_value": (1, 2, "s89", 16)},
         {"s70": 7, "s53": 12, "s15": 5, "s89": 5}),
        ({"input_ids": ("batch", "sequence"), "attention_mask": ("batch", "total_sequence")},
         {"batch": 1, "sequence": 7, "total_sequence": 12}),
        ({"input_ids": ("batch", "sequence"), KEY: ("batch", 2, "past_sequence", 8),
          "attention_mask": ("batch", "past_sequence + sequence")},
         {"batch": 1, "sequence": 7, "past_sequence": 5, "past_sequence + sequence": 12}),
        ({"input_ids": (1, 1), KEY: (1, 2, "past_len", 8), "attention_mask": (1, "past_len + 1")},
         {"past_len": 5, "past_len + 1": 6}),
        ({"input_ids": (1, 1), "attention_mask": (1, "past_sequence_length + 1")}, {"past_sequence_length + 1": 12}),
        ({"attention_mask": ("n0", "n1", "n2", "n3")}, {"n0": 1, "n1": 1, "n2": 7, "n3": 12}),
        ({"cache_position": ("q",)}, {"q": 7}),
        ({"inputs_embeds": ("x0", "x1", 64)}, {"x0": 1, "x1": 7}),
        ({"tokens": ("T",)}, {"T": 7}),
        ({"pixel_values": ("images", "c", 32, 32)}, {"images": 1, "c": 3}),
        ({"past_0": (2, "k0", 4, "k1", 8)}, {"k0": 1, "k1": 5}),
        ({"audio": ("num_tokens", 80)}, {"num_tokens": 7}),
        ({"audio": ("max_length", 80)}, {"max_length": 7}),
        ({"x": (3, 4)}, {}),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else None,
)  # fmt: skip
def test_names_places_and_sums(inputs: dict[str, tuple[Dim, ...]], expected: dict[str, int]) -> None:
    student = student_of(inputs)
    bindings = bind_dims(student, prompt=7, past=5)
    assert bindings == expected
    static = bound(student, bindings)
    assert not symbols(static)
    for value, shape in zip(static.graph.input, inputs.values(), strict=True):
        found = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        assert found == [
            extent if isinstance(extent, int) else bindings[extent or f"{value.name}[{axis}]"]
            for axis, extent in enumerate(shape)
        ]
    assert bound(static, bindings) is static


def test_what_is_given_comes_first_and_moves_the_sums() -> None:
    student = student_of({"input_ids": ("batch", "seq"), "mask": ("batch", "2*seq - batch")})
    bindings = bind_dims(student, prompt=7, past=5, bind={"seq": 9})
    assert bindings == {"batch": 1, "seq": 9, "2*seq - batch": 17}
    assert bind_dims(student, prompt=7, past=5, bind={"2*seq - batch": 4})["2*seq - batch"] == 4


def test_what_stays_open_is_listed_with_its_inputs() -> None:
    student = student_of({"input_ids": ("batch", "seq"), "a": ("rows", 4), "b": ("columns", "rows", None)})
    with pytest.raises(OptionError) as refusal:
        bind_dims(student, prompt=7, past=0)
    assert str(refusal.value) == (
        "s: 3 dimensions of the inputs have no value:\n  'rows' of 'a', 'b'\n  'columns' of 'b'\n  'b[2]' of 'b'\n"
        "  remedy: give each one, such as --bind rows=64"
    )
    full = bind_dims(student, prompt=7, past=0, bind={"rows": 2, "columns": 3, "b[2]": 4})
    assert full == {"rows": 2, "columns": 3, "b[2]": 4, "batch": 1, "seq": 7}


@pytest.mark.parametrize(
    ("bind", "message"),
    [
        ({"row": 3}, r"--bind 'row': s has no such dimension, its open dimensions are 'batch', 'rows'"),
        ({"rows": -1}, r"--bind rows=-1: a dimension is between 0 and 1048576"),
        ({"rows": 1 << 40}, r"--bind rows=1099511627776: a dimension is between 0 and 1048576"),
    ],
)
def test_bindings_that_do_not_fit(bind: dict[str, int], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        bind_dims(student_of({"x": ("batch", "rows")}), prompt=1, past=0, bind=bind)


def test_a_static_file_has_nothing_to_bind() -> None:
    with pytest.raises(OptionError, match="s has no such dimension, all its shapes are static"):
        bind_dims(student_of({"x": (1, 2)}), prompt=1, past=0, bind={"batch": 1})


def test_a_negative_sum_is_an_error() -> None:
    student = student_of({"input_ids": ("batch", "seq"), "m": ("seq - 9", "batch")})
    with pytest.raises(OptionError, match=r"the dimension 'seq - 9' is -2 with these lengths; it must be 0 to 1048576"):
        bind_dims(student, prompt=7, past=0)


@pytest.mark.parametrize(
    "name", ["__import__('os')", "a if b else c", "f(seq)", "seq.__class__", "((((((", "seq + unknown"]
)
def test_other_texts_are_only_names(name: str) -> None:
    student = student_of({"input_ids": ("batch", "seq"), "m": (name, "batch")})
    bindings = bind_dims(student, prompt=7, past=0, bind={name: 3})
    assert bindings == {"batch": 1, "seq": 7, name: 3}


def test_texts_of_the_command_line() -> None:
    assert parse_bindings(["a=1", "b + c=12", "x[0]=3", "a=1"]) == {"a": 1, "b + c": 12, "x[0]": 3}
    for text in ("a", "=1", "a=", "a=-1", "a=x", "a=1.5", "a=\N{SUPERSCRIPT TWO}"):
        with pytest.raises(OptionError, match=r"write NAME=VALUE with a whole number"):
            parse_bindings([text])
    with pytest.raises(OptionError, match="gives 'a' both 1 and 2"):
        parse_bindings(["a=1", "a=2"])


@pytest.mark.parametrize("route", ["genai-qwen2-fp16-decode", "genai-llama-int4-prefill"])
def test_the_width_of_a_head_follows_from_the_graph(route: str) -> None:
    student = open_student(ROUTES / route / "model.onnx")
    bindings = bind_dims(student, prompt=3, past=4)
    assert bindings["kv_cache_dim"] == 16
    assert bindings["total_sequence_length"] == 7


def test_a_cache_that_is_appended_to_implies_the_rest_of_its_shape() -> None:
    model = written(
        "(float[1,s,2,8] k, float[1,heads,past,width] past_key) => (float[1,h,t,w] present)",
        "t = Transpose<perm=[0,2,1,3]>(k) present = Concat<axis=2>(past_key, t)",
    )
    bindings = bind_dims(from_model(model, Path(), "s"), prompt=3, past=4, bind={"s": 3})
    assert bindings == {"s": 3, "past": 4, "heads": 2, "width": 8}


def test_weights_that_are_listed_as_inputs_have_no_dimensions() -> None:
    model = written("(float[1,n] x, float[n,n] w) => (float[1,n] y)", "y = MatMul(x, w)", w=np.eye(4, dtype=np.float32))
    found = symbols(from_model(model, Path(), "s"))
    assert {name: symbol.places for name, symbol in found.items()} == {"n": (("x", 1, 2),)}
