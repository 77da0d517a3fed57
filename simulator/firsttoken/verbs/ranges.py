"""`firsttoken ranges`: ranges of a student's activations, for static scales."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from firsttoken.progress import Bar


def ranges(
    student: Annotated[
        str, typer.Argument(help="A built-in student with weights or for images, a GGUF file, or an ONNX file.")
    ],
    out: Annotated[Path, typer.Option("-o", "--out", help="The file of ranges.")] = Path("ranges.json"),
    method: Annotated[
        Literal["minmax", "entropy", "percentile"], typer.Option("--method", help="How onnxruntime finds a range.")
    ] = "minmax",
    windows: Annotated[int, typer.Option("--windows", min=1, help="Stretches of the text; SmolLM2 has 16.")] = 4,
    tokens: Annotated[int, typer.Option("--tokens", min=2, help="Tokens of each.")] = 128,
    inputs: Annotated[Path | None, typer.Option("--inputs", help="An .npz file with an ONNX file's inputs.")] = None,
    prompt: Annotated[
        int | None, typer.Option("--prompt", min=1, help="Tokens of an ONNX file with open lengths.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")] = False,
) -> None:
    """Measure the ranges of what products read, by onnxruntime's calibrators on the float graph.

    Of a built-in network for images, which has no weights here, every range is declared as -1 to 1.
    """
    from firsttoken.cli import print_json
    from firsttoken.range_calibration import calibrate_file, calibrate_text, declared
    from firsttoken.subject import ImageNetwork, subject_of
    from firsttoken_simulator.report.folder import write_file

    subject = subject_of(student)
    with Bar() as bar:
        if isinstance(subject, ImageNetwork) and inputs is None:
            subject.lengths(prompt, None)
            found = declared(subject)
        elif inputs is not None:
            found = calibrate_file(subject, method, inputs, prompt, bar.update)
        else:
            found = calibrate_text(subject, method, windows, tokens, bar.update)
    write_file(out, found.to_json().encode())
    largest = max(found.magnitudes(), key=lambda pair: pair[1])
    if as_json:
        print_json({"file": str(out), "method": found.method, "samples": found.samples, "tensors": len(found.ranges)})
        return
    print(f"wrote {out}: {len(found.ranges)} ranges ({found.method}) over {found.samples} samples of {found.student}")
    print(f"the widest reaches {largest[1]:.4g}: {largest[0]}")
