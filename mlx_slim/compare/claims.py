"""What the headline compares: two methods on the mean over tasks and seeds, paired.

Invariant: a claim is a comparison like those of the table: on the same questions, its p value in
the same family, its power stated at the corrected level. Each score has the score of guessing
beside it; there is no ratio to a model that guesses. Try it: ``mlx-slim report DIR``.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace

import numpy as np

from mlx_slim.compare.report_records import Interval, ReportTask
from mlx_slim.compare.store import StoredCell, StoredMatrix
from mlx_slim.evaluation import pooled, stats
from mlx_slim.reading import JsonObject


@dataclass(frozen=True)
class MethodScore:
    """Mean over tasks and seeds of one method.

    Attributes:
        method: Its name in the matrix.
        cells: Names of its cells.
        value: The mean, a fraction.
        interval: 95% interval over questions.
        chance: Mean over tasks of what guessing gives.
        above_chance: Whether the score is detectably more.
    """

    method: str
    cells: list[str]
    value: float
    interval: Interval
    chance: float
    above_chance: bool


@dataclass(frozen=True)
class MethodComparison:
    """One comparison of two methods of a model; every difference is second minus first.

    Attributes:
        model: Key of the matrix.
        what: ``gain`` (tuned against the untrained base), ``kept`` (QLoRA of full fine-tuning or
            LoRA), ``pruned`` (of the base), ``recovered`` (against the pruned model).
        tasks: Those that all of its cells answered.
        first: What is compared with.
        second: What is compared.
        delta: Difference of the means.
        interval: Its interval, corrected as the p value is: it leaves out 5% / ``tests``.
        p_value: Of ``pooled.sign_flip``; McNemar's for one task and one seed.
        ratio: Second over first, and its interval, corrected; None where the first is 0.
        ratio_above_chance: The same of what is above chance; None where the first is not above it.
        p_holm: Corrected for the family.
        tests: Of the family.
        detectable: Smallest true difference found in 4 of 5 cases at the corrected level, or None.
        verdict: In words.
    """

    model: str
    what: str
    tasks: list[str]
    first: MethodScore
    second: MethodScore
    delta: float
    p_value: float
    before: list[np.ndarray] = field(repr=False)
    after: list[np.ndarray] = field(repr=False)
    interval: Interval = (0.0, 0.0)
    ratio: tuple[float, Interval] | None = None
    ratio_above_chance: tuple[float, Interval] | None = None
    p_holm: float = 1.0
    tests: int = 1
    detectable: float | None = None
    verdict: str = ""

    @property
    def differences(self) -> list[np.ndarray]:
        """Second minus first: one array a task, a value a question."""
        return [y - x for x, y in zip(self.before, self.after, strict=True)]

    @property
    def pair(self) -> tuple[str, ...]:
        """First cell, second cell and task, where it is one of each; else nothing of the table."""
        names = (*self.first.cells, *self.second.cells, *self.tasks)
        return names if len(names) == 3 else ()

    @property
    def seen(self) -> bool:
        """Whether there is a difference that the corrected test flags."""
        return self.p_holm < 1 - stats.LEVEL

    def judged(self, p_holm: float, tests: int) -> MethodComparison:
        """Return it with the corrected p value, the size of the family, and the verdict."""
        above, chance = self.ratio_above_chance, self.first.chance
        if self.first.above_chance:
            above = pooled.ratio(self.before, self.after, chance, tests=tests)
        detectable = pooled.detectable_pooled(self.differences, tests)
        return replace(
            self,
            p_holm=p_holm,
            tests=tests,
            interval=pooled.mean_interval(self.differences, pooled.PAIRS, tests),
            ratio=pooled.ratio(self.before, self.after, tests=tests),
            ratio_above_chance=above,
            detectable=detectable,
            verdict=stats.verdict(self.delta, p_holm, detectable),
        )

    def as_json(self) -> JsonObject:
        """Return the object of ``claims``."""
        values = {key: value for key, value in vars(self).items() if key not in ("before", "after")}
        return {**values, "first": asdict(self.first), "second": asdict(self.second)}


def claims(stored: StoredMatrix, tasks: list[ReportTask]) -> list[MethodComparison]:
    """Return the comparisons that the headline is made of, not corrected yet."""
    comparisons: list[MethodComparison | None] = []
    for model in dict.fromkeys(cell.model for cell in stored.cells):
        methods: dict[str, list[StoredCell]] = {}
        for cell in stored.cells:
            if cell.model == model:
                methods.setdefault(cell.method, []).append(cell)
        base = next((m for m in methods if methods[m][0].kind == "base"), None)
        pruned = [m for m in methods if methods[m][0].kind == "pruned"]
        tuned = [m for m in methods if methods[m][0].kind == "tuned"]
        if pruned and base is not None:
            for method in pruned:
                comparisons.append(_claim("pruned", methods[base], methods[method], tasks))
                back = [m for m in tuned if starts_from(methods[m], methods[method])]
                comparisons += [
                    _claim("recovered", methods[method], methods[m], tasks) for m in back
                ]
            continue
        if (sides := _small_and_large(methods, tuned)) is not None:
            small, large = sides
            comparisons.append(_claim("kept", methods[large], methods[small], tasks))
        if base is not None:
            comparisons += [_claim("gain", methods[base], methods[m], tasks) for m in tuned]
    return [claim for claim in comparisons if claim is not None]


def starts_from(cells: list[StoredCell], parents: list[StoredCell]) -> bool:
    """Return whether ``cells`` were made from ``parents``."""
    names = {cell.name for cell in parents}
    return all(cell.record.parent in names for cell in cells)


def _small_and_large(
    methods: dict[str, list[StoredCell]], tuned: list[str]
) -> tuple[str, str] | None:
    """Return a QLoRA method, and full fine-tuning or LoRA of the same model."""
    ways: dict[str, str] = {}
    for method in tuned:
        if methods[method][0].record.parent is None:
            ways.setdefault(methods[method][0].record.recipe["method"], method)
    large = ways.get("full") or ways.get("lora")
    return (ways["qlora"], large) if "qlora" in ways and large else None


def score_of(cells: list[StoredCell], tasks: list[ReportTask]) -> MethodScore:
    """Return the mean of one method's cells over ``tasks``, all of which they answered."""
    values = [_values(cells, task) for task in tasks]
    value = float(np.mean([x.mean() for x in values]))
    levels = [cells[0].answers[task.task].chance for task in tasks]
    chance = float(np.mean(levels))
    if len(values) == 1:
        above = stats.above_chance(value * len(values[0]), len(values[0]), chance)
    else:
        pairs = zip(levels, values, strict=True)
        error = sum(c * (1 - c) / len(x) for c, x in pairs) ** 0.5 / len(values)
        above = value - chance > pooled.errors_wide() * error
    names, interval = [cell.name for cell in cells], pooled.mean_interval(values, pooled.SCORES)
    return MethodScore(cells[0].method, names, value, interval, chance, above)


