"""Rows of whole models: a prompt, an answer or an input on a chip, by whatever runtime ran it."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

from firsttoken.api import target_of
from firsttoken.image_network import ImageNetworkConfig
from firsttoken.student import StudentConfig
from firsttoken.validation.chips import chip_of
from firsttoken.validation.measurements import Measurement, Quantity, Row, Skipped
from firsttoken.validation.number_formats import formats_of
from firsttoken.validation.runtimes import on, runtime_of
from firsttoken.validation.students import student_of
from firsttoken_compiler.errors import OptionError
from firsttoken_compiler.options import INTEGERS

if TYPE_CHECKING:
    from firsttoken.options import RunOptions
    from firsttoken.validation.table import Line

ASSUMED_PROMPT: Final = 128
"""Tokens of a prompt whose length a row does not state."""
ANSWER: Final = 128
"""Tokens of an answer whose length a row does not state."""
SAME: Final = 0.02
"""A rate that is the prompt's tokens over the time to the first token, this closely, is not a second measurement."""
_LENGTH: Final = re.compile(r"(?:seq(?:uence)?\.? ?)?(<=?|~)? ?(\d{1,7})(?: tokens)?")
_IMAGE: Final = re.compile(r"(\d{1,5}) ?[x\u00d7] ?\d{1,5}(?: ?[x\u00d7] ?\d{1,3})?")
_INFERRED: Final = re.compile(r"prompt(?:'s)? length (?:is )?inferred", re.IGNORECASE)
_REPEATED: Final = (3072, 1792)
"""GenieX measures graphs of this context with a prompt of so many tokens, that of its context of 2048: it comes with
prompts for contexts of 512, 1024, 2048 and 4096 only."""
_NEW: Final = re.compile(r"\b(?:new_tokens|n_gen) ?= ?(\d{1,6})\b")
_LOW: Final = re.compile(r"\blow for ([\w ,&]+)", re.IGNORECASE)
_WORDS: Final = {"decode": "decode", "ttft": "prefill", "prefill": "prefill", "power": "power", "energy": "energy"}


def row_of(line: Line) -> Row:
    """The measurement in a row, or why it is not run; raises MeasurementError for a field that cannot be read."""
    chip, prompt, context = chip_of(line.text("chip")), _prompt(line), _context(line)
    quantities, unread = _quantities(line)  # read even if the row is not run, so that a bad field never hides
    student, missing = student_of(line.text("model"), line.text("params"))
    reason = chip.refusal or missing or ("" if quantities else "it holds no value that is predicted")
    if reason:
        return Skipped(line.file, line.number, line.text("chip"), line.text("model"), reason)
    runtime = runtime_of(chip.target, line.text("notes"), line.text("source"), line.text("model"),
                         line.text("weight_bits"))  # fmt: skip
    decoder = isinstance(student, StudentConfig)
    formats = formats_of(
        line.text("weight_bits"), line.text("act_bits"), line.text("notes"), runtime, encoder=not decoder
    )
    if formats.options is None:
        return Skipped(line.file, line.number, line.text("chip"), line.text("model"), formats.refusal)
    tokens, assumed = prompt
    inferred = _INFERRED.search(line.text("notes")) is not None
    if inferred and runtime.startswith("geniex") and context == _REPEATED[0] and tokens != _REPEATED[1]:
        assumed = f"the prompt's length is inferred, and GenieX has none for this context: {_REPEATED[1]} tokens"
        tokens = _REPEATED[1]
    limit = getattr(student, "max_positions", None)
    if limit is not None and (needed := max(tokens, context or 0)) > limit:
        why = f"{needed} tokens, and {student.name} has {limit} positions"
        return Skipped(line.file, line.number, line.text("chip"), line.text("model"), why)
    known, unknown = on(target_of(chip.variant or chip.target), runtime)
    try:
        work, setting = _work(line, student, formats.options, tokens, context, known)
    except OptionError as error:
        return Skipped(line.file, line.number, line.text("chip"), line.text("model"), str(error))
    setting = f"{setting}, {runtime}"
    if not decoder:
        quantities = [replace(q, name="inference_ms") if q.name == "ttft_ms" else q for q in quantities]
    return Measurement(
        line.file, line.number, line.text("chip"), chip.target, chip.variant, student.name, work, setting,
        _judged(line, quantities, "not stated" in assumed, inferred), line.text("source"),
        line.text("confidence"), tuple(text for text in (assumed, unknown, *formats.assumed, *unread) if text),
    )  # fmt: skip


def _work(
    line: Line, student: Any, options: RunOptions, tokens: int, context: int | None, runtime: str | None
) -> tuple[Any, str]:
    """(what is run, in words)."""
    from firsttoken.latency import EncoderWork, LlmWork

    scales = f" by {options.group}" if options.weights in INTEGERS else ""
    formats = f"{options.weights}{scales}, {options.acts} activations"
    if not isinstance(student, StudentConfig):
        if isinstance(student, ImageNetworkConfig):
            network = _of_size(student, line.text("prompt_tokens"))
            kept = _image_options(network, options.weights, options.acts or "fp16")
            return EncoderWork(network, kept, 1, runtime), f"image of {network.side} pixels a side, {formats}"
        return EncoderWork(student, options, tokens, runtime), f"{tokens} tokens, {formats}"
    found = _NEW.search(line.text("notes"))
    new = int(found[1]) if found else 1 if "short context" in line.text("notes") else ANSWER
    rows = context if context is not None and context > tokens else tokens + new
    return LlmWork(student, options, tokens, rows, new, runtime), f"{tokens} tokens, context {rows}, {formats}"


