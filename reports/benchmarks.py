"""All measurements of speed and of schedules, into reports/benchmarks: what `make bench` runs.

    python reports/benchmarks.py [--parts start,runs,compile,simulation,costs,schedules] [--schedule-targets A,B] [--trials N]

Nothing here fails: a goal that is missed is said. Times are of this machine, which the page describes; cycles are of
tests/golden/metrics.csv, where every change of the model shows in a diff.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any, Final

OUT: Final = Path(__file__).parent / "benchmarks"
RESULTS: Final = OUT / "results.json"
PARTS: Final = ("start", "runs", "compile", "simulation", "costs", "schedules")
STARTS: Final = {
    "firsttoken --help": ["-c", "import sys; from firsttoken.cli import main; sys.argv = ['firsttoken', '--help']; main()"],
    "import firsttoken": ["-c", "import firsttoken"],
    "an empty Python": ["-c", "pass"],
}
START_GOALS: Final = {"firsttoken --help": 0.30, "import firsttoken": 0.15}
"""Seconds."""
REPEATS: Final = 7


def main() -> int:
    """Runs the parts, keeps what they measured, writes the page; always 0."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--schedule-targets", default="")
    parser.add_argument("--trials", type=int, default=16)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    arguments = parser.parse_args()
    wanted = arguments.parts.split(",")
    unknown = [part for part in wanted if part not in PARTS]
    if unknown:
        parser.error(f"--parts has {unknown[0]!r}; parts are {', '.join(PARTS)}")
    OUT.mkdir(exist_ok=True)
    found: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    found["machine"] = machine()
    for part in wanted:
        print(f"{part} ...", file=sys.stderr)
        found[part] = measured(part, arguments)
        RESULTS.write_text(json.dumps(found, indent=1) + "\n")  # a run that is stopped keeps its parts
    text = page(found)
    (OUT / "README.md").write_text(text)
    print(text)
    return 0


def measured(part: str, arguments: argparse.Namespace) -> Any:
    """What a part measured, as JSON values."""
    if part == "start":
        return {name: start(words) for name, words in STARTS.items()}
    if part == "runs":
        return _script("bench.py", "--json")
    if part == "compile":
        return _script("bench_compile.py", "--json")
    if part == "simulation":
        return _script("bench_simulation.py", "--json")
    if part == "costs":
        return _script("bench_cost.py", "--json")
    targets = ["--targets", arguments.schedule_targets] if arguments.schedule_targets else []
    return _script("bench_schedules.py", "--json", "--trials", str(arguments.trials), "--jobs", str(arguments.jobs), *targets)


def _script(name: str, *options: str) -> Any:
    """The JSON document that a script prints; its message where it fails."""
    command = [sys.executable, str(Path(__file__).with_name(name)), *options]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    try:
        return json.loads(done.stdout)
    except ValueError:
        return {"failed": f"{name} ended with {done.returncode}"}


def start(words: list[str]) -> float:
    """CPU seconds of a process, the median of several."""
    taken = []
    for _ in range(REPEATS):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, *words], stdout=subprocess.DEVNULL, check=False)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        taken.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return round(statistics.median(taken), 3)


