"""Rows of single operators: products, norms, attention and the like, by the time or the cycles that each took."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from firsttoken.api import target_of
from firsttoken.validation.chips import chip_of
from firsttoken.validation.kernel_graphs import Operator
from firsttoken.validation.kernel_works import work_of
from firsttoken.validation.measurements import Measurement, Quantity, Row, Skipped
from firsttoken.validation.runtimes import on, runtime_of
from firsttoken_compiler.errors import FirsttokenError

if TYPE_CHECKING:
    from firsttoken.validation.table import Line

MAX_EXTENT: Final = 1 << 28
_OPERATORS: Final = (
    (r"flash ?attention|\battention\b", "attention"),
    (r"\bgemv\b", "gemv"),
    (r"\bgemm\b|\bmatmul\b|mat ?mul", "matmul"),
    (r"layer ?norm", "layer_norm"),
    (r"rms ?norm", "rms_norm"),
    (r"soft ?max", "softmax"),
    (r"silu[_ ]?(?:and[_ ]?)?mul|swiglu", "silu_mul"),
    (r"eltwise ?add|\badd\b|residual", "add"),
    (r"\brope\b|rotary", "rope"),
    (r"\bbert\b", "bert"),
)
_REFUSED: Final = (
    (r"bandwidth", "a bandwidth: no operator was timed"),
    (r"\bhvx\b", "a product on vector threads alone: programs multiply on the matrix unit"),
)
_DIMENSIONS: Final = {
    "matmul": 3, "gemv": 2, "layer_norm": 2, "rms_norm": 2, "softmax": 2, "silu_mul": 1, "add": 1, "rope": 2,
}  # fmt: skip
_ATTENTION: Final = re.compile(r"lq(\d+) lk(\d+) d(\d+) q(\d+)/kv(\d+)(?: causal ?= ?(\S+))?")


def cycles(line: Line) -> Row:
    """A row such as "gemm_256x256x256" with cycles of TPU v3; raises MeasurementError."""
    chip, target = "TPU v3", "tpu-v3"
    name = line.text("workload")
    reading = line.reading("tpu_v3_measured_cycles")
    if reading is None:
        raise line.error("tpu_v3_measured_cycles", "a number of cycles")
    op, _, shape = name.partition("_") if re.search(r"_\d", name) else (name, "", "")
    kind = _kind(op.replace("_", " "))
    extents = _extents(line, "workload", shape)
    if kind == "attention" and len(extents) == 3:
        heads, rows, width = extents
        extents = (rows, rows, width, heads, heads)
    elif kind == "bert":
        extents = ()
    time = reading[0] / target_of(target).clock_hz * 1e6
    dtypes = "bf16" if kind in ("matmul", "attention", "bert") else "fp32"
    return _row(line, chip, kind, name, extents, dtypes, (time, reading[1]), "workload")


def product(line: Line) -> Row:
    """A row with the extents M, N, K in columns; of a norm these are batch, sequence and width."""
    kind = _kind(line.text("op"))
    m, n, k = (line.whole(name) for name in ("m", "n", "k"))
    shape = (m * n, k) if kind in ("layer_norm", "rms_norm", "softmax") else (m, k, n)
    return _row(line, line.text("chip"), kind, line.text("op"), shape, _dtypes(line.text("dtype"), kind),
                line.reading("time_us"), "m")  # fmt: skip


def operator(line: Line) -> Row:
    """A row with the operator and its types in one field and the shape in another."""
    name, shape, causal = line.text("op"), line.text("shape"), False
    kind = _kind(name)
    extents: tuple[int, ...]
    if kind == "attention":
        found = _ATTENTION.fullmatch(shape)
        if found is None:
            raise line.error("shape", "an attention such as lq512 lk512 d64 q12/kv6 causal=✗")
        extents = tuple(int(part) for part in found.groups()[:5])
        causal = (found[6] or "").casefold() in ("✓", "true", "yes", "1")
    elif kind == "rope":
        numbers = re.fullmatch(r"(\d{1,9}) ?\((\d{1,5})\)", shape)
        if numbers is None:
            raise line.error("shape", "rows and, in brackets, the width of a head, such as 16384 (64)")
        extents = (int(numbers[1]), int(numbers[2]))
    else:
        extents = _extents(line, "shape", re.sub(r"\(.*\)", "", shape).strip())
    return _row(line, line.text("chip"), kind, name, extents, _dtypes(name, kind), line.reading("time_us"), "shape",
                causal)  # fmt: skip


def slower_apart(rows: Sequence[Row]) -> tuple[Row, ...]:
    """Of rows that time the same operator in several ways, such as tilings, only the fastest counts."""
    best: dict[tuple[str, str], tuple[float, int]] = {}
    for at, row in enumerate(rows):
        if isinstance(row, Measurement):
            key = (row.target, row.model)
            best[key] = min(best.get(key, (row.quantities[0].value, at)), (row.quantities[0].value, at))
    found: list[Row] = []
    for at, row in enumerate(rows):
        if isinstance(row, Measurement) and best[row.target, row.model][1] != at:
            faster = rows[best[row.target, row.model][1]].line
            why = f"the same operator is faster in line {faster}, and the tiling is the tool's choice"
            row = replace(row, quantities=tuple(replace(q, apart=q.apart or why) for q in row.quantities))
        found.append(row)
    return tuple(found)


def _row(
    line: Line, chip_name: str, kind: str, name: str, shape: tuple[int, ...], dtypes: str,
    reading: tuple[float, str] | None, column: str, causal: bool = False,
) -> Row:  # fmt: skip
    chip = chip_of(chip_name)
    words = f"{name} {line.text('shape')}".casefold()
    refusal = next((why for pattern, why in _REFUSED if re.search(pattern, words)), "")
    reason = chip.refusal or refusal
    if not reason and not kind:
        reason = f"no operator {name!r:.80}"
    if not reason and reading is None:
        reason = "it holds no time"
    if reason or reading is None:
        return Skipped(line.file, line.number, chip_name, name, reason)
    if kind in _DIMENSIONS and len(shape) != _DIMENSIONS[kind]:
        raise line.error(column, f"{_DIMENSIONS[kind]} extents, which {kind} has")
    found = Operator(kind, shape, dtypes, causal)
    runtime = runtime_of(chip.target, name, line.text("source"), line.text("used_by/source"), operator=True)
    known, unknown = on(target_of(chip.target), runtime)
    try:
        work = work_of(found, known)
    except FirsttokenError as error:
        return Skipped(line.file, line.number, chip_name, found.text, str(error))
    return Measurement(
        line.file, line.number, chip_name, chip.target, chip.variant, found.text, work, f"{found.op}, {runtime}",
        (Quantity("time_us", *reading),), line.text("source"), line.text("confidence"),
        (unknown,) if unknown else (),
    )  # fmt: skip


def _kind(text: str) -> str:
    words = re.sub(r"_", " ", text.casefold())
    return next((kind for pattern, kind in _OPERATORS if re.search(pattern, words)), "")


def _dtypes(text: str, kind: str) -> str:
    """Types of operands and result by the words of a table; floats of 16 bits unless it says otherwise."""
    words = text.casefold()
    both = re.search(r"(bf16|fp16|int8)_in_(bf16|fp16|fp32|int32|int8)_out", words)
    if both:
        return f"{both[1]}>{both[2]}"
    single = re.search(r"bf16|fp16|fp32|int8", words)
    if single:
        return single[0]
    return "bf16"  # also of a norm whose table does not say: as the products of the same table


def _extents(line: Line, column: str, text: str) -> tuple[int, ...]:
    """The extents in "2048x2048x512"; nothing for an empty text; raises MeasurementError."""
    parts = re.split(r" ?[x\u00d7] ?", text) if text else []
    if any(not part.isascii() or not part.isdigit() or not 1 <= int(part[:9]) <= MAX_EXTENT or len(part) > 9
           for part in parts):  # fmt: skip
        raise line.error(column, f"extents from 1 to {MAX_EXTENT} such as 2048x2048x512")
    return tuple(int(part) for part in parts)