def _values(cells: list[StoredCell], task: ReportTask) -> np.ndarray:
    """Return each question's fraction of right answers over the seeds."""
    columns = [cell.answers[task.task].right_N[task.metric] for cell in cells]
    return np.mean(np.stack(columns), axis=0, dtype=float)


def shared_tasks(cells: list[StoredCell], tasks: list[ReportTask]) -> list[ReportTask]:
    """Return the tasks that all ``cells`` answered, on the same questions."""
    return [task for task in tasks if _same_questions(cells, task.task)]


def _same_questions(cells: list[StoredCell], task: str) -> bool:
    if not all(task in cell.answers for cell in cells):
        return False
    first, *others = (cell.answers[task] for cell in cells)
    return all(
        other.section.questions == first.section.questions
        and np.array_equal(first.doc_ids_N, other.doc_ids_N)
        for other in others
    )


def _claim(
    what: str, first: list[StoredCell], second: list[StoredCell], tasks: list[ReportTask]
) -> MethodComparison | None:
    """Return a claim; None if the two have no task in common."""
    common = shared_tasks([*first, *second], tasks)
    if not common:
        return None
    before = [_values(first, task) for task in common]
    after = [_values(second, task) for task in common]
    scores = [score_of(cells, common) for cells in (first, second)]
    differences = [y - x for x, y in zip(before, after, strict=True)]
    return MethodComparison(
        model=first[0].model,
        what=what,
        tasks=[task.task for task in common],
        first=scores[0],
        second=scores[1],
        delta=float(np.mean([x.mean() for x in differences])),
        p_value=pooled.sign_flip(differences),
        before=before,
        after=after,
    )


def means(stored: StoredMatrix, tasks: list[ReportTask]) -> dict[str, list[MethodScore]]:
    """Return the mean over tasks and seeds of each method, by model; without any task, none."""
    scores: dict[str, list[MethodScore]] = {}
    for model in dict.fromkeys(cell.model for cell in stored.cells):
        members = [cell for cell in stored.cells if cell.model == model]
        groups = [
            [cell for cell in members if cell.method == method]
            for method in dict.fromkeys(cell.method for cell in members)
        ]
        shared = [(cells, shared_tasks(cells, tasks)) for cells in groups]
        scores[model] = [score_of(cells, common) for cells, common in shared if common]
    return scores
