"""Distillation from texts of teachers (arXiv 1606.07947) or their rationales (arXiv 2402.04616).

Invariant: teachers write first (``generate.py``), with no student in memory; what follows is a
fine-tune over these rows, each target with its group's weight. Validation rows are
rows of the data, measured by plain cross-entropy, so that runs with other teachers and weights can
be compared. An interrupted run resumes with the next missing response, or the next step. Try it:
``mlx-slim distill tinyllm-openbookqa -o runs/try``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import final

import mlx.nn as nn
import numpy as np

from mlx_slim import events
from mlx_slim.artifacts import public_name, write_json
from mlx_slim.config.distill import TeacherConfig
from mlx_slim.config.load import Resolved
from mlx_slim.config.schema import Recipe
from mlx_slim.data.pipeline import Pipeline
from mlx_slim.data.prepare import Prepared
from mlx_slim.distillation.dataset import (
    DistillationDataset,
    dataset_from_record,
    read_record,
)
from mlx_slim.distillation.generate import generate_dataset
from mlx_slim.finetuning.build import Tuned, prepare_data
from mlx_slim.finetuning.guard import check_folder
from mlx_slim.finetuning.run import finetune
from mlx_slim.finetuning.run_dir import (
    STATE_FILE,
    Result,
    claim,
    command_words,
    is_complete,
    run_dir,
    state_record,
)
from mlx_slim.finetuning.strategy import CrossEntropyStrategy, SingleModel
from mlx_slim.models.load import load_tokenizer, read_config
from mlx_slim.power import keep_awake
from mlx_slim.reading import JsonObject
from mlx_slim.runtime import true_on_all_ranks, world
from mlx_slim.training.cross_entropy import CrossEntropy
from mlx_slim.training.objective import Objective


def learn_from_texts(
    resolved: Resolved,
    out: Path,
    teachers: Sequence[TeacherConfig],
    method: str,
    *,
    observer: events.Observer,
    resume: bool = False,
) -> Result:
    """Let teachers write, then train the student on it.

    Args:
        resolved: The recipe, with ``distill``.
        out: The run folder; must be new unless ``resume``.
        teachers: Its teachers, each with its model.
        method: ``sequence`` or ``rationales``.
        observer: Hears of every event.
        resume: Resume an interrupted run.

    Raises:
        SlimError: Bad input, or a teacher that does not answer; its responses so far stay.
        ResourceError: As ``finetune``.
        Interrupted: Ctrl-C; everything so far is saved.
    """
    recipe = resolved.recipe
    with claim(out, recipe, observer, resume=resume) as started:
        if started and is_complete(out, recipe):
            return finetune(
                resolved, out, observer=observer, resume=True, strategy=CrossEntropyStrategy()
            )

        def ready() -> None:
            if not started:
                write_json(out / STATE_FILE, state_record(resolved, None))

        _check_student(recipe)
        message = "stopped while the teachers generated answers; those so far are saved"
        with (
            run_dir(out).resumable(partial(command_words, resolved), message),
            keep_awake(recipe.train.keep_awake),
        ):
            dataset = _prepare_dataset(recipe, teachers, method, out, observer, ready)
        strategy = TextDistillation(dataset, teachers)
        return finetune(resolved, out, observer=observer, resume=True, strategy=strategy)


def _check_student(recipe: Recipe) -> None:
    """Refuse a student that cannot be trained, before the teachers write."""
    read_config(recipe.model, recipe.revision)
    tokenizer = load_tokenizer(recipe.model, revision=recipe.revision)
    Pipeline(recipe.data, tokenizer, max_length=recipe.train.max_length)


def _prepare_dataset(
    recipe: Recipe,
    teachers: Sequence[TeacherConfig],
    method: str,
    out: Path,
    observer: events.Observer,
    ready: Callable[[], None],
) -> DistillationDataset:
    """Generate the dataset on rank 0; the other ranks read it."""
    if world().size() == 1:
        return generate_dataset(recipe, teachers, method, out, observer, ready)
    if world().rank() == 0:
        generate_dataset(recipe, teachers, method, out, observer, ready)
    true_on_all_ranks()
    check_folder(out)
    stored = read_record(out)
    assert stored is not None
    return dataset_from_record(stored[0], recipe, out)


@final
class TextDistillation:
    """Training on texts of teachers.

    Args:
        dataset: What they wrote, and the data's rows.
        teachers: As in the recipe, each with its model.
    """

    targets = None
    scorer = None

    def __init__(self, dataset: DistillationDataset, teachers: Sequence[TeacherConfig]) -> None:
        self.student = SingleModel()
        self.dataset = dataset
        self.teachers = teachers
        self._weights_S: np.ndarray | None = None

    def check(self, recipe: Recipe) -> None:
        """Accept every recipe: the student was checked before the teachers were run."""

    def rows(self, recipe: Recipe, tuned: Tuned, out: Path, *, unchanged: bool) -> Prepared:
        """Return the rows of the dataset, tokenised; compute the weight of every target."""
        dataset = self.dataset
        data = prepare_data(
            recipe, tuned, out, unchanged=unchanged, data=dataset.data, find=dataset.find
        )
        self._weights_S = dataset.weights(data)
        return data

    def objectives(
        self, model: nn.Module, chunk: int | None, vocabulary: int, num_threads: int
    ) -> tuple[Objective, Objective | None]:
        """Return weighted cross-entropy, and the plain one for validation rows."""
        return (
            CrossEntropy(model, chunk, vocabulary, num_threads, self._weights_S),
            CrossEntropy(model, chunk, vocabulary, num_threads),
        )

    def record(self) -> JsonObject:
        """Return the method, the teachers and their loss weights, for ``run.json``."""
        answer_weight, *weights = self.dataset.loss_weights
        teachers = [
            {**asdict(report), "model": public_name(teacher.model or ""), "weight": weight}
            for report, teacher, weight in zip(
                self.dataset.teachers, self.teachers, weights, strict=True
            )
        ]
        method = self.dataset.method
        return {"distill": {"method": method, "answer_weight": answer_weight, "teachers": teachers}}
