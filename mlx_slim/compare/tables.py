"""From stored answers to the numbers of the report: scores, paired differences, seeds.

Invariant: a score is a whole number of questions over their count; every difference is paired on
the same questions, its p value exact (McNemar) and corrected (Holm) over all comparisons of one
model; the verdict is never "equal", but how small a difference could be detected.
Try it: ``mlx-slim report DIR``.
"""

from __future__ import annotations

from dataclasses import replace
from statistics import mean, stdev

import numpy as np

from mlx_slim.compare.claims import MethodComparison
from mlx_slim.compare.report_records import (
    AGAINST_BASE,
    Contrast,
    ReportTask,
    Row,
    SeedSpread,
    Spread,
    TaskScore,
)
from mlx_slim.compare.store import Answers, StoredCell, StoredMatrix
from mlx_slim.errors import SlimError
from mlx_slim.evaluation import stats
from mlx_slim.evaluation.tasks.metrics import first_metric

RESAMPLED = 60  # pairs of cells up to which a bootstrap is drawn within subjects too


def tasks_of(stored: StoredMatrix) -> list[ReportTask]:
    """Return the tasks in the order of the matrix."""
    by_name: dict[str, ReportTask] = {}
    for cell in stored.cells:
        for name, answers in cell.answers.items():
            metric, section = first_metric(answers.right_N), answers.section
            by_name.setdefault(name, ReportTask(name, metric, answers.chance, section.questions))
    order = stored.record.tasks
    return sorted(by_name.values(), key=lambda t: order.index(t.task) if t.task in order else 0)


def row_of(cell: StoredCell, tasks: list[ReportTask]) -> Row:
    """Return a cell's line of the matrix table."""
    scores = {
        task.task: _score(cell.answers[task.task], task.metric)
        for task in tasks
        if task.task in cell.answers
    }
    average = mean(score.value for score in scores.values()) if scores else None
    return Row.of(cell.record, scores, average)


def _score(answers: Answers, metric: str) -> TaskScore:
    right_N, section = answers.right_N[metric], answers.section
    n, k = len(right_N), int(right_N.sum(dtype=np.int64))
    value = k / n
    return TaskScore(
        k=k,
        n=n,
        value=value,
        stderr=(value * (1 - value) / max(1, n - 1)) ** 0.5,
        metrics=section.metrics,
        micro=section.micro,
        macro=section.macro,
    )


# ------------------------------------------------------------------------------- paired contrasts


def pairs(cells: list[StoredCell]) -> list[tuple[StoredCell, StoredCell, str]]:
    """Return (first, second, the question that their difference answers) of one model's cells."""
    base = next((cell for cell in cells if cell.kind == "base"), None)
    starts = {cell.name: cell.record.parent for cell in cells}
    of_name = {cell.name: cell for cell in cells}
    rounded = next(
        (cell for cell in cells if cell.kind == "quantized" and starts[cell.name] is None), None
    )
    compared: list[tuple[StoredCell, StoredCell, str]] = []
    if base is not None:
        compared += [(base, cell, AGAINST_BASE) for cell in cells if cell is not base]
    tuned = [cell for cell in cells if cell.kind == "tuned"]
    ways = {cell.method: cell.record.recipe["method"] for cell in tuned}
    if rounded is not None:
        compared += [
            (rounded, cell, "what tuning adds to the 4-bit base")
            for cell in tuned
            if ways[cell.method] == "qlora" and starts[cell.name] is None
        ]
    for start in dict.fromkeys(starts[cell.name] for cell in tuned):
        members = [cell for cell in tuned if starts[cell.name] == start]
        names = [cell.method for cell in members]
        middle = next((name for name in names if ways[name] == "lora"), names[0])
        for cell in members:
            if cell.method != middle:
                compared += [
                    (other, cell, "between methods")
                    for other in members
                    if other.method == middle and other.seed == cell.seed
                ]
    for cell in cells:
        parent = of_name.get(starts[cell.name] or "")
        if parent is not None:
            compared.append((parent, cell, _STEPS[cell.kind]))
    return compared


# What the difference between a cell and the one that it starts from says, by the cell's kind.
_STEPS = {
    "fused": "what fusing costs",
    "quantized": "what rounding costs",
    "pruned": "what pruning costs",
    "tuned": "what tuning brings back",
}


def contrasts(stored: StoredMatrix, tasks: list[ReportTask]) -> tuple[list[Contrast], list[str]]:
    """Return every paired comparison, and a line for each that could not be made.

    ``corrected`` adds what depends on how many there are.
    """
    rows: list[Contrast] = []
    notes: list[str] = []
    by_model: dict[str, list[StoredCell]] = {}
    for cell in stored.cells:
        by_model.setdefault(cell.model, []).append(cell)
    by_pair = {model: pairs(cells) for model, cells in by_model.items()}
    resample = sum(map(len, by_pair.values())) <= RESAMPLED
    for pairs_of_model in by_pair.values():
        for first, second, why in pairs_of_model:
            for task in tasks:
                try:
                    row = contrast(first, second, why, task, resample=resample)
                except SlimError as error:
                    notes.append(error.message)
                    continue
                if row is not None:
                    rows.append(row)
    return rows, notes


