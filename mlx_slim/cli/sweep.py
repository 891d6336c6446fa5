"""``mlx-slim sweep``: search the hyperparameters of a recipe, each trial in a process.

Invariant: this file turns words into ``SweepOptions`` and prints. Try it: ``mlx-slim sweep
sweep-smollm2-lora --space space-smollm2-lora -o runs/sweep``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from mlx_slim.cli.options import options_of, recipe_names, refuse_model, show_next
from mlx_slim.errors import Interrupted, SlimError
from mlx_slim.events import Event, Notice
from mlx_slim.next_steps import look_at, step
from mlx_slim.sweeping.options import SweepOptions


@click.command(
    "sweep",
    epilog="Example: mlx-slim sweep smollm2-lora data.path=rows.jsonl --space space.yaml "
    "-o runs/sweep",
)
@click.argument("recipe", required=False, shell_complete=recipe_names)
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--space", metavar="FILE", help="A .yaml file of keys and ranges, or a shipped name.")
@click.option("-o", "--out", type=click.Path(path_type=Path), help="Folder [runs/RECIPE-sweep].")
@options_of(SweepOptions)
@click.option("--resume", is_flag=True, help="Resume an interrupted sweep, or try more.")
@click.option("--only", metavar="NAME", help="Run one trial of the folder in this process.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object at the end.")
@click.option("--quiet", is_flag=True, help="Print only warnings and the last lines.")
def command(
    recipe: str | None,
    overrides: tuple[str, ...],
    space: str | None,
    out: Path | None,
    resume: bool,
    only: str | None,
    as_json: bool,
    quiet: bool,
    **chosen: Any,
) -> None:
    """Search the hyperparameters of RECIPE for the lowest validation loss.

    FILE names keys of the recipe, each a list of choices or a range:

    \b
    adapter.rank: [4, 8, 16]
    train.learning_rate: {low: 1.0e-4, high: 1.0e-2, log: true}

    Without RECIPE, the shipped spaces are listed.
    """  # noqa: D301 - click reads the backspace
    if only is not None:
        _one(out, only, quiet)
        return
    if recipe is None:
        from mlx_slim.config import library

        click.echo("\n".join(library.names("spaces")))
        return
    refuse_model(recipe)
    if space is None:
        raise SlimError("no space to search", "set --space FILE; mlx-slim sweep --help shows one")
    from mlx_slim.config.load import load_recipe
    from mlx_slim.sweeping.report import PAGE
    from mlx_slim.sweeping.run import WINNER, sweep

    resolved = load_recipe(recipe, overrides)
    folder = out or Path("runs") / f"{resolved.name}-sweep"
    silent = quiet or as_json
    report = sweep(
        resolved,
        space,
        folder,
        SweepOptions(**chosen),
        _Lines(silent),
        resume=resume,
        processes=True,
        quiet=silent,
    )
    if as_json:
        from mlx_slim.sweeping.records import to_json

        click.echo(json.dumps(to_json(report)))
        return
    click.echo(report.headline)
    for note in report.notes:
        click.echo(note)
    click.echo(f"report: {folder / PAGE}")
    winner = folder / WINNER
    show_next(
        look_at(folder / PAGE),
        step("train with the best values", "mlx-slim", "train", winner, "-o", "runs/best"),
    )


class _Lines:
    """An observer that prints notices; what a trial reports, its process prints."""

    def __init__(self, quiet: bool) -> None:
        self._quiet = quiet

    def notify(self, event: Event) -> None:
        """Print a notice."""
        if isinstance(event, Notice) and event.level == "warning":
            click.echo(f"warning: {event.message}", err=True)
        elif isinstance(event, Notice) and not self._quiet:
            click.echo(event.message)


def _one(out: Path | None, name: str, quiet: bool) -> None:
    """Run one trial; how it ended is in its folder.

    Raises:
        SlimError: If there is no such trial.
    """
    from mlx_slim.console import Console
    from mlx_slim.sweeping.folder import REQUEST
    from mlx_slim.sweeping.trial import run_trial

    if out is None:
        raise SlimError("no sweep to run a trial of", "set -o DIR")
    folder = out / name
    if not (folder / REQUEST).is_file():
        raise SlimError(f"{folder} holds no trial", "run the sweep without --only")
    try:
        with Console("quiet" if quiet else "auto", title=name) as console:
            run_trial(folder, console)
    except Interrupted as stop:
        raise Interrupted(stop.message, "the sweep resumes with --resume") from stop
