"""``mlx-slim distill``: a student learns from its rows and from teachers."""

from __future__ import annotations

from pathlib import Path

import click

from mlx_slim.cli.train import go
from mlx_slim.config.load import load_recipe, render


@click.command("distill")
@click.argument("recipe")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("-o", "--out", type=click.Path(path_type=Path), help="Run folder [runs/RECIPE].")
@click.option("--resume", is_flag=True, help="Go on where the run was cut off, exactly.")
@click.option("--dry-run", is_flag=True, help="Print the resolved recipe and write nothing.")
@click.option("--json", "as_json", is_flag=True, help="One event a line, as JSON.")
@click.option("--quiet", is_flag=True, help="Warnings and the end only.")
def command(
    recipe: str,
    overrides: tuple[str, ...],
    out: Path | None,
    resume: bool,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Train the model of RECIPE on its rows and on what teachers say of them.

    Teachers are loaded one at a time, before the student; what they say is kept on disk. Any recipe
    can be given teachers: mlx-slim distill smollm2-lora "distill.teachers=[{model: BIGGER}]"
    """
    if as_json and quiet:
        raise click.UsageError("--json and --quiet exclude each other")
    resolved = load_recipe(recipe, overrides)
    if dry_run:
        click.echo(render(resolved))
        return
    from mlx_slim.workflows.distill import distill

    mode = "json" if as_json else "quiet" if quiet else "auto"
    go(distill, resolved, out, resume=resume, mode=mode)
