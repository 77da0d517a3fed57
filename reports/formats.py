"""Weights in blocks: how far from the weights they are, what a student takes in them, and whether Q3_K is below 800 MB.

    python reports/formats.py

Writes reports/formats/README.md. ggml's own quantisers are asked too where the wheel `ctransformers` is installed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import ggml_quantisers
import numpy as np
from gguf import GGMLQuantizationType
from gguf.quants import dequantize

from firsttoken.student import StudentConfig
from firsttoken_compiler.formats.dequantise import dequantise
from firsttoken_compiler.formats.policy import POLICIES, Policy
from firsttoken_compiler.formats.quantise import quantise
from firsttoken_compiler.formats.types import BLOCK_TYPES, BlockType
from firsttoken_models import smollm2
from firsttoken_models.gguf_file import read
from firsttoken_models.gguf_names import as_stored, gguf_name
from firsttoken_models.gguf_write import encoded, mixed, tensor_bytes
from firsttoken_models.students import DEEPSEEK_R1_DISTILL_QWEN_1_5B, SMOLLM2_135M
from firsttoken_models.weights import EMBEDDING, tensor_shapes

OUT: Final = Path(__file__).parent / "formats" / "README.md"
Rows = Callable[[], Iterator[np.ndarray]]
MIXTURES: Final = (
    "q3_k_s", "q3_k_m", "q3_k_l", "q4_0", "q4_1", "q4_k_s", "q4_k_m", "q5_k_s", "q5_k_m", "q6_k", "q8_0", "f16",
)  # fmt: skip
QUANTISERS: Final[dict[str, Callable[[np.ndarray, BlockType], np.ndarray]]] = {
    "ours": quantise,
    "nearest": lambda x, kind: quantise(x, kind, tries=0),
    "ggml": ggml_quantisers.quantise,
}


def matrices(*endings: str, turned: bool = False) -> Iterator[np.ndarray]:
    """Matrices of SmolLM2 whose names end so, rows of weights that are summed over; turned: the other way round."""
    weights = smollm2.load_weights()
    for name, shape in tensor_shapes(SMOLLM2_135M).items():
        if len(shape) == 2 and name.endswith(endings):
            rows = as_stored(SMOLLM2_135M, name, weights.tensor(name))
            yield np.ascontiguousarray(rows.T) if turned else rows


def gaussian() -> Iterator[np.ndarray]:
    """Random weights, which lie on nobody's grid."""
    yield (np.random.default_rng(0).standard_normal((1024, 4096)) * 0.03).astype(np.float32)


SETS: Final[dict[str, tuple[str, Rows]]] = {
    "file": ("the 210 matrices of layers, rows as the file has them", lambda: matrices("proj.weight")),
    "down": ("the 30 `ffn_down`, rows of 1536, as the file has them", lambda: matrices("down_proj.weight")),
    "turned": (
        "the 60 `ffn_gate` and `ffn_up` turned, rows of 1536",
        lambda: matrices("gate_proj.weight", "up_proj.weight", turned=True),
    ),
    "table": ("the embedding table turned, rows of 49152", lambda: matrices(EMBEDDING, turned=True)),
    "gauss": ("4 million Gaussian weights", gaussian),
}


def error(rows: Rows, kind: BlockType, name: str) -> float:
    """Percent, root mean square over that of the weights."""
    off = of = 0.0
    for x in rows():
        left = dequantise(QUANTISERS[name](x, kind), kind).astype(np.float64) - x
        off, of = off + float((left**2).sum()), of + float((x.astype(np.float64) ** 2).sum())
    return 100 * (off / of) ** 0.5


def errors() -> list[str]:
    """The tables of errors, and what they come to."""
    found = ggml_quantisers.library()
    lines, beside = [], {"nearest": [], "ggml": []}
    for key, (words, rows) in SETS.items():
        lines += [
            f"### {words[0].upper()}{words[1:]}",
            "",
            "| type | bits | ours | nearest | ggml |",
            "|---|---|---|---|---|",
        ]
        for kind in BLOCK_TYPES.values():
            if key == "file" and kind.block > 32:
                continue
            searched = kind.block > 32 or bool(kind.codebook)
            errors = {"ours": error(rows, kind, "ours")}
            errors["nearest"] = error(rows, kind, "nearest") if searched else errors["ours"]
            if found and kind.name in ggml_quantisers.TYPES:
                errors["ggml"] = error(rows, kind, "ggml")
            if kind.block > 32:
                for name in beside.keys() & errors.keys():
                    beside[name].append(1 - errors["ours"] / errors[name])
            shown = (f"{errors[name]:.4f}" if name in errors else "-" for name in QUANTISERS)
            lines.append(f"| {kind.name} | {8 * kind.nbytes / kind.block:g} | {' | '.join(shown)} |")
            print(key, lines[-1], flush=True)
        lines.append("")
    ranges = {name: f"{100 * min(of):.1f} to {100 * max(of):.1f} %" for name, of in beside.items() if of}
    says = f"K-quants here have {ranges['nearest']} less error than when rounded"
    says += f", and {ranges['ggml']} less than those of ggml's search" if "ggml" in ranges else ""
    says += "; most where the weights lie on the grids of their file."
    return [
        "## Errors",
        "",
        says,
        "",
        "Percent: root mean square of the error over that of the weights. `nearest` rounds to the grid that the largest (and least)",
        "weights of a group span, small scales to the nearest one; for types without small scales that is ggml's quantiser, and ours.",
        f"The column ggml is {found[1] if found else 'empty, as ctransformers is not installed'}, which has no IQ4_NL.",
        "",
        "The weights of layers lie on the grids of SmolLM2's file, Q4_1 in groups of 32 along each row: in rows as the file has them",
        "Q4_1 costs nothing, Q4_K and Q5_K little. Turned matrices, the embedding table (Q8_0 in the file) and Gaussian weights say",
        "what other weights would lose. Rows of 576 are no multiple of 256: only `ffn_down` can be K-quants as it is.",
        "",
        *lines,
    ]


