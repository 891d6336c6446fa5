"""A search counted again: every share, distance, size, cost and claim, from the files beside it.

Invariant: nothing is taken from ``slim.json`` but what is checked; answers come from the samples
that ``mlx-slim eval`` wrote, whose hash is in its results. Counted costs need the original's
folder: where it is gone they are left out, which the record says. Try it:
``mlx-slim report DIR --verify``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from mlx_slim.artifacts import hash_file
from mlx_slim.errors import SlimError
from mlx_slim.evaluation.results import samples_name
from mlx_slim.reading import library_errors, read_object
from mlx_slim.slimming import build, proof
from mlx_slim.slimming.candidate import Candidate
from mlx_slim.slimming.candidates import BITS, SearchSpace, mixed_weight_bytes
from mlx_slim.slimming.conclusion import headline, task_claim
from mlx_slim.slimming.folder import CANDIDATES, MODEL, REPORT_FILE, SCORES
from mlx_slim.slimming.options import SlimOptions
from mlx_slim.slimming.questions import ModelAnswers, TaskPlan, paired, read_answers
from mlx_slim.slimming.records import (
    CandidateRow,
    MeasuredSpeed,
    SlimReport,
    TaskClaim,
    read_report,
)
from mlx_slim.slimming.request import STATE_FILE, space_of

_DEMANDS = ("memory", "disk", "speed", "context", "kv_bits", "limit")


@dataclass(frozen=True)
class RecountedSearch:
    """How much was counted again.

    Attributes:
        numbers: Figures that were compared.
        answers: To questions, that retentions were counted from.
        candidates: That are scored.
        costs: Whether counted costs were counted again; not without the original.
    """

    numbers: int
    answers: int
    candidates: int
    costs: bool


def verify(folder: Path) -> RecountedSearch:
    """Count the report in ``folder`` again.

    Raises:
        SlimError: Names the first figure that differs, or a file that was changed.
    """
    report = read_report(folder)
    with library_errors(f"{folder / REPORT_FILE} is damaged", "search again"):
        return _Recount(folder, report).all()


class _Recount:
    """Compares a report with the files of its folder."""

    def __init__(self, folder: Path, report: SlimReport) -> None:
        self._folder, self._report = folder, report
        self._plans = _plans(report)
        self._numbers = self._answered = 0
        self._original = self._answers("scores/original")

    def all(self) -> RecountedSearch:
        """Compare everything."""
        report = self._report
        for task, plan in zip(self._original, self._plans, strict=True):
            chosen = int(task.selects_N.sum())
            counted = chosen, len(task.selects_N) - chosen
            self._same(f"questions of {plan.name}", report.questions[plan.name], counted, 2)
        self._provable()
        scored = [row for row in report.rows if self._row(row)]
        self._winner(scored)
        self._forgotten()
        costs = self._costs()
        self._same("headline", report.headline, headline(report), 1)
        return RecountedSearch(self._numbers, self._answered, len(scored), costs)

    def _answers(self, name: str) -> list[ModelAnswers]:
        answers = _answers(self._folder / name, self._plans)
        self._answered += sum(len(one.right_N) for one in answers)
        return answers

    def _same(self, what: str, stored: object, counted: object, numbers: int) -> None:
        _same(self._folder, what, stored, counted)
        self._numbers += numbers

    def _provable(self) -> None:
        key = replace(self._report.original, bits=BITS[0]).key
        rounded = _answers(self._folder / SCORES / key, self._plans)
        pairs = paired(self._original, rounded, selection=True)
        counted = proof.provable(pairs, [plan.claim for plan in self._plans])
        self._same("largest share that can be shown", self._report.provable, counted, 1)

    def _row(self, row: CandidateRow) -> bool:
        """Compare a candidate; return whether it is scored."""
        folder, key = self._folder, row.candidate.key
        self._same(f"name of {key}", row.name, row.candidate.name(self._report.original), 0)
        ranked = read_object(folder / "ranked" / f"{key}.json", kl=float, top1=float)
        self._same(f"distance of {key}", (row.kl, row.top1), (ranked["kl"], ranked["top1"]), 2)
        place = folder / CANDIDATES / key
        speed = place / "speed.json"
        measured = MeasuredSpeed(**read_object(speed)) if speed.exists() else None
        self._same(f"speed of {key}", row.speed, measured, 4 if measured else 0)
        if row.selection is None:
            self._same(f"size of {key}", row.disk_bytes, None, 0)
            return False
        size = read_object(place / build.SIZE, disk_bytes=int)["disk_bytes"]
        self._same(f"size of the folder of {key}", row.disk_bytes, size, 1)
        pairs = paired(self._original, self._answers(f"{SCORES}/{key}"), selection=True)
        self._same(f"share of {row.name}", row.selection, proof.retention(pairs), 6)
        return True

    def _winner(self, scored: list[CandidateRow]) -> None:
        report, keep = self._report, self._report.options["keep"]
        chosen = _chosen(report, scored)
        self._same("winner", report.winner, None if chosen is None else chosen.candidate.key, 0)
        if chosen is None:
            self._same("claim", report.claim, None, 0)
            self._same("verdict", report.demand_met, None if keep is None else False, 0)
            return
        pairs = paired(self._original, self._answers(f"claim/{report.winner}"), selection=False)
        self._same("claim", report.claim, proof.retention(pairs), 6)
        claims: list[TaskClaim] = [task_claim(pair) for pair in pairs]
        self._same("claim by task", report.tasks, claims, 5 * len(claims))
        demand_met = None if keep is None else bool(report.claim and report.claim.keeps(keep / 100))
        self._same("verdict", report.demand_met, demand_met, 1)
        files = [path for path in (self._folder / MODEL).iterdir() if path.is_file()]
        size = sum(path.stat().st_size for path in files)
        self._same("size of the model's folder", chosen.disk_bytes, size, 1)

    def _forgotten(self) -> None:
        if self._report.forgotten is None:
            return
        values = []
        for name in ("original", self._report.winner):
            results = self._folder / "text" / str(name) / "results.json"
            section = read_object(results, perplexity=dict)["perplexity"]
            values.append(float(section["metrics"]["bits_per_byte"]["value"]))
        self._same("what was forgotten", self._report.forgotten, tuple(values), 2)

    def _costs(self) -> bool:
        """Compare counted costs; return False where the original is not there."""
        report = self._report
        request = read_object(self._folder / STATE_FILE, source=str)
        for name in _DEMANDS:
            self._same(f"demanded {name}", report.options[name], request[name], 0)
        options = SlimOptions(
            context=report.options["context"],
            kv_bits=report.options["kv_bits"],
            revision=report.revision,
        )
        try:
            space = space_of(request["source"], options)
        except SlimError:
            return False
        self._same("the original", report.original, space.original, 5)
        for row in report.rows:
            self._same(f"cost of {row.name}", row.candidate, _again(space, row.candidate), 5)
        return True


def _again(space: SearchSpace, one: Candidate) -> Candidate:
    """Return a candidate, counted again; of one with bits by layer all but its whole folder."""
    if one.bits_per_weight is None:
        return space.candidate(one.bits, one.cuts)
    size = mixed_weight_bytes(one.bits_per_weight, space.original.cost.parameters)
    cost = replace(space.original.cost, weight_bytes=size, disk_bytes=one.cost.disk_bytes)
    return replace(space.original, bits=one.bits, cost=cost, bits_per_weight=one.bits_per_weight)


def _chosen(report: SlimReport, scored: Iterable[CandidateRow]) -> CandidateRow | None:
    """Return the candidate that the search has to choose by its scores, sizes and speeds."""
    options = report.options
    if all(options[name] is None for name in ("memory", "disk", "speed")):
        keeps = [
            row for row in scored if row.selection and row.selection.keeps(options["keep"] / 100)
        ]
        return keeps[-1] if keeps else None  # largest first
    fitting = [
        row
        for row in scored
        if (options["disk"] is None or (row.disk_bytes or 0) <= options["disk"])
        and not (row.speed and row.speed.generation_ratio < (options["speed"] or 0))
    ]
    nearest = sorted(fitting, key=lambda row: (row.kl, row.candidate.key))
    return max(nearest, key=lambda row: row.selection.second if row.selection else 0, default=None)


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
