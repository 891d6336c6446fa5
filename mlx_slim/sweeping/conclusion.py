"""What a sweep found: the report of the trials that have ended, and the recipe of the best.

Invariant: a function of the folder: of ``request.json``, ``study.db`` and the outcomes in
``seeds/``. So the report can be made at any time, and again. Used by ``sweeping/run.py``.
"""

from __future__ import annotations

import shlex
import statistics
from collections.abc import Sequence
from pathlib import Path

from mlx_slim.artifacts import SCHEMA_VERSION, provenance
from mlx_slim.config.load import Resolved
from mlx_slim.config.recipe_file import recipe_text, value_text
from mlx_slim.sweeping.folder import OUTCOME, SEEDS, STATE_FILE, STUDY_FILE, WINNER
from mlx_slim.sweeping.options import SweepOptions
from mlx_slim.sweeping.records import SeedRow, SweepReport, TrialOutcome, TrialRow, read_json_record
from mlx_slim.sweeping.request import SweepRequest
from mlx_slim.sweeping.space import Point, changed_recipe
from mlx_slim.sweeping.study import SweepStudy, objective_values


def read_request(out: Path) -> SweepRequest:
    """Return the request of the sweep in ``out``.

    Raises:
        SlimError: If it is missing or damaged.
    """
    return read_json_record(out / STATE_FILE, SweepRequest)


def collect(out: Path) -> SweepReport:
    """Return the report of the sweep in ``out`` as far as it has come.

    Raises:
        SlimError: If a file is missing or damaged.
    """
    request = read_request(out)
    plan = request.plan()
    study = SweepStudy(out / STUDY_FILE, plan)
    rows = study.rows()
    best = best_of(rows)
    options = plan.options
    space, train_seed = request.sweep_space, request.sweep_space.base.recipe.train.seed
    seeds = [] if best is None else _seeds(out, best.number)
    baseline = next((row for row in rows if plan.queue and row.number == 0), None)
    workers = study.workers()
    return SweepReport(
        schema_version=SCHEMA_VERSION,
        recipe=request.name,
        space=space.as_json(),
        objectives=list(options.objective),
        pruner=options.pruner if options.prunes else "none",
        seed=options.seed,
        train_seed=train_seed,
        workers=workers,
        rows=rows,
        best=None if best is None else best.number,
        front=_front(rows, options),
        baseline=None if baseline is None else baseline.number,
        seeds=seeds,
        importances=study.importances(),
        headline=_headline(rows, best, baseline, seeds),
        notes=_notes(rows, best, seeds, options, workers),
        provenance=provenance(),
    )


def best_of(rows: Sequence[TrialRow]) -> TrialRow | None:
    """Return the complete trial with the lowest validation loss, of equal ones the first."""
    return min((row for row in rows if row.outcome.state == "complete"), key=_loss, default=None)


def _loss(row: TrialRow) -> float:
    assert row.outcome.loss is not None
    return row.outcome.loss


def seed_folder(number: int, seed: int) -> str:
    """Return the folder of trial ``number`` on another seed, in that of the sweep."""
    return f"{SEEDS}/{number:03d}-seed-{seed}"


def seed_recipe(recipe: Resolved, seed: int) -> Resolved:
    """Return a recipe with another seed and the same validation rows."""
    changes = {"train.seed": seed, "data.seed": recipe.recipe.rows_seed}
    return changed_recipe(recipe, changes, "sweep")


def _seeds(out: Path, number: int) -> list[SeedRow]:
    files = (out / SEEDS).glob(f"{number:03d}-seed-*/{OUTCOME}")
    rows = [
        SeedRow(int(file.parent.name.rpartition("-")[2]), read_json_record(file, TrialOutcome))
        for file in files
    ]
    return sorted(rows, key=lambda row: row.seed)


def _front(rows: Sequence[TrialRow], options: SweepOptions) -> list[int]:
    """Return the numbers of the complete trials that no other one beats, by loss."""
    complete = [row for row in rows if row.outcome.state == "complete"]
    values = {row.number: objective_values(row.outcome, options) for row in complete}

    def beaten(number: int) -> bool:
        mine = values[number]
        return any(
            other != mine and all(a <= b for a, b in zip(other, mine, strict=True))
            for other in values.values()
        )

    return [row.number for row in sorted(complete, key=_loss) if not beaten(row.number)]