def exactness() -> list[str]:
    """Bits against gguf's on the real file, and the file made again."""
    file, weights = read(smollm2.gguf_file()[0]), smollm2.load_weights()
    blocks = different = same = tensors = 0
    rule = mixed(POLICIES["q4_1"], SMOLLM2_135M)
    for name, shape in tensor_shapes(SMOLLM2_135M).items():
        stored, kind = file.bytes_of(gguf_name(name)), BLOCK_TYPES.get(file.tensors[gguf_name(name)].type)
        rows = as_stored(SMOLLM2_135M, name, weights.tensor(name))
        tensors += 1
        type_ = rule(name, rows.shape[-1]) if len(shape) > 1 else "f32"
        same += np.array_equal(encoded(rows, type_, name).reshape(-1).view(np.uint8), stored.reshape(-1))
        if kind is not None:
            mine, theirs = dequantise(stored, kind), dequantize(stored, GGMLQuantizationType(kind.ggml))
            blocks += mine.size // kind.block
            different += int((mine.view(np.uint32) != theirs.view(np.uint32)).sum())
    return [
        "## The real file",
        "",
        f"`{file.path.name}`: {blocks:,} blocks of Q4_1 and Q8_0 as floats, beside `gguf.quants.dequantize`: "
        f"{different} numbers differ in a bit. Those floats quantised again under `q4_1`, whose rule for heads gives the table "
        f"Q6_K, or Q8_0 where rows are no multiple of 256: {same} of {tensors} tensors are the file's own, byte for byte.",
        "",
    ]


def megabytes(config: StudentConfig, policy: Policy, *, without_table: bool = False) -> float:
    """Millions of bytes of all tensors, or of those that every token reads."""
    total = sum(entry.nbytes for entry in tensor_bytes(config, policy))
    if without_table:
        kind = BLOCK_TYPES.get(mixed(policy, config)(EMBEDDING, config.hidden))
        row = kind.row_bytes(config.hidden) if kind is not None else 2 * config.hidden
        total -= config.vocab * row
    return total / 1e6


def policies() -> list[str]:
    """Bytes of two students under every mixture."""
    reference, small = DEEPSEEK_R1_DISTILL_QWEN_1_5B, SMOLLM2_135M
    lines = ["## Mixtures", ""]
    lines += [
        f"Millions of bytes of tensors, without a file's header. Streamed: without the table of `{reference.name}`,"
    ]
    lines += ["of which a token reads one row.", ""]
    lines += [
        f"| mixture | {reference.name} | bits per weight | streamed | {small.name} | its types |",
        "|---|---|---|---|---|---|",
    ]
    for name in sorted(MIXTURES, key=lambda name: megabytes(reference, POLICIES[name])):
        whole = megabytes(reference, POLICIES[name])
        types = ", ".join(
            f"{entry.tensors} {entry.type}" for entry in tensor_bytes(small, POLICIES[name]) if entry.type != "f32"
        )
        lines.append(
            f"| {name} | {whole:.1f} | {8e6 * whole / reference.parameters:.3f} "
            f"| {megabytes(reference, POLICIES[name], without_table=True):.1f} | {megabytes(small, POLICIES[name]):.1f} | {types} |"
        )
    return [*lines, ""]


def below_800() -> list[str]:
    """By what choice Q3_K stays below 800 MB."""
    config, words = DEEPSEEK_R1_DISTILL_QWEN_1_5B, {"q6_k": "`q3_k_s`", "q3_k": "`q3_k`"}
    rows = []
    for head in ("q6_k", "q5_k", "q4_k", "q3_k"):
        policy = Policy("", "q3_k", head)
        whole, streamed = megabytes(config, policy), megabytes(config, policy, without_table=True)
        rows.append(f"| {head} | {words.get(head, '-')} | {whole:.1f} | {streamed:.1f} |")
    return [
        "## Q3_K below 800 MB",
        "",
        f"Not as it is published: of the Q3_K mixtures `q3_k_s` of {config.name} is the smallest, and its head is Q6_K. All other",
        "matrices in Q3_K, millions of bytes by the type of the head:",
        "",
        "| head | `--weights` | tensors | without the table |",
        "|---|---|---|---|",
        *rows,
        "",
        "So there are three ways: the table stays on flash, of which a token reads one row; or the head is Q4_K, which is below 800",
        "only without the 6 MB of a file's header (vocabulary and merges); or it is Q3_K. What a head loses in each type is above,",
        "for SmolLM2's embedding table, which is its head.",
        "",
    ]


def main() -> None:
    """Measures everything and writes the page."""
    lines = ["# Weights in blocks", "", "Redraw: `make formats`. Speed: [throughput](throughput.md).", ""]
    for part in (exactness, errors, policies, below_800):
        lines += part()
    OUT.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")
    print(f"wrote {OUT}")


if __name__ == "__main__":
    main()
