"""`firsttoken calibrate`: fits the parameters that a target declares to rows measured on the machine."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from firsttoken.progress import Bar
from firsttoken_compiler.errors import OptionError

if TYPE_CHECKING:
    from firsttoken.calibration.calibrate import Calibration


def calibrate(
    target: Annotated[str, typer.Option(help="A preset or a .toml file that declares [[calibration]].")],
    measurements: Annotated[
        list[Path], typer.Option("--measurements", metavar="FILE", help="A CSV table of measurements; repeatable.")
    ],
    out: Annotated[
        Path | None, typer.Option("-o", "--out", metavar="FILE.toml", help="Where the fitted target goes.")
    ] = None,
    parameters: Annotated[
        str, typer.Option(metavar="PATH[,PATH...]", help="Fit only these of the declared parameters.")
    ] = "",
    without: Annotated[
        str, typer.Option(metavar="RUNTIME[,RUNTIME...]", help="Leave out rows of these runtimes.")
    ] = "",
    leave_one_out: Annotated[
        bool, typer.Option("--leave-one-out/--no-leave-one-out", help="Predict each model by a fit to the others.")
    ] = True,
    loss: Annotated[
        Literal["linear", "soft_l1"], typer.Option(help="Squares, or squares that outliers leave.")
    ] = "linear",
    check: Annotated[
        bool, typer.Option("--check/--no-check", help="Compile one whole student beside its short versions.")
    ] = True,
    generations: Annotated[int, typer.Option(min=1, max=3, help="Most sets of programs that rounds are made on.")] = 3,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")] = False,
) -> None:
    """Fit the physical parameters that a target declares, within their bounds, and write them with their provenance."""
    from firsttoken.calibration.calibrate import calibrated
    from firsttoken.cli import print_json
    from firsttoken_simulator.report.folder import write_file

    if out is not None and out.suffix != ".toml":
        raise OptionError(f"-o {out}: a target is a .toml file; give a name that ends so")
    wanted = [path.strip() for path in parameters.split(",") if path.strip()]
    apart = [name.strip() for name in without.split(",") if name.strip()]
    with Bar() as bar:
        found = calibrated(
            target, measurements, wanted, without=apart, leave_one_out=leave_one_out, loss=loss, check=check,
            generations=generations,
            progress=bar.update, say=lambda text: print(text, file=sys.stderr),
        )  # fmt: skip
    if out is not None:
        write_file(out, found.text.encode())
    if as_json:
        print_json(document(found) | {"file": None if out is None else str(out)})
        return
    show(found)
    print(f"wrote {out}" if out is not None else "nothing is written: -o FILE.toml writes the fitted target")


def document(found: Calibration) -> dict[str, Any]:
    """The whole result as one JSON document."""
    outcome, fit = found.outcome, found.fit
    rows, at = [], 0
    for row in found.problem.rows:
        for name, value in row.quantities.items():
            errors = {
                what: None if some is None else round(100 * float(some[at]), 3)
                for what, some in (("before_pct", outcome.before), ("after_pct", outcome.after),
                                   ("left_out_pct", outcome.left_out))
            }  # fmt: skip
            rows.append({"row": row.label, "model": row.model, "quantity": name, "measured": value, **errors})
            at += 1
    return {
        "target": found.problem.base.name,
        "rows": rows,
        "left_out_rows": [{"row": entry.label, "reason": entry.reason} for entry in found.left_out],
        "mape_before_pct": round(found.mape_before, 3),
        "mape_pct": fit.mape_pct,
        "leave_one_model_out_mape_pct": fit.leave_one_model_out_mape_pct,
        "parameters": [
            {
                "path": list(entry.parameter.tunable.paths), "before": list(entry.parameter.start),
                "after": list(entry.values), "low": entry.parameter.tunable.low, "high": entry.parameter.tunable.high,
                "why": entry.parameter.tunable.why, "grade": found.grade(entry), "determined": entry.determined,
                "at_bound": entry.at_bound, "standard_error_log": entry.error, "sensitivity": entry.sensitivity,
            }
            for entry in outcome.parameters
        ],
        "disagreement_pct": round(100 * outcome.disagreement, 3),
        "sets_of_programs": outcome.generations,
        "cut_students": [
            {"student": c.student, "tokens": c.tokens, "past": c.past, "layers": c.layers, "whole_ms": c.whole_s * 1e3,
             "line_ms": c.line_s * 1e3, "error_pct": round(100 * c.error, 3)}
            for c in found.checks
        ],
    }  # fmt: skip


def show(found: Calibration) -> None:
    """Prints parameters, rows, and what the fit rests on."""
    from firsttoken.cli import table
    from firsttoken_simulator.report.plain import plain

    outcome = found.outcome
    names = list(dict.fromkeys(found.problem.names))
    table(
        ["parameter", "before", "after", "low", "high", "grade", "+-", *(f"d log t, {name}" for name in names), "note"],
        [
            [
                entry.parameter.name, f"{entry.parameter.start[0]:g}", f"{entry.value:g}",
                f"{entry.parameter.tunable.low:g}", f"{entry.parameter.tunable.high:g}", found.grade(entry),
                _spread(entry.error), *(f"{entry.sensitivity[name]:+.3f}" for name in names), _remark(entry),
            ]
            for entry in outcome.parameters
        ],
    )  # fmt: skip
    lines = []
    for at, (row, name, value) in enumerate(found.residuals):
        cells = [f"{100 * errors[at]:+.1f}" for errors in (outcome.before, outcome.after)]
        cells += [] if outcome.left_out is None else [f"{100 * outcome.left_out[at]:+.1f}"]
        setting = getattr(row.work, "setting", "")
        lines.append([row.label, row.model, setting, name, f"{value:g}", *cells])
    left_out = [] if outcome.left_out is None else ["left out %"]
    table(["row", "model", "how", "quantity", "measured", "before %", "after %", *left_out], lines)
    for skipped in found.left_out:
        print(f"not fitted: {plain(f'{skipped.label}: {skipped.reason}')}")
    for entry in outcome.parameters:
        print(f"{entry.parameter.name} between {entry.parameter.tunable.low:g} and {entry.parameter.tunable.high:g}: "
              f"{plain(entry.parameter.tunable.why)}")  # fmt: skip
    for check in found.checks:
        print(
            f"students of {check.layers} layers are lines through 2 and 4 layers: {check.student}, {check.tokens} rows "
            f"after {check.past}: {check.line_s * 1e3:.3f} ms, whole {check.whole_s * 1e3:.3f} ms ({check.error:+.2%})"
        )
    print(f"rounds on {outcome.generations} sets of programs; fresh and kept ones differ by {outcome.disagreement:.2%}")
    outside = found.fit.leave_one_model_out_mape_pct
    print(
        f"MAPE {found.mape_before:.2f} % before, {found.fit.mape_pct:.2f} % after"
        + ("" if outside is None else f", {outside:.2f} % with each model left out")
        + f" ({len(found.problem.names)} quantities of {len(found.problem.rows)} rows)"
    )


def _spread(error: float | None) -> str:
    return "" if error is None or not math.isfinite(error) else f"{100 * math.expm1(error):.0f} %"


def _remark(entry: Any) -> str:
    words: Sequence[str] = (
        "" if entry.determined else "not determined by the data: as before",
        f"at its {entry.at_bound} bound" if entry.at_bound else "",
    )
    return ", ".join(word for word in words if word)