def losses_of(best: TrialRow, seeds: Sequence[SeedRow]) -> list[float]:
    """Return the losses of the best trial over its seeds, its own first."""
    return [_loss(best), *(row.outcome.loss for row in seeds if row.outcome.loss is not None)]


def point_text(point: Point) -> str:
    """Return values as they are typed: ``adapter.rank=8, …``; numbers rounded."""
    return ", ".join(
        f"{key}={value:.3g}" if isinstance(value, float) else f"{key}={value_text(value)}"
        for key, value in point.items()
    )


def _headline(
    rows: Sequence[TrialRow],
    best: TrialRow | None,
    baseline: TrialRow | None,
    seeds: Sequence[SeedRow],
) -> str:
    if best is None:
        return f"none of {len(rows)} trials is complete"
    text = (
        f"trial {best.number} of {len(rows)}: validation loss {_loss(best):.4f} nats/token with "
        f"{point_text(best.values)}"
    )
    losses = losses_of(best, seeds)
    if len(losses) > 1:
        text += (
            f"; on {len(losses)} seeds {statistics.mean(losses):.4f} ± "
            f"{statistics.stdev(losses):.4f}"
        )
    if (
        baseline is not None
        and baseline.outcome.state == "complete"
        and baseline.number != best.number
    ):
        text += f"; the recipe's own values: {_loss(baseline):.4f}"
    return text


def _notes(
    rows: Sequence[TrialRow],
    best: TrialRow | None,
    seeds: Sequence[SeedRow],
    options: SweepOptions,
    workers: int,
) -> list[str]:
    notes = []
    if len(options.objective) > 1:
        notes.append(
            "Optuna has no pruner for several objectives: every trial took all its steps. Peak "
            "memory is the predicted one, the same in every run; the measured one is beside it."
        )
    if workers > 1:
        notes.append(
            f"Up to {workers} trials ran at a time: the order in which they ended decided what "
            "was proposed next, so the same sweep again may try other values."
        )
    tokens: dict[int | None, list[int]] = {}
    for row in rows:
        if row.outcome.state in ("complete", "pruned"):
            tokens.setdefault(row.outcome.validated_tokens, []).append(row.number)
    if len(tokens) > 1:
        groups = "; ".join(
            f"{count} tokens: trials {', '.join(map(str, numbers))}"
            for count, numbers in tokens.items()
        )
        notes.append(
            f"The trials were not validated on the same tokens ({groups}): their losses cannot be "
            "compared across these groups."
        )
    pruned = sum(row.outcome.state == "pruned" for row in rows)
    if pruned:
        notes.append(f"{pruned} of {len(rows)} trials were pruned by the {options.pruner} pruner.")
    if best is not None and len(losses_of(best, seeds)) > 1:
        notes.append(_close(rows, best, losses_of(best, seeds)))
    return notes


def _close(rows: Sequence[TrialRow], best: TrialRow, losses: Sequence[float]) -> str:
    """Return how many other trials the seeds of the best one do not tell from it."""
    close = [
        row.number
        for row in rows
        if row.outcome.state == "complete" and row != best and _loss(row) <= max(losses)
    ]
    low, high = min(losses), max(losses)
    if not close:
        return (
            f"On its {len(losses)} seeds the best trial has losses of {low:.4f} to {high:.4f}; no "
            "other trial has one as low."
        )
    one = "trial" if len(close) == 1 else "trials"
    return (
        f"On its {len(losses)} seeds the best trial has losses of {low:.4f} to {high:.4f}: it is "
        f"not told apart from {one} {', '.join(map(str, close))}."
    )


def winner_text(out: Path, report: SweepReport) -> str:
    """Return the best trial's recipe as a file.

    Raises:
        SlimError: If ``request.json`` is damaged.
    """
    space = read_request(out).sweep_space
    best = next(row for row in report.rows if row.number == report.best)
    reasons = {key: f"chosen of {len(report.rows)} trials" for key in best.values}
    header = [
        f"The best of {len(report.rows)} trials of {report.recipe}, by validation loss.",
        report.headline,
        f"Run:  mlx-slim train {shlex.quote(str(out / WINNER))} -o RUN",
    ]
    return recipe_text(space.recipe(best.values).recipe, reasons, header)


def trial_text(recipe: Resolved, what: str) -> str:
    """Return the recipe of a trial as a file; nothing is answered for its page."""
    quiet = changed_recipe(recipe, {"report_answers": 0}, "sweep")
    return recipe_text(quiet.recipe, {}, [what])
