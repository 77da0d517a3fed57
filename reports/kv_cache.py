"""Int8 keys and values beside fp16 ones: cycles, bytes and energy of a token on a long cache, and the error of logits.

    python reports/kv_cache.py

Writes reports/kv-cache/README.md.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import numpy as np

from firsttoken import RunOptions, Target, run
from firsttoken.fidelity import equipped
from firsttoken.generation import OrtSession, Session
from firsttoken.npu_session import NpuSession
from firsttoken.subject import subject_of
from firsttoken_simulator.report.energy_table import low_high

STUDENTS: Final = ("deepseek-r1-distill-qwen-1.5b", "smollm2-135m")
TARGETS: Final = ("snapdragon-x-elite", "systolic-128")
PAST: Final = 2048
KINDS: Final = ("fp16", "int8")
QUESTION: Final = "What is the capital of France?"
STEPS: Final = 5
OUT: Final = Path(__file__).parent / "kv-cache" / "README.md"
HEAD: Final = f"""# What int8 keys and values gain and lose

Redraw: `make kv-cache`.

## A token behind {PAST} others

Weights int4 in groups of 128, activations int8, one token. *Cache* are keys and values in DRAM with their scales, *traffic* what
the token moves of them. Attention reads the whole cache once; everything else is weights, which the option does not touch.
Energies are typical, with the band that their sources leave ([energy](../../docs/energy.md)).

| student | target | keys and values | cycles | attention, cycles | quantised appends, cycles | cache MB | traffic MB | energy mJ | low to high |
|---|---|---|---|---|---|---|---|---|---|"""
ERROR: Final = f"""
## Error

`smollm2-135m` with its real weights, fp16 weights and activations, on the functional machine of `{TARGETS[0]}`: cosine of the
logits of {STEPS} steps ("{QUESTION}" and the first tokens of the answer), and whether the likeliest token is the same.

| keys and values | against | cosine min | cosine mean | same token |
|---|---|---|---|---|"""


def main() -> None:
    """Runs everything and writes the page."""
    lines = [HEAD]
    for student in STUDENTS:
        for target in TARGETS:
            lines += [row(student, target, kind) for kind in KINDS]
            print(*lines[-len(KINDS) :], sep="\n", flush=True)
    lines += [ERROR, *errors(), ""]
    OUT.parent.mkdir(exist_ok=True)
    OUT.write_text("\n".join(lines), encoding="utf-8")


def row(student: str, target: str, kind: str) -> str:
    """One token on a full cache."""
    options = RunOptions(kv_cache=kind)
    found = run(student, target, prompt=1, past=PAST, options=options, cache=False)
    low, high = low_high(found)
    attention, appends = (cycles(found, name) for name in ("attention", "kv_quantise"))
    return (
        f"| {student} | {target} | {kind} | {found.ttft_cycles:,} | {attention:,} | {appends:,} "
        f"| {found.kv_bytes / 1e6:.2f} | {found.dram_bytes_by_kind['kv'] / 1e6:.2f} | {found.energy_mj:.2f} "
        f"| {low:.2f} to {high:.2f} |"
    )


def cycles(found: Any, kind: str) -> int:
    """Cycles on the critical path of all operators of a kind."""
    return sum(op.cycles for op in found.ops if op.kind == kind)


def errors() -> list[str]:
    """Logits of the same tokens, by the type of keys and values and in onnxruntime."""
    student, tokenizer = equipped(subject_of(STUDENTS[1]))
    floats = student.float_weights()
    assert floats is not None
    ids = tokenizer.chat(QUESTION)
    capacity, parts = len(ids) + STEPS, (student.provider, student.config, floats)
    reference = OrtSession(*parts, capacity)
    logits = {"onnxruntime, fp32": steps(reference, ids, [])}
    answer = [int(step.argmax()) for step in logits["onnxruntime, fp32"]]
    for kind in KINDS:
        options = RunOptions(weights="fp16", kv_cache=kind)
        session = NpuSession(*parts, capacity, target=Target.load(TARGETS[0]), options=options)
        logits[kind] = steps(session, ids, answer)
    pairs = (("fp16", "onnxruntime, fp32"), ("int8", "onnxruntime, fp32"), ("int8", "fp16"))
    return [compared(a, b, logits) for a, b in pairs]


def steps(session: Session, ids: list[int], answer: list[int]) -> list[np.ndarray]:
    """Logits of the prompt's last token and of the tokens of an answer; without one, of its own."""
    found = [session.prefill(ids)]
    for index in range(STEPS - 1):
        token = answer[index] if answer else int(found[-1].argmax())
        found.append(session.decode(token, len(ids) + index))
    return found


def compared(a: str, b: str, logits: dict[str, list[np.ndarray]]) -> str:
    """A row of the table of errors."""
    pairs = [(x.astype(np.float64), y.astype(np.float64)) for x, y in zip(logits[a], logits[b], strict=True)]
    cosines = [float(x @ y / np.linalg.norm(x) / np.linalg.norm(y)) for x, y in pairs]
    same = sum(int(x.argmax()) == int(y.argmax()) for x, y in pairs)
    return f"| {a} | {b} | {min(cosines):.6f} | {np.mean(cosines):.6f} | {same} of {len(pairs)} |"


if __name__ == "__main__":
    main()
