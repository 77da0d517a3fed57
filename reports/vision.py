"""ResNet-50 on `systolic-128`: time against two bounds, per format of weights and activations.

    python reports/vision.py

Writes reports/vision/README.md. The graph has ResNet-50's shapes and batch normalisation folded; no time depends on weights.
"""

from collections import Counter
from pathlib import Path
from typing import Final

import numpy as np

from firsttoken.subject import subject_of
from firsttoken_compiler.frontend.onnx_file import OnnxStudent
from firsttoken_compiler.options import resolve
from firsttoken_compiler.pipeline import compile_onnx
from firsttoken_compiler.target.load import load_target
from firsttoken_simulator.machine import simulate_program

TARGET: Final = "systolic-128"
STUDENT: Final = "resnet-50"
FORMATS: Final = (("fp16", "fp16"), ("int8", "fp16"), ("int4", "fp16"), ("int8", "int8"))
OUT: Final = Path(__file__).parent / "vision" / "README.md"


def row(student: OnnxStudent, weights: str, acts: str) -> str:
    """A line of the table."""
    target = load_target(TARGET)
    program = compile_onnx(student, target, resolve(weights, acts, "channel", None))
    assert program is not None
    assert not program.hosts
    line = simulate_program(program, target)
    macs = sum(op.macs for op in program.ops)
    packed = sum(tensor.nbytes for tensor in program.of_kind("weight"))
    unit = macs / target.matrix.macs_per_cycle[f"{acts}x{weights}"] / target.clock_hz * 1e3
    stream = packed / target.dram.peak_bytes_per_s * 1e3
    moved = int(np.sum(line.dram_read_bytes) + np.sum(line.dram_write_bytes))
    kinds = Counter(op.kind for op in program.ops)
    made = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
    return (
        f"| {weights} | {acts} | {macs / 1e9:.2f} | {unit:.2f} | {stream:.2f} | {moved / 1e6:.0f} "
        f"| {moved / target.dram.peak_bytes_per_s * 1e3:.2f} | **{line.total_ms:.2f}** | {made} |"
    )


def main() -> None:
    """Measures all and writes the page."""
    student = subject_of(STUDENT).open(1, 0)
    lines = [
        "# ResNet-50, one image of 224 x 224, on systolic-128",
        "",
        "ResNet-50's shapes, weights that nobody reads; the host computes nothing. Bounds: multiply-accumulates at the array's peak, the "
        "weights' bytes and all bytes moved at the DRAM's peak. Redraw: `python reports/vision.py`.",
        "",
        "| weights | activations | GMAC | array, ms | weights' bytes, ms | MB moved | all bytes, ms | **simulated, ms** | operators |",
        "|---|---|---|---|---|---|---|---|---|",
        *(row(student, *formats) for formats in FORMATS),
        "",
        "With fp16 activations a convolution makes its windows tile by tile in the scratchpad (`conv`), so that the DRAM sees "
        "the image once. A kernel of one pixel and stride 1 is a product of the image as it lies (`linear`). What stands between the "
        "bytes and the time: the first stages' images do not stay in the scratchpad, results and shortcuts are written and read beside the "
        "streams, and the vector unit makes a tile of windows before, and applies bias and activation after, the same "
        "tile's product. int8 activations have a scale per row of windows, so these rows are made as a whole (`windows`) and "
        "then quantised: nine times the image's bytes, which costs more than the faster types gain.",
        "",
    ]
    OUT.write_text("\n".join(lines), encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
