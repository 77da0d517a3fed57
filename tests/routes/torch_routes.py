"""Routes of torch.onnx.export: the dynamo exporter and TorchScript."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import students
import torch
from students import FORMS, Form, Student
from zoo import Meta, save, widened

ONNX_DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


def dynamo(
    folder: Path, family: str, opset: int, dtype: str, form: str, shapes: str, attention: str, size: str = "tiny"
) -> None:
    """`shapes`: static, dynamic (named dims), or auto (dims that torch names by itself, unrelated per tensor)."""
    shape = FORMS[form]
    model = students.random_model(family, attention, dtype, **students.SIZES[size])
    inputs = students.example(model, shape)
    input_names, output_names = students.names(model, shape)
    program = torch.onnx.export(
        Student(model, shape).eval(), (), kwargs=inputs, dynamo=True, opset_version=opset, input_names=input_names,
        output_names=output_names, dynamic_shapes=_dynamic(inputs, shape, shapes), external_data=False, verbose=False,
    )  # fmt: skip
    finish(folder, program.model_proto, input_names, inputs, Meta(
        folder.name, f"torch.onnx.export(dynamo=True), {family}, {form}, {shapes} shapes, {attention} attention",
        ONNX_DTYPES[dtype],
    ), shape, static=shapes == "static", external=size != "tiny")  # fmt: skip


def _dynamic(inputs: dict[str, Any], form: Form, shapes: str) -> Any:
    if shapes == "static":
        return None
    if shapes == "auto":
        every = torch.export.Dim.DYNAMIC
        return {
            name: [{2: every} for _ in value] if isinstance(value, list) else {1: every}
            for name, value in inputs.items()
        }
    batch, tokens = "batch", "sequence_length"
    found: dict[str, Any] = {}
    for name, value in inputs.items():
        if isinstance(value, list):
            found[name] = [{0: batch, 2: "past_sequence_length"} for _ in value]
        elif name == "attention_mask" and form.past:
            found[name] = {0: batch, 1: "total_sequence_length"}
        else:
            found[name] = {0: batch} if form.past else {0: batch, 1: tokens}
    return found


def torchscript(
    folder: Path, family: str, opset: int, dtype: str, form: str, shapes: str, attention: str, size: str = "tiny"
) -> None:
    """The exporter that traces."""
    shape = FORMS[form]
    model = students.random_model(family, attention, dtype, **students.SIZES[size])
    inputs = students.example(model, shape)
    input_names, output_names = students.names(model, shape)
    axes: dict[str, dict[int, str]] = {}
    if shapes == "dynamic":
        for name in (*input_names, *output_names):
            past = name.startswith(("past_key_values", "present"))
            axes[name] = {0: "batch", 2: "past_sequence"} if past else {0: "batch", 1: "sequence"}
        if shape.additive:
            axes["attention_mask"] = {0: "batch", 2: "sequence", 3: "sequence"}
        if shape.past:
            axes["attention_mask"] = {0: "batch", 1: "total_sequence"}
    target = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            Traced(Student(model, shape)).eval(), tuple(students.flat(inputs)), target, dynamo=False,
            opset_version=opset, input_names=input_names, output_names=output_names, dynamic_axes=axes,
        )  # fmt: skip
    finish(folder, onnx.load_from_string(target.getvalue()), input_names, inputs, Meta(
        folder.name, f"torch.onnx.export(dynamo=False), {family}, {form}, {shapes} shapes, {attention} attention",
        ONNX_DTYPES[dtype],
    ), shape, static=shapes == "static", external=size != "tiny")  # fmt: skip


class Traced(torch.nn.Module):
    """TorchScript wants positional tensors."""

    def __init__(self, student: Student) -> None:
        super().__init__()
        self.student = student

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        form, rest = self.student.form, list(tensors)
        ids = rest.pop(0)
        mask = rest.pop(0) if form.mask else None
        positions = rest.pop(0) if form.positions else None
        return self.student(ids, mask, positions, rest if form.past else None)


def finish(
    folder: Path, model: onnx.ModelProto, input_names: list[str], inputs: dict[str, Any], meta: Meta, form: Form,
    *, static: bool, external: bool = False,
) -> None:  # fmt: skip
    """Stores the export with its inputs."""
    arrays: dict[str, np.ndarray] = {}
    for name, value in zip(input_names, students.flat(inputs), strict=True):
        wide = meta.dtype == "bfloat16" and value.is_floating_point()
        arrays[name] = (value.float() if wide else value).numpy()
    meta.prompt = None if static else inputs["input_ids"].shape[1]
    meta.past = students.PAST if form.past and not static else None
    reference = widened(model) if meta.dtype == "bfloat16" else None
    save(folder, model, arrays, meta, reference=reference, external=external)
