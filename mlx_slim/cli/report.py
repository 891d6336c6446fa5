"""``mlx-slim report``: the page of a run or a matrix, rebuilt from its records.

Invariant: the kind of folder is detected; a page is a function of its records. Try it:
``mlx-slim report runs/try``, and ``mlx-slim report runs/try --watch`` while it trains.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mlx_slim.cli.options import Whole, alive, show_next
from mlx_slim.errors import SlimError
from mlx_slim.interrupts import Terminated
from mlx_slim.next_steps import look_at, step
from mlx_slim.progress import stage

if TYPE_CHECKING:
    from http.server import ThreadingHTTPServer

    from mlx_slim.sweeping.records import SweepReport


@click.command("report", epilog="Example: mlx-slim report runs/smollm2-lora --watch")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--verify", is_flag=True, help="Of a matrix, a search or a sweep: recompute it.")
@click.option("--watch", is_flag=True, help="For a run: serve the page live, on this machine only.")
@click.option("--port", type=Whole(0, 65535), default=0, help="Port of --watch [a free one].")
def command(folder: Path, verify: bool, watch: bool, port: int) -> None:
    """Write the page of the run, search, sweep or experiment matrix in FOLDER: report.html.

    For a run (train, distill, prune --recover; complete, running or killed): curves, memory, rows,
    answers before and after. For a matrix (compare): also report.md and results.json. Of a pruned
    model, what was cut and what it cost.
    """
    from mlx_slim.slimming.folder import is_search
    from mlx_slim.sweeping.folder import is_sweep

    if is_search(folder):
        _search(folder, verify, watch or bool(port))
        return
    if is_sweep(folder):
        _sweep(folder, verify, watch or bool(port))
        return
    run = _run_of(folder)
    facts = _pruning_facts(folder)
    if verify and run is not None:
        raise SlimError(f"{folder} is a run: --verify is for a matrix", "leave --verify out")
    if watch and run is None:
        raise SlimError(f"{folder} holds no run to watch", "give the folder that train -o named")
    if port and not watch:
        raise SlimError(f"--port {port} is for --watch", "add --watch, or leave it out")
    if watch:
        assert run is not None
        _watch(run, port)
    elif run is None and facts:
        for line in facts:
            click.echo(line)
    elif run is None and not (folder / "matrix.json").exists():
        raise SlimError(
            f"{folder} holds neither a run (recipe.json) nor a matrix (matrix.json)",
            "give the folder that train, distill, prune --recover or compare wrote",
        )
    elif run is not None:
        from mlx_slim.finetuning.report import write_page

        page = write_page(run, facts=facts)
        for line in facts:
            click.echo(line)
        click.echo(f"report: {page}")
        show_next(
            look_at(page),
            step("see it live", "mlx-slim", "report", folder, "--watch"),
        )
    elif verify:
        from mlx_slim.compare.verify import verify as check

        with alive(), stage(f"recomputing the numbers of {folder}"):
            verified = check(folder)
        for cell, why in verified.missing:
            click.echo(f"warning: {cell} is missing: {why}", err=True)
        click.echo(
            f"{verified.numbers:,} numbers of {verified.cells} of "
            f"{verified.cells + len(verified.missing)} cells recomputed from "
            f"{verified.questions:,} answers: all agree, and every score × n is a whole number"
        )
    else:
        show(folder)


def _search(folder: Path, verify: bool, live: bool) -> None:
    """Write the page of a search, or count it again."""
    from mlx_slim.slimming.records import read_report
    from mlx_slim.slimming.report import write_page

    if live:
        raise SlimError(f"{folder} is a finished search", "leave --watch and --port out")
    if verify:
        from mlx_slim.slimming.verify import verify as check

        counted = check(folder)
        click.echo(
            f"{counted.numbers:,} numbers of {counted.candidates} scored candidates recomputed "
            f"from {counted.answers:,} answers: all agree"
        )
        if not counted.costs:
            click.echo("warning: the original is not here: counted costs were left out", err=True)
        return
    page = write_page(folder)
    click.echo(read_report(folder).headline)
    click.echo(f"report: {page}")
    show_next(look_at(page), step("recompute it", "mlx-slim", "report", folder, "--verify"))


def _sweep(folder: Path, verify: bool, live: bool) -> None:
    """Write the page of a sweep, or make its report anew and compare.

    Raises:
        SlimError: If they differ.
    """
    from mlx_slim.sweeping.folder import REPORT_FILE, WINNER
    from mlx_slim.sweeping.records import read_report
    from mlx_slim.sweeping.report import write_page

    if live:
        raise SlimError(f"{folder} is a sweep", "leave --watch and --port out")
    if verify:
        again, stored = _collected(folder), read_report(folder)
        if replace(again, provenance=stored.provenance) != stored:
            raise SlimError(
                f"{folder}/sweep.json is not what its trials give",
                "remove it and resume the sweep: it is made anew",
            )
        click.echo(f"the report of {len(stored.rows)} trials follows from their records")
        return
    finished = (folder / REPORT_FILE).is_file()
    report = read_report(folder) if finished else _collected(folder)
    page = write_page(folder, report)
    click.echo(report.headline)
    click.echo(f"report: {page}")
    winner = folder / WINNER
    best = step("train with the best values", "mlx-slim", "train", winner, "-o", "runs/best")
    show_next(look_at(page), *([best] if winner.exists() else []))


def _collected(folder: Path) -> SweepReport:
    """Return the report of a sweep as far as it has come, from the records of its trials."""
    from mlx_slim.sweeping.conclusion import collect  # Optuna's: a finished sweep needs none of it

    return collect(folder)


def _pruning_facts(folder: Path) -> list[str]:
    """Return what pruning says of a folder that it made; nothing for others."""
    if not (folder / "prune.json").is_file():
        return []
    from mlx_slim.pruning.facts import facts

    return facts(folder)


def _run_of(folder: Path) -> Path | None:
    """Return the run folder that ``folder`` is, or that prune --recover wrote in it."""
    from mlx_slim.finetuning.report import is_run

    if is_run(folder):
        return folder
    from mlx_slim.pruning.records import RECOVER

    return folder / RECOVER if is_run(folder / RECOVER) else None


def _watch(run: Path, port: int) -> None:
    """Serve the page until Ctrl-C."""
    from mlx_slim.finetuning.report import render
    from mlx_slim.finetuning.watch import server

    render(run)  # damaged records are reported before the server starts
    with server(run, port) as serving:
        _serve(serving, run)


def _serve(serving: ThreadingHTTPServer, run: Path) -> None:
    host, port = serving.server_address[:2]
    click.echo(f"{run}: http://{host!s}:{port} (Ctrl-C ends it)")
    try:
        serving.serve_forever()
    except Terminated:
        raise
    except KeyboardInterrupt:
        click.echo("server stopped")


def show(folder: Path) -> None:
    """Write the report; print its path and headline."""
    from mlx_slim.compare.report import report

    with alive(), stage(f"drawing the report of {folder}"):
        done = report(folder)
    for line in done.record.headline:
        click.echo(line)
    for item in done.record.failed:
        click.echo(f"warning: {item.cell}: {item.why}", err=True)
    click.echo(f"report: {done.page}")
    show_next(
        look_at(done.page),
        step("recompute its numbers", "mlx-slim", "report", folder, "--verify"),
    )
