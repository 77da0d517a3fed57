"""`firsttoken targets` and `firsttoken students`: what comes with the package and with plug-ins."""

from __future__ import annotations

from typing import Annotated

import typer

targets_app = typer.Typer(help="The NPUs that come with the package.", invoke_without_command=True)
students_app = typer.Typer(help="The students that installed plug-ins provide.", invoke_without_command=True)
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]


@targets_app.callback()
def targets(context: typer.Context, as_json: AsJson = False) -> None:
    """List the targets that come with the package."""
    if context.invoked_subcommand is not None:
        return
    from firsttoken.cli import print_json, table
    from firsttoken_compiler.target.load import load_target, preset_names

    known = [load_target(name) for name in preset_names()]
    if as_json:
        print_json([{"name": t.name, "description": t.description, "hash": t.content_hash} for t in known])
    else:
        table(["name", "description"], [[target.name, target.description] for target in known])


@targets_app.command("show")
def targets_show(name: Annotated[str, typer.Argument(show_default=False)], as_json: AsJson = False) -> None:
    """Print every value of a target with its unit, grade and source."""
    from firsttoken.cli import print_json, table
    from firsttoken.describe import target_document

    document = target_document(name)
    if as_json:
        print_json(document)
        return
    print(f"{document['name']}: {document['description']} (hash {document['hash']})")
    columns = ["path", "value", "unit", "grade", "source"]
    for row in document["values"]:
        if row["low"] is not None:
            row["value"] = f"{row['value']} ({row['low']} to {row['high']})"
    table(columns, [[str(row[column]) for column in columns] for row in document["values"]])
    print("not modelled:")
    for line in document["not_modelled"]:
        print(f"  {line}")


@students_app.callback()
def students(context: typer.Context, as_json: AsJson = False) -> None:
    """List the students that installed plug-ins provide."""
    if context.invoked_subcommand is not None:
        return
    from firsttoken.cli import print_json, table
    from firsttoken.describe import student_rows

    rows = student_rows()
    if as_json:
        print_json(rows)
    else:
        columns = ["name", "family", "layers", "hidden", "parameters"]
        table(columns, [[f"{row[c]:,}" if c == "parameters" else str(row[c]) for c in columns] for row in rows])


@students_app.command("show")
def students_show(name: Annotated[str, typer.Argument(show_default=False)], as_json: AsJson = False) -> None:
    """Print the dimensions of a student."""
    from firsttoken.cli import print_facts
    from firsttoken.describe import student_document

    print_facts(student_document(name), as_json)
