"""``mlx-slim distill``: train a student on its rows and on teachers' outputs."""

from __future__ import annotations

from pathlib import Path

import click

from mlx_slim.cli.options import run_options
from mlx_slim.cli.train import go


@click.command("distill", epilog="Example: mlx-slim distill distill-smollm2 -o runs/distilled")
@run_options
def command(
    recipe: str,
    overrides: tuple[str, ...],
    out: Path | None,
    resume: bool,
    dry_run: bool,
    mode: str,
) -> None:
    """Train the model of RECIPE on its rows and on teachers' outputs for them.

    Teachers are loaded one at a time, before the student; their outputs are stored on disk. Any
    recipe can have teachers: mlx-slim distill smollm2-lora "distill.teachers=[{model: BIGGER}]"
    """
    from mlx_slim.config.load import load_recipe, render

    resolved = load_recipe(recipe, overrides)
    if dry_run:
        click.echo(render(resolved))
        return
    from mlx_slim.distillation.run import distill

    go(distill, resolved, out, resume=resume, mode=mode)
