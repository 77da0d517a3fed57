"""The cases of ONNX's backend test suite that ship with the package, and what one of them comes to here."""

from __future__ import annotations

import glob
import os
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

PRODUCT_RTOL: Final = 2e-3
"""Beside a test's own tolerance, of the largest magnitude of the result: what rounding the operands of products to
float16 (11 bits each) may move a sum by. Only where a product ran on the matrix unit."""
INTERNAL: Final = re.compile(r"internal: |the program breaks \d+ rule")
"""Errors that say that the compiler is wrong, not the input."""
TRANSFORM_ATOL: Final = 1e-6
"""The same for DFT and STFT, whose exact zeros come out of float32 sums; the suite's data were made in float64."""
TRANSFORMS: Final = re.compile(r"test_(dft|stft)")
RANDOM: Final = re.compile(r"test_(bernoulli|training_dropout_(default|default_mask|mask)$|training_dropout$)")
"""Results drawn at random: only their shapes and types can be compared."""
STATUSES: Final = ("NPU", "NPU + host", "host", "folded", "not supported", "failed", "crashed")
PASSED: Final = STATUSES[:4]
KINDS: Final = ("node", "simple", "pytorch-converted", "pytorch-operator", "light")


@dataclass(frozen=True)
class Outcome:
    """What became of a case: one of `STATUSES`, and the reason or error in one line."""

    status: str
    detail: str = ""
    seconds: float = 0.0


@dataclass(frozen=True)
class Case:
    """A test: its model and where its data come from."""

    name: str
    kind: str
    rtol: float
    atol: float
    source: Any

    def model(self) -> Any:
        """The ModelProto."""
        import onnx

        if self.source.model is not None:
            return self.source.model
        return onnx.load(str(self._path()))

    def data(self, model: Any) -> list[tuple[list[Any], list[Any]]]:
        """(inputs, expected outputs) of every data set."""
        if self.source.data_sets is not None:
            return [([_array(a) for a in i], [_array(a) for a in o]) for i, o in self.source.data_sets]
        if self.kind == "light":
            return [(_ramps(model), _stored(str(self._path().with_suffix("")) + "_output_", model.graph.output))]
        folders = sorted(glob.glob(os.path.join(self.source.model_dir, "test_data_set*")))
        return [
            (_stored(f"{folder}/input_", model.graph.input), _stored(f"{folder}/output_", model.graph.output))
            for folder in folders
        ]

    def _path(self) -> Path:
        import onnx

        if self.kind == "light":
            return Path(onnx.__file__).parent.parent / self.source.url
        return Path(self.source.model_dir) / "model.onnx"


def all_cases() -> list[Case]:
    """Every case whose data ship with the package, in a fixed order; "real" models have only their light form here."""
    from onnx.backend.test.loader import load_model_tests

    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the cases are computed here, and some divide by zero on purpose
        for kind in ("node", "simple", "pytorch-converted", "pytorch-operator", "real"):
            for test in load_model_tests(kind=kind):
                name = "light" if kind == "real" else kind
                found.append(Case(test.name, name, test.rtol, test.atol, test))
    return sorted(found, key=lambda case: (KINDS.index(case.kind), case.name))


def _array(value: Any) -> Any:
    import onnx

    return onnx.numpy_helper.to_array(value) if isinstance(value, onnx.TensorProto) else value


def _ramps(model: Any) -> list[Any]:
    """The inputs that the suite makes for a light model."""
    weights = {tensor.name for tensor in model.graph.initializer}
    shapes = [
        tuple(dim.dim_value or 1 for dim in value.type.tensor_type.shape.dim)
        for value in model.graph.input
        if value.name not in weights
    ]
    sizes = [int(np.prod(shape)) for shape in shapes]
    return [
        (np.arange(size).reshape(shape) / size).astype(np.float32) for shape, size in zip(shapes, sizes, strict=True)
    ]


def _stored(prefix: str, values: Any) -> list[Any]:
    """The values kept as `<prefix><number>.pb`."""
    import onnx

    count = len(glob.glob(f"{glob.escape(prefix)}*.pb"))
    found: list[Any] = []
    for index in range(count):
        data = Path(f"{prefix}{index}.pb").read_bytes()
        kind = values[index].type.WhichOneof("value")
        if kind == "sequence_type":
            found.append(onnx.numpy_helper.to_list(onnx.SequenceProto.FromString(data)))
        elif kind == "optional_type":
            found.append(onnx.numpy_helper.to_optional(onnx.OptionalProto.FromString(data)))
        else:
            found.append(onnx.numpy_helper.to_array(onnx.TensorProto.FromString(data)))
    return found


def run_case(case: Case) -> Outcome:
    """Compiles, executes and compares a case; whatever the package raises that is not meant for users is a crash."""
    from firsttoken.onnx_backend import prepare
    from firsttoken_compiler.errors import FirsttokenError

    model = case.model()
    try:
        rep = prepare(model)
        for inputs, expected in case.data(model):
            found = rep.run(inputs)
            made = rep.latest
            wrong = difference(found, expected, case, made.products)
            if wrong:
                return Outcome("failed", f"{where(made)}: {wrong}")
    except FirsttokenError as error:
        return Outcome("crashed" if INTERNAL.search(str(error)) else "not supported", one_line(str(error)))
    except Exception as error:
        return Outcome("crashed", one_line(f"{type(error).__name__}: {error}"))
    return Outcome(where(made), "; ".join(dict.fromkeys(made.reasons.values())))


def where(made: Any) -> str:
    """Where the nodes of a graph ran."""
    places = set(made.placement.values())
    if "host" in places:
        return "NPU + host" if "NPU" in places else "host"
    return "NPU" if "NPU" in places else "folded"


def difference(found: Any, expected: Any, case: Case, matrix: bool) -> str:
    """What is wrong with the results; empty when they are right."""
    if len(found) != len(expected):
        return f"{len(found)} outputs, expected {len(expected)}"
    for index, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        ours, theirs = np.asarray(ours), np.asarray(theirs)
        if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
            return f"output {index} is {ours.dtype} {list(ours.shape)}, expected {theirs.dtype} {list(theirs.shape)}"
        if RANDOM.match(case.name):
            continue
        if ours.dtype.kind in "fcV":
            rtol = max(case.rtol, 2.0**-6) if ours.dtype.name == "bfloat16" else case.rtol
            wide = np.complex128 if ours.dtype.kind == "c" else np.float64
            ours, theirs = ours.astype(wide), theirs.astype(wide)
            finite = np.abs(theirs[np.isfinite(theirs)])
            largest = float(finite.max()) if finite.size else 0.0
            atol = case.atol + (PRODUCT_RTOL * largest if matrix else 0.0)
            atol += TRANSFORM_ATOL * largest if TRANSFORMS.match(case.name) else 0.0
            wrong = ~np.isclose(ours, theirs, rtol, atol, equal_nan=True)
        else:
            wrong = np.asarray(ours != theirs)
        if wrong.any():
            at = tuple(int(i) for i in np.argwhere(wrong)[0])
            return f"output {index}: {wrong.sum()} of {wrong.size} differ, first at {at}: {ours[at]} for {theirs[at]}"
    return ""


def one_line(text: str) -> str:
    """Text without line breaks and without addresses of objects, shortened."""
    return re.sub(r"0x[0-9a-f]{6,}", "0x…", " ".join(text.split()))[:400]