def machine() -> dict[str, Any]:
    """What the times are of."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        model = next((line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if "model name" in line), model)
    names = ("numba", "numpy", "apache-tvm", "onnx", "onnxruntime")
    return {
        "cpu": model, "cpus": os.cpu_count(), "python": platform.python_version(), "system": platform.system(),
        **{name: metadata.version(name) for name in names},
    }  # fmt: skip


def page(found: dict[str, Any]) -> str:
    """The report."""
    versions = ", ".join(f"{name} {value}" for name, value in found["machine"].items() if name not in ("cpu", "cpus"))
    lines = [
        "# Benchmarks", "", f"On {found['machine']['cpus']} CPUs of {found['machine']['cpu']}; {versions}. Redraw: `make bench`.", "",
    ]  # fmt: skip
    writers = {
        "start": _start, "runs": _runs, "compile": _compile, "simulation": _simulation, "costs": _costs,
        "schedules": _schedules,
    }  # fmt: skip
    for part, write in writers.items():
        if part in found:
            failed = isinstance(found[part], dict) and found[part].get("failed")
            lines += [*([f"{part}: {failed}"] if failed else write(found[part])), ""]
    return "\n".join(lines)


def _start(found: dict[str, float]) -> list[str]:
    rows = [
        f"| `{name}` | {seconds:.3f} | {f'{START_GOALS[name]:.2f}' if name in START_GOALS else ''} |"
        for name, seconds in found.items()
    ]
    return ["## Start-up, CPU seconds", "", "| | seconds | goal |", "|---|---|---|", *rows]


def _runs(found: dict[str, Any]) -> list[str]:
    rows = found["rows"]
    columns = list(rows[0])
    cells = [
        "| " + " | ".join(f"{row[c]:.2f}" if isinstance(row[c], float) else str(row[c]) for c in columns) + " |" for row in rows
    ]
    limits = ", ".join(f"{name} {limit:g}" for name, limit in found["limits"].items())
    return [
        "## The 1.5B student, 64 tokens, snapdragon-x-elite: a process of its own without any kept result", "",
        "| " + " | ".join(columns) + " |", "|---" * len(columns) + "|", *cells, "",
        f"Goals: at most {limits}. Above: {', '.join(found['over']) or 'none'}.",
    ]  # fmt: skip


def _compile(found: dict[str, Any]) -> list[str]:
    rows = found["rows"]
    columns = [name for name in rows[0] if name != "format"]
    cells = [
        f"| {row['format']} | "
        + " | ".join(f"{row[c]['median']:.2f} ({', '.join(f'{taken:.2f}' for taken in row[c]['seconds'])})" for c in columns)
        + " |"
        for row in rows
    ]
    limits = ", ".join(f"{name} {limit:g}" for name, limit in found["limits"].items())
    return [
        "## Compiling the 1.5B student again in one process, CPU seconds: median (each)", "",
        "| format | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|", *cells, "",
        f"Goals: at most {limits}. Above: {', '.join(found['over']) or 'none'}. Widths are those of the feed-forward "
        "network; a tile changed is one of a product of a layer, which a schedule halves.",
    ]  # fmt: skip


def _simulation(found: dict[str, Any]) -> list[str]:
    lines = ["## Simulation, CPU seconds of one core"]
    for name in ("products", "prefills"):
        rows = found[name]
        columns = [column for column in rows[0] if column not in ("name", "path")]
        lines += ["", f"### {name.capitalize()}", "", "| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
        lines += ["| " + " | ".join(_cell(row[c]) for c in columns) + " |" for row in rows]
    limits = found["limits"]
    seconds = ", ".join(f"{limit:g} s for {prompt} tokens" for prompt, limit in limits["seconds"].items())
    missed = "; ".join(found["over"]) or "none"
    goals = f"{limits['times_onnxim']:g} times ONNXim's bytes per second, {seconds}, {limits['rss_mib']:g} MiB"
    return [*lines, "", f"Goals: {goals}. Missed: {missed}."]


def _costs(found: dict[str, Any]) -> list[str]:
    rows = [f"| {name} | {_cell(value)} | {found['limits'].get(name, '')} |" for name, value in found.items() if name not in ("limits", "over")]
    return [
        "## Cost queries from a table", "", "| | measured | goal |", "|---|---|---|", *rows, "",
        f"Missed: {', '.join(found['over']) or 'none'}. Errors against exact runs are in docs/costs.md.",
    ]  # fmt: skip


def _schedules(found: dict[str, list[dict[str, Any]]]) -> list[str]:
    sys.path.insert(0, str(Path(__file__).parent))
    from bench_schedules import GOALS, WHOLE, Prefill, Product, prefill_table, table

    products = [Product(**{**row, "dims": tuple(row["dims"])}) for row in found["products"]]
    prefills = [Prefill(**row) for row in found["prefills"]]
    return [
        "## Schedules: every product of the 1.5B student", "",
        f"Cycles over the larger of the bounds of compute and of the DRAM's peak; goals: worst {GOALS['worst']:.2f}, median "
        f"{GOALS['median']:.2f}. Each product alone, launched several times in a row. In the last column the weights "
        "come at the bandwidth that one long read reaches on that target.", "", *table(products), "",
        "## Schedules: the whole prefill of the 1.5B student", "",
        "Cycles over the work of the busiest unit: matrix unit, vector unit, or all bytes at the DRAM's peak. Tuned has the "
        f"best choice of every product; goal {WHOLE:.2f}.", "", *prefill_table(prefills),
    ]  # fmt: skip


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.3f}" if abs(value) < 100 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


if __name__ == "__main__":
    sys.exit(main())
