"""One product with weights in every type of blocks: what it takes, and which unit decides.

    python reports/blocks.py

Writes reports/blocks/README.md. Activations are fp16; the weights need not exist.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from gemm import product

from firsttoken_compiler.formats.types import BLOCK_TYPES
from firsttoken_compiler.frontend.onnx_file import from_model
from firsttoken_compiler.isa import word
from firsttoken_compiler.isa.types import ENGINES_PER_CORE, Engine
from firsttoken_compiler.options import Precision
from firsttoken_compiler.pipeline import compile_onnx
from firsttoken_compiler.target.load import load_target
from firsttoken_simulator.energy import energy
from firsttoken_simulator.machine import simulate_program

K: Final = 1536
N: Final = 8960
TOKENS: Final = (64, 1)
TARGETS: Final = ("snapdragon-x-elite", "systolic-128")
FORMATS: Final = ("fp16", "int4", *BLOCK_TYPES)
OUT: Final = Path(__file__).parent / "blocks" / "README.md"


@dataclass(frozen=True)
class Measured:
    """A product: simulated cycles, cycles that matrix and vector unit work, bytes read, millijoules (low, typical, high), its tile."""

    cycles: int
    matrix: int
    vector: int
    dram_read: int
    mj: tuple[float, float, float]
    tile: str


def measure(target_name: str, tokens: int, weights: str) -> Measured:
    """Compiles and simulates one product."""
    target = load_target(target_name)
    student = from_model(product(tokens, K, N), Path("."), "gemm")
    program: Any = compile_onnx(student, target, Precision(weights, "fp16", "channel", "off"))
    line = simulate_program(program, target)
    queues = program.code[:, word.QUEUE] % ENGINES_PER_CORE

    def busy(engine: Engine) -> int:
        return int(line.busy_fs[queues == engine].sum() // target.period_fs)

    band = energy(program, line, target).total
    read, tile = int(line.dram_read_bytes.sum()), program.ops[-1].tile
    return Measured(line.total_cycles, busy(Engine.MATRIX), busy(Engine.VECTOR), read, (band.low, band.typical, band.high), tile)


def table(target: str, tokens: int) -> list[str]:
    """A row per format."""
    rows = {weights: measure(target, tokens, weights) for weights in FORMATS}
    lines = [
        f"## {target}, {tokens} token{'s' if tokens > 1 else ''}", "",
        "| weights | cycles | beside fp16 | matrix unit works | vector unit works | DRAM read, MB | mJ | low to high | tile, method |",
        "|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for weights, row in rows.items():
        ratio = row.cycles / rows["fp16"].cycles
        lines.append(
            f"| {weights} | {row.cycles:,} | {ratio:.2f} | {row.matrix:,} | {row.vector:,} | {row.dram_read / 1e6:.2f} | "
            f"{row.mj[1]:.2f} | {row.mj[0]:.2f} to {row.mj[2]:.2f} | {row.tile} |"
        )
    return [*lines, ""]


def main() -> None:
    """Writes the report."""
    lines = [
        "# Products on blocks", "",
        f"[m, {K}] x [{K}, {N}], fp16 activations, weights in every format; `int4` has a scale per column. Redrawn by",
        "`python reports/blocks.py`. The methods are described in [numerics](../../docs/numerics.md#products-on-blocks).",
        "Energies are typical, with the band that their sources leave ([energy](../../docs/energy.md)).", "",
    ]  # fmt: skip
    for target in TARGETS:
        for tokens in TOKENS:
            lines += table(target, tokens)
    lines += [
        "On `systolic-128` a vector unit of fp32 lanes decides for most types: the bytes that blocks save are paid for by unpacking,",
        "and `int4` with a scale per column is unpacked by the matrix unit as it loads weights, which the target assumes costs nothing.",
        "On `snapdragon-x-elite` fp16 weights wait for memory, as few requests are in flight there; blocks halve that and are bound by the",
        "matrix unit in a prompt, and `int4` by the cycles that a tile of it takes to become fp16, which are fitted to measured graphs.",
    ]  # fmt: skip
    OUT.parent.mkdir(exist_ok=True)
    OUT.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
