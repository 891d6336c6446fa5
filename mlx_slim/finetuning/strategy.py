"""What a run learns from: the part of a fine-tune that distillation replaces.

Invariant: model, rows, loop, run folder, resume and verification are the same for every strategy;
one says only what is minimised, what must happen before, and what is saved. Try it: ``mlx-slim
train smollm2-lora -o runs/try``.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.nn as nn

from mlx_slim import events
from mlx_slim.adapters.inject import without_adapters
from mlx_slim.adapters.stack import load_adapters, parse_adapters, used_folders
from mlx_slim.adapters.store import save_adapter
from mlx_slim.config.schema import Recipe
from mlx_slim.data.prepare import Prepared
from mlx_slim.finetuning.build import Tuned, from_rows, prepare_data, prepare_model
from mlx_slim.finetuning.qat_save import save_quantized
from mlx_slim.models.lineage import carry
from mlx_slim.models.load import load, read_config
from mlx_slim.models.save import save_model
from mlx_slim.planner.memory import Prediction, predict
from mlx_slim.quantization.base import as_record, load_base
from mlx_slim.runtime import resolve_dtype
from mlx_slim.training.step import Objective

BASE = "base"


class TrainingStrategy:
    """How a run learns; this one from its rows alone, by cross-entropy."""

    def begin(self, recipe: Recipe, observer: events.Observer) -> None:
        """Refuse, before anything is loaded, what cannot work."""

    def model(self, recipe: Recipe) -> Tuned:
        """Return what is trained."""
        return prepare_model(recipe)

    def rows(self, recipe: Recipe, tuned: Tuned, out: Path, *, unchanged: bool) -> Prepared:
        """Return the rows, tokenised in ``out``; with ``unchanged`` refuse other ones."""
        return prepare_data(recipe, tuned, out, unchanged=unchanged, readers=self.readers())

    def readers(self) -> list[dict[str, Any]]:
        """Return the configs of the models besides the student that read every row."""
        return []

    def read(self, recipe: Recipe, tuned: Tuned, data: Prepared, out: Path) -> None:
        """Take note of the rows, before the objectives are asked for."""

    def expect(self, recipe: Recipe) -> Prediction:
        """Return what training will cost, as far as it is known before anything is loaded."""
        return predict(read_config(recipe.model, recipe.revision), recipe)

    def predict(self, recipe: Recipe, tuned: Tuned, lengths: Sequence[int]) -> Prediction:
        """Return what training will cost."""
        return predict(planned_config(recipe, tuned), recipe, lengths=lengths)

    def check_disk(self, out: Path) -> None:
        """Refuse what the disk cannot hold besides checkpoints."""

    def objectives(
        self, model: nn.Module, chunk: int | None, vocabulary: int, num_threads: int
    ) -> tuple[Objective, Objective | None]:
        """Return what is minimised, and what held-out rows are measured by (None: the same)."""
        return from_rows(model, chunk, vocabulary, num_threads)

    def needs_targets(self) -> bool:
        """Return whether ``generate_targets`` has work to do."""
        return False

    def generate_targets(self, observer: events.Observer) -> bool:
        """Do what must be done while the student is not loaded; False if it was interrupted."""
        return True

    def artifact(self, recipe: Recipe, tuned: Tuned) -> str:
        """Return the name of what is saved inside the run folder."""
        return "model" if tuned.injected is None or recipe.quantize.aware else "adapters"

    def save(self, recipe: Recipe, tuned: Tuned, out: Path) -> None:
        """Write what was trained; of a quantization-aware run the adapters too."""
        if tuned.injected is not None or not recipe.quantize.aware:
            folder = "model" if tuned.injected is None else "adapters"
            save_tuned(recipe, tuned, tuned.model, out / folder)
        if recipe.quantize.aware:
            save_quantized(out / "model", recipe, tuned)

    def load_again(self, recipe: Recipe, tuned: Tuned, out: Path) -> nn.Module:
        """Return what was saved, loaded as a user would."""
        if recipe.quantize.aware:
            return load(out / "model", dtype=resolve_dtype(recipe.train.dtype)).model
        return load_tuned(recipe, tuned.injected is not None, out / self.artifact(recipe, tuned))

    def record(self) -> dict[str, Any]:
        """Return what ``run.json`` says of the strategy."""
        return {}


def planned_config(recipe: Recipe, tuned: Tuned) -> dict[str, Any]:
    """Return the config that a plan starts from: of the dense model, where it is quantized here."""
    if recipe.method == "qlora":
        return read_config(recipe.model, recipe.revision)
    return tuned.config


def base_folder(target: Path) -> Path:
    """Return where a run keeps the quantized base of the adapters in ``target``."""
    return target.with_name(BASE if target.name == "adapters" else f"{target.name}-{BASE}")


def save_tuned(recipe: Recipe, tuned: Tuned, model: nn.Module, target: Path) -> None:
    """Write the adapters of ``model``, or all of it, to the folder ``target``.

    A base that was quantized here lies beside them: they would be another model over another one.
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
