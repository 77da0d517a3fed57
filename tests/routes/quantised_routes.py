"""Routes of onnxruntime.quantization on torch's exports."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
import students
import torch
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantFormat,
    QuantType,
    quantize_dynamic,
    quantize_static,
)
from students import FORMS, Student
from zoo import Meta, save

TYPES: Final = {
    "int8": QuantType.QInt8, "uint8": QuantType.QUInt8, "int16": QuantType.QInt16, "uint16": QuantType.QUInt16
}  # fmt: skip
FORMATS: Final = {"qdq": QuantFormat.QDQ, "qoperator": QuantFormat.QOperator}


def base(family: str, opset: int, **shape: Any) -> onnx.ModelProto:
    """A prefill without mask and with static shapes."""
    model = students.random_model(family, "eager", **shape)
    form = FORMS["plain"]
    program = torch.onnx.export(
        Student(model, form).eval(), (), kwargs=students.example(model, form), dynamo=True, opset_version=opset,
        input_names=["input_ids"], output_names=["logits"], external_data=False, verbose=False,
    )  # fmt: skip
    return program.model_proto


def prompts(count: int) -> list[dict[str, np.ndarray]]:
    """Calibration prompts; the first is the one that is checked."""
    steps = np.arange(students.PROMPT, dtype=np.int64)[None]
    return [{"input_ids": (steps * (37 + 2 * i) + 3 * (i + 1)) % students.SHAPE["vocab_size"]} for i in range(count)]


class Prompts(CalibrationDataReader):
    """Calibration data."""

    def __init__(self) -> None:
        self._left = iter(prompts(4))

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self._left, None)


def dynamic(folder: Path, family: str, opset: int, weights: str, channels: bool) -> None:
    """DynamicQuantizeLinear and MatMulInteger."""
    with tempfile.TemporaryDirectory() as work:
        source, target = Path(work) / "float.onnx", Path(work) / "quantised.onnx"
        onnx.save(base(family, opset), str(source))
        quantize_dynamic(source, target, per_channel=channels, weight_type=TYPES[weights])
        model = onnx.load(target)
    meta = Meta(folder.name, f"quantize_dynamic, {weights} weights, per channel {channels}, {family}", weights,
                max_rel=5e-2, cosine=0.998)  # fmt: skip
    save(folder, model, prompts(1)[0], meta)


def static(folder: Path, family: str, opset: int, form: str, activations: str, weights: str, channels: bool) -> None:
    """QuantizeLinear and DequantizeLinear around every operator, or QLinear operators."""
    with tempfile.TemporaryDirectory() as work:
        source, target = Path(work) / "float.onnx", Path(work) / "quantised.onnx"
        onnx.save(base(family, opset), str(source))
        quantize_static(
            source, target, Prompts(), quant_format=FORMATS[form], per_channel=channels,
            activation_type=TYPES[activations], weight_type=TYPES[weights], calibrate_method=CalibrationMethod.MinMax,
            extra_options={"ActivationSymmetric": activations == "int16"},
        )  # fmt: skip
        model = onnx.load(target)
    meta = Meta(
        folder.name, f"quantize_static {form}, {activations} activations, {weights} weights, per channel {channels}, "
        f"{family}", weights, max_rel=3e-2, cosine=0.999,
        notes="one activation level of 8 bits that rounds the other way is a large part of the range",
    )  # fmt: skip
    save(folder, model, prompts(1)[0], meta)


def nbits(
    folder: Path, family: str, form: str, block: int, symmetric: bool, bits: int = 4, gather: bool = False
) -> None:
    """MatMulNBits, or DequantizeLinear of blocked int4 weights (opset 21)."""
    from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, MatMulNBitsQuantizer

    shape = {"hidden_size": block, "intermediate_size": 2 * block} if block >= 128 else {}
    config = DefaultWeightOnlyQuantConfig(
        block_size=block, is_symmetric=symmetric, accuracy_level=0, quant_format=FORMATS[form], bits=bits,
        op_types_to_quantize=("MatMul", "Gather") if gather else ("MatMul",),
    )  # fmt: skip
    quantiser = MatMulNBitsQuantizer(base(family, 21, **shape), algo_config=config)
    quantiser.process()
    kind = "symmetric" if symmetric else "with zero points"
    meta = Meta(folder.name, f"MatMulNBitsQuantizer {form}, {bits} bits, block {block}, {kind}, {family}", f"int{bits}")
    save(folder, quantiser.model.model, prompts(1)[0], meta)


def vision_static(folder: Path, form: str) -> None:
    """The network shaped like ResNet-50 with QDQ or QLinearConv."""
    import vision_routes

    model = vision_routes.random_resnet()
    images = [torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(seed)) for seed in (3, 4, 5)]
    graph = vision_routes.exported(model, images[0], "dynamo", 18)

    class Images(CalibrationDataReader):
        def __init__(self) -> None:
            self._left = iter([{"pixel_values": image.numpy()} for image in images])

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self._left, None)

    with tempfile.TemporaryDirectory() as work:
        source, target = Path(work) / "float.onnx", Path(work) / "quantised.onnx"
        onnx.save(graph, str(source))
        quantize_static(source, target, Images(), quant_format=FORMATS[form], per_channel=True)
        quantised = onnx.load(target)
    meta = Meta(folder.name, f"quantize_static {form}, a network shaped like ResNet-50", "int8", max_rel=3e-2,
                cosine=0.999)  # fmt: skip
    save(folder, quantised, {"pixel_values": images[0].numpy()}, meta)
