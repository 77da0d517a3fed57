"""`firsttoken sweep`: a student under every combination of some settings, and the front of what is worth having."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from firsttoken.progress import Bar
from firsttoken_compiler.errors import OptionError

if TYPE_CHECKING:
    from firsttoken.sweeping.sweep import Row, Sweep

SHOWN = 20
"""Rows of the front on the screen."""


def sweep(
    student: Annotated[str, typer.Argument(help="An ONNX or GGUF file, or a built-in student.", show_default=False)],
    settings: Annotated[
        list[str],
        typer.Option("--set", metavar="SETTING=A,B,...", help="Values to sweep: target.scratchpad_bytes=1M,2M; "
                     "prompt=64,512; weights=int4,int8; student.layers=12,24. Repeatable."),
    ],
    out: Annotated[Path, typer.Option("-o", "--out", help="The table; its .sqlite3 beside it is gone on with.")],
    target: Annotated[str, typer.Option(help="A preset or a .toml file.")] = "snapdragon-x-elite",
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of the prompt where it is not swept.")] = 64,
    decode: Annotated[int, typer.Option(min=0, help="Also measure this token of the answer.")] = 0,
    weights: Annotated[str, typer.Option(help="As in 'run', where it is not swept.")] = "int4",
    jobs: Annotated[int, typer.Option(min=1, help="Processes of this machine.")] = 1,
    engine: Annotated[
        Literal["joblib", "ray"], typer.Option(help="Processes of this machine, or a Ray cluster's workers.")
    ] = "joblib",
    ray_address: Annotated[
        str | None, typer.Option(help="Address of a running Ray cluster; default: one of --jobs workers here.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")] = False,
) -> None:  # fmt: skip
    """Run every combination of the settings, keep each result at once, and mark the Pareto front."""
    from firsttoken.cli import print_json
    from firsttoken.options import RunOptions
    from firsttoken.sweeping.axes import axes_of
    from firsttoken.sweeping.points import Base
    from firsttoken.sweeping.sweep import store_of
    from firsttoken.sweeping.sweep import sweep as run
    from firsttoken_simulator.report.folder import write_file

    if ray_address is not None and engine != "ray":
        raise OptionError("--ray-address is for --engine ray")
    base, axes = Base(student, target, prompt, decode, RunOptions(weights=weights)), axes_of(settings)
    store = store_of(out)
    if store == out:
        raise OptionError(f"-o {out}: the table needs another name than its database; give a name such as sweep.csv")
    with Bar() as bar:
        found = run(base, axes, store, jobs=jobs, engine=engine, address=ray_address, progress=bar.update)
    write_file(out, found.csv().encode())
    if as_json:
        print_json({"rows": [row.cells() for row in found.rows], "computed": found.computed})
        return
    _show(found)
    print(f"wrote {out}; {store} knows every point, the same command goes on with it")


def _show(found: Sweep) -> None:
    from firsttoken.cli import table

    refused = [row for row in found.rows if row.error]
    print(f"{len(found.rows)} combinations: {found.computed} computed now, "
          f"{len(found.rows) - len(refused)} with numbers, {len(refused)} refused")  # fmt: skip
    front = found.front
    if front:
        paths = [axis.path for axis in found.axes]
        columns = [*paths, "TTFT ms", "TPOT ms", "energy mJ", "area proxy mm2", "MAC util %"]
        table(columns, [_cells(row, paths) for row in front[:SHOWN]])
        left = f", the first {SHOWN}" if len(front) > SHOWN else ""
        count = f"{len(front)} of {len(found.rows)}"
        print(f"Pareto front of TTFT, energy and area proxy, for each prompt: {count} points{left}")
    for row in refused[:3]:
        print(f"refused: {row.error.splitlines()[0]}")


def _cells(row: Row, paths: list[str]) -> list[str]:
    result = row.result
    later = result["tpot_ms"]
    numbers = [
        f"{result['ttft_ms']:.3f}", "-" if later is None else f"{later:.3f}", f"{result['energy_mj']:.3f}",
        f"{result['area_proxy_mm2']:.2f}", f"{result['mac_util_pct']:.1f}",
    ]  # fmt: skip
    return [*(str(row.settings[path]) for path in paths), *numbers]
