"""Runs the command line on every bad file and writes reports/bad-input.

python tests/bad_input/check.py [-o FOLDER] [part of a case's name ...]
"""

import os
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import gguf_cases
from bad_cases import CASES, Case

LIMIT_S, LIMIT_MIB, TIMEOUT_S = 2.0, 1024, 60.0
COMMAND = "import sys; from firsttoken.cli import main; sys.argv[0] = 'firsttoken'; main()"
ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Outcome:
    """What the command line did with one file."""

    case: Case
    code: int
    said: str
    seconds: float
    cpu_s: float
    peak_mib: float
    left: tuple[str, ...]

    @property
    def complaints(self) -> list[str]:
        """What is wrong with it."""
        found = [] if self.code == 2 else [f"exit code {self.code}"]
        found += [] if self.case.message in self.said else [f"does not say {self.case.message!r}"]
        found += ["traceback"] if "Traceback" in self.said else []
        found += [] if self.cpu_s < LIMIT_S else [f"{self.cpu_s:.1f} s"]
        found += [] if self.peak_mib < LIMIT_MIB else [f"{self.peak_mib:.0f} MiB"]
        return found + [f"left {name}" for name in self.left]


def run(case: Case) -> Outcome:
    """The outcome of `firsttoken run FILE --target systolic-128 -o out/here`."""
    with tempfile.TemporaryDirectory() as name:
        work, temporary, cache = (Path(name, part) for part in ("work", "tmp", "cache"))
        for folder in (work, temporary):
            folder.mkdir()
        case.write(work)
        before = _listing(Path(name))
        arguments = ["run", case.file, "--target", "systolic-128", "-o", "out/here"]
        environment = {**os.environ, "TMPDIR": str(temporary), "FIRSTTOKEN_CACHE": str(cache)}
        said = Path(name, "said")
        started = time.monotonic()
        child = os.fork()
        if not child:
            handle = os.open(said, os.O_WRONLY | os.O_CREAT)
            os.dup2(handle, 1)
            os.dup2(handle, 2)
            os.chdir(work)
            os.execve(sys.executable, [sys.executable, "-c", COMMAND, *arguments], environment)
        status, usage = _wait(child, started)
        seconds = time.monotonic() - started
        text = said.read_text(errors="replace")
        said.unlink()
        left = tuple(sorted(_listing(Path(name)) - before))
    code = os.waitstatus_to_exitcode(status)
    return Outcome(case, code, text, seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024, left)


def _wait(child: int, started: float) -> tuple[int, object]:
    while True:
        done, status, usage = os.wait4(child, os.WNOHANG)
        if done:
            return status, usage
        if time.monotonic() - started > TIMEOUT_S:
            os.kill(child, 9)
            return os.wait4(child, 0)[1:]
        time.sleep(0.01)


def _listing(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def page(outcomes: list[Outcome]) -> str:
    """The report."""
    slowest = max(outcomes, key=lambda o: o.cpu_s)
    largest = max(outcomes, key=lambda o: o.peak_mib)
    good = sum(not o.complaints for o in outcomes)
    lines = [
        "# Input that cannot hurt", "",
        "`bad_cases.py` and `gguf_cases.py` in `tests/bad_input` make them; each is given to `firsttoken run FILE "
        "--target systolic-128 -o out/here`. It must end with exit code 2 and one message, in less than "
        f"{LIMIT_S:.0f} s of processor time and {LIMIT_MIB} MiB, and leave no file behind: no report, no cache entry, "
        "no temporary file.", "",
        f"{good} of {len(outcomes)} do. Slowest: {slowest.case.name} ({slowest.cpu_s:.2f} s); largest: "
        f"{largest.case.name} ({largest.peak_mib:.0f} MiB).", "",
        "Redraw with `make bad-input`.", "",
        "| file | said | s | MiB |", "|---|---|---|---|",
    ]  # fmt: skip
    for outcome in outcomes:
        said = outcome.said.strip().removeprefix("error: ").replace("|", "\\|").replace("\n", " ")
        said = said if len(said) <= 200 else f"{said[:200]}..."
        wrong = f"**{'; '.join(outcome.complaints)}** " if outcome.complaints else ""
        lines.append(f"| {outcome.case.name} | {wrong}{said} | {outcome.cpu_s:.2f} | {outcome.peak_mib:.0f} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Prints a line per file; writes the report when all were run."""
    words = sys.argv[1:]
    folder = ROOT / "reports" / "bad-input"
    if words[:1] == ["-o"]:
        folder, words = Path(words[1]), words[2:]
    chosen = [case for case in (*CASES, *gguf_cases.CASES) if not words or any(word in case.name for word in words)]
    outcomes = []
    for case in chosen:
        outcome = run(case)
        outcomes.append(outcome)
        wrong = "; ".join(outcome.complaints) or "ok"
        print(f"{outcome.cpu_s:5.2f} s {outcome.peak_mib:5.0f} MiB  {case.name}: {wrong}", flush=True)
        if outcome.complaints:
            print(f"    {outcome.said.strip()[:500]}", flush=True)
    if not words:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "README.md").write_text(page(outcomes))
    return int(any(outcome.complaints for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
