"""The strategy of preference tuning: which rows, which reference, which loss.

Invariant: the reference is the model as it is before its first step, scored once and kept in the
run folder (``reference.py``); of the rows, both answers of a pair are used or neither. Loop, run
folder, resume and verification are those of every fine-tune (``finetuning/strategy.py``). Try it:
``mlx-slim train smollm2-dpo -o runs/dpo``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import final

import mlx.nn as nn
import numpy as np

from mlx_slim import events
from mlx_slim.artifacts import hash_files, hash_json
from mlx_slim.config.preference import PreferenceConfig
from mlx_slim.config.schema import Recipe
from mlx_slim.data.batches import Batcher, RowStore
from mlx_slim.data.prepare import Prepared
from mlx_slim.data.store import TokenStore
from mlx_slim.data.with_prompts import WithPrompts
from mlx_slim.errors import ResourceError, SlimError
from mlx_slim.finetuning.build import Tuned, prepare_data
from mlx_slim.finetuning.run_dir import adapter_hashes
from mlx_slim.finetuning.strategy import SingleModel
from mlx_slim.models.prefix_attention import why_not
from mlx_slim.models.tensors import WEIGHTS
from mlx_slim.preferences.objective import KtoObjective, PairObjective
from mlx_slim.preferences.reference import ReferenceCache
from mlx_slim.preferences.rows import MismatchedRows
from mlx_slim.preferences.scorer import RowScorer
from mlx_slim.progress import stage
from mlx_slim.reading import JsonObject
from mlx_slim.runtime import (
    default_num_threads,
    dtype_name,
    free_disk,
    on_gpu,
    resolve_dtype,
    true_on_all_ranks,
    world,
)
from mlx_slim.training.callbacks import computing
from mlx_slim.training.objective import Objective
from mlx_slim.training.stop import StopRequest
from mlx_slim.units import human_bytes

REFERENCE_FOLDER = "reference"


@dataclass
class _Split:
    """The training or the validation rows, and their references.

    Attributes:
        answers: The rows as they are stored.
        view: As batches read them.
        reference: None where the loss has none.
        mismatched: KTO's rows, with their reference; None without.
    """

    answers: TokenStore
    view: RowStore
    reference: ReferenceCache | None = None
    mismatched: ReferenceCache | None = None

    @property
    def caches(self) -> list[ReferenceCache]:
        return [one for one in (self.reference, self.mismatched) if one is not None]


@final
class PreferenceStrategy:
    """Learning which of two answers is better, or which answers are wanted.

    Args:
        config: The ``preference`` section.
    """

    from_student = True

    scorer = None

    def __init__(self, config: PreferenceConfig) -> None:
        self.config = config
        self.student = SingleModel()
        self._splits: list[_Split] = []
        self._batch_tokens = 0
        self._vocabulary = 8
        self._chunk: int | None = None
        self._prefix_sharing = False

    @property
    def targets(self) -> PreferenceStrategy | None:
        """The reference's log-probabilities, where the loss has a reference."""
        return self if self.config.has_reference else None

    def check(self, recipe: Recipe) -> None:
        """Accept every recipe: the schema refuses what does not fit."""

    def rows(self, recipe: Recipe, tuned: Tuned, out: Path, *, unchanged: bool) -> Prepared:
        """Return the recipe's rows.

        Raises:
            SlimError: If all labels are alike, or there is only one row (KTO).
        """
        data = prepare_data(recipe, tuned, out, unchanged=unchanged)
        if self.config.loss == "kto":
            _check_labels(data)
        data = replace(data, with_prompts=self.config.loss == "orpo" and self.config.nll == "all")
        self._batch_tokens = recipe.train.batch_tokens
        self._vocabulary = tuned.config.get("vocab_size", 8)
        self._chunk = recipe.train.loss_chunk
        self._prefix_sharing = allows_prefix_sharing(recipe, tuned.model)
        if not self._splits:
            self._splits = [_Split(data.train, data.train_view)]
            if data.validation is not None:
                view = data.validation_view
                assert view is not None
                self._splits.append(_Split(data.validation, view))
            if self.config.has_reference:
                self._locate_reference(recipe, tuned, out)
        return data

    def _locate_reference(self, recipe: Recipe, tuned: Tuned, out: Path) -> None:
        folder, train = tuned.loaded.path, recipe.train
        key: JsonObject = {
            "model": hash_files([*folder.glob(WEIGHTS), folder / "config.json"]),
            "adapters": adapter_hashes(recipe),
            "recipe": recipe.model_dump(mode="json", include={"method", "adapter", "quantize"}),
            "dtype": dtype_name(resolve_dtype(train.dtype)),
        }

        def cache(rows: RowStore, name: str) -> ReferenceCache:
            sizes = train.batch_tokens, train.max_length
            unit = 1 if self.config.loss == "kto" else 2
            batcher = Batcher(rows, *sizes, "grouped", train.seed, unit=unit)
            return ReferenceCache(out / REFERENCE_FOLDER, key, batcher, hash_json(name))

        for split in self._splits:
            name = split.answers.fingerprint
            split.reference = cache(split.answers, name)
            if self.config.loss == "kto":
                mismatched = MismatchedRows(split.answers, train.max_length)
                split.mismatched = cache(mismatched, f"{name}:mismatched")

    @property
    def _caches(self) -> list[ReferenceCache]:
        return [cache for split in self._splits for cache in split.caches]

    def need(self, read_N: np.ndarray) -> None:
        """Score all rows all the same: they are one file, and four bytes each."""

    def check_disk(self, out: Path) -> None:
        """Check that the disk can hold four bytes a row.

        Raises:
            ResourceError: Names the bytes needed and free.
        """
        needed, free = 4 * sum(len(cache.rows) for cache in self._caches), free_disk(out)
        if free < needed:
            raise ResourceError(
                f"the reference's log-probabilities need {human_bytes(needed)} in {out}, "
                f"{human_bytes(free)} are free",
                "free some space, or choose another output folder",
            )

    def missing(self) -> bool:
        """Return whether rows are not scored yet."""
        return not all(cache.complete for cache in self._caches)

    def generate(self, observer: events.Observer, student: Tuned | None) -> bool:
        """Score all rows with the untrained model on rank 0; return False if it was interrupted."""
        assert student is not None
        done = True
        if world().rank() == 0:
            model = student.model
            model.eval()
            with StopRequest() as stop, computing(student.callbacks):
                for cache in self._caches:
                    if not (cache.complete or stop.requested):
                        self._score(cache, model, lambda: stop.requested)
            model.train()
            done = not self.missing()
            if done:
                self._report(observer)
        return true_on_all_ranks(done)

    def _score(self, cache: ReferenceCache, model: nn.Module, stop: Callable[[], bool]) -> None:
        settings = self._chunk, self._vocabulary, default_num_threads()
        sharing = self._prefix_sharing
        scorer = RowScorer(cache.rows, model, *settings, prefix_sharing=sharing)
        what = "scoring the rows with the untrained model (reference)"
        with stage(what, len(cache.rows), "rows") as scoring:
            for count in cache.write(scorer, model, stop):
                scoring.reach(count)

    def _report(self, observer: events.Observer) -> None:
        """Tell how often the untrained model prefers the chosen answer of validation pairs."""
        if self.config.loss == "kto" or len(self._splits) == 1:
            return
        rows, reference = self._splits[1].answers, self._splits[1].reference
        assert reference is not None
        means = reference(np.arange(len(rows))) / rows.supervised
        accuracy = float((means[::2] > means[1::2]).mean())
        observer.notify(events.Notice(pair_accuracy_text(accuracy, len(rows) // 2)))

    def objectives(
        self, model: nn.Module, chunk: int | None, vocabulary: int, num_threads: int
    ) -> tuple[Objective, Objective | None]:
        """Return the loss over the training rows, and the same over the validation rows."""
        settings = chunk, vocabulary, num_threads
        each = [self._objective(split, model, settings) for split in self._splits]
        return each[0], each[1] if len(each) > 1 else None

    def _objective(
        self, split: _Split, model: nn.Module, settings: tuple[int | None, int, int]
    ) -> Objective:
        config, rows = self.config, split.view
        if config.loss != "kto":
            answers = rows.answers_S if isinstance(rows, WithPrompts) else None
            return PairObjective(config, split.reference, rows, model, *settings, answers)
        labels, mismatched = split.answers.labels, split.mismatched
        assert split.reference is not None
        assert mismatched is not None
        assert labels is not None
        sharing = self._prefix_sharing
        scorer = RowScorer(mismatched.rows, model, *settings, prefix_sharing=sharing)
        inputs = split.reference, scorer, mismatched, labels, self._batch_tokens
        return KtoObjective(config, *inputs, rows, model, *settings)

    def record(self) -> JsonObject:
        """Return the loss and the number of rows that were compared, for ``run.json``."""
        unit = 1 if self.config.loss == "kto" else 2
        names = ("train", "validation")
        counts = {
            name: len(split.answers) // unit
            for name, split in zip(names, self._splits, strict=False)
        }
        return {"preference": {"loss": self.config.loss, "rows": self.config.rows, **counts}}


def allows_prefix_sharing(recipe: Recipe, model: nn.Module) -> bool:
    """Return whether rows that are scored without gradients share what they begin with."""
    train = recipe.train
    compiled = on_gpu() if train.compile == "auto" else train.compile
    if train.prefix_sharing is False or compiled:
        return False
    return not why_not(model, train.max_length)


def pair_accuracy_text(accuracy: float, pairs: int) -> str:
    """Return the sentence about the pairs that an untrained model has the right way round."""
    return (
        f"before training, the chosen answer has the higher mean log-probability in {accuracy:.1%} "
        f"of {pairs:,} validation pairs"
    )


def _check_labels(data: Prepared) -> None:
    """Refuse rows that KTO learns nothing from.

    Raises:
        SlimError: Names the count and the labels.
    """
    labels = data.train.labels
    assert labels is not None
    hint = "give rows of both labels (label: true and label: false)"
    if labels.all() or not labels.any():
        value = str(bool(labels[0])).lower()
        raise SlimError(
            f"all {len(labels):,} training rows have label {value}: kto needs both", hint
        )
    if data.validation is not None and len(data.validation) == 1:
        raise SlimError(
            "kto compares with the answer of another row, and there is 1 validation row",
            "set data.validation to 2 rows or more, or to 0",
        )
