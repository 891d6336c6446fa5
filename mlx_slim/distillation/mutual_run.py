"""Mutual distillation: two students in one run, saved as ``first/`` and ``second/``.

Invariant: both are loaded, adapted, saved and checked as one is; a checkpoint holds both, so a run
resumes exactly. Try it:
``mlx-slim distill smollm2-lora "distill={method: mutual, teachers: [{model: SECOND}]}"``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import mlx.nn as nn

from mlx_slim import events
from mlx_slim.artifacts import public_name
from mlx_slim.config.distill import DistillConfig, TeacherConfig
from mlx_slim.config.schema import Recipe
from mlx_slim.distillation.mutual import BothHeldOut, Mutual, Pair
from mlx_slim.distillation.teachers import with_model
from mlx_slim.errors import SlimError
from mlx_slim.finetuning.build import Tuned, prepare_model
from mlx_slim.finetuning.strategy import Course, load_tuned, planned_config, save_tuned
from mlx_slim.models.load import read_config
from mlx_slim.planner.known_models import model_config
from mlx_slim.planner.memory import Prediction, predict
from mlx_slim.training.step import Objective

FIRST, SECOND = "first", "second"


def second_recipe(recipe: Recipe, second: TeacherConfig) -> Recipe:
    """Return the recipe of the second student: another model and other random numbers."""
    train = recipe.train.model_copy(update={"seed": (recipe.train.seed + 1) % 2**32})
    update = {"model": second.model, "revision": second.revision, "train": train}
    return recipe.model_copy(update=update)


class Together(Course):
    """Two students of one tokenizer.

    Args:
        config: The ``distill`` section.
        second: The second student.
    """

    def __init__(self, config: DistillConfig, second: TeacherConfig) -> None:
        self.config = config
        self.second = second
        self._beside: Tuned | None = None  # the second student, without its weights

    def begin(self, recipe: Recipe, observer: events.Observer) -> None:
        """Refuse students that cannot learn from each other.

        Raises:
            SlimError: If they have other numbers of logits, or are one and the same.
        """
        assert self.second.model is not None
        sizes = [
            read_config(recipe.model, recipe.revision)["vocab_size"],
            read_config(self.second.model, self.second.revision)["vocab_size"],
        ]
        if sizes[0] != sizes[1]:
            raise SlimError(
                f"the students have {sizes[0]:,} and {sizes[1]:,} logits a token",
                "take two models of one family",
            )
        same = (self.second.model, self.second.revision) == (recipe.model, recipe.revision)
        if same and recipe.method == "full":
            raise SlimError(
                f"both students are {recipe.model}, trained in full: they would stay equal",
                "give another model as distill.teachers=[{model: …}], or take method=lora",
            )

    def model(self, recipe: Recipe) -> Tuned:
        """Return both as one model."""
        first = prepare_model(recipe)
        second = prepare_model(second_recipe(recipe, self.second))
        pair = Pair(first.model, second.model)
        self._beside = replace(second, loaded=replace(second.loaded, model=nn.Module()))
        return Tuned(
            loaded=replace(first.loaded, model=pair),
            config=first.config,
            injected=first.injected,
            base=first.base,
            total=first.total + second.total,
        )

    @property
    def _second(self) -> Tuned:
        assert self._beside is not None
        return self._beside

    def expect(self, recipe: Recipe) -> Prediction:
        """Return what both cost together, before anything is loaded."""
        return predicted(read_config(recipe.model, recipe.revision), recipe)

    def readers(self) -> list[dict[str, Any]]:
        """Return the second student's config."""
        return [self._second.config]

    def predict(self, recipe: Recipe, tuned: Tuned, lengths: Sequence[int]) -> Prediction:
        """Return what both cost together."""
        second = second_recipe(recipe, self.second)
        return together(
            predict(planned_config(recipe, tuned), recipe, lengths=lengths),
            predict(planned_config(second, self._second), second, lengths=lengths, suggest=False),
        )

    def objectives(
        self, model: nn.Module, chunk: int | None, vocabulary: int, lanes: int
    ) -> tuple[Objective, Objective | None]:
        """Return what both minimise, and their mean cross-entropy for held-out rows."""
        config = self.config
        settings = (config.divergence, config.temperature, config.weight, chunk, vocabulary, lanes)
        pair = cast(Pair, model)
        return Mutual(pair, *settings), BothHeldOut(pair, *settings)

    def artifact(self, recipe: Recipe, tuned: Tuned) -> str:
        """Return the folder of the first student."""
        return FIRST

    def save(self, recipe: Recipe, tuned: Tuned, out: Path) -> None:
        """Write both."""
        pair = cast(Pair, tuned.model)
        save_tuned(recipe, tuned, pair.first, out / FIRST)
        second = second_recipe(recipe, self.second)
        save_tuned(second, self._second, pair.second, out / SECOND)

    def load_again(self, recipe: Recipe, tuned: Tuned, out: Path) -> nn.Module:
        """Return both, loaded as a user would."""
        adapted = tuned.injected is not None
        second = second_recipe(recipe, self.second)
        return Pair(
            load_tuned(recipe, adapted, out / FIRST), load_tuned(second, adapted, out / SECOND)
        )

    def record(self) -> dict[str, Any]:
        """Return who learned together, for ``run.json``."""
        second = public_name(self.second.model or "")
        return {"distill": {"method": "mutual", "second": second, "folders": [FIRST, SECOND]}}


def predicted(
    config: dict[str, Any],
    recipe: Recipe,
    look_up: Callable[[Recipe], dict[str, Any]] = lambda recipe: model_config(recipe)[0],
    **settings: Any,
) -> Prediction:
    """Return what a run costs: of one student, or of both if there are two.

    Args:
        config: Of the recipe's model.
        recipe: The run.
        look_up: Finds the configuration of another recipe's model.
        settings: For ``predict``.

    Raises:
        SlimError: As ``predict``, or if the second student's configuration is not to be had.
    """
    first = predict(config, recipe, **settings)
    if recipe.distill is None or recipe.distill.method != "mutual":
        return first
    other = second_recipe(recipe, with_model(recipe.distill.teachers[0], recipe))
    return together(first, predict(look_up(other), other, **{**settings, "suggest": False}))


def together(first: Prediction, second: Prediction) -> Prediction:
    """Return what two runs in one process cost: sizes and times add up."""
    peak = first.predicted_peak_bytes + second.predicted_peak_bytes
    seconds = None
    if first.predicted_seconds is not None and second.predicted_seconds is not None:
        seconds = first.predicted_seconds + second.predicted_seconds
    more = second.predicted_peak_bytes
    return replace(
        first,
        predicted_peak_bytes=peak,
        loading_peak_bytes=first.loading_peak_bytes + second.loading_peak_bytes,
        fits=peak <= first.budget_bytes,
        predicted_seconds=seconds,
        disk_bytes=first.disk_bytes + second.disk_bytes,
        download_bytes=first.download_bytes + second.download_bytes,
        breakdown={key: size + second.breakdown[key] for key, size in first.breakdown.items()},
        parameters=first.parameters + second.parameters,
        trainable_parameters=first.trainable_parameters + second.trainable_parameters,
        suggestions=[
            replace(s, predicted_peak_bytes=s.predicted_peak_bytes + more)
            for s in first.suggestions
        ],
    )
