"""A search counted again: every share, cost and claim, from the answers and the configs.

Invariant: nothing is taken from ``slim.json`` but what is checked; answers come from the samples
that ``mlx-slim eval`` wrote, whose hash is in its results. Try it:
``mlx-slim report DIR --verify``.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mlx_slim.artifacts import hash_file
from mlx_slim.errors import SlimError
from mlx_slim.evaluation.results import samples_name
from mlx_slim.reading import read_object
from mlx_slim.slimming import proof
from mlx_slim.slimming.conclusion import task_claim
from mlx_slim.slimming.questions import ModelAnswers, TaskPlan, paired, read_answers
from mlx_slim.slimming.records import SlimReport, TaskClaim
from mlx_slim.slimming.run import read_report
from mlx_slim.slimming.search import MODEL


@dataclass(frozen=True)
class RecountedSearch:
    """How much was counted again."""

    numbers: int
    answers: int
    candidates: int


def verify(folder: Path) -> RecountedSearch:
    """Count the report in ``folder`` again.

    Raises:
        SlimError: Names the first figure that differs, or a file that was changed.
    """
    report = read_report(folder)
    plans = _plans(report)
    counted = answers = numbers = 0
    original = _answers(folder / "scores" / "original", plans)
    answers += sum(len(one.right_N) for one in original)
    for row in report.rows:
        if row.selection is None:
            continue
        its = _answers(folder / "scores" / row.candidate.key, plans)
        answers += sum(len(one.right_N) for one in its)
        retention = proof.retention(paired(original, its, selection=True))
        _same(folder, f"share of {row.name}", row.selection, retention)
        counted, numbers = counted + 1, numbers + 6
    if report.winner is not None:
        its = _answers(folder / "claim" / report.winner, plans)
        answers += sum(len(one.right_N) for one in its)
        pairs = paired(original, its, selection=False)
        _same(folder, "claim", report.claim, proof.retention(pairs))
        claims: list[TaskClaim] = [task_claim(pair) for pair in pairs]
        _same(folder, "claim by task", report.tasks, claims)
        numbers += 6 + 5 * len(claims)
        keep = report.options["keep"]
        demand_met = None if keep is None else bool(report.claim and report.claim.keeps(keep / 100))
        _same(folder, "verdict", report.demand_met, demand_met)
        row = next(row for row in report.rows if row.candidate.key == report.winner)
        files = [path for path in (folder / MODEL).iterdir() if path.is_file()]
        size = sum(path.stat().st_size for path in files)
        _same(folder, "size of the model's folder", row.disk_bytes, size)
        numbers += 2
    return RecountedSearch(numbers, answers, counted)


def _plans(report: SlimReport) -> list[TaskPlan]:
    limits = report.options["questions"]
    return [
        TaskPlan(name, name, limits[name][0], limits[name][1], *sizes)
        for name, sizes in report.questions.items()
    ]


def _answers(folder: Path, plans: list[TaskPlan]) -> list[ModelAnswers]:
    for plan in plans:
        where = folder / plan.name
        section = read_object(where / "results.json", tasks=dict)["tasks"].get(plan.name, {})
        samples = where / samples_name(plan.name)
        if section.get("samples_sha256") != hash_file(samples):
            raise SlimError(f"{samples} differs from its results.json", "search again")
    return [read_answers(folder / plan.name, plan) for plan in plans]


def _same(folder: Path, what: str, stored: object, counted: object) -> None:
    if stored != counted:
        raise SlimError(
            f"{folder}: {what} is {stored} in slim.json, counted again it is {counted}",
            "the file was changed: search again",
        )