def _of_size(network: ImageNetworkConfig, image: str) -> ImageNetworkConfig:
    """The network for images of a row's size, "224x224"; raises OptionError for one that it does not take."""
    sides = _IMAGE.match(image)
    try:
        return replace(network, side=int(sides[1])) if sides else network
    except ValueError as error:
        raise OptionError(str(error)) from error


def _image_options(network: ImageNetworkConfig, weights: str, acts: str) -> RunOptions:
    """Number formats; integer activations have static scales, as there are no windows of rows then."""
    from firsttoken.options import RunOptions
    from firsttoken.subject import ImageNetwork, subject_of

    subject = subject_of(network)
    assert isinstance(subject, ImageNetwork)
    ranges = subject.declared() if acts != "fp16" else ()
    return RunOptions(weights=weights, acts=acts, group="channel", ranges=ranges)


def _prompt(line: Line) -> tuple[int, str]:
    """(tokens, what was assumed) of a prompt."""
    text = line.text("prompt_tokens").casefold()
    if not text or text.startswith(("unstated", "unknown", "n/a")):
        return ASSUMED_PROMPT, f"the prompt's length is not stated: {ASSUMED_PROMPT} tokens"
    if _IMAGE.fullmatch(text):
        return 1, ""
    found = _LENGTH.fullmatch(text)
    if found is None or int(found[2]) < 1:
        raise line.error("prompt_tokens", "a length such as 128, <=128, seq 384, 224x224 or unstated")
    tokens = int(found[2])
    return tokens, f"the prompt's length is given as {text}: {tokens} tokens" if found[1] else ""


def _context(line: Line) -> int | None:
    text = line.text("context")
    found = _LENGTH.fullmatch(text.casefold())
    if text and (found is None or int(found[2]) < 1):
        raise line.error("context", "a number of tokens, nor empty")
    return int(found[2]) if found else None


def _quantities(line: Line) -> tuple[list[Quantity], list[str]]:
    """(what was measured, which fields of power and energy hold no number); raises MeasurementError for times."""
    found = [
        Quantity(name, *reading)
        for name in ("ttft_ms", "prefill_tok_s", "decode_tok_s")
        if (reading := line.reading(name)) is not None
    ]
    unread = []
    for column, reader in (("power_w", power), ("energy", energy)):
        quantity = reader(line.text(column))
        if quantity is not None:
            found.append(quantity)
        elif line.text(column):
            unread.append(f"no number is read from {column} {line.text(column)!r:.60}")
    return found, unread


def power(text: str) -> Quantity | None:
    """Watts: a number, "<5" as an upper bound, the average or plateau where peaks stand beside it."""
    numbers = re.findall(r"(?<![\w.])\d{1,6}(?:\.\d{1,9})?(?![\w.])", re.sub(r"\(.*?\)", "", text))
    if not numbers:
        return None
    words, at = text.casefold(), 0
    order = re.search(r"\((\w+)/(\w+)\)", words)
    if order and len(numbers) == 2:
        at = 1 if order[2] in ("avg", "average", "mean", "plateau") else 0
    elif len(numbers) == 2 and re.search(r"peak.*(?:plateau|avg|average|mean)", words):
        at = 1
    value = float(numbers[at])
    return Quantity("power_w", value, "<" if text.lstrip().startswith("<") else "") if value > 0 else None


def energy(text: str) -> Quantity | None:
    """Millijoules per token, frame or inference."""
    found = re.match(r"\s*(<)?\s*(\d{1,9}(?:\.\d{1,9})?) ?(m|u|µ)?j\b", text.casefold())
    if found is None or float(found[2]) <= 0:
        return None
    value = float(found[2]) * {"m": 1.0, "u": 1e-3, "µ": 1e-3, None: 1e3}[found[3]]
    derived = "derived by its source from time and power" if "derived" in text.casefold() else ""
    return Quantity("energy_mj", value, found[1] or "", derived)


def _judged(line: Line, quantities: list[Quantity], open_length: bool, inferred: bool) -> tuple[Quantity, ...]:
    """The quantities with the reasons why some are shown apart.

    Time to the first token and tokens per second are one measurement where one is the prompt's tokens over the other:
    the time counts, or the rate where the length of the prompt is only inferred.
    """
    confidence = line.text("confidence")
    unreliable = {
        kind for found in _LOW.findall(confidence) for word, kind in _WORDS.items() if word in found.casefold()
    }
    everything = re.match(r"(?:very )?low\b(?! for)", confidence.strip().casefold()) is not None
    values = {q.name: q.value for q in quantities}
    stated = _LENGTH.fullmatch(line.text("prompt_tokens").casefold())
    same = (
        stated is not None and "ttft_ms" in values and "prefill_tok_s" in values
        and abs(values["prefill_tok_s"] * values["ttft_ms"] / 1e3 / float(stated[2]) - 1) <= SAME
    )  # fmt: skip
    without_dram = re.search(r"no dram power|without dram", line.text("notes").casefold()) is not None
    judged = []
    for quantity in quantities:
        apart = quantity.apart
        if without_dram and quantity.kind in ("power", "energy"):
            apart = apart or "measured without the DRAM, predicted with it"
        if everything or quantity.kind in unreliable:
            apart = f"the table calls it unreliable: {confidence}"
        elif open_length and quantity.kind == "prefill":
            apart = "the prompt's length is not stated"
        elif same and quantity.name == ("ttft_ms" if inferred else "prefill_tok_s"):
            apart = "follows from the rate and an inferred length" if inferred else "tokens over ttft_ms: the same"
        judged.append(replace(quantity, apart=apart))
    return tuple(judged)
