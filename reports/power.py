"""Predicted mean power beside what is published of the same or a like job, with the band of the targets' energies.

    python reports/power.py

Writes reports/power/: README.md, power.csv and power.html.
"""

from __future__ import annotations

import csv
import html
import io
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from firsttoken import RunOptions, Target
from firsttoken.latency import EncoderWork, LlmWork, Step, StepTime, Work, compile_step, plan, predict
from firsttoken.subject import ImageNetwork, subject_of
from firsttoken.weight_rules import inline_rules
from firsttoken_compiler.options import Precision
from firsttoken_compiler.pipeline import compile_onnx
from firsttoken_simulator.energy import COMPONENTS, Band, EnergyResult, energy, standing_w
from firsttoken_simulator.machine import simulate_program

OUT: Final = Path(__file__).parent / "power"
MEASURED: Final = ("NPU", "NPU and DRAM", "system")
"""What a figure covers, and what of the prediction stands beside it."""


@dataclass(frozen=True, slots=True)
class Figure:
    """A published power, and the job that comes nearest.

    Attributes:
        job: what was measured.
        watts: how much.
        bound: `=`, `<` for at most, or `~` for an order of magnitude.
        covers: one of `MEASURED`.
        target: the preset that stands for the chip.
        work: the job as it is simulated; None for ResNet-50, which `nvdla` compiles.
        phase: of the work.
        source: who says so.
        differs: how the two jobs differ.
    """

    job: str
    watts: float
    bound: str
    covers: str
    target: str
    work: Work | None
    phase: str
    source: str
    differs: str


Q4_0: Final = RunOptions(weights="q4_0", acts="fp16", rules=inline_rules("ffn_down=q8_0"))
FIGURES: Final = (
    Figure(
        "Snapdragon 8 Gen 3 (OnePlus 12), Qwen2.5-1.5B Q4_0, decode", 5.0, "<", "system", "snapdragon-8-gen3",
        LlmWork("qwen2.5-1.5b", Q4_0, 256, 1024, 64, "geniex_llamacpp"), "decode", "arXiv 2509.23324, 7.2.3",
        "the figure is the whole phone, with the head on its CPU; here NPU, the DRAM's share of it and a host that polls, with the "
        "head on the NPU; ffn_down is Q8_0 in both",
    ),
    Figure(
        "Snapdragon 8 Gen 3 (OnePlus 12), Qwen2.5-3B Q4_0, decode", 4.3, "=", "system", "snapdragon-8-gen3",
        LlmWork("qwen2.5-3b", Q4_0, 256, 1024, 64, "geniex_llamacpp"), "decode", "arXiv 2509.23324, 7.2.3",
        "as above",
    ),
    Figure(
        "Snapdragon 8 Gen 3, Llama-3.1-8B W4A16, prefill mostly on the NPU", 2.23, "=", "NPU and DRAM", "snapdragon-8-gen3",
        LlmWork("llama-3.1-8b", RunOptions(weights="int4", acts="fp16", group="channel"), 256, 1024, 0, "powerserve"),
        "prefill", "HeteroInfer, 5.8",
        "a part of the work is on the GPU there, and what the figure covers is not quoted; int4 per channel stands for W4A16",
    ),
    Figure(
        "XDNA2 (Strix), a 1.54B model, decode", 1.57, "=", "NPU", "xdna2-strix",
        LlmWork("qwen2.5-1.5b", Q4_0, 256, 1024, 64), "decode", "NPU rail while a 1.54B model decodes, quoted",
        "formats are not quoted with the figure: Q4_0 here; the rail feeds no DRAM",
    ),
    Figure(
        "Apple A15, DistilBERT fp16, 128 tokens", 0.454, "~", "NPU", "snapdragon-8-gen3",
        EncoderWork("distilbert", RunOptions(weights="fp16", acts="fp16"), 128), "inference",
        "Apple, Deploying Transformers on the Neural Engine",
        "another chip, as there is no target for Apple's: an order of magnitude alone can agree. The figure is 1.58 mJ in "
        "3.47 ms; 85 MB of fp16 weights take 4.1 mJ at the low bound of a bit of DRAM, so DRAM cannot be in it",
    ),
)  # fmt: skip


