"""Distill: the targets of each teacher are stored, one teacher at a time; then a student learns.

Invariant: a fine-tune with another strategy: the same loop, run folder, resume, memory guard and
verification of what was saved. A teacher and the student are never in memory at the same time; the
targets of a teacher are stored under a key of all that they depend on, and a run that is killed
while they are generated resumes there. A notice tells which method ``auto`` chose, and why. Try
it: ``mlx-slim distill distill-smollm2 -o runs/distilled``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mlx_slim import events
from mlx_slim.config.distill import TeacherConfig
from mlx_slim.config.load import Resolved
from mlx_slim.config.schema import Recipe
from mlx_slim.data.tokenizer_difference import TokenizerDifference, tokenizer_difference
from mlx_slim.distillation.logits import LogitDistillation
from mlx_slim.distillation.mutual import MutualDistillation
from mlx_slim.distillation.teachers import name_of
from mlx_slim.distillation.text import learn_from_texts
from mlx_slim.distillation.uld import ULDDistillation
from mlx_slim.errors import SlimError
from mlx_slim.finetuning.run import finetune
from mlx_slim.finetuning.run_dir import Result
from mlx_slim.models.load import load_tokenizer
from mlx_slim.planner.students import with_model


def distill(
    resolved: Resolved, out: Path, *, observer: events.Observer, resume: bool = False
) -> Result:
    """Run a recipe with teachers into the folder ``out``.

    Args:
        resolved: The recipe (with ``distill``) and where its values come from.
        out: The run folder; must be new unless ``resume``.
        observer: Hears of every event.
        resume: Resume an interrupted run.

    Raises:
        SlimError: Bad input; a recipe without ``distill``; tokenizers that differ under
            ``method=logits`` or ``mutual``.
        ResourceError: Over the memory budget or out of disk, before the work.
        Interrupted: Ctrl-C; the state is saved.
    """
    recipe = resolved.recipe
    if recipe.distill is None:
        raise SlimError(
            f"{resolved.source} has no teachers",
            "set distill.teachers=[{model: BIGGER}], or fine-tune: mlx-slim train",
        )
    teachers = [with_model(teacher, recipe) for teacher in recipe.distill.teachers]
    method = recipe.distill.method
    if method in ("auto", "logits", "on-policy"):
        method = _method(recipe, teachers, observer)
    if method in ("logits", "on-policy"):
        logits = LogitDistillation(recipe.distill, teachers)
        return finetune(resolved, out, observer=observer, resume=resume, strategy=logits)
    if method == "uld":
        for teacher in teachers:
            if teacher.base_url is not None:
                raise SlimError(
                    f"distill.method=uld needs a teacher's logits: {name_of(teacher)} is an "
                    "endpoint",
                    "give its model folder, or train on its texts: distill.method=sequence",
                )
        uld = ULDDistillation(recipe.distill, teachers)
        return finetune(resolved, out, observer=observer, resume=resume, strategy=uld)
    if method == "mutual":
        _check_same_tokens(recipe, teachers[0], observer)
        both = MutualDistillation(recipe.distill, teachers[0])
        return finetune(resolved, out, observer=observer, resume=resume, strategy=both)
    return learn_from_texts(resolved, out, teachers, method, observer=observer, resume=resume)


def _method(recipe: Recipe, teachers: list[TeacherConfig], observer: events.Observer) -> str:
    """Return the method: for ``auto`` logits where all have the student's tokenizer, else sequence.

    Raises:
        SlimError: If a teacher has not, and the method compares logits.
    """
    method = recipe.distill.method if recipe.distill else "auto"
    student = load_tokenizer(recipe.model, revision=recipe.revision)
    for teacher in teachers:
        if method in ("logits", "on-policy") and teacher.base_url is not None:
            continue  # it is tried whether it scores the student's tokens: scoring_endpoint.py
        difference = _difference(student, teacher)
        if difference is None:
            continue
        why = f"{name_of(teacher)} has a different tokenizer: {difference.text}"
        if method != "auto" and difference.encodings:
            raise SlimError(
                why,
                "compare sorted logits: distill.method=uld; or train on the teacher's texts: "
                "distill.method=sequence",
            )
        observer.notify(events.Notice(why, level="warning"))
        if method == "auto":
            text = "logits cannot be compared: training on texts (distill.method=sequence)"
            if teacher.base_url is None:
                text += "; distill.method=uld compares sorted logits"
            else:
                text += "; distill.method=logits asks a server that scores given texts"
            observer.notify(events.Notice(text))
            return "sequence"
    return "logits" if method == "auto" else method


def _check_same_tokens(recipe: Recipe, second: TeacherConfig, observer: events.Observer) -> None:
    """Check that the second student has the tokenizer of the first."""
    difference = _difference(load_tokenizer(recipe.model, revision=recipe.revision), second)
    if difference is None:
        return
    why = f"{name_of(second)} has a different tokenizer: {difference.text}"
    if difference.encodings:
        raise SlimError(why, "choose two models of one family")
    observer.notify(events.Notice(why, level="warning"))


def _difference(student: Any, teacher: TeacherConfig) -> TokenizerDifference | None:
    if teacher.base_url is not None:
        return TokenizerDifference("an endpoint returns texts, not logits", encodings=True)
    assert teacher.model is not None
    return tokenizer_difference(student, load_tokenizer(teacher.model, revision=teacher.revision))
