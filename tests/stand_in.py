"""A stand-in for the compiler: one small program for whatever it is asked."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from harness import load, make_program, matmul, store, vector

from firsttoken_compiler.isa.program import OpInfo, Program, Tensor
from firsttoken_compiler.isa.types import Dtype, Space


def small_program(meta: dict[str, Any]) -> Program:
    """Two operators of one layer; the more past, the more bytes are loaded."""
    first = (load(4096 + 64 * meta["past"]), matmul(16, 128, 64 * meta["prompt_tokens"], waits=((0, 1),)))
    second = (vector(1, 16, 128, waits=((2, 1),)), store(4096, 8192, waits=((3, 1),)))
    code = [replace(i, op=0) for i in first] + [replace(i, op=1) for i in second]
    ops = (
        OpInfo("layers.0.up", "linear", ("up",), "layers.0.mlp", 0, 2, 16, 128, 64, w_bits=8, a_bits=8, macs=131072),
        OpInfo("layers.0.add", "add", ("add",), "layers.0", 2, 4),
    )
    tensors = (Tensor("w", "weight", Space.DRAM, 0, 4096, Dtype.I8, (4096,)),)
    return replace(
        make_program(*code), ops=ops, tensors=tensors, dram_bytes=1 << 20, meta={**meta, "host_fallbacks": []}
    )


class Compiler:
    """Records every compilation: (student, tokens, past, precision)."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int, int, Any]] = []

    def __call__(
        self, subject: Any, target: Any, tokens: int, past: int, options: Any, progress: Any = None, **control: Any
    ) -> Program | None:
        subject.open(tokens, past)
        self.calls.append((subject.name, tokens, past, options.precision(subject.layer_bits)))
        if progress is not None:
            progress("emit", 1.0, 1.0)
        meta = {**options.meta(), "student": subject.name, "prompt_tokens": tokens, "past": past, "phase": "prefill"}
        meta |= {"target": target.name, "target_hash": target.content_hash}
        meta["weight_formats"] = [{"format": meta["weights"], "stored": False, "matrices": 1, "bytes": 4096}]
        return None if control.get("stop_after") else small_program(meta)