@dataclass
class Meter:
    """A clock that keeps what every step takes."""

    spent: dict[tuple[str, Step], tuple[StepTime, EnergyResult]] = field(default_factory=dict)

    def seconds(self, step: Step, target: Target) -> StepTime:
        """See `latency.Clock`."""
        key = (target.content_hash, step)
        if key not in self.spent:
            program = compile_step(step, target)
            timeline = simulate_program(program, target)
            found = energy(program, timeline, target)
            device = found.device
            seconds = StepTime(timeline.total_fs / 1e15, len(program.ops), device.typical, device.low, device.high)
            self.spent[key] = (seconds, found)
        return self.spent[key][0]

    def component(self, name: str, step: Step, target: Target) -> Band:
        """Millijoules of a component in a step that was asked for, of `static` with that of the dispatch."""
        return self.spent[target.content_hash, step][1].component(name)


@dataclass(frozen=True, slots=True)
class Found:
    """A figure with its prediction: watts, mean over the phase."""

    figure: Figure
    seconds: float
    parts: dict[str, Band]
    """By component, `static` with the time of launches."""
    host: Band

    @property
    def dram(self) -> Band:
        """The DRAM without what it takes for refresh and standby, which is static."""
        return self.parts["dram"]

    @property
    def npu(self) -> Band:
        """Everything but DRAM and host."""
        return sum((band for name, band in self.parts.items() if name != "dram"), Band(0.0, 0.0, 0.0))

    @property
    def beside(self) -> Band:
        """What the figure covers, of the prediction."""
        whole = {"NPU": self.npu, "NPU and DRAM": self.npu + self.dram, "system": self.npu + self.dram + self.host}
        return whole[self.figure.covers]

    @property
    def verdict(self) -> str:
        """How the two agree, in words."""
        band, watts = self.beside, self.figure.watts
        ratio = band.typical / watts
        if self.figure.bound == "<":
            if band.high <= watts:
                return "agrees, the whole band is below"
            return "agrees, a part of the band is above" if band.typical <= watts else f"{ratio:.2f} times the limit"
        if self.figure.bound == "~":
            return f"{ratio:.2f} times: {'the same' if 0.1 <= ratio <= 10 else 'another'} order of magnitude"
        if band.low <= watts <= band.high:
            return f"inside the band, typical {ratio:.2f} times"
        return f"{'above' if watts < band.low else 'below'} the figure, typical {ratio:.2f} times"


def found(figure: Figure, meter: Meter) -> Found:
    """The prediction for a figure; raises FirsttokenError where the job cannot be compiled."""
    assert figure.work is not None
    target = Target.load(figure.target)
    said = predict(figure.work, target, meter)
    part, launches = said.parts[figure.phase], plan(figure.work, target).phases[figure.phase]
    tokens = sum(launch.count for launch in launches) if figure.phase == "decode" else 1
    npu, host = standing_w(target)
    parts = {"static": npu}
    for name in (name for name in COMPONENTS if name != "static"):
        every = [meter.component(name, launch.step, target).scaled(launch.count / tokens) for launch in launches]
        parts[name] = sum(every, Band(0.0, 0.0, 0.0)).scaled(1 / part.seconds / 1e3)
    return Found(figure, part.seconds, parts, host)


NVDLA: Final = Figure(
    "NVDLA of 2048 int8 multipliers, 512 KB and 20 GB/s, ResNet-50", 0.291, "=", "NPU", "nvdla-full", None, "inference",
    "nvdla/doc, primer",
    "the figure is an estimate of its authors for 16 nm at 1 GHz without DRAM, 1.08 mJ in the 3.72 ms that they expect of an image; "
    "int8 with static scales here. The sizes below do not hold a line of ResNet-50's first images in the way that ours are made",
)
"""The mean; 0.766 W is the peak."""


