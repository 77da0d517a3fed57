"""`firsttoken footprint`: the DRAM that a student takes on a target, by format of its weights."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Literal

import typer

from firsttoken.progress import Bar
from firsttoken_compiler.errors import OptionError


def footprint(
    student: Annotated[str, typer.Argument(help="A GGUF file, or a built-in student.", show_default=False)],
    target: Annotated[str, typer.Option(help="A preset or a .toml file.")] = "snapdragon-x-elite",
    context: Annotated[int, typer.Option(min=2, help="Tokens of prompt and answer together.")] = 4096,
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of the prompt.")] = 64,
    weights: Annotated[
        str, typer.Option(metavar="FORMAT[,FORMAT...]", help="Formats of the weights, those of 'run'.")
    ] = "int4,q4_k_m,q5_k_m,int8,fp16",
    kv_cache: Annotated[Literal["fp16", "int8"], typer.Option(help="Type of keys and values.")] = "fp16",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")] = False,
) -> None:
    """Show weights, keys and values, activations and programs in bytes, and which published sizes can be true."""
    from firsttoken import api
    from firsttoken.cli import print_json, table
    from firsttoken.footprint import footprints, verdicts
    from firsttoken.options import RunOptions
    from firsttoken.subject import subject_of

    formats = list(dict.fromkeys(name.strip() for name in weights.split(",") if name.strip()))
    if not formats:
        raise OptionError("--weights names no format; give at least one, such as int4,q4_k_m")
    subject, machine = subject_of(student), api.target_of(target)
    options = [RunOptions(weights=name, kv_cache=kv_cache) for name in formats]  # names are refused before any work
    with Bar() as bar:
        found = footprints(subject, machine, formats, context, prompt, options[0], bar.update)
    said = verdicts(subject.name, found)
    if as_json:
        print_json(
            {
                "student": subject.name, "target": machine.name, "context": context, "prompt": prompt,
                "kv_cache": kv_cache,
                "formats": [asdict(entry) | {"total_bytes": entry.total_bytes} for entry in found],
                "claims": [asdict(entry) for entry in said],
            }
        )  # fmt: skip
        return
    columns = ["weights", "weights MB", "of it token table", "KV MB", "activations MB", "programs MB", "total MB"]
    base = next((entry.total_bytes for entry in found if entry.weights == "fp16"), None)
    rows = []
    for entry in found:
        parts = (
            entry.weight_bytes, entry.table_bytes, entry.kv_bytes, entry.activation_bytes, entry.program_bytes,
            entry.total_bytes,
        )  # fmt: skip
        share = [] if base is None else [f"{100 * entry.total_bytes / base:.1f}"]
        rows.append([entry.weights, *(f"{nbytes / 1e6:,.2f}" for nbytes in parts), *share])
    print(f"{subject.name} on {machine.name}: {context} tokens of context, prompts of {prompt}; MB are 10^6 bytes")
    table(columns + ([] if base is None else ["% of fp16"]), rows)
    if said:
        print("Published sizes")
        for line in said:
            alone = f"{line.without_table:.3f} without its token table"
            print(f"  {line.claim}; {line.weights}: {line.gigabytes:.3f} GB ({alone}): {line.verdict}")
