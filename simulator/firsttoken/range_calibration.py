"""Ranges of activations, measured by onnxruntime's calibrators on the float graph of a student."""

from __future__ import annotations

import contextlib
import io
import math
import tempfile
import zipfile
import zlib
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from firsttoken.act_ranges import ActRanges, Method
from firsttoken.subject import File
from firsttoken_compiler.errors import OptionError, StudentError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from firsttoken.options import Progress
    from firsttoken.subject import ImageNetwork, Subject
    from firsttoken_compiler.frontend.onnx_file import OnnxStudent

    Feeds = dict[str, NDArray[Any]]

METHODS: Final[tuple[Method, ...]] = ("minmax", "entropy", "percentile")
MAX_INPUT_BYTES: Final = 1 << 30
"""Most bytes that a file of inputs may unpack to."""


def calibrate_text(
    subject: Subject, method: Method, windows: int, tokens: int, progress: Progress | None = None
) -> ActRanges:
    """Ranges of a student with real weights that reads the project's text; raises OptionError where it cannot."""
    from firsttoken.fidelity import equipped
    from firsttoken.generation import token_feeds
    from firsttoken.prose import windows as windows_of

    student, tokenizer = equipped(subject)
    chosen = windows_of(tokenizer, windows, tokens)
    student.lengths(tokens, 0)
    graph = replace(student, weights=student.float_weights(), file=None).open(tokens, 0)
    return calibrate(graph, method, [token_feeds(window.ids) for window in chosen], progress)


def calibrate_file(
    subject: Subject, method: Method, inputs: Path, prompt: int | None, progress: Progress | None = None
) -> ActRanges:
    """Ranges of an ONNX file on the arrays of an .npz file; raises OptionError where they do not fit."""
    if not isinstance(subject, File):
        raise OptionError(
            f"--inputs {inputs} is for ONNX files, and {subject.name} is {subject.kind}: leave --inputs away"
        )
    graph = subject.open(*subject.lengths(prompt, None))
    graph.require_data()
    return calibrate(graph, method, read_samples(inputs, graph), progress)


def declared(subject: ImageNetwork) -> ActRanges:
    """Ranges of an image network, which no values are measured for: what its times need."""
    return ActRanges(subject.name, "declared", 0, {tensor: (-end, end) for tensor, end in subject.declared()})


def calibrate(
    student: OnnxStudent, method: Method, samples: Sequence[Feeds], progress: Progress | None = None
) -> ActRanges:
    """The range of every tensor that the graph multiplies by weights, over all samples.

    Raises OptionError when there is nothing to measure, StudentError when onnxruntime refuses the graph.
    """
    from firsttoken_compiler.frontend.specialise import specialise
    from firsttoken_compiler.passes.static_ranges import multiplied

    student = specialise(student)
    wanted = set(multiplied(student.graph.node, student.initializers).values())
    if not wanted or not samples:
        raise OptionError(f"{student.name}: no tensor is multiplied by weights, or no sample is given")
    with tempfile.TemporaryDirectory(prefix="firsttoken-") as folder:
        path = Path(folder) / "model.onnx"
        _write(student, path)
        found = _measured(student.name, method, path, wanted, samples, progress)
    lost = sorted(name for name in wanted if not all(np.isfinite(found.get(name, (np.nan,)))))
    if lost:
        raise StudentError(f"{student.name}: tensor {lost[0]!r} has no finite range on these inputs; give other ones")
    return ActRanges(student.name, method, len(samples), found)


def _write(student: OnnxStudent, path: Path) -> None:
    """The graph with its weights, as one file beside another."""
    import onnx

    model = onnx.ModelProto()
    model.CopyFrom(student.model)
    known = {entry.name for entry in model.graph.initializer}
    model.graph.initializer.extend(
        onnx.numpy_helper.from_array(np.asarray(student.array(name)), name)
        for name in student.initializers
        if name not in known
    )
    onnx.save(model, str(path), save_as_external_data=True, location="weights.bin", size_threshold=1024)


def _measured(
    name: str, method: Method, path: Path, wanted: set[str], samples: Sequence[Feeds], progress: Progress | None
) -> dict[str, tuple[float, float]]:
    from onnxruntime.capi.onnxruntime_pybind11_state import Fail, InvalidArgument, InvalidGraph, NotImplemented

    try:
        with contextlib.redirect_stdout(io.StringIO()):  # the calibrators tell of their progress
            calibrator = _calibrator(method, path, wanted)
            for done, feeds in enumerate(samples):
                if progress is not None:
                    progress("calibrate", done, len(samples))
                calibrator.collect_data(_Reader(feeds))
            found = calibrator.compute_data()
    except (Fail, InvalidArgument, InvalidGraph, NotImplemented) as error:
        raise StudentError(f"{name}: onnxruntime cannot run the float graph: {str(error).splitlines()[0]}") from error
    ranges = {}
    for tensor in sorted(wanted & set(found.keys())):
        low, high = (float(np.asarray(value).reshape(-1)[0]) for value in found[tensor].range_value)
        ranges[tensor] = (low, high)
    return ranges