def nvdla() -> Found:
    """The built-in ResNet-50 with the ranges that it declares; raises FirsttokenError."""
    target, student = Target.load(NVDLA.target), subject_of("resnet-50")
    assert isinstance(student, ImageNetwork)
    formats = Precision("int8", "int8", "channel", "int8", ranges=student.declared())
    program = compile_onnx(student.open(1, 0), target, formats)
    assert program is not None
    timeline = simulate_program(program, target)
    spent, seconds = energy(program, timeline, target), timeline.total_fs / 1e15 + target.host.dispatch_us / 1e6
    parts = {name: spent.component(name).scaled(1 / seconds / 1e3) for name in COMPONENTS}
    return Found(NVDLA, seconds, parts, standing_w(target)[1])


def watts(band: Band) -> str:
    """`1.23 (0.80 to 2.10)`."""
    return f"{band.typical:.2f}" if band.low == band.high else f"{band.typical:.2f} ({band.low:.2f} to {band.high:.2f})"


def markdown(rows: Iterable[Found]) -> str:
    """The page."""
    lines = [
        "# Power, predicted and published",
        "",
        "Redraw: `make power`. Mean power in watts over the named phase, *typical (low to high)*: low and high have every energy",
        "of the target at its bound at once, which says how far sources disagree and is no interval of a probability",
        "([energy.md](../../docs/energy.md)). Nothing was fitted to these figures. What a figure covers is in bold type.",
        "",
        "| job | ms | published W | NPU | DRAM | host that polls | **what the figure covers** | verdict |",
        "|---|---|---|---|---|---|---|---|",
    ]
    rows = list(rows)
    for row in rows:
        sign = {"=": "", "<": "< ", "~": "about "}[row.figure.bound]
        host = watts(row.host) if row.host.high else "not modelled"
        lines.append(
            f"| {row.figure.job} on `{row.figure.target}` | {1e3 * row.seconds:.2f} | {sign}{row.figure.watts:g} "
            f"| {watts(row.npu)} | {watts(row.dram)} | {host} | {row.figure.covers}: **{watts(row.beside)}** | {row.verdict} |"
        )
    names = [name for name in COMPONENTS if name != "dram"]
    lines += ["", "Where the typical watts of the NPU go:", "", f"| job | {' | '.join(names)} |", f"|---{'|---' * len(names)}|"]
    lines += [
        f"| {row.figure.job} | {' | '.join(f'{row.parts[name].typical:.2f}' for name in names)} |" for row in rows
    ]
    lines += ["", *WHY, "", "How the jobs differ, and who published the figures:", ""]
    lines += [f"- {row.figure.job}: {row.figure.differs} ({row.figure.source})." for row in rows]
    return "\n".join([*lines, ""])


WHY: Final = (
    "What the differences come from, as far as it can be told from here:",
    "",
    "- **Decode is DRAM power**: bits per second times 8 pJ. A model that streams weights faster than the part does takes as much",
    "  more power, with the energy of a token unchanged; so a figure of power alone does not tell the two apart.",
    "- **Polling** is 30 % of another chip's system under another runtime, which takes 7 to 10 W there. A phone that stays below 5 W as",
    "  a whole cannot have that host as well: the two sources contradict each other, so look at NPU and DRAM alone too.",
    "- **Prefill** is multipliers and scratchpad. Every operand is counted as one access of the 8 MB scratchpad per tile; registers and",
    "  small buffers between, which would take most of it back, are not public and not modelled. The published 2.23 W is also that of a",
    "  device whose clock is governed by its power, while the preset runs at its highest clock all the time.",
    "- **The A15's figure** is 0.28 pJ per fp16 multiply-accumulate with everything in it, below what the sources give for the multiplier",
    "  alone at 4 to 5 nm. What it covers is not published.",
    "- **NVDLA's** power agrees while an image takes 3.6 times as long and 4.5 times the energy: here the vector unit copies windows that",
    "  the part reads from its buffer directly, and results leave in 16 bits.",
)

