"""Search for the smallest model that keeps its score, or the best within a budget, and prove it.

Invariant: a phase that is complete on disk is not repeated, so a kill loses at most the work on one
candidate; the claim is tested on questions that chose nothing; ``slim.json`` is written last, and
``model/`` is the winner. Try it: ``mlx-slim slim MODEL -o DIR --disk 200MB --task arc_easy``.
"""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path

from mlx_slim.artifacts import write_json
from mlx_slim.events import Notice, Observer
from mlx_slim.run_dir import RunDir
from mlx_slim.slimming.conclusion import conclude
from mlx_slim.slimming.folder import CANDIDATES, MODEL, REPORT_FILE, TARGETS
from mlx_slim.slimming.options import SlimOptions, check
from mlx_slim.slimming.records import SlimReport, read_report
from mlx_slim.slimming.request import RUN, check_same, command_words
from mlx_slim.slimming.search import Search
from mlx_slim.units import human_seconds


def slim(
    source: str | Path,
    out: Path,
    options: SlimOptions,
    observer: Observer,
    *,
    resume: bool = False,
) -> SlimReport:
    """Search the folder ``out`` full; return its report.

    Args:
        source: Dense model, folder or hub id.
        out: The folder; must be new unless ``resume``.
        options: Budget, demand and tasks, and where candidates are made: in this process, or by
            several workers in processes.
        observer: Gets every event.
        resume: Resume a search that was started with the same demands.

    Raises:
        SlimError: Bad input, a budget that nothing meets, or a share that cannot be proved.
        ResourceError: Not enough memory or disk.
        Interrupted: Ctrl-C; what is complete is kept.
    """
    check(options)
    match = partial(check_same, out, source, options)
    with RunDir(out, RUN).claim(resume=resume, match=match) as claimed:
        if claimed.note:
            observer.notify(Notice(claimed.note))
        if (out / REPORT_FILE).exists():
            observer.notify(Notice(f"{out} is complete: nothing to do"))
            report = read_report(out)
            finish(out, report.winner)
            return report
        with RunDir(out, RUN).resumable(partial(command_words, source, options)):
            search = Search(str(source), out, options, observer)
            winner = search.choose(claimed.descriptor)
            report = conclude(search, winner)
            write_json(out / REPORT_FILE, report.as_json())
            finish(out, report.winner)
            search.say(f"took {human_seconds(search.time.elapsed)}")
            return read_report(out)


def finish(out: Path, winner: str | None) -> None:
    """Move the winner's weights to ``model/``; remove those of the others."""
    if winner is not None and not (out / MODEL).exists():
        (out / CANDIDATES / winner / MODEL).rename(out / MODEL)
    for folder in (out / CANDIDATES).glob("*"):
        for name in (MODEL, "pruned-1", "pruned-2", TARGETS, "recover"):
            if name != "recover":
                shutil.rmtree(folder / name, ignore_errors=True)
            else:
                shutil.rmtree(folder / name / "checkpoints", ignore_errors=True)
    shutil.rmtree(out / TARGETS, ignore_errors=True)
