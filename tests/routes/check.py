"""Every exported model through firsttoken on both targets, held against onnxruntime; a table of what became of them.

    python tests/routes/check.py DIR... [--target NAME]... [--only PATTERN]... [--report reports/routes]

DIR holds a folder per route, as `make.py -o DIR` leaves it, or is one. `--report` writes README.md and routes.csv.
"""

from __future__ import annotations

import argparse
import csv
import fnmatch
import io
import json
import sys
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Final

sys.path.insert(0, str(Path(__file__).resolve().parent))

from checking import Checked, check

TARGETS: Final = ("systolic-128", "snapdragon-x-elite")


def folders(places: list[Path], patterns: list[str]) -> list[Path]:
    """The folders of routes in these places, by name."""
    found = [p.parent for place in places for p in (*place.glob("meta.json"), *place.glob("*/meta.json"))]
    keep = [f for f in found if not patterns or any(fnmatch.fnmatch(f.name, pattern) for pattern in patterns)]
    return sorted(keep, key=lambda folder: folder.name)


def check_all(found: list[Path], targets: list[str]) -> list[Checked]:
    """Checks in a process of its own that is started again where a route takes it down."""
    results = []
    pool = ProcessPoolExecutor(1)
    for folder in found:
        for target in targets:
            try:
                results.append(pool.submit(check, folder, target).result())
            except BrokenProcessPool:
                pool = ProcessPoolExecutor(1)
                results.append(Checked(folder.name, target, error="CRASH the process died"))
            print(line(results[-1]), flush=True)
    pool.shutdown()
    return results


def line(result: Checked) -> str:
    """For the terminal."""
    head = f"{result.verdict:5} {result.route:58} {result.target:18} {result.seconds:5.1f} s"
    if result.error:
        return f"{head}  {' '.join(result.error.split())[:600]}"
    host = ", ".join(f"{kind} {count}" for kind, count in result.host.items()) or "-"
    return (
        f"{head}  {result.ttft_ms:8.3f} ms  host {sum(result.host.values())}/{result.nodes} ({host})  "
        f"max {result.max_rel:.2e} (<= {result.limit[0]:.0e})  cosine {result.cosine:.6f}"
    )


def as_csv(results: list[Checked]) -> str:
    """All results, one row each."""
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(("route", "target", "verdict", "ttft_ms", "nodes", "host_nodes", "host_operators", "max_rel",
                   "max_rel_limit", "cosine", "cosine_limit", "error"))  # fmt: skip
    for r in results:
        host = " ".join(f"{kind}:{count}" for kind, count in r.host.items())
        numbers = ("", "") if r.error else (f"{r.max_rel:.3e}", f"{r.cosine:.7f}")
        rows.writerow((r.route, r.target, r.verdict, f"{r.ttft_ms:.4f}", r.nodes, sum(r.host.values()), host,
                       numbers[0], r.limit[0], numbers[1], r.limit[1], " ".join(r.error.split())[:300]))  # fmt: skip
    return text.getvalue()


def page(results: list[Checked], found: list[Path]) -> str:
    """The page of the report."""
    metas = {folder.name: json.loads((folder / "meta.json").read_text(encoding="utf-8")) for folder in found}
    targets = list(dict.fromkeys(r.target for r in results))
    passed = sum(r.passed for r in results)
    lines = [
        "# Exporters' routes: from file to TTFT and logits", "",
        f"{passed} of {len(results)} runs ({len(found)} models, {len(targets)} targets) agree with onnxruntime.",
        "Made by `python tests/routes/make.py all -o DIR`,",
        "checked by `python tests/routes/check.py DIR --report reports/routes`. All numbers are in `routes.csv`.", "",
        "`difference`: greatest |difference| over all outputs, relative to the range of onnxruntime's values;",
        "`cosine`: the least of all outputs; limits in brackets. `host`: ONNX nodes that the host CPU computes, of all",
        "that are left after specialisation. Weights that the file holds as floats are compiled as fp16.", "",
    ]  # fmt: skip
    for target in targets:
        lines += [f"## {target}", "", "| route | TTFT ms | host | difference | cosine | |", "|---|---|---|---|---|---|"]
        for r in (r for r in results if r.target == target):
            if r.error:
                lines.append(f"| {r.route} | | | | | error: {' '.join(r.error.split())[:160].replace('|', '/')} |")
                continue
            host = ", ".join(f"{kind} {count}" for kind, count in list(r.host.items())[:6])
            count = f"{sum(r.host.values())} of {r.nodes}" + (f": {host}" if host else "")
            lines.append(
                f"| {r.route} | {r.ttft_ms:.3f} | {count} | {r.max_rel:.1e} ({r.limit[0]:.0e}) | {r.cosine:.6f} "
                f"({r.limit[1]}) | {r.verdict} |"
            )
        lines.append("")
    lines += ["## How each model was made", "", "| route | opset | by | with |", "|---|---|---|---|"]
    for name, meta in metas.items():
        versions = ", ".join(f"{package} {number}" for package, number in meta["exporter"].items())
        lines.append(f"| {name} | {meta['opset']} | {meta['how']} | {versions} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """The command line; returns 1 when a run failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("places", nargs="+", type=Path)
    parser.add_argument("--target", action="append", help=f"default: {', '.join(TARGETS)}")
    parser.add_argument("--only", action="append", default=[], help="pattern of route names")
    parser.add_argument("--report", type=Path, help="folder for README.md and routes.csv")
    arguments = parser.parse_args()
    found = folders(arguments.places, arguments.only)
    results = check_all(found, arguments.target or list(TARGETS))
    print(f"{sum(r.passed for r in results)} of {len(results)} passed")
    if arguments.report is not None:
        arguments.report.mkdir(parents=True, exist_ok=True)
        (arguments.report / "README.md").write_text(page(results, found), encoding="utf-8")
        (arguments.report / "routes.csv").write_text(as_csv(results), encoding="utf-8")
    return int(not all(r.passed for r in results))


if __name__ == "__main__":
    sys.exit(main())
