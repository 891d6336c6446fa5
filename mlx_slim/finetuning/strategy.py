"""The training strategy: what a fine-tune minimises, over which rows, and what it saves.

Invariant: loop, run folder, resume and verification are the same for every strategy. The plain one
is here; distillation has others (``distillation/``). To add one, write a final class with the
methods of ``TrainingStrategy`` and pass it to ``finetuning.run.finetune``. Try it: ``mlx-slim train
smollm2-lora -o runs/try``.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, final

import mlx.nn as nn
import numpy as np

from mlx_slim import events
from mlx_slim.adapters.inject import without_adapters
from mlx_slim.adapters.stack import load_adapters, parse_adapters, used_folders
from mlx_slim.adapters.store import save_adapter
from mlx_slim.config.load import Resolved
from mlx_slim.config.schema import Recipe
from mlx_slim.data.prepare import Prepared
from mlx_slim.errors import SlimError
from mlx_slim.finetuning.build import Tuned, from_rows, prepare_data, prepare_model
from mlx_slim.finetuning.qat_save import save_quantized
from mlx_slim.finetuning.rounds import RoundScorer
from mlx_slim.finetuning.sharded_save import base_folder, save_sharded
from mlx_slim.models.lineage import carry
from mlx_slim.models.load import load, read_config
from mlx_slim.models.save import save_model
from mlx_slim.planner.memory import Prediction, predict
from mlx_slim.quantization.base import as_record, load_base
from mlx_slim.reading import JsonObject, ModelConfig
from mlx_slim.runtime import resolve_dtype, world
from mlx_slim.training.objective import Objective


class Student(Protocol):
    """What is trained, saved and loaded again: one model, or two in one."""

    def prepare(self, recipe: Recipe) -> Tuned:
        """Return it with its trainable parameters chosen."""
        ...

    def expect(self, recipe: Recipe) -> Prediction:
        """Return the cost of training, as far as it is predictable before anything is loaded."""
        ...

    def predict(self, recipe: Recipe, tuned: Tuned, lengths: Sequence[int]) -> Prediction:
        """Return the cost of training on rows of these lengths, in tokens."""
        ...

    def artifact(self, recipe: Recipe, tuned: Tuned) -> str:
        """Return the name of what is saved inside the run folder."""
        ...

    def save(self, recipe: Recipe, tuned: Tuned, out: Path) -> None:
        """Write what was trained into the run folder ``out``."""
        ...

    def load_again(self, recipe: Recipe, tuned: Tuned, out: Path) -> nn.Module:
        """Return what was saved, loaded as a user would."""
        ...

    def responder(self, model: nn.Module) -> nn.Module:
        """Return the part of what is trained, or of what was loaded again, that answers prompts."""
        ...


class TargetGeneration(Protocol):
    """Targets that must be computed before the first step."""

    @property
    def from_student(self) -> bool:
        """Whether the untrained student computes them; else it is not loaded meanwhile."""
        ...

    def need(self, read_N: np.ndarray) -> None:
        """Take note of the training rows that the run reads in any of its steps, bool (N,)."""
        ...

    def check_disk(self, out: Path) -> None:
        """Refuse to start when the disk cannot hold the targets.

        Raises:
            ResourceError: Gives their size.
        """
        ...

    def missing(self) -> bool:
        """Return whether some targets are not there yet."""
        ...

    def generate(self, observer: events.Observer, student: Tuned | None) -> bool:
        """Compute the missing targets; return False if it was interrupted.

        Args:
            observer: Hears of it.
            student: Untrained, if it computes them.
        """
        ...


class TrainingStrategy(Protocol):
    """What is minimised, over which rows, and what must happen before.

    Every strategy is a final class; what strategies have in common are the functions below.
    """

    @property
    def student(self) -> Student:
        """What is trained."""
        ...

    @property
    def targets(self) -> TargetGeneration | None:
        """Targets to compute before training, or None."""
        ...

    @property
    def scorer(self) -> RoundScorer | None:
        """What learns from answers that the model writes in rounds, or None."""
        ...

    def check(self, recipe: Recipe) -> None:
        """Refuse, before anything is loaded, what cannot work.

        Raises:
            SlimError: The recipe does not fit the strategy.
            ResourceError: The memory budget is too small.
        """
        ...

    def rows(self, recipe: Recipe, tuned: Tuned, out: Path, *, unchanged: bool) -> Prepared:
        """Return the rows, tokenised in ``out``; called before ``objectives``.

        With ``unchanged`` other rows than those in ``out`` are an error.
        """
        ...

    def objectives(
        self, model: nn.Module, chunk: int | None, vocabulary: int, num_threads: int
    ) -> tuple[Objective, Objective | None]:
        """Return what is minimised, and what validation rows are measured by (None: the same)."""
        ...

    def record(self) -> JsonObject:
        """Return the keys of ``run.json`` that describe the strategy."""
        ...


@final
class SingleModel:
    """The model of the recipe: adapters, the whole model, or a quantization-aware one."""

    def prepare(self, recipe: Recipe) -> Tuned:
        """Return the base with its adapters, or all of it to train."""
        return prepare_model(recipe)

    def expect(self, recipe: Recipe) -> Prediction:
        """Return the cost of training without looking at rows."""
        config = read_config(recipe.model, recipe.revision)
        return predict(config, recipe, ranks=world().size())

    def predict(self, recipe: Recipe, tuned: Tuned, lengths: Sequence[int]) -> Prediction:
        """Return the cost of training on rows of these lengths, in tokens."""
        config = planned_config(recipe, tuned)
        return predict(config, recipe, lengths=lengths, ranks=world().size())

    def artifact(self, recipe: Recipe, tuned: Tuned) -> str:
        """Return ``model`` or ``adapters``."""
        return "model" if tuned.injected is None or recipe.quantize.qat else "adapters"

    def save(self, recipe: Recipe, tuned: Tuned, out: Path) -> None:
        """Write what was trained; of a quantization-aware run the adapters too."""
        if tuned.sharded is not None:
            save_sharded(recipe, tuned, out / self.artifact(recipe, tuned))
            return
        if tuned.injected is not None or not recipe.quantize.qat:
            folder = "model" if tuned.injected is None else "adapters"
            save_tuned(recipe, tuned, tuned.model, out / folder)
        if recipe.quantize.qat:
            save_quantized(out / "model", recipe, tuned)

    def load_again(self, recipe: Recipe, tuned: Tuned, out: Path) -> nn.Module:
        """Return what was saved, loaded as a user would."""
        if recipe.quantize.qat:
            return load(out / "model", dtype=resolve_dtype(recipe.train.dtype)).model
        return load_tuned(recipe, tuned.injected is not None, out / self.artifact(recipe, tuned))

    def responder(self, model: nn.Module) -> nn.Module:
        """Return ``model``."""
        return model


@final
class CrossEntropyStrategy:
    """Learning from the rows alone, by next-token cross-entropy."""

    targets = None
    scorer = None

    def __init__(self) -> None:
        self.student = SingleModel()

    def check(self, recipe: Recipe) -> None:
        """Accept every recipe."""

    def rows(self, recipe: Recipe, tuned: Tuned, out: Path, *, unchanged: bool) -> Prepared:
        """Return the recipe's rows."""
        return prepare_data(recipe, tuned, out, unchanged=unchanged)

    def objectives(
        self, model: nn.Module, chunk: int | None, vocabulary: int, num_threads: int
    ) -> tuple[Objective, Objective | None]:
        """Return cross-entropy, for training and for validation."""
        return from_rows(model, chunk, vocabulary, num_threads)

    def record(self) -> JsonObject:
        """Return nothing: the recipe describes it."""
        return {}