class _Reader:
    """One sample, as calibrators read it."""

    def __init__(self, feeds: Feeds) -> None:
        self._left: list[Feeds] = [feeds]

    def get_next(self) -> Feeds | None:
        """The sample, then None."""
        return self._left.pop() if self._left else None


def _calibrator(method: Method, path: Path, wanted: set[str]) -> Any:
    """A calibrator of onnxruntime for these tensors alone, ready to collect."""
    from onnxruntime.quantization import calibrate as ort

    kinds = {"minmax": ort.MinMaxCalibrater, "entropy": ort.EntropyCalibrater, "percentile": ort.PercentileCalibrater}
    calibrator = kinds[method](
        path, augmented_model_path=str(path.with_name("augmented.onnx")), use_external_data_format=True, symmetric=True
    )
    select = calibrator.select_tensors_to_calibrate

    def chosen(model: Any) -> tuple[list[str], Any]:
        tensors, values = select(model)
        return sorted(tensors & wanted), values

    calibrator.select_tensors_to_calibrate = chosen
    calibrator.augment_graph()
    calibrator.create_inference_session()
    return calibrator


def read_samples(path: Path, student: OnnxStudent) -> list[Feeds]:
    """Samples out of an .npz file: per input an array of its shape, or several stacked along a new first axis.

    Raises OptionError naming the file and the input.
    """
    arrays = _arrays(path)
    shapes = {
        value.name: tuple(dim.dim_value for dim in value.type.tensor_type.shape.dim) for value in student.graph.input
    }
    if missing := sorted(set(shapes) - set(arrays)):
        raise OptionError(f"--inputs {path}: no array for input {missing[0]!r}; the inputs are {', '.join(shapes)}")
    counts = {name: _count(path, name, arrays[name].shape, shape) for name, shape in shapes.items()}
    several = {count for count in counts.values() if count}
    if len(several) > 1:
        found = " and ".join(map(str, sorted(several)))
        raise OptionError(f"--inputs {path}: arrays hold {found} samples; give as many of each input")
    kinds = {value.name: value.type.tensor_type.elem_type for value in student.graph.input}
    return list(_samples(arrays, counts, kinds, max(several, default=1)))


def _samples(arrays: Feeds, counts: dict[str, int], kinds: dict[str, int], samples: int) -> Iterator[Feeds]:
    from onnx import helper

    typed = {name: arrays[name].astype(helper.tensor_dtype_to_np_dtype(kind)) for name, kind in kinds.items()}
    for index in range(samples):
        yield {name: typed[name][index] if counts[name] else typed[name] for name in counts}


def _count(path: Path, name: str, given: tuple[int, ...], shape: tuple[int, ...]) -> int:
    """Samples that an array holds; 0 when it is a sample itself."""
    if given == shape:
        return 0
    if given[1:] == shape and given and given[0]:
        return given[0]
    raise OptionError(
        f"--inputs {path}: input {name!r} has shape {list(given)}, a sample has {list(shape)}; give one, or several "
        "along a new first axis"
    )


def _arrays(path: Path) -> Feeds:
    """The arrays of an .npz file whose sizes have been checked; raises OptionError."""
    if not path.is_file():
        raise OptionError(f"--inputs {path}: no such file")
    try:
        with zipfile.ZipFile(path) as archive:
            total = sum(entry.file_size for entry in archive.infolist())
            if total > MAX_INPUT_BYTES:
                raise OptionError(f"--inputs {path}: {total} bytes of arrays, the limit is {MAX_INPUT_BYTES}")
            return {entry.filename.removesuffix(".npy"): _array(path, archive, entry) for entry in archive.infolist()}
    except (zipfile.BadZipFile, zlib.error, ValueError, EOFError, OSError, NotImplementedError, RuntimeError) as error:
        raise OptionError(f"--inputs {path} is not an .npz file of arrays: {error}") from error


def _array(path: Path, archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> NDArray[Any]:
    """One array, whose header is compared with the bytes that are there before anything of its size exists."""
    headers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    with archive.open(entry) as file:
        version = np.lib.format.read_magic(file)
        if version not in headers:
            raise ValueError(f"array {entry.filename!r:.200} is of version {version}")
        shape, _, dtype = headers[version](file)
    if dtype.kind not in "fiub":
        raise OptionError(f"--inputs {path}: array {entry.filename!r:.200} has type {dtype}, expected numbers")
    if math.prod(shape) * dtype.itemsize > entry.file_size:
        what = f"array {entry.filename!r:.200} of shape {list(shape)}"
        raise ValueError(f"{what} is larger than its {entry.file_size} bytes")
    with archive.open(entry) as file:
        found: NDArray[Any] = np.lib.format.read_array(file, allow_pickle=False)
    return found
