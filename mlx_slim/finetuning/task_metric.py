"""The metric of a task on questions that are not its test: what ``train.validate_task`` follows.

Invariant: no question is one that the task is scored on, and none is trained on, in this run or in
what it starts from: both are left out by the hash of their words, and counted. The questions are a
seeded choice from a split that is not scored, posed without examples, as ``task:NAME`` rows are
trained. Batches are a function of the recipe, so the same weights give the same figure. Try it:
``mlx-slim train smollm2-lora train.validate_task=arc_easy -o runs/try``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import ClassVar, final

import numpy as np

from mlx_slim import events
from mlx_slim.artifacts import hash_json
from mlx_slim.config.schema import Recipe
from mlx_slim.data.templates import load_template
from mlx_slim.data.tokenize import unwrap
from mlx_slim.errors import SlimError
from mlx_slim.evaluation.jobs import Engine, TaskJob
from mlx_slim.evaluation.scoring.loglikelihood import LoglikelihoodScorer
from mlx_slim.evaluation.scoring.requests import RequestEncoder, max_length
from mlx_slim.evaluation.tasks.prompts import Chat, build_questions
from mlx_slim.evaluation.tasks.rows import RowsAbsent, TaskRows, load_rows
from mlx_slim.evaluation.tasks.spec import Task, find_task
from mlx_slim.evaluation.tasks.training_rows import is_scored, question_keys, with_split
from mlx_slim.finetuning.build import Tuned, started_from
from mlx_slim.models.lineage import trained_keys
from mlx_slim.models.row_limits import row_limit
from mlx_slim.reading import field
from mlx_slim.runtime import from_first_rank
from mlx_slim.training.callbacks import CallbackState, MetricValue, ValidationMetric, computing

_SPLITS = ("validation", "dev", "train")  # tried in this order, those that are not scored
_STREAM = 4  # parts the choice of questions from all else that is drawn from the seed
_ANY = 1 << 62  # the batch is limited by its positions alone: free memory would vary


def _split_of(task: Task, named: str | None) -> tuple[Task, TaskRows]:
    """Return the task over a split that is not scored, with its rows.

    Raises:
        SlimError: If the named split is scored, or no other one is here.
    """
    if named is not None:
        if is_scored(task, named):
            raise SlimError(
                f"train.validate_split={named} holds the rows that {task.name} is scored on",
                "name another split, or a file with other rows of the task",
            )
        over = with_split(task, named)
        return over, load_rows(over)
    tried = [split for split in _SPLITS if not is_scored(task, split)]
    for split in tried:
        over = with_split(task, split)
        try:
            return over, load_rows(over)
        except RowsAbsent:
            continue
    raise SlimError(
        f"train.validate_task={task.name}: no rows but those that it is scored on "
        f"({task.spec.data.split}); looked for {', '.join(tried) or 'no other split'}",
        "name a split or a file with other rows of the task: train.validate_split=FILE.jsonl",
    )


def _chosen(recipe: Recipe, task: Task, out: Path, say: Callable[[str], None]) -> TaskRows:
    """Return the rows of the questions, in their order."""
    config = recipe.train
    over, rows = _split_of(task, config.validate_split)
    scored = set(question_keys(task, load_rows(task)))
    below = [Path(recipe.model).expanduser(), *started_from(recipe)]
    below += [Path(one.partition("=")[0]).expanduser() for one in recipe.adapter.on]
    trained = trained_keys([out, *below])
    keys = question_keys(over, rows)
    tested = [key in scored for key in keys]
    learned = [key in trained and not test for key, test in zip(keys, tested, strict=True)]
    usable = np.flatnonzero(~(np.array(tested) | np.array(learned)))
    left_out = f"{sum(tested):,} are test questions, {sum(learned):,} are trained on"
    split = over.spec.data.split
    if not len(usable):
        raise SlimError(
            f"train.validate_task={task.name}: none of the {len(keys):,} questions of {split} can "
            f"be used: {left_out}",
            f"leave some out of training: data.path=[{{path: task:{task.name}, skip: 100}}]",
        )
    generator = np.random.default_rng([config.seed, _STREAM])
    chosen = np.sort(generator.permutation(usable)[: config.validate_limit]).tolist()
    say(
        f"validating on {len(chosen):,} of {len(keys):,} questions of {task.name} ({split}): "
        f"{left_out}; the best step is the one with the best figure"
    )
    places = [rows.place(number) for number in chosen]
    return replace(rows, rows=[rows.rows[number] for number in chosen], places=places)


def validation_metric(
    recipe: Recipe, tuned: Tuned, out: Path, observer: events.Observer
) -> list[ValidationMetric]:
    """Return the callback of ``train.validate_task``; none without one.

    Args:
        recipe: Names the task.
        tuned: What is trained; measured as it is at each call.
        out: The run folder, which declares the task rows that are trained on.
        observer: Gets a notice about the questions.

    Raises:
        SlimError: If there are no questions to ask.
    """
    name = recipe.train.validate_task
    if name is None:
        return []
    task = find_task(name)
    if task.kind == "perplexity":
        raise SlimError(
            f"train.validate_task={name} has texts, no questions",
            "measure a text with the section forgetting, or rows with data.validation",
        )
    rows = _chosen(recipe, task, out, lambda text: observer.notify(events.Notice(text)))
    tokenizer = tuned.loaded.tokenizer
    chat = Chat.of(load_template("auto", unwrap(tokenizer))) if task.spec.chat else None
    encoder = RequestEncoder(
        tokenizer,
        max_length(tuned.config, tokenizer),
        chat=chat is not None and chat.renders_bos,
        limit=row_limit(tuned.config),
    )
    questions = build_questions(task, rows, 0, chat=chat)
    job = TaskJob(task, rows.checksum, 0, None, questions, encoder, chat is not None)
    job.check_questions()
    callbacks = list(tuned.callbacks)

    def measure() -> dict[str, float | str]:
        model = tuned.model
        training = model.training
        model.eval()
        with computing(callbacks):
            scorer = LoglikelihoodScorer(model)
            engine = Engine(model, tokenizer, scorer, _ANY, recipe.train.batch_tokens)
            records = [r for chunk in job.chunks for r in job.compute(chunk, engine).records]
        model.train(training)
        metric, value = job.running(records)
        return {"metric": metric, "value": value}

    identity = hash_json([job.describe(), list(rows.rows)])
    return [TaskMetric(task.name, len(questions), measure, identity)]


@final
class TaskMetric(ValidationMetric):
    """Measures a task by the weights as they are.

    Args:
        task: Its name.
        questions: How many there are.
        measure: Returns ``metric`` and ``value``; called on rank 0 alone.
        identity: Hash of the questions: a resumed run must have the same ones.
    """

    name: ClassVar[str] = "validate_task"

    def __init__(
        self,
        task: str,
        questions: int,
        measure: Callable[[], dict[str, float | str]],
        identity: str,
    ) -> None:
        self.task, self.questions = task, questions
        self._measure, self._identity = measure, identity

    def measure(self) -> MetricValue:
        """Return the figure of the weights as they are; the more the better."""
        measured = from_first_rank(self._measure)
        return MetricValue(self.task, measured["metric"], float(measured["value"]), self.questions)

    def state(self) -> CallbackState:
        """Return the hash of the questions."""
        return CallbackState(values={"questions": self._identity})

    def load_state(self, state: CallbackState) -> None:
        """Check that the questions are the same.

        Raises:
            SlimError: If they are others now.
        """
        where = f"checkpoint: callbacks.{self.name}"
        if field(state.values, where, "questions", str) != self._identity:
            raise SlimError(
                f"the questions of train.validate_task={self.task} are others than when the run "
                "started",
                "resume with the data that it started with, or start a new run",
            )