def plain_strategy(resolved: Resolved) -> CrossEntropyStrategy:
    """Return the strategy of a recipe that says nothing else than its rows.

    Raises:
        SlimError: If it does.
    """
    recipe, source = resolved.recipe, resolved.source
    if recipe.distill is not None:
        raise SlimError(
            f"{source} has teachers (distill:), and this is plain fine-tuning",
            f"use mlx-slim distill {source}, or drop them with distill=null",
        )
    if recipe.preference is not None:
        raise SlimError(
            f"{source} compares answers (preference:), and this is plain fine-tuning",
            f"use mlx-slim train {source}, or drop the section with preference=null",
        )
    if recipe.reward is not None:
        raise SlimError(
            f"{source} has rewards (reward:), and this is plain fine-tuning",
            f"use mlx-slim train {source}, or drop them with reward=null",
        )
    return CrossEntropyStrategy()


def planned_config(recipe: Recipe, tuned: Tuned) -> ModelConfig:
    """Return the config that a plan starts from: of the dense model, where it is quantized here."""
    if recipe.method == "qlora":
        return read_config(recipe.model, recipe.revision)
    return tuned.config


def save_tuned(recipe: Recipe, tuned: Tuned, model: nn.Module, target: Path) -> None:
    """Write the adapters of ``model``, or all of it, to the folder ``target``.

    A base that was quantized here is saved beside them: over another base they are another model.
    """
    if tuned.injected is not None:
        more = {}
        if tuned.base is not None:
            base = base_folder(target)
            shutil.rmtree(base, ignore_errors=True)
            with without_adapters(model):
                save_model(base, model, tuned.loaded.tokenizer, tuned.config)
            carry(base, [tuned.loaded.path])
            more = as_record(tuned.base, f"../{base.name}")
        save_adapter(
            target,
            model,
            recipe.adapter,
            tuned.injected,
            dora=recipe.method == "dora",
            base=recipe.model,
            more=more,
        )
    else:
        shutil.rmtree(target, ignore_errors=True)
        save_model(target, model, tuned.loaded.tokenizer, tuned.config)
        carry(target, [tuned.loaded.path])


def load_tuned(recipe: Recipe, adapted: bool, target: Path) -> nn.Module:
    """Return what ``save_tuned`` wrote: the base with its adapters, or the whole model."""
    if not adapted:
        return load(target).model
    stack = parse_adapters([*recipe.adapter.on, target])
    dtype = resolve_dtype(recipe.train.dtype)
    again = load_base(
        recipe.model, used_folders(stack), revision=recipe.revision, dtype=dtype
    ).model
    load_adapters(again, stack)
    return again
