"""`firsttoken mix`: the best formats of a student's matrices under a budget of bytes or time."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from firsttoken.progress import Bar
from firsttoken_compiler.errors import OptionError

if TYPE_CHECKING:
    from firsttoken.mix_search import Budget, MixResult


def mix(
    student: Annotated[str, typer.Argument(help="A built-in student with weights.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="The TOML file that --mix reads.")] = Path("mix.toml"),
    budget_mb: Annotated[float | None, typer.Option(help="Most MB (10^6 bytes) of all weights in DRAM.")] = None,
    budget_ttft_ms: Annotated[float | None, typer.Option(help="Most milliseconds until the first token.")] = None,
    formats: Annotated[
        str, typer.Option(metavar="TYPE,TYPE[,...]", help="Formats to choose from, the smallest first.")
    ] = "int4,int8",
    acts: Annotated[str | None, typer.Option(help="Type of the activations; default by the first format.")] = None,
    group: Annotated[str, typer.Option(help="Weights that share a scale: 32, 64, 128, channel.")] = "128",
    norm_cache: Annotated[str | None, typer.Option(help="How normalised rows are kept; default as in 'run'.")] = None,
    target: Annotated[str, typer.Option(help="A preset or a .toml file.")] = "snapdragon-x-elite",
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of the prompt that is compiled.")] = 64,
    blocks: Annotated[int, typer.Option(min=1, help="Ranges of layers, in each attention and feed-forward.")] = 5,
    windows: Annotated[int, typer.Option(min=1, help="Stretches of the text to choose by; as many are held out.")] = 2,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens of each.")] = 128,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")] = False,
) -> None:
    """Search the best formats by measured divergence under a budget; write them as a file for --mix."""
    from firsttoken import api
    from firsttoken.mix_search import Budget
    from firsttoken.options import RunOptions
    from firsttoken_simulator.report.folder import write_file

    if (budget_mb is None) == (budget_ttft_ms is None):
        raise OptionError("give one of --budget-mb and --budget-ttft-ms")
    if budget_mb is not None:
        budget = Budget("weight_bytes", budget_mb * 1e6, prompt)
    else:
        assert budget_ttft_ms is not None
        budget = Budget("ttft_ms", budget_ttft_ms, prompt)
    names = [name.strip() for name in formats.split(",") if name.strip()]
    if not names:
        raise OptionError("--formats names no format; give at least 2, such as int4,int8")
    options = RunOptions(weights=names[0], acts=acts, group=group, norm_cache=norm_cache)
    with Bar() as bar:
        result = api.mix(
            student, target, formats=names, budget=budget, options=options, blocks=blocks, windows=windows,
            tokens=tokens, progress=bar.update,
        )  # fmt: skip
    write_file(out, file_text(result, budget).encode())
    if as_json:
        print(result.to_json())
        return
    show(result, budget)
    print(f"wrote {out}")


def file_text(result: MixResult, budget: Budget) -> str:
    """The file, with what it was made for and how it is used."""
    from firsttoken.weight_rules import to_toml
    from firsttoken_simulator.report.plain import plain

    flags = " ".join(f"--{name} {value}" for name, value in result.options.items())
    head = [
        f"# {plain(result.student)} on {plain(result.target)}: {_kind(budget)} {budget.text(result.cost)} of at most "
        f"{budget.text(budget.limit)}, divergence {result.kl_executed:.3g} nats per token.",
        f"# Use: firsttoken run {plain(result.student)} {flags} --mix FILE",
        "",
        "",
    ]
    return "\n".join(head) + to_toml(result.rules)


def show(result: MixResult, budget: Budget) -> None:
    """Prints what was measured, what was chosen, and how far the predictions hold."""
    from firsttoken.cli import table
    from firsttoken_simulator.report.plain import plain

    formats = [option.weights for option in result.groups[0].options]
    rows = []
    for row in result.groups:
        cells = [f"{option.kl:.2e} ± {option.kl_error:.0e}, {_signed(budget, option.cost)}" for option in row.options]
        rows.append([row.group, str(row.matrices), *cells, row.chosen])
    table(["group", "matrices", *(f"{name}: KL, {_kind(budget)}" for name in formats), "chosen"], rows)
    held = result.held_out
    print(
        f"{plain(result.student)} on {plain(result.target)}, {_kind(budget)}: at most {budget.text(budget.limit)}, "
        f"predicted {budget.text(result.cost_predicted)}, compiled {budget.text(result.cost)}\n"
        f"KL, nats per token, {result.windows} windows of {result.window_tokens} tokens: sum of the groups "
        f"{result.kl_predicted:.4g}; all together in onnxruntime {result.kl_weights:.4g}; executed, activations "
        f"{held.activations} {result.kl_executed:.4g}\n"
        f"executed on as much text that was held out: KL {held.kl_mean:.4g} ± {held.kl_mean_error:.1g}, same top 1 "
        f"{100 * held.top1_agreement:.1f} %, perplexity {held.perplexity:.3f} "
        f"({100 * (held.perplexity_ratio - 1):+.2f} % against fp32)"
    )


def _kind(budget: Budget) -> str:
    return "weights in DRAM" if budget.kind == "weight_bytes" else f"TTFT of {budget.prompt} tokens"


def _signed(budget: Budget, cost: float) -> str:
    return f"{'+' if cost >= 0 else ''}{budget.text(cost)}"
