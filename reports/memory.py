"""How values between operators share memory beside what they must take, and what serving several prompts allocates.

    python reports/memory.py

Writes reports/memory/README.md. Needs the weights of SmolLM2 for the second part.
"""

from pathlib import Path
from typing import Final

from firsttoken import RunOptions, api
from firsttoken.generation import greedy
from firsttoken.npu_session import NpuSession
from firsttoken.student import find_student
from firsttoken_compiler.isa.memory_plan import ArenaUse, arena_use, kind_bytes
from firsttoken_compiler.isa.program import Program
from firsttoken_compiler.isa.types import Space
from firsttoken_compiler.target.target import Target
from firsttoken_simulator.memory_pool import PoolUse
from firsttoken_simulator.report.occupancy import spills

STUDENTS: Final = ("smollm2-135m", "deepseek-r1-distill-qwen-1.5b")
TARGETS: Final = ("snapdragon-x-elite", "systolic-128")
WEIGHTS: Final = ("int4", "fp16")
LENGTHS: Final = ((64, 0), (512, 0), (1, 1023))
"""(tokens, rows in the cache)."""
SERVED: Final = ([504, 3575, 282] * 8, [504, 3575, 282], [504, 3575] * 6, [504, 3575, 282] * 8)
"""Prompts of 24, 3, 12 and 24 tokens."""
OUT: Final = Path(__file__).parent / "memory" / "README.md"


def main() -> None:
    """Compiles every case, serves the prompts, writes the page."""
    lines = ["# Memory: what is planned, and what must be", "", "Redraw: `make memory`.", ""]
    for target in TARGETS:
        lines += table(target)
    lines += served()
    OUT.parent.mkdir(exist_ok=True)
    OUT.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


def table(target: str) -> list[str]:
    """One row per student, format and phase on a target."""
    lines = [
        f"## {target}", "",
        "Values between operators, by memory. *Live* is the bound: bytes of those that are live at the same operator, at the fullest one. "
        "*Reuse*: bytes of all values over the planned ones. *Unused*: share of the planned bytes that the bound does not have.", "",
        "| student | weights | graph | scratchpad: values | live | planned | / live | reuse | unused | DRAM: values | live | planned | / live | kernels work in | weights MB | KV MB |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    reasons = []
    for student in STUDENTS:
        for weights in WEIGHTS:
            for tokens, past in LENGTHS:
                program = api.compile(student, target, prompt=tokens, past=past, options=RunOptions(weights=weights))
                lines.append(row(student, weights, program))
                for spill in spills(program):
                    count = f"{spill.count}x {spill.value}" if spill.count > 1 else spill.value
                    reasons.append(f"- {student}, {weights}, {graph(program)}: {count}: {spill.reason}")
    found = ["", "Values in DRAM, and why they are not in the scratchpad:", "", *reasons, ""] if reasons else [""]
    return lines + found


def graph(program: Program) -> str:
    """`prefill 64`, or `decode after 1023`."""
    past = program.meta["past"]
    return f"decode after {past}" if past else f"prefill {program.meta['prompt_tokens']}"


def row(student: str, weights: str, program: Program) -> str:
    """The cells of one program."""
    local, dram = (arena_use(program, space) for space in (Space.SPAD, Space.DRAM))
    kinds = kind_bytes(program)
    work = max((tensor.nbytes for tensor in program.of_kind("scratch")), default=0)
    cells = [
        student, weights, graph(program), *arena(local), f"{local.reuse:.1f}", f"{100 * local.fragmentation:.1f} %",
        *arena(dram), f"{work:,}", f"{(kinds['weight'] + kinds.get('constant', 0)) / 1e6:,.1f}", f"{kinds['kv'] / 1e6:.2f}",
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def arena(use: ArenaUse) -> list[str]:
    """Values, bound, peak and ratio."""
    if not use.values:
        return ["0", "-", "-", "-"]
    return [f"{use.values}", f"{use.bound_bytes:,}", f"{use.peak_bytes:,}", f"{use.ratio:.3f}"]


def served() -> list[str]:
    """What a session allocates before and while it serves prompts of several lengths."""
    provider, config = find_student("smollm2-135m")
    weights = provider.weights(config.name)
    if weights is None:
        return ["## Serving", "", "SmolLM2's weights are not here.", ""]
    session = NpuSession(
        provider, config, weights, 32, target=Target.load(TARGETS[0]), options=RunOptions(weights="fp16")
    )
    session.prepare(len(prompt) for prompt in SERVED)
    before = session.pool.use
    for prompt in SERVED:
        greedy(session, prompt, 3, ())
    lengths = ", ".join(str(len(prompt)) for prompt in SERVED)
    return [
        "## Serving", "",
        f"SmolLM2 in fp16 on {TARGETS[0]}: prompts of {lengths} tokens, three tokens of answer each; one block of DRAM, one "
        "scratchpad and one set of accumulators serve the programs of all lengths and the one that decodes.", "",
        "| | requests | allocations | allocated MB | requested / allocated | peak MB | of it not asked for |",
        "|---|---|---|---|---|---|---|",
        pool_row("programs loaded", before), pool_row("all prompts served", session.pool.use), "",
    ]  # fmt: skip


def pool_row(name: str, use: PoolUse) -> str:
    """The cells of a pool's counts."""
    cells = [
        name, str(use.requests), str(use.allocations), f"{use.allocated_bytes / 1e6:,.1f}", f"{use.reuse:.2f}",
        f"{use.peak_bytes / 1e6:,.1f}", f"{100 * use.fragmentation:.1f} %",
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
