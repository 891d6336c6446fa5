"""``mlx-slim prune``: remove the least important layers or widths, and measure the effect.

Invariant: user errors are reported before any weight is read. Try it:
``mlx-slim prune MODEL -o DIR --ratio 0.2 --dry-run``, then the same without ``--dry-run``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from mlx_slim.cli.options import Whole, options_of, show_next
from mlx_slim.errors import SlimError
from mlx_slim.next_steps import GENERAL_TASK, NextStep, step, train_on, use_model
from mlx_slim.pruning.options import PruneOptions

_PATH = click.Path(path_type=Path)


@click.command(
    "prune",
    epilog="Example: mlx-slim prune models/mine -o models/narrow --method taylor --ratio 0.2",
)
@click.argument("model")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("-o", "--out", required=True, type=_PATH, help="New folder.")
@options_of(PruneOptions, "axis", "method", "layers")
@click.option(
    "--ratio", type=float, help="Fraction of the layers, or of the groups of a layer, to remove."
)
@click.option("--target-params", metavar="N", help="Most parameters to keep: 100M, 1.1B.")
@click.option("--target-bytes", metavar="SIZE", help="Most bytes to keep: 200MB.")
@options_of(
    PruneOptions,
    "heads",
    "mlp",
    "hidden",
    "hidden_size",
    "intermediate_size",
    "kv_heads",
    "experts",
    "uniform",
    "compensate",
    "ranking",
    "protect_first",
    "protect_last",
    "calibration",
    "samples",
    "length",
    "held_out",
    "seed",
    "revision",
)
@click.option(
    "--recover", metavar="RECIPE", help="Then train it with RECIPE; KEY=VALUE changes a key."
)
@click.option(
    "--task", "tasks", multiple=True, metavar="NAMES", help="Tasks to score before and after."
)
@click.option("--limit", type=Whole(1), metavar="N", help="Score the first N rows only.")
@click.option("--data-dir", type=_PATH, metavar="DIR", help="Evaluation data [MLX_SLIM_DATA].")
@click.option("--resume", is_flag=True, help="Resume a run that has --recover or --task.")
@click.option("--dry-run", is_flag=True, help="Print the counts and write nothing.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object at the end.")
def command(
    model: str,
    overrides: tuple[str, ...],
    out: Path,
    target_params: str | None,
    target_bytes: str | None,
    recover: str | None,
    tasks: tuple[str, ...],
    limit: int | None,
    data_dir: Path | None,
    resume: bool,
    dry_run: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    """Prune layers, heads, neurons, hidden size or experts of MODEL (folder or hub id, in floats).

    Give one of --ratio, --target-params, --target-bytes and --layers, or the sizes themselves:
    --hidden-size, --intermediate-size, --kv-heads, --experts. With --recover or --task, DIR is a
    run folder: DIR/model is pruned, DIR/recover tuned, DIR/report.json compares.
    """
    from rich.console import Console as RichConsole

    from mlx_slim.console import Console
    from mlx_slim.units import parse_size

    options = PruneOptions(
        target_params=None if target_params is None else _count(target_params),
        target_bytes=None if target_bytes is None else parse_size(target_bytes),
        **settings,
    )
    if dry_run:
        _dry_run(model, options, as_json)
        return
    output = RichConsole(highlight=False, stderr=as_json)
    if recover is None and not tasks:
        unused = [*overrides, *(["--resume"] if resume else []), *(["--limit"] if limit else [])]
        if unused:
            raise SlimError(
                f"{', '.join(unused)} can be given only with --recover or --task",
                "leave it out, or give --recover RECIPE",
            )
        from mlx_slim.pruning.run import prune

        with Console("quiet" if as_json else "plain", output=output) as console:
            result = prune(model, out, options, console)
        click.echo(json.dumps(result.record) if as_json else "\n".join(result.lines()))
        if not as_json:
            show_next(*use_model(out), train_on(out))
        return
    from mlx_slim.pruning.facts import report_lines
    from mlx_slim.pruning.recover import RecoverOptions, prune_and_recover

    after = RecoverOptions(recover, overrides, tasks, limit, data_dir)
    with Console("quiet" if as_json else "plain", output=output) as console:
        report = prune_and_recover(model, out, options, after, console, resume=resume)
    click.echo(json.dumps(report.as_json()) if as_json else "\n".join(report_lines(report)))
    if not as_json:
        show_next(*_after(out, tasks))


def _after(out: Path, tasks: tuple[str, ...]) -> list[NextStep]:
    """Return the suggested commands after a run with --recover or --task."""
    from mlx_slim.evaluation.tasks.examples import task_to_score
    from mlx_slim.finetuning.run_dir import STATE_FILE, read_result, sources_of
    from mlx_slim.pruning.records import MODEL, RECOVER
    from mlx_slim.reading import read_object

    task = ",".join(tasks) or GENERAL_TASK
    if not (out / RECOVER / "run.json").is_file():
        return [*use_model(out / MODEL, task=task), train_on(out / MODEL)]
    result = read_result(out / RECOVER)
    if not tasks:
        state = read_object(out / RECOVER / STATE_FILE, recipe=dict)
        task = task_to_score(sources_of(state["recipe"]))
    tuned = out / RECOVER / result.artifact
    page = step("look at its page", "mlx-slim", "report", out)
    if result.artifact == "model":
        return [page, *use_model(tuned, name=out, task=task)]
    base = out / RECOVER / result.base if result.base else out / MODEL
    return [page, *use_model(base, [tuned], name=out, task=task)]


def _count(text: str) -> int:
    """Return the number of ``1.1B``, ``900M`` or ``900000000``."""
    units = {"k": 1e3, "m": 1e6, "b": 1e9}
    lower = text.strip().lower().replace(",", "").replace("_", "")
    unit = units.get(lower[-1:], 1)
    try:
        return round(float(lower.rstrip("kmb")) * unit)
    except (ValueError, OverflowError) as error:
        raise SlimError(f"--target-params {text!r} is not a number", "write it as 900M") from error


def _dry_run(model: str, options: Any, as_json: bool) -> None:
    """Print the counts, from shapes alone."""
    from mlx_slim.models.load import read_config
    from mlx_slim.planner.shipped_models import SHIPPED_CONFIGS
    from mlx_slim.pruning.plan import plan, weight_size

    config = SHIPPED_CONFIGS.get(model) or read_config(model, options.revision)
    size = weight_size(config)
    pruning = plan(config, options, size)
    if not as_json:
        click.echo("\n".join(pruning.lines()))
        return
    record = {
        "axis": pruning.axis,
        "method": pruning.method,
        "layers": pruning.layers,
        "removed_layers": pruning.count,
        "sizes": pruning.sizes,
        "parameters_before": pruning.before.total,
        "parameters_after": pruning.parameters,
        "bytes_before": pruning.before.total * size,
        "bytes_after": pruning.parameters * size,
        "notes": pruning.notes,
    }
    click.echo(json.dumps(record))
