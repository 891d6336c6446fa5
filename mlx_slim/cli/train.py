"""``mlx-slim train``: run or resume a recipe, or train a model on rows without one."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click

from mlx_slim.cli.options import alive, refuse_model, run_options, show_next
from mlx_slim.config.values import Method
from mlx_slim.errors import SlimError

if TYPE_CHECKING:
    from mlx_slim.config.load import Resolved
    from mlx_slim.finetuning.run_dir import Result
    from mlx_slim.planner.choose import Chosen


@click.command(
    "train",
    epilog="Example: mlx-slim train smollm2-lora data.path=rows.jsonl train.steps=50 -o runs/mine; "
    "mlx-slim train MODEL --data rows.jsonl -o runs/mine",
)
@run_options
@click.option(
    "--data",
    metavar="ROWS",
    multiple=True,
    callback=lambda _context, _parameter, values: _one_source(values),
    help="Train a model on these rows, without a recipe.",
)
@click.option(
    "--method", type=click.Choice(get_args(Method)), help="With --data: the method to use."
)
@click.option("--budget", metavar="SIZE", help="With --data: memory not to exceed, e.g. 12GB.")
@click.option("--time", metavar="TIME", help="With --data: time to stay within, roughly, e.g. 2h.")
@click.option(
    "--reward",
    metavar="FILE.py:FUNCTION",
    help="Score drawn answers with this function; it is run, so give only a file you trust.",
)
@click.option(
    "--validate", is_flag=True, help="Only score MODEL, untrained, on the validation rows."
)
def command(
    recipe: str,
    overrides: tuple[str, ...],
    out: Path | None,
    resume: bool,
    dry_run: bool,
    data: str | None,
    method: str | None,
    budget: str | None,
    time: str | None,
    reward: str | None,
    validate: bool,
    mode: str,
) -> None:
    """Fine-tune with RECIPE: a shipped recipe's name or a YAML file; with --data a model.

    Any key can be set: mlx-slim train smollm2-lora train.steps=50 data.path=rows.jsonl -o runs/a

    With --data, RECIPE is a hub id or a folder, and what is not set is chosen to fit the rows and
    this machine. Each choice is printed with its reason; RUN/recipe.yaml has them all, to change
    and run again.

    A recipe with a reward section learns from answers that the model draws and a task or --reward
    scores: mlx-slim train smollm2-grpo -o runs/grpo
    """
    from mlx_slim.config.load import load_recipe, render

    if validate and (out is not None or resume):
        raise click.UsageError("--validate writes nothing: leave -o and --resume out")
    limits = {"--method": method, "--budget": budget, "--time": time}
    if data is None:
        if used := [name for name, value in limits.items() if value is not None]:
            raise SlimError(
                f"{used[0]} can be given only with --data",
                "with a recipe, set its keys: method=lora, memory.budget=12GB, train.epochs=1",
            )
        refuse_model(recipe)
        resolved = load_recipe(recipe, overrides)
    else:
        out = out or Path("runs") / (Path(data).stem or "run")
        words = recipe, data, out, overrides, limits
        resolved = None if dry_run or validate else _started(*words, resume, mode)
        resolved = resolved or _chosen(*words, mode)
    if dry_run:
        if data is None:
            click.echo(render(resolved))
        return
    if validate:
        _validate(resolved, mode == "json")
        return
    from mlx_slim.rewards.run import train

    go(partial(train, reward=reward), resolved, out, resume=resume, mode=mode)


def _one_source(values: tuple[str, ...]) -> str | None:
    """Return the value of ``--data``.

    Raises:
        SlimError: If it is given more than once: click would take the last one only.
    """
    if len(values) > 1:
        raise SlimError(
            f"--data is given {len(values)} times: {', '.join(values)}",
            "name a folder that holds the files, or list them under data.path in a recipe",
        )
    return values[0] if values else None


def _started(
    model: str,
    data: str,
    out: Path,
    overrides: tuple[str, ...],
    limits: dict[str, str | None],
    resume: bool,
    mode: str,
) -> Resolved | None:
    """Return the recipe of the run in ``out`` that is to be resumed; None if there is none yet.

    Raises:
        SlimError: If the folder cannot be used, or was started with something else.
    """
    from mlx_slim.config.load import load_recipe
    from mlx_slim.finetuning.run_dir import RECIPE_FILE, run_dir
    from mlx_slim.runtime import world

    if not run_dir(out).check(resume=resume):
        return None
    file = out / RECIPE_FILE
    if not file.exists():
        raise SlimError(
            f"{out} holds a run that was not started with --data",
            "resume it with the recipe that started it",
        )
    resolved = load_recipe(str(file), overrides)
    recipe = resolved.recipe
    started = {"model": recipe.model, "data.path": recipe.data.path, "method": recipe.method}
    names = {"model": model, "data.path": data, "method": limits["--method"]}
    for key, value in names.items():
        if value not in (None, started[key]):
            raise SlimError(
                f"{out} was started with {key}={started[key]}, not {value}",
                "resume it with the same values, or choose another output folder",
            )
    if mode == "auto" and world().rank() == 0:
        click.echo(f"resuming with the settings in {file}")
    return resolved


def _chosen(
    model: str,
    data: str,
    out: Path,
    overrides: tuple[str, ...],
    limits: dict[str, str | None],
    mode: str,
) -> Resolved:
    """Return a recipe for a model and rows, after it was shown."""
    from mlx_slim.config import library
    from mlx_slim.planner.choose import choose
    from mlx_slim.runtime import world

    if model in library.names("recipes") or model.endswith((".yaml", ".yml")):
        raise SlimError(
            f"{model} is a recipe, and --data trains a model without one",
            f"name a model, or leave --data out: mlx-slim train {model} data.path={data}",
        )
    options = {name.removeprefix("--"): value for name, value in limits.items()}
    with alive():
        chosen = choose(model, data, out=out, overrides=overrides, **options)
    if world().rank() == 0:
        _show(chosen, mode)
    return chosen.resolved


def _show(chosen: Chosen, mode: str) -> None:
    """Print one example and the choices: lines, or JSON lines; nothing in quiet mode."""
    from rich.console import Console

    from mlx_slim.console.rows import legend, row_text, segments
    from mlx_slim.data.tokenize import unwrap

    row, tokenizer = chosen.example, unwrap(chosen.tokenizer)
    if mode == "json":
        runs = [{"text": text, "learned": learned} for text, learned in segments(row, tokenizer)]
        example = {"place": row.raw.place, "format": row.example.kind, "segments": runs}
        click.echo(json.dumps({"event": "example", **example}, ensure_ascii=False))
        for one in chosen.choices:
            click.echo(json.dumps({"event": "choice", **asdict(one)}, ensure_ascii=False))
        cost = {
            "predicted_peak_bytes": chosen.prediction.predicted_peak_bytes,
            "budget_bytes": chosen.budget,
            "predicted_seconds": [chosen.time.low, chosen.time.high],
        }
        click.echo(json.dumps({"event": "cost", **cost}))
    elif mode == "auto":
        console = Console(highlight=False, soft_wrap=True)
        marks = ("", "") if console.color_system else ("⟦", "⟧")
        console.print(row_text(row, tokenizer, *marks))
        console.print(legend(*marks))
        for line in ("", *(one.line for one in chosen.choices), chosen.cost_line, ""):
            click.echo(line)


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
    from mlx_slim.config.preference import loss_unit
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
        unit = loss_unit(resolved.recipe.preference_rows)
        console.summary(f"{resolved.name}: done", summary_rows(result, unit))
    if mode == "auto" and world().rank() == 0:
        command = "train" if resolved.recipe.distill is None else "distill"
        rows = [one.path for one in resolved.recipe.data.sources]
        show_next(*steps_after(result, command, resolved.source, rows))


def _validate(resolved: Resolved, as_json: bool) -> None:
    """Print the model's loss on the validation rows, or how many answers it prefers rightly."""
    from mlx_slim.finetuning.validate import validate
    from mlx_slim.preferences.run import validate_labels, validate_pairs

    with alive():
        if resolved.recipe.preference_rows is None:
            result = validate(resolved.recipe)
            text = (
                f"{result.model}: validation loss {result.loss:.4f} nats/token "
                f"({result.supervised:,} supervised tokens, {result.rows:,} rows)"
            )
        elif resolved.recipe.preference_rows == "labels":
            result = validate_labels(resolved.recipe)
            text = (
                f"{result.model}: desirable answers have the higher mean log-probability in "
                f"{result.accuracy:.1%} of {result.desirable * result.undesirable:,} comparisons "
                f"of {result.desirable:,} validation rows with {result.undesirable:,} others (by "
                f"{result.margin:.4f} nats/token on average)"
            )
        else:
            result = validate_pairs(resolved.recipe)
            text = (
                f"{result.model}: the chosen answer has the higher mean log-probability in "
                f"{result.accuracy:.1%} of {result.pairs:,} validation pairs (by "
                f"{result.margin:.4f} nats/token on average)"
            )
    record = {"event": "validated", **asdict(result)}
    click.echo(json.dumps(record) if as_json else text)
