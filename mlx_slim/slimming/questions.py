"""The questions of a search: which select, which test the claim, and who answered them right.

Invariant: the first half of each task (of each of its subjects) selects, the second half is
answered by the original and the winner alone. Scores are those of ``mlx-slim eval``, read from its
files. Try it: ``mlx-slim slim MODEL -o DIR --disk 200MB --task arc_easy``.

Legend: N questions.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mlx_slim.errors import SlimError
from mlx_slim.evaluation import stats
from mlx_slim.evaluation.options import EvalOptions
from mlx_slim.evaluation.plan import read_tasks
from mlx_slim.evaluation.results import STATE_FILE, read_samples, samples_name
from mlx_slim.evaluation.run import evaluate
from mlx_slim.evaluation.tasks.metrics import counted, first_metric
from mlx_slim.events import Observer
from mlx_slim.reading import read_object
from mlx_slim.slimming.options import SlimOptions
from mlx_slim.slimming.proof import PairedAnswers


@dataclass(frozen=True)
class TaskPlan:
    """How many questions of a task there are.

    Attributes:
        task: As ``--task`` takes it.
        name: As results call it.
        limit: Questions (of each subject) that the original and the winner answer.
        half: Of them, those that select.
        selection: Questions that select, of all subjects.
        claim: Those that test the claim.
    """

    task: str
    name: str
    limit: int
    half: int
    selection: int
    claim: int


def plan_questions(options: SlimOptions) -> list[TaskPlan]:
    """Return the tasks, each with its questions dealt.

    Raises:
        SlimError: If a task is unknown, counts no right answers, its rows are not there, or it has
            too few.
    """
    plans: list[TaskPlan] = []
    for name in options.tasks:
        settings = EvalOptions(limit=options.limit, data_dir=options.data_dir)
        expanded = read_tasks([name], settings)
        for one in expanded:
            task = one.selection.task
            if not task.spec.counts_answers:
                raise _counts_none(task.name)
            subjects = Counter(question.subject for question in one.questions)
            each = max(2, -(-options.limit // len(subjects)))
            sizes = [min(each, size) for size in subjects.values()]
            half = max(sizes) // 2
            selection = sum(min(half, size) for size in sizes)
            claim = sum(sizes) - selection
            if not selection or not claim:
                raise SlimError(
                    f"{task.name} has {sum(sizes)} questions: none is left for the claim",
                    "choose a larger task, or a larger --limit",
                )
            if any(plan.name == task.name for plan in plans):
                raise SlimError(f"{task.name} is named twice", "name every task once")
            single = name if len(expanded) == 1 else task.name  # a file's path stays
            plans.append(TaskPlan(single, task.name, max(sizes), half, selection, claim))
    return plans


def _counts_none(task: str) -> SlimError:
    return SlimError(
        f"{task} counts no right answers, so no share of them can be kept",
        "choose a task with right and wrong answers, such as arc_easy",
    )


@dataclass(frozen=True)
class ModelAnswers:
    """Right and wrong answers of one model to a task's questions, in their order.

    Attributes:
        task: Its name.
        metric: What is counted.
        right_N: 0 or 1.
        selects_N: Whether a question belongs to the selection part.
        chance: Expected accuracy of guessing.
    """

    task: str
    metric: str
    right_N: np.ndarray
    selects_N: np.ndarray
    chance: float


def answer(
    model: Path | str,
    plan: TaskPlan,
    folder: Path,
    data_dir: Path | None,
    observer: Observer,
    *,
    whole: bool,
    revision: str | None = None,
) -> ModelAnswers:
    """Score a model on a task, resumed where it was begun; return its answers.

    Args:
        model: Folder or hub id.
        plan: The task.
        folder: Of the scores.
        data_dir: The data mirror; None takes ``MLX_SLIM_DATA``.
        observer: Gets every event.
        whole: Ask the claim questions too.
        revision: Of a hub model.
    """
    settings = EvalOptions(
        limit=plan.limit if whole else plan.half, data_dir=data_dir, revision=revision
    )
    if not (folder / "results.json").exists():
        resume = (folder / STATE_FILE).exists()
        evaluate([str(model)], [plan.task], folder, settings, resume=resume, observer=observer)
    return read_answers(folder, plan)


def read_answers(folder: Path, plan: TaskPlan) -> ModelAnswers:
    """Return the answers in a folder of scores.

    Raises:
        SlimError: If it is damaged, or the task counts no right answers.
    """
    records = read_samples(folder / samples_name(plan.name))
    section = read_object(folder / "results.json", tasks=dict)["tasks"][plan.name]
    metrics = counted(section["metrics"], records[0])
    chance = stats.chance_level(records)
    if not metrics or chance is None:
        raise _counts_none(plan.name)
    metric = first_metric(metrics)
    seen: Counter[str] = Counter()
    selects = []
    for record in records:
        subject = str(record.get("subject"))
        selects.append(seen[subject] < plan.half)
        seen[subject] += 1
    right_N = np.array([record[metric] for record in records], np.int8)
    return ModelAnswers(plan.name, metric, right_N, np.array(selects), chance)


def paired(
    first: list[ModelAnswers], second: list[ModelAnswers], *, selection: bool
) -> list[PairedAnswers]:
    """Return the answers of two models to the selection or to the claim questions, by task."""
    pairs = []
    for a, b in zip(first, second, strict=True):
        a_N, b_N = (one.right_N[one.selects_N == selection] for one in (a, b))
        if len(a_N) != len(b_N):
            raise SlimError(
                f"{a.task}: {len(a_N)} and {len(b_N)} questions cannot be paired",
                "the scores in the folder were changed: start a new search",
            )
        pairs.append(PairedAnswers(a.task, a.metric, a_N, b_N, a.chance))
    return pairs
