"""``mlx-slim train``: run or resume a recipe."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlx_slim.cli.options import alive, run_options, show_next
from mlx_slim.config.load import Resolved, load_recipe, render

if TYPE_CHECKING:
    from mlx_slim.finetuning.run_dir import Result


@click.command(
    "train",
    epilog="Example: mlx-slim train smollm2-lora data.path=rows.jsonl train.steps=50 -o runs/mine",
)
@run_options
@click.option(
    "--validate", is_flag=True, help="Only score MODEL, untrained, on the validation rows."
)
def command(
    recipe: str,
    overrides: tuple[str, ...],
    out: Path | None,
    resume: bool,
    dry_run: bool,
    validate: bool,
    mode: str,
) -> None:
    """Fine-tune with RECIPE: a shipped recipe's name or a YAML file.

    Any key can be set: mlx-slim train smollm2-lora train.steps=50 data.path=rows.jsonl -o runs/a
    """
    resolved = load_recipe(recipe, overrides)
    if dry_run:
        click.echo(render(resolved))
        return
    if validate:
        if out is not None or resume:
            raise click.UsageError("--validate writes nothing: leave -o and --resume out")
        _validate(resolved, mode == "json")
        return
    from mlx_slim.finetuning.run import finetune

    go(finetune, resolved, out, resume=resume, mode=mode)


def go(
    workflow: Callable[..., Result],
    resolved: Resolved,
    out: Path | None,
    *,
    resume: bool,
    mode: Any,
) -> None:
    """Run a workflow that trains, with the console and the trackers listening."""
    from mlx_slim import events
    from mlx_slim.console import Console
    from mlx_slim.finetuning.run_dir import steps_after, summary_rows
    from mlx_slim.runtime import world
    from mlx_slim.trackers import Trackers

    folder = out or Path("runs") / resolved.name
    values = resolved.recipe.model_dump(mode="json")
    with (
        Console(mode, title=f"{resolved.name} → {folder}") as console,
        Trackers(resolved.recipe.report_to, folder, name=resolved.name, config=values) as trackers,
    ):
        observer = events.Broadcast([console, trackers])
        result = workflow(resolved, folder, observer=observer, resume=resume)
        console.summary(f"{resolved.name}: done", summary_rows(result))
    if mode == "auto" and world().rank() == 0:
        command = "train" if resolved.recipe.distill is None else "distill"
        show_next(*steps_after(result, command, resolved.source))


def _validate(resolved: Resolved, as_json: bool) -> None:
    """Print the model's loss on the validation rows."""
    from mlx_slim.finetuning.validate import validate

    with alive():
        result = validate(resolved.recipe)
    if as_json:
        click.echo(json.dumps({"event": "validated", **asdict(result)}))
        return
    click.echo(
        f"{result.model}: validation loss {result.loss:.4f} nats/token "
        f"({result.supervised:,} supervised tokens, {result.rows:,} rows)"
    )
