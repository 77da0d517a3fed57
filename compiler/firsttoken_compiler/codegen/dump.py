"""Text forms of what the passes make, for --dump-after."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from firsttoken_compiler.errors import OptionError
from firsttoken_compiler.frontend.onnx_file import OnnxStudent
from firsttoken_compiler.isa.program import Program
from firsttoken_compiler.passes.lower import Launches
from firsttoken_compiler.passes.place import Placement


def dump(folder: Path, number: int, name: str, made: Any) -> None:
    """Writes `NN-pass.txt` into `folder`; raises OptionError when the folder cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number:02d}-{name}.txt").write_text(_text(made), encoding="utf-8")
    except OSError as error:
        raise OptionError(f"cannot write to --dump-dir {folder}: {error.strerror or error}") from error


def _text(made: Any) -> str:
    if isinstance(made, Program):
        return str(made)
    if isinstance(made, OnnxStudent):
        from onnx import printer

        return str(printer.to_text(made.model)) + "\n"
    if isinstance(made, Placement):
        lines = [f"resident {made.resident_bytes} of {made.scratchpad_bytes} bytes"]
        lines += [f"{name} at {address:#x}: {made.sizes[name]} bytes" for name, address in made.resident.items()]
        lines += [f"{made.dram_bytes} bytes of DRAM"] if made.dram else []
        lines += [f"{name} at +{offset:#x}: {made.spilled[name]}" for name, offset in made.dram.items()]
        return "\n".join(lines) + "\n"
    if isinstance(made, Launches):
        return "".join(f"{launch.title or launch.label}: {launch.spec}\n" for launch in made.launches)
    if isinstance(made, dict):
        return "".join(
            f"# {spec.kind} {spec.args} -> {spec.outs} in {[space.text for space in spaces]}, tile {template.tile}\n"
            f"{Program(code=template.code, kernels=template.kernels, tensors=(), ops=())!s}\n"
            for (spec, spaces), template in made.items()
        )
    return str(made.script()) + "\n"
