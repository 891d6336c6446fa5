"""Models that a distillation recipe names, and the cost of a run that trains two of them.

Invariant: a teacher without a model is the one that the student was made from; the second student
of ``method: mutual`` has the recipe of the first but for its model and seed. Sizes and times of two
students in one process are added. Try it:
``mlx-slim plan smollm2-lora distill.method=mutual "distill.teachers=[{}]"``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mlx_slim.artifacts import is_hub_id
from mlx_slim.config.distill import TeacherConfig
from mlx_slim.config.schema import Recipe
from mlx_slim.errors import SlimError
from mlx_slim.planner.memory import Prediction, predict, weight_bytes
from mlx_slim.planner.shipped_models import model_config
from mlx_slim.reading import ModelConfig, read_object

_SCORING = 0.1  # of a teacher's weights: what its pass over a batch takes besides


def with_model(teacher: TeacherConfig, recipe: Recipe) -> TeacherConfig:
    """Return ``teacher`` with its model filled in: by default the one the student was made from.

    Raises:
        SlimError: If a pruned folder names no hub id as its source.
    """
    if teacher.model is not None:
        return teacher
    record = Path(recipe.model) / "prune.json"
    if not record.is_file():
        return teacher.model_copy(update={"model": recipe.model, "revision": recipe.revision})
    origin = read_object(record, source=str)
    if not is_hub_id(origin["source"]):
        raise SlimError(
            f"{recipe.model} was pruned from a folder called {origin['source']}",
            "set its folder: distill.teachers=[{model: FOLDER}]",
        )
    original = {"model": origin["source"], "revision": origin.get("revision")}
    return teacher.model_copy(update=original)


def second_recipe(recipe: Recipe, second: TeacherConfig) -> Recipe:
    """Return the recipe of the second student: another model and another seed."""
    train = recipe.train.model_copy(update={"seed": (recipe.train.seed + 1) % 2**32})
    update = {"model": second.model, "revision": second.revision, "train": train}
    return recipe.model_copy(update=update)


def predict_run(
    config: ModelConfig,
    recipe: Recipe,
    look_up: Callable[[Recipe], ModelConfig] = lambda recipe: model_config(recipe)[0],
    **settings: Any,
) -> Prediction:
    """Return the cost of a run: of one student, or of both if there are two.

    Args:
        config: Of the recipe's model.
        recipe: The run.
        look_up: Returns the configuration of another recipe's model.
        settings: For ``predict``.

    Raises:
        SlimError: As ``predict``, or if the second student's configuration cannot be read.
    """
    first = predict(config, recipe, **settings)
    if recipe.distill is None:
        return first
    if recipe.distill.sampled_fraction > 0:
        sizes = _teacher_sizes(recipe, look_up, first.dtype)
        return first if sizes is None else beside_teachers(first, sizes, first.budget_bytes)[1]
    if recipe.distill.method != "mutual":
        return first
    other = second_recipe(recipe, with_model(recipe.distill.teachers[0], recipe))
    return combined(first, predict(look_up(other), other, **{**settings, "suggest": False}))


def _teacher_sizes(
    recipe: Recipe, look_up: Callable[[Recipe], ModelConfig], dtype: str
) -> list[int] | None:
    """Return the bytes of the teachers' weights; None if a configuration is not to be had."""
    teachers = recipe.distill.teachers if recipe.distill is not None else []
    sizes = []
    for teacher in (with_model(one, recipe) for one in teachers if one.base_url is None):
        named = {"model": teacher.model, "revision": teacher.revision}
        try:
            config = look_up(recipe.model_copy(update=named))
        except SlimError:
            return None
        sizes.append(sum(weight_bytes({**config, "dtype": dtype}).values()))
    return sizes


def teacher_passes(recipe: Recipe, config: ModelConfig) -> float:
    """Return what the teachers' pass over a row costs, in forward passes of the student.

    Teachers whose targets are stored read each row once; costs go by the number of weights. 0 where
    there is none, or its configuration is not to be had.
    """
    distill = recipe.distill
    if distill is None or distill.method not in ("logits", "uld"):
        return 0.0

    def dense(config: ModelConfig) -> ModelConfig:
        """A pass over packed weights computes what one over whole ones does."""
        return {key: value for key, value in config.items() if not key.startswith("quantization")}

    sizes = _teacher_sizes(recipe, lambda teacher: dense(model_config(teacher)[0]), "float32")
    return sum(sizes or []) / sum(weight_bytes({**dense(config), "dtype": "float32"}).values())


def beside_teachers(
    training: Prediction, teachers: Sequence[int], budget: int
) -> tuple[bool, Prediction]:
    """Return whether the teachers fit beside a run whose rounds they score, and its cost then.

    Where they do not, student and teachers take turns, each alone in memory.

    Args:
        training: The cost of the run without teachers.
        teachers: Bytes of each teacher's weights.
        budget: Bytes.
    """
    weights = sum(teachers)
    beside = training.predicted_peak_bytes + int(weights * (1 + _SCORING)) <= budget
    peak = training.predicted_peak_bytes
    breakdown = {**training.breakdown, "teachers": weights}
    if not beside:
        alone = int(max(teachers, default=0) * (1 + _SCORING))
        breakdown = dict.fromkeys(training.breakdown, 0) | {"teachers": alone}
        if alone <= peak:
            breakdown = {**training.breakdown, "teachers": 0}
    peak = sum(breakdown.values())
    more = weights if beside else 0
    suggestions = [
        replace(s, predicted_peak_bytes=s.predicted_peak_bytes + more) for s in training.suggestions
    ]
    fits = peak <= training.budget_bytes
    return beside, replace(
        training,
        predicted_peak_bytes=peak,
        breakdown=breakdown,
        fits=fits,
        suggestions=suggestions,
    )


def combined(first: Prediction, second: Prediction) -> Prediction:
    """Return the cost of two runs in one process: sizes and times are added."""
    peak = first.predicted_peak_bytes + second.predicted_peak_bytes
    seconds = None
    if first.predicted_seconds is not None and second.predicted_seconds is not None:
        seconds = first.predicted_seconds + second.predicted_seconds
    time_range = None
    if first.time_range is not None and second.time_range is not None:
        time_range = first.time_range + second.time_range
    return replace(
        first,
        predicted_peak_bytes=peak,
        loading_peak_bytes=first.loading_peak_bytes + second.loading_peak_bytes,
        fits=peak <= first.budget_bytes,
        predicted_seconds=seconds,
        time_range=time_range,
        disk_bytes=first.disk_bytes + second.disk_bytes,
        download_bytes=first.download_bytes + second.download_bytes,
        breakdown={key: size + second.breakdown[key] for key, size in first.breakdown.items()},
        parameters=first.parameters + second.parameters,
        trainable_parameters=first.trainable_parameters + second.trainable_parameters,
        suggestions=[
            replace(s, predicted_peak_bytes=s.predicted_peak_bytes + second.predicted_peak_bytes)
            for s in first.suggestions
        ],
    )
