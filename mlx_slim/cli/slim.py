"""``mlx-slim slim``: the smallest model that keeps its score, or the best within a budget, proved.

Invariant: this file turns words into ``SlimOptions`` and prints; exit code 1 says that the demanded
share is not shown. Try it: ``mlx-slim slim MODEL -o DIR --disk 200MB --task arc_easy --dry-run``.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from mlx_slim.cli.options import options_of, show_next
from mlx_slim.errors import Interrupted, SlimError
from mlx_slim.next_steps import look_at, step, use_model
from mlx_slim.slimming.options import SlimOptions


@click.command(
    "slim",
    epilog="Example: mlx-slim slim models/mine -o slim/mine --disk 4GB --keep 95 --task hellaswag",
)
@click.argument("model", required=False)
@click.option("-o", "--out", type=click.Path(path_type=Path), help="Folder of the search.")
@click.option("--memory", metavar="SIZE", help="Most memory while answering: 6GB.")
@click.option("--disk", metavar="SIZE", help="Most bytes of the model's folder: 4GB.")
@click.option("--speed", metavar="FACTOR", help="Least speed of generation, measured: 1.5x.")
@options_of(SlimOptions, "context", "kv_bits", "keep")
@click.option(
    "--task", "tasks", multiple=True, metavar="NAMES", help="Tasks whose score is to be kept."
)
@options_of(SlimOptions, "limit", "data", "data_dir")
@click.option("--time", metavar="TIME", help="Longest time of the search: 90m, 2h.")
@options_of(SlimOptions, "revision", "workers", "cluster")
@click.option("--resume", is_flag=True, help="Resume the search in DIR.")
@click.option("--only", metavar="NAME", help="Make one candidate of the folder in this process.")
@click.option("--dry-run", is_flag=True, help="List the candidates and write nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object at the end.")
def command(
    model: str | None,
    out: Path | None,
    memory: str | None,
    disk: str | None,
    speed: str | None,
    tasks: tuple[str, ...],
    time: str | None,
    resume: bool,
    only: str | None,
    dry_run: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    """Search for a smaller MODEL (a folder or hub id, not quantized) that still does the job.

    With a budget (--memory, --disk, --speed): the best within it. With --keep alone: the smallest
    that keeps the share of the score. Candidates are cut, quantized, ranked, recovered by
    distillation from the original and scored; the claim is tested on questions that chose nothing.
    """
    from rich.console import Console as RichConsole

    from mlx_slim.console import Console

    if only is not None:
        _one(out, only)
        return
    if model is None:
        raise click.UsageError("Missing argument 'MODEL'.")
    from mlx_slim.units import parse_duration, parse_size

    options = SlimOptions(
        memory=None if memory is None else parse_size(memory),
        disk=None if disk is None else parse_size(disk),
        speed=None if speed is None else _factor(speed),
        tasks=tuple(name for text in tasks for name in text.split(",") if name),
        time=None if time is None else parse_duration(time),
        **settings,
    )
    if dry_run:
        _dry_run(model, options, as_json)
        return
    if out is None:
        raise SlimError("no output folder", "set -o DIR")
    from mlx_slim.slimming.folder import MODEL
    from mlx_slim.slimming.report import write_page
    from mlx_slim.slimming.run import slim

    output = RichConsole(highlight=False, stderr=as_json)
    with Console("quiet" if as_json else "plain", output=output) as console:
        report = slim(model, out, options, console, resume=resume)
    page = write_page(out)
    click.echo(json.dumps(report.as_json()) if as_json else report.headline)
    if not as_json:
        click.echo(f"report: {page}")
        steps = use_model(out / MODEL, task=",".join(options.tasks)) if report.winner else []
        show_next(
            look_at(page), *steps, step("count it again", "mlx-slim", "report", out, "--verify")
        )
    if report.demand_met is False or report.winner is None:
        raise SystemExit(1)


def _one(out: Path | None, name: str) -> None:
    """Make and score one candidate, silently; why it failed is in its folder.

    Raises:
        SlimError: If there is no such candidate.
    """
    from mlx_slim.cluster.failures import failure_in
    from mlx_slim.console import Console
    from mlx_slim.slimming.candidate_job import FAILURE, read_request, run_candidate

    if out is None:
        raise SlimError("no search to make a candidate of", "set -o DIR")
    read_request(out / name)
    try:
        with failure_in(out / name / FAILURE), Console("quiet", title=name) as console:
            run_candidate(out, name, console)
    except Interrupted as stop:
        raise Interrupted(stop.message, "the search resumes with --resume") from stop


def _factor(text: str) -> float:
    """Return the number of ``1.5x`` or ``1.5``."""
    try:
        return float(text.strip().lower().removesuffix("x"))
    except ValueError as error:
        raise SlimError(f"--speed {text!r} is not a factor", "write it as 1.5x") from error


def _dry_run(model: str, options: SlimOptions, as_json: bool) -> None:
    """List the candidates, from shapes alone."""
    from mlx_slim.slimming.candidates import listed
    from mlx_slim.slimming.options import check
    from mlx_slim.slimming.request import space_of
    from mlx_slim.units import human_bytes

    check(options)
    space = space_of(model, options)
    candidates = listed(space, options)
    if as_json:
        click.echo(json.dumps([asdict(one) for one in (space.original, *candidates)]))
        return
    lines = [("", "on disk", "in memory", "parameters")]
    for one in (space.original, *candidates):
        name = "the original" if one is space.original else one.name(space.original)
        size, inside = human_bytes(one.cost.disk_bytes), human_bytes(one.cost.memory_bytes)
        lines.append((name, size, inside, f"{one.cost.parameters:,}"))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for name, *figures in lines:
        cells = [f"{cell:>{width}}" for cell, width in zip(figures, widths[1:], strict=True)]
        click.echo("  ".join([f"{name:<{widths[0]}}", *cells]).rstrip())
