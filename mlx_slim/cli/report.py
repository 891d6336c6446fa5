"""``mlx-slim report``: the page of a matrix, made again or checked against what is stored."""

from __future__ import annotations

from pathlib import Path

import click


@click.command("report")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--verify", is_flag=True, help="Count every published number again; write nothing.")
def command(folder: Path, verify: bool) -> None:
    """Write report.html, report.md and results.json of the matrix in FOLDER."""
    if not verify:
        show(folder)
        return
    from mlx_slim.compare.verify import verify as check

    found = check(folder)
    for cell, why in found.missing:
        click.echo(f"warning: {cell} is not among them: {why}", err=True)
    click.echo(
        f"{found.numbers:,} numbers of {found.cells} of {found.cells + len(found.missing)} cells "
        f"counted again from {found.questions:,} answers: all agree, and every score × n is a "
        "whole number"
    )


def show(folder: Path) -> None:
    """Write the report and say where it is and what it says."""
    from mlx_slim.compare.report import report

    done = report(folder)
    for line in done.results["headline"]:
        click.echo(line)
    for item in done.results["failed"]:
        click.echo(f"warning: {item['cell']}: {item['why']}", err=True)
    click.echo(f"report: {done.page}")
