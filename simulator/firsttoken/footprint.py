"""What a student takes of a target's DRAM while it answers, by format of its weights, from its programs' memory plans.

And which published sizes of the students that come with the package can be true: claims are compared with the plans.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Final

from firsttoken.cache import ResultCache, content_key
from firsttoken.options import Progress, RunOptions
from firsttoken.subject import Built, Subject
from firsttoken_compiler.errors import OptionError

if TYPE_CHECKING:
    from firsttoken_compiler.isa.program import Program
    from firsttoken_compiler.target.target import Target


@dataclass(frozen=True, slots=True)
class Footprint:
    """Bytes of DRAM of one student in one format.

    Attributes:
        weights: format of the weights.
        weight_bytes: weights, scales and constants, once for all programs.
        table_bytes: of these, what rows of token embeddings are gathered from.
        kv_bytes: keys and values of the whole context.
        activation_bytes: inputs, outputs and values between operators, of the program that needs most.
        scratchpad_bytes: scratchpad in use, the most of all programs; not DRAM.
        program_bytes: the files of the programs, one for the prompt and one for each further token.
    """

    weights: str
    weight_bytes: int
    table_bytes: int
    kv_bytes: int
    activation_bytes: int
    scratchpad_bytes: int
    program_bytes: int

    @property
    def total_bytes(self) -> int:
        """All of DRAM."""
        return self.weight_bytes + self.kv_bytes + self.activation_bytes + self.program_bytes


@dataclass(frozen=True, slots=True)
class Claim:
    """A published size: what it says, of which formats, and how many GB (10^9 bytes) there may be at most."""

    student: str
    text: str
    formats: tuple[str, ...]
    part: str
    """`weights`, or `total`."""
    most: float


STUDENT: Final = "deepseek-r1-distill-qwen-1.5b"
CLAIMS: Final = (
    Claim(STUDENT, "Q4_K_M and Q5_K_M weights take 1.12 to 1.30 GB", ("q4_k_m", "q5_k_m"), "weights", 1.30),
    Claim(STUDENT, "Q3_K weights take less than 800 MB", ("q3_k_s", "q3_k_m", "q3_k_l"), "weights", 0.80),
    Claim(STUDENT, "in FP16 it takes 3.2 GB in all", ("fp16",), "total", 3.2),
    Claim(STUDENT, "quantised it takes 1.8 GB in all", ("int4", "q4_k_m", "q5_k_m", "int8"), "total", 1.8),
)
"""From a post that names no device and no method ("DeepSeek-R1-Distill-Qwen-1.5B: A Breakthrough in Mobile AI")."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the plans say about a claim for one format."""

    claim: str
    weights: str
    gigabytes: float
    without_table: float
    """The same with the table of token embeddings left in flash."""
    verdict: str


def footprints(
    subject: Subject, target: Target, formats: Sequence[str], context: int, prompt: int, options: RunOptions,
    progress: Progress | None = None,
) -> list[Footprint]:  # fmt: skip
    """The bytes in each format, with `context` tokens in the cache at the end and prompts of `prompt` tokens.

    Raises OptionError for a student that has no cache, for lengths that do not fit, and what compiling raises.
    """
    if not isinstance(subject, Built):
        raise OptionError(f"{subject.name} is {subject.kind}: give a GGUF file, or a built-in language model")
    if not 1 <= prompt < context:
        raise OptionError(f"--prompt {prompt}: give 1 to {context - 1} tokens, fewer than --context {context}")
    lengths = (subject.lengths(prompt, 0), subject.lengths(1, context - 1))
    found = []
    for weights in formats:
        wanted = replace(options, weights=weights)
        parts = {
            "student": subject.content(), "target": target.content_hash, "lengths": lengths,
            "precision": wanted.precision(subject.layer_bits).canonical_json(), "weights": weights,
        }  # fmt: skip
        key = content_key("footprint", parts, subject.packages)
        kept = ResultCache().get(key, ("footprint.json",))
        if kept is None:
            made = _measured(subject, target, weights, lengths, wanted, progress)
            ResultCache().put(key, {"footprint.json": json.dumps(asdict(made)).encode()})
        else:
            made = Footprint(**json.loads(kept["footprint.json"]))
        found.append(made)
    return found


def verdicts(student: str, found: Sequence[Footprint]) -> list[Verdict]:
    """What the footprints say about the published sizes of this student."""
    by_format = {footprint.weights: footprint for footprint in found}
    lines = []
    for claim in CLAIMS:
        for name in claim.formats if claim.student == student else ():
            if name in by_format:
                footprint = by_format[name]
                nbytes = footprint.weight_bytes if claim.part == "weights" else footprint.total_bytes
                sizes = nbytes / 1e9, (nbytes - footprint.table_bytes) / 1e9
                lines.append(Verdict(claim.text, name, *sizes, _verdict(claim, *sizes)))
    return lines


def _verdict(claim: Claim, size: float, without_table: float) -> str:
    """Sizes count as published, in hundredths of a GB."""
    if round(size, 2) <= claim.most:
        return "possible"
    if round(without_table, 2) <= claim.most:
        return "only with the table of token embeddings outside of memory"
    return "not possible: too large"


def _measured(
    subject: Built, target: Target, weights: str, lengths: Sequence[tuple[int, int]], options: RunOptions,
    progress: Progress | None,
) -> Footprint:  # fmt: skip
    from firsttoken.api import compile_subject

    def step(stage: str, done: float, total: float) -> None:
        if progress is not None:
            progress(f"{weights}: {stage}", done, total)

    programs: list[Program] = [compile_subject(subject, target, *pair, options, step) for pair in lengths]
    kinds = [_kinds(program) for program in programs]
    return Footprint(
        weights=weights,
        weight_bytes=max(each.get("weight", 0) + each.get("constant", 0) for each in kinds),
        table_bytes=_table_bytes(programs[-1]),
        kv_bytes=kinds[-1].get("kv", 0),
        activation_bytes=max(sum(each.get(kind, 0) for kind in ("input", "output", "activation")) for each in kinds),
        scratchpad_bytes=max(program.spad_bytes for program in programs),
        program_bytes=sum(len(program.encode()) for program in programs),
    )


def _kinds(program: Program) -> dict[str, int]:
    from firsttoken_compiler.isa.memory_plan import kind_bytes

    return kind_bytes(program)


def _table_bytes(program: Program) -> int:
    """Bytes of the largest weight that rows are gathered from, all its parts together."""
    from firsttoken_compiler.isa import word
    from firsttoken_compiler.isa.dma import Gather

    rows = program.code[program.code[:, word.OPCODE] == Gather.OPCODE]
    starts = set(rows[:, word.operand_column(2) + 1].tolist())
    sources: dict[str, int] = {}
    for tensor in program.of_kind("weight"):
        if tensor.address in starts and tensor.packing is not None:
            sources[tensor.packing.source] = sources.get(tensor.packing.source, 0) + tensor.nbytes
    return max(sources.values(), default=0)
