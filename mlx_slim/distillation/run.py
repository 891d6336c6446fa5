"""Distill: teachers write down what they say, one at a time; then a student learns from it.

Invariant: a fine-tune with another strategy: the same loop, run folder, resume, guard and check of
what was saved. A teacher and the student are never in memory together; what a teacher said is kept
under a key of all that it depends on, and a run that is killed while a teacher speaks goes on
there. Which way of learning ``auto`` took, and why, is said. Try it:
``mlx-slim distill distill-smollm2 -o runs/distilled``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mlx_slim import events
from mlx_slim.config.distill import TeacherConfig
from mlx_slim.config.load import Resolved
from mlx_slim.config.schema import Recipe
from mlx_slim.distillation.logits import LogitDistillation
from mlx_slim.distillation.mutual import MutualDistillation
from mlx_slim.distillation.teachers import (
    Disagreement,
    disagreement,
    name_of,
    with_model,
)
from mlx_slim.distillation.text import learn_from_texts
from mlx_slim.errors import SlimError
from mlx_slim.finetuning.run import finetune
from mlx_slim.finetuning.run_dir import Result
from mlx_slim.models.load import load_tokenizer


def distill(
    resolved: Resolved, out: Path, *, observer: events.Observer, resume: bool = False
) -> Result:
    """Run a recipe with teachers into the folder ``out``.

    Args:
        resolved: The recipe (with ``distill``) and where its values come from.
        out: The run folder; must be new unless ``resume``.
        observer: Hears of every event.
        resume: Go on where a run was cut off, while teachers spoke or the student learned.

    Raises:
        SlimError: Bad input; a recipe without ``distill``; tokenizers that differ under
            ``method=logits`` or ``mutual``.
        ResourceError: Over the memory budget or out of disk, before the work.
        Interrupted: Ctrl-C; the state is saved.
    """
    recipe = resolved.recipe
    if recipe.distill is None:
        raise SlimError(
            f"{resolved.given} has no teachers",
            "give distill.teachers=[{model: BIGGER}], or fine-tune: mlx-slim train",
        )
    teachers = [with_model(teacher, recipe) for teacher in recipe.distill.teachers]
    method = recipe.distill.method
    if method in ("auto", "logits"):
        method = _method(recipe, teachers, observer)
    if method == "logits":
        logits = LogitDistillation(recipe.distill, teachers)
        return finetune(resolved, out, observer=observer, resume=resume, strategy=logits)
    if method == "mutual":
        _check_same_tokens(recipe, teachers[0], observer)
        both = MutualDistillation(recipe.distill, teachers[0])
        return finetune(resolved, out, observer=observer, resume=resume, strategy=both)
    return learn_from_texts(resolved, out, teachers, method, observer=observer, resume=resume)


def _method(recipe: Recipe, teachers: list[TeacherConfig], observer: events.Observer) -> str:
    """Return ``logits`` where every teacher speaks the student's tokens, else ``sequence``.

    Raises:
        SlimError: If they do not, and ``method=logits`` was asked for.
    """
    wanted = recipe.distill.method if recipe.distill else "auto"
    student = load_tokenizer(recipe.model, revision=recipe.revision)
    for teacher in teachers:
        found = _difference(student, teacher)
        if found is None:
            continue
        why = f"{name_of(teacher)} does not speak the student's tokens: {found.text}"
        if wanted == "logits" and found.words:
            raise SlimError(why, "learn from the teacher's texts: distill.method=sequence")
        observer.notify(events.Notice(why, level="warning"))
        if wanted == "auto":
            text = "logits cannot be compared: learning from texts (distill.method=sequence)"
            observer.notify(events.Notice(text))
            return "sequence"
    return "logits"


def _check_same_tokens(recipe: Recipe, second: TeacherConfig, observer: events.Observer) -> None:
    """Refuse a second student that does not speak the first one's tokens."""
    found = _difference(load_tokenizer(recipe.model, revision=recipe.revision), second)
    if found is None:
        return
    why = f"{name_of(second)} does not speak the student's tokens: {found.text}"
    if found.words:
        raise SlimError(why, "take two models of one family")
    observer.notify(events.Notice(why, level="warning"))


def _difference(student: Any, teacher: TeacherConfig) -> Disagreement | None:
    if teacher.base_url is not None:
        return Disagreement("an endpoint gives texts, not logits", words=True)
    assert teacher.model is not None
    return disagreement(student, load_tokenizer(teacher.model, revision=teacher.revision))
