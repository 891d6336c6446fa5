"""``mlx-slim compare``: run a matrix of experiments, each cell in a separate process.

Invariant: this file prints and starts processes; cells are defined in ``compare/``.
Try it: ``mlx-slim compare matrix-tiny --dry-run``.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlx_slim.cli.options import options_of
from mlx_slim.cluster.options import PoolOptions
from mlx_slim.compare.options import CompareOptions
from mlx_slim.errors import Interrupted, SlimError, did_you_mean
from mlx_slim.run_dir import RunDir, option_words

if TYPE_CHECKING:
    from mlx_slim.cluster.jobs import Job
    from mlx_slim.compare.matrix import Cell, MatrixPlan


@click.command("compare", epilog="Example: mlx-slim compare matrix-tiny -o runs/matrix-tiny")
@click.argument("matrix", required=False)
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("-o", "--out", type=click.Path(path_type=Path), help="Folder [runs/MATRIX].")
@options_of(CompareOptions)
@click.option("--quiet", is_flag=True, help="Print only warnings and the last lines.")
def command(
    matrix: str | None,
    overrides: tuple[str, ...],
    out: Path | None,
    quiet: bool,
    **chosen: Any,
) -> None:
    """Run MATRIX (a name or a .yaml file): models × methods × tasks, and write one report.

    Any key can be set: mlx-slim compare matrix-tiny recipe.train.steps=4 -o runs/try
    """
    from mlx_slim.config import library

    options = CompareOptions(**chosen)
    if options.only is not None:
        _one(out, matrix, options.only, quiet)
        return
    if matrix is None:
        click.echo("\n".join(library.names("matrices")))
        return
    from mlx_slim.compare.matrix import load_matrix

    layout = load_matrix(matrix, overrides, limit=options.limit)
    for notice in layout.notices:
        click.echo(f"note: {notice}", err=True)
    folder = out or Path("runs") / layout.name
    if options.dry_run:
        _show_plan(layout)
        return
    words = ["compare", matrix, *overrides]
    words += [] if options.limit is None else ["--limit", str(options.limit)]
    words += option_words(PoolOptions(options.workers, options.cluster))
    words += ["--quiet"] if quiet else []
    _run(layout, folder, words, options, quiet)


def _run(
    layout: MatrixPlan, folder: Path, words: list[str], options: CompareOptions, quiet: bool
) -> None:
    from mlx_slim.cli.report import show
    from mlx_slim.cluster.pool import pool_of
    from mlx_slim.compare import runner
    from mlx_slim.compare.cell_job import cell_job
    from mlx_slim.runtime import memory_budget
    from mlx_slim.units import human_seconds

    for name, why in layout.refused:
        click.echo(f"warning: {name} cannot run: {why}", err=True)
    run_dir = RunDir(folder, runner.MATRIX)
    budget = memory_budget(layout.matrix.budget)
    with run_dir.claim(resume=options.resume) as claimed:
        if claimed.note:
            click.echo(claimed.note)
        with pool_of(folder, claimed.descriptor, options, budget, click.echo) as pool:
            if layout.matrix.budget == "auto":
                budget = pool.budget  # of the largest worker
            cells, lines = runner.prepare(layout, folder, options.resume, budget)

            def job_of(cell: Cell) -> Job:
                memory = lines[cell.name].memory
                silent = quiet or options.several
                return cell_job(layout, cell, folder, memory, far=pool.far, quiet=silent)

            def begun(number: int, cell: Cell) -> None:
                click.echo(f"\n── cell {number} of {len(cells)}: {cell.name}")

            with run_dir.resumable(lambda: words):
                ran = runner.run(cells, folder, pool, job_of, begun)
    for name, why in ran.failed:
        click.echo(f"warning: {name} failed: {why}", err=True)
    click.echo(f"\n{len(ran.complete)} of {len(cells)} cells in {human_seconds(ran.seconds)}")
    show(folder)
    if ran.failed or layout.refused:
        count = len(ran.failed) + len(layout.refused)
        raise SlimError(
            f"{count} of {len(cells) + len(layout.refused)} cells failed; the others are done",
            "fix what the warnings name, then run the same command with --resume",
        )


def _one(out: Path | None, matrix: str | None, name: str, quiet: bool) -> None:
    """Run one cell of a prepared folder; write its error to the file that the matrix reads."""
    from mlx_slim.cluster.failures import failure_in
    from mlx_slim.compare.cell import CellRun
    from mlx_slim.compare.cell_job import failure_note
    from mlx_slim.compare.jobs import MatrixRun
    from mlx_slim.compare.runner import stored_layout
    from mlx_slim.console import Console

    if out is None and matrix is None:
        raise SlimError("no matrix to run a cell of", "set -o DIR")
    folder = out or Path("runs") / Path(str(matrix)).stem
    layout = stored_layout(folder)
    cell = next((cell for cell in layout.cells if cell.name == name), None)
    if cell is None:
        names = [cell.name for cell in layout.cells]
        raise SlimError(f"no cell is called {name!r}", did_you_mean(name, names))
    try:
        with (
            failure_in(folder / failure_note(name), cell=name),
            Console("quiet" if quiet else "auto", title=name) as console,
        ):
            CellRun(MatrixRun(layout, folder, console), cell).run()
    except Interrupted as stop:
        raise Interrupted(stop.message, "the matrix resumes with --resume") from stop


def _show_plan(layout: MatrixPlan) -> None:
    """Print the plan as a table."""
    from mlx_slim.compare.predict import plan
    from mlx_slim.units import human_bytes, human_duration

    def size(value: int | None) -> str:
        return "–" if value is None else human_bytes(value)

    def span(value: float | None) -> str:
        return "–" if value is None else human_duration(value)

    lines = plan(layout)
    rows = [("cell", "peak memory", "training", "scoring")]
    runs = [line for line in lines if not line.why_not]
    rows += [
        (line.cell, size(line.peak_bytes), span(line.train_seconds), span(line.score_seconds))
        for line in runs
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    for row in rows:
        click.echo("  ".join(text.ljust(w) for text, w in zip(row, widths, strict=True)).rstrip())
    times = [(line.train_seconds or 0) + (line.score_seconds or 0) for line in runs]
    click.echo(f"\n{len(runs)} cells, about {human_duration(sum(times))} on this machine")
    left_out = [(f"{model}-{method}", why) for model, method, why in layout.omitted]
    left_out += [(line.cell, line.why_not) for line in lines if line.why_not]
    for name, why in [*left_out, *((n, f"cannot run: {w}") for n, w in layout.refused)]:
        click.echo(f"omitted: {name}: {why}")
