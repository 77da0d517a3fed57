"""`firsttoken quality`: what low precision costs in the student's own words."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Final

import typer

from firsttoken.progress import Bar

if TYPE_CHECKING:
    from firsttoken.fidelity import QualityResult, QualityRow

COLUMNS: Final = (
    "weights", "acts", "group", "norm cache", "kv", "weights in DRAM", "KL mean, nats", "KL 99 %", "same top 1",
    "perplexity", "against fp32",
)  # fmt: skip


def quality(
    student: Annotated[str, typer.Argument(help="A built-in student with weights, or a GGUF file.")],
    weights: Annotated[
        str, typer.Option("--weights", metavar="TYPE[,TYPE...]", help="Types of the weights, a row each.")
    ] = "int4",
    acts: Annotated[str | None, typer.Option("--acts", help="Type of the activations; default as in 'run'.")] = None,
    group: Annotated[str, typer.Option("--group", help="Weights that share a scale: 32, 64, 128, channel.")] = "128",
    norm_cache: Annotated[
        str | None, typer.Option("--norm-cache", help="How normalised rows are kept; default as in 'run'.")
    ] = None,
    acts_range: Annotated[
        str, typer.Option("--acts-range", metavar="dynamic|FILE", help="Scales of activations, as in 'run'.")
    ] = "dynamic",
    kv_cache: Annotated[str, typer.Option(help="Type in which keys and values are kept: fp16, int8.")] = "fp16",
    asymmetric: Annotated[bool, typer.Option("--asymmetric", help="Give int4 and int8 weights zero points.")] = False,
    mix: Annotated[str | None, typer.Option(metavar="RULES", help="Weights of some, as in 'run'.")] = None,
    target: Annotated[str, typer.Option("--target", help="A preset or a .toml file.")] = "snapdragon-x-elite",
    windows: Annotated[int, typer.Option("--windows", min=1, help="Stretches of the text; SmolLM2 has 16.")] = 4,
    tokens: Annotated[int, typer.Option("--tokens", min=2, help="Tokens of each.")] = 128,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")] = False,
) -> None:
    """Measure KL divergence, top-1 agreement and perplexity against fp32 on a text, by executing the program."""
    from firsttoken import api
    from firsttoken.act_ranges import ranges_of
    from firsttoken.options import RunOptions
    from firsttoken.weight_rules import rules_of

    names = dict.fromkeys(name.strip() for name in weights.split(",") if name.strip())
    rules, ranges = () if mix is None else rules_of(mix), ranges_of(acts_range)
    formats = [
        RunOptions(
            weights=name, acts=acts, group=group, norm_cache=norm_cache, kv_cache=kv_cache, asymmetric=asymmetric,
            rules=rules, ranges=ranges,
        )
        for name in names
    ]
    with Bar() as bar:
        result = api.quality(
            student, target, formats=formats, windows=windows, tokens=tokens, progress=bar.update
        )
    if as_json:
        print(result.to_json())
    else:
        show(result)


def show(result: QualityResult) -> None:
    """Prints the table and what it was measured on."""
    from firsttoken.cli import table
    from firsttoken_simulator.report.plain import plain

    table([*COLUMNS], [cells(row) for row in result.rows])
    print(
        f"{plain(result.student)} on {result.target}: {result.windows} windows of {result.window_tokens} tokens of "
        f"{result.text}; perplexity of the float32 graph in onnxruntime {result.reference_perplexity:.3f} "
        f"± {result.reference_perplexity_error:.3f}; ± is one standard error, tokens taken as independent"
    )


def cells(row: QualityRow) -> list[str]:
    """One format as text."""
    return [
        f"{row.weights}{' mixed' if row.rules else ''}{' asymmetric' if row.asymmetric else ''}",
        row.activations,
        row.group if row.weights.startswith("int") else "-",
        row.norm_cache,
        row.kv_cache,
        f"{row.weight_bytes / 1e6:.1f} MB",
        f"{row.kl_mean:.3g} ± {row.kl_mean_error:.1g}",
        f"{row.kl_p99:.3g}",
        f"{100 * row.top1_agreement:.1f} ± {100 * row.top1_agreement_error:.1f} %",
        f"{row.perplexity:.3f}",
        f"{100 * (row.perplexity_ratio - 1):+.2f} ± {100 * row.perplexity_ratio_error:.2f} %",
    ]
