"""``mlx-slim demo``: fine-tune a real model on bundled data, scored before and after.

Invariant: complete steps are reused. Try it: ``mlx-slim demo``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mlx_slim.cli.options import options_of, output_mode, show_next
from mlx_slim.finetuning.options import DemoOptions


@click.command("demo", epilog='Example: mlx-slim demo --methods "lora qlora"')
@options_of(DemoOptions, "model", "methods")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    help="The demo's folder. Default: runs/demo, or runs/demo-MODEL.",
)
@options_of(DemoOptions, "limit")
@output_mode("Events and results as JSON lines.", "Warnings and the table only.")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
def command(
    model: str | None,
    methods: str,
    output: Path | None,
    limit: int,
    mode: Any,
    overrides: tuple[str, ...],
) -> None:
    """Fine-tune a real model on bundled data, and score it before and after.

    The task turns a messy expense message into one line of JSON. KEY=VALUE changes the recipe for
    all methods, as in mlx-slim train. A second run reuses everything that is complete.
    """
    import json
    from dataclasses import asdict

    from mlx_slim.console import Console
    from mlx_slim.finetuning import demo as workflow
    from mlx_slim.finetuning.demo_page import demo_steps

    name = "demo" if model is None else f"demo-{Path(model).name}"
    out = output or Path("runs") / name
    rows = workflow.demo(
        out,
        (methods or DemoOptions.methods).split(),
        model=model,
        limit=limit,
        overrides=overrides,
        watch=lambda title: Console(mode, title=title),
    )
    if mode == "json":
        click.echo(json.dumps({"event": "results", "methods": [asdict(row) for row in rows]}))
        return
    _show(workflow.HEADINGS, [workflow.cells(row) for row in rows])
    click.echo(f"report: {out / 'report.md'}, every answer: {out / 'scores'}")
    if mode == "quiet":
        return
    best = max(rows, key=lambda row: row.after.exact)
    show_next(*demo_steps(out / "runs" / best.method))


def _show(headings: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    """Print the table: methods as columns, which fits 80 characters for four of them."""
    from rich.console import Console as Terminal
    from rich.table import Table

    table = Table(title="mlx-slim demo", title_justify="left")
    table.add_column(headings[0], style="dim", no_wrap=True)
    for row in rows:
        table.add_column(row[0], justify="right")
    for index, heading in enumerate(headings[1:], start=1):
        table.add_row(heading, *(row[index] for row in rows))
    Terminal(highlight=False).print(table)