COLUMNS: Final = (
    "job", "target", "phase", "covers", "bound", "published_w", "low_w", "typical_w", "high_w", "npu_w", "dram_w",
    "host_w", "seconds", "verdict", "source", *(f"{name}_w" for name in COMPONENTS if name != "dram"),
)  # fmt: skip


def table(rows: Iterable[Found]) -> str:
    """The same as CSV."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(COLUMNS)
    for row in rows:
        figure, band = row.figure, row.beside
        numbers = (band.low, band.typical, band.high, row.npu.typical, row.dram.typical, row.host.typical)
        writer.writerow(
            [figure.job, figure.target, figure.phase, figure.covers, figure.bound, f"{figure.watts:g}"]
            + [f"{number:.4g}" for number in numbers]
            + [f"{row.seconds:.6g}", row.verdict, figure.source]
            + [f"{row.parts[name].typical:.4g}" for name in COMPONENTS if name != "dram"]
        )
    return out.getvalue()


def page(rows: Iterable[Found], width: float = 460.0) -> str:
    """Bars from low to high with a tick at typical, and a line at the published figure, each row on its own scale."""
    lines: list[str] = []
    for row in rows:
        band, published = row.beside, row.figure.watts
        scale = width / (1.15 * max(band.high, published))
        low, typical, high, line = (round(value * scale, 1) for value in (band.low, band.typical, band.high, published))
        lines.append(
            f"<tr><td>{html.escape(row.figure.job)}<br><small>{html.escape(row.figure.source)}; "
            f"{html.escape(row.figure.differs)}</small></td><td>{html.escape(row.figure.covers)}</td>"
            f'<td><svg width="{width:g}" height="26"><rect x="{low}" y="6" width="{max(1.0, high - low):.1f}" height="14" '
            f'fill="#8fb8a0"/><rect x="{typical}" y="6" width="2" height="14" fill="#222"/>'
            f'<rect x="{line}" y="0" width="2" height="26" fill="#b5523b"/></svg></td>'
            f"<td>{watts(band)}</td><td>{published:g}</td><td>{html.escape(row.verdict)}</td></tr>"
        )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>Power, predicted and published</title>\n'
        "<style>body { font: 14px/1.45 system-ui, sans-serif; color: #222; background: #fdfcfa; margin: 2em; }\n"
        "td, th { padding: .3em .7em; text-align: left; vertical-align: top; } small { color: #666; }</style></head>\n"
        "<body><h1>Power, predicted and published</h1>\n<p>Watts. Green: every energy of the target at its low to every one "
        "at its high bound; black: typical; red: published.</p>\n<table>\n<tr><th>job</th><th>covers</th><th></th>"
        "<th>predicted</th><th>published</th><th>verdict</th></tr>\n" + "\n".join(lines) + "\n</table></body></html>\n"
    )


def write(rows: list[Found], folder: Path = OUT) -> None:
    """The three files."""
    folder.mkdir(parents=True, exist_ok=True)
    texts: dict[str, Any] = {"README.md": markdown(rows), "power.csv": table(rows), "power.html": page(rows)}
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")


def main() -> None:
    """Predicts every figure and writes the folder."""
    rows, meter = [], Meter()
    for figure in FIGURES:
        begin = time.perf_counter()
        rows.append(found(figure, meter))
        spent = time.perf_counter() - begin
        print(f"{figure.job}: {watts(rows[-1].beside)} W, {rows[-1].verdict} ({spent:.0f} s)", flush=True)
    write([*rows, nvdla()])


if __name__ == "__main__":
    main()