def corrected(
    rows: list[Contrast], pooled: list[MethodComparison]
) -> tuple[list[Contrast], list[MethodComparison]]:
    """Return both with p values corrected by Holm over all of a model, and their verdicts.

    A claim of the headline that is one row of the table takes that row's p value; the others are
    members of the family.
    """
    judged_rows: dict[int, Contrast] = {}  # by place
    judged_claims: dict[int, MethodComparison] = {}
    for model in dict.fromkeys([*(row.model for row in rows), *(c.model for c in pooled)]):
        members = [place for place, row in enumerate(rows) if row.model == model]
        of_pair: dict[tuple[str, ...], int] = {
            (rows[i].first, rows[i].second, rows[i].task): i for i in members
        }
        claims = [place for place, claim in enumerate(pooled) if claim.model == model]
        further = [place for place in claims if pooled[place].pair not in of_pair]
        tests = len(members) + len(further)
        p_values = [rows[place].p_value for place in members]
        p_values += [pooled[place].p_value for place in further]
        adjusted = stats.holm(p_values)
        for place, p_holm in zip(members, adjusted, strict=False):
            judged_rows[place] = _judged(rows[place], p_holm, tests)
        of_claim = dict(zip(further, adjusted[len(members) :], strict=True))
        for place in claims:
            row = of_pair.get(pooled[place].pair)
            p_holm = of_claim[place] if row is None else judged_rows[row].p_holm
            judged_claims[place] = pooled[place].judged(p_holm, tests)
    return (
        [judged_rows[place] for place in range(len(rows))],
        [judged_claims[place] for place in range(len(pooled))],
    )


def _judged(row: Contrast, p_holm: float, tests: int) -> Contrast:
    detectable = stats.detectable_difference(row.gained + row.lost, row.n, tests)
    verdict = stats.verdict(row.delta, p_holm, detectable)
    return replace(row, p_holm=p_holm, family=tests, detectable=detectable, verdict=verdict)


def contrast(
    first: StoredCell, second: StoredCell, why: str, task: ReportTask, *, resample: bool = True
) -> Contrast | None:
    """Return one paired comparison, second minus first; None where a side was not scored.

    Args:
        first: Usually the base.
        second: What is compared with it.
        why: The question that the difference answers.
        task: Name, metric.
        resample: Draw the bootstrap within subjects (of MMLU) too, an eighth of a second.

    Raises:
        SlimError: If the two did not answer the same questions.
    """
    name = task.task
    a, b = first.answers.get(name), second.answers.get(name)
    if a is None or b is None:
        return None
    differing = a.section.questions.differing(b.section.questions)
    if differing or not np.array_equal(a.doc_ids_N, b.doc_ids_N):
        what = ", ".join(differing) or "row numbers"
        raise SlimError(f"{name}: {first.name} and {second.name} are not compared: {what} differ")
    parted = a.subjects_N is not None
    strata = a.subjects_N.tolist() if a.subjects_N is not None and resample else None
    first_N, second_N = (answers.right_N[task.metric].tolist() for answers in (a, b))
    draws = 1 if parted and not resample else stats.DRAWS
    paired = stats.paired(first_N, second_N, strata, draws=draws, tests=None)
    assert paired.interval is not None  # answers are 0 or 1
    return Contrast(
        model=first.model,
        why=why,
        first=first.name,
        second=second.name,
        task=name,
        first_score=paired.first,
        second_score=paired.second,
        n=paired.n,
        delta=paired.delta,
        stderr=paired.stderr,
        interval=paired.interval,
        bootstrap=None if parted and not resample else paired.bootstrap,
        gained=paired.gained,
        lost=paired.lost,
        p_value=paired.p_value,
    )


# ------------------------------------------------------------------------------------- seeds


def seeds_of(rows: list[Row], tasks: list[ReportTask]) -> list[SeedSpread]:
    """Return mean and standard deviation over seeds, of methods that ran with several."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.model, row.method), []).append(row)
    lines = []
    for (model, method), members in groups.items():
        if len(members) < 2:
            continue
        values = {
            task.task: [row.scores[task.task].value for row in members]
            for task in tasks
            if all(task.task in row.scores for row in members)
        }
        spreads = {task: Spread(mean(v), stdev(v)) for task, v in values.items()}
        lines.append(SeedSpread(model, method, [row.seed for row in members], spreads))
    return lines
