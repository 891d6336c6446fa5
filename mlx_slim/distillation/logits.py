"""Distillation from cached logits of one teacher or several.

Invariant: a teacher and the student are never in memory at the same time; the targets of a teacher
are stored under a key of all that they depend on, and a run that is killed while targets are
generated resumes there. Try it: ``mlx-slim distill distill-smollm2 -o runs/distilled``.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import final

import mlx.core as mx
import mlx.nn as nn

from mlx_slim import events
from mlx_slim.artifacts import hash_json, public_name
from mlx_slim.config.distill import DistillConfig, TeacherConfig
from mlx_slim.config.schema import Recipe
from mlx_slim.data.batches import Batcher, RowStore
from mlx_slim.data.prepare import Prepared
from mlx_slim.distillation import target_cache
from mlx_slim.distillation.losses import DistillationLoss
from mlx_slim.distillation.objective import Columns, DistillationObjective, DistillationValidation
from mlx_slim.distillation.target_cache import TargetLayout
from mlx_slim.distillation.teachers import (
    fingerprint,
    load_teacher,
    name_of,
)
from mlx_slim.errors import ResourceError
from mlx_slim.finetuning.build import Tuned, prepare_data
from mlx_slim.finetuning.strategy import SingleModel
from mlx_slim.models.load import read_config
from mlx_slim.planner.memory import weight_bytes
from mlx_slim.reading import JsonObject
from mlx_slim.runtime import (
    default_num_threads,
    dtype_name,
    human_bytes,
    memory_budget,
    resolve_dtype,
    world,
)
from mlx_slim.training.step import Objective
from mlx_slim.training.stop import StopRequest

CACHE_FOLDER = "targets"  # inside a run folder, unless distill.cache names another


@dataclass
class _TargetSet:
    """The targets of one teacher for one list of rows.

    Attributes:
        shape: Of the cache.
        key: All that its numbers depend on.
        folder: Of the cache.
        batcher: The rows.
    """

    shape: TargetLayout
    key: JsonObject
    folder: Path
    batcher: Batcher

    def columns(self) -> Columns:
        """Return the targets, or placeholders of the same shapes while they are not complete."""
        return target_cache.open_complete(
            self.folder, self.shape
        ) or target_cache.PlaceholderTargets(self.shape)

    @property
    def complete(self) -> bool:
        return target_cache.open_complete(self.folder, self.shape) is not None


@final
class LogitDistillation:
    """Distillation from cached logits.

    Args:
        config: The ``distill`` section.
        teachers: Its teachers, each with its model.
    """

    def __init__(self, config: DistillConfig, teachers: list[TeacherConfig]) -> None:
        self.config = config
        self.teachers = teachers
        self.student = SingleModel()
        self._dtype = mx.float32
        self._budget = 0
        self._cache = Path(CACHE_FOLDER)
        self._train: list[_TargetSet] = []
        self._validation: list[_TargetSet] = []

    @property
    def targets(self) -> LogitDistillation:
        """The teachers' logits, cached before the student is trained."""
        return self

    def check(self, recipe: Recipe) -> None:
        """Check that every teacher fits into the memory budget.

        Raises:
            ResourceError: Names it.
        """
        self._dtype = resolve_dtype(recipe.train.dtype)
        self._budget = memory_budget(recipe.memory.budget)
        for teacher in self.teachers:
            config = {**self._config(teacher), "dtype": dtype_name(self._dtype)}
            needed = sum(weight_bytes(config).values())
            if needed > self._budget:
                raise ResourceError(
                    f"the weights of teacher {name_of(teacher)} need {human_bytes(needed)}, "
                    f"the budget is {human_bytes(self._budget)}",
                    "take a smaller or a quantized teacher",
                )

    def _config(self, teacher: TeacherConfig) -> JsonObject:
        assert teacher.model is not None
        return read_config(teacher.model, teacher.revision)

    def rows(self, recipe: Recipe, tuned: Tuned, out: Path, *, unchanged: bool) -> Prepared:
        """Return the recipe's rows, within the limits of the teachers too."""
        readers = [self._config(teacher) for teacher in self.teachers]
        data = prepare_data(recipe, tuned, out, unchanged=unchanged, readers=readers)
        if not self._train:
            self._locate_targets(recipe, tuned, data, out)
        return data

    def _locate_targets(self, recipe: Recipe, tuned: Tuned, data: Prepared, out: Path) -> None:
        """Determine the cache of each teacher."""
        self._cache = Path(self.config.cache or out / CACHE_FOLDER)
        self._tokenizer = str(data.fingerprint["tokenizer"])
        for teacher in self.teachers:
            teacher_hash = fingerprint(teacher, self._dtype)
            shared = min(tuned.config["vocab_size"], self._config(teacher)["vocab_size"])
            self._train.append(self._target_set(recipe, teacher_hash, data.train, shared))
            if data.validation is not None:
                self._validation.append(
                    self._target_set(recipe, teacher_hash, data.validation, shared)
                )

    def _target_set(
        self, recipe: Recipe, teacher: JsonObject, rows: RowStore, shared: int
    ) -> _TargetSet:
        train = recipe.train
        shape = target_cache.target_layout(rows, self.config.top_k, shared)
        key = target_cache.cache_key(teacher, self._tokenizer, rows, shape, self.config.temperature)
        batcher = Batcher(rows, train.batch_tokens, train.max_length, "grouped", train.seed)
        return _TargetSet(shape, key, target_cache.folder_of(self._cache, key), batcher)

    @property
    def _target_sets(self) -> list[_TargetSet]:
        return [*self._train, *self._validation]

    def _missing_bytes(self) -> int:
        """Bytes that the targets will still take on disk; two teachers may use one folder."""
        return sum(
            {
                s.folder: target_cache.missing_bytes(s.folder, s.shape) for s in self._target_sets
            }.values()
        )

    def check_disk(self, out: Path) -> None:
        """Check that the disk can hold the targets.

        Raises:
            ResourceError: Names the bytes needed and free.
        """
        target_cache.check_disk(self._cache, self._missing_bytes())

    @property
    def token_loss(self) -> DistillationLoss:
        """The loss."""
        weights = [teacher.weight for teacher in self.teachers]
        loss_weights = tuple(weight / sum(weights) for weight in weights)
        config = self.config
        return DistillationLoss(config.divergence, config.temperature, config.weight, loss_weights)

    def objectives(
        self, model: nn.Module, chunk: int | None, vocabulary: int, num_threads: int
    ) -> tuple[Objective, Objective | None]:
        """Return the mixed loss for training, and cross-entropy with divergence for validation."""
        train = [target_set.columns() for target_set in self._train]
        validation = [target_set.columns() for target_set in self._validation]
        return (
            DistillationObjective(self.token_loss, train, model, chunk, vocabulary, num_threads),
            DistillationValidation(
                self.token_loss, validation, model, chunk, vocabulary, num_threads
            )
            if validation
            else None,
        )

    def missing(self) -> bool:
        """Return whether targets are missing."""
        return not all(target_set.complete for target_set in self._target_sets)

    def generate(self, observer: events.Observer) -> bool:
        """Run the teachers, each loaded alone; return False if the user stopped it."""
        complete = True
        if world().rank() == 0:
            with StopRequest() as stop:
                for number, teacher in enumerate(self.teachers):
                    sets = [part[number] for part in (self._train, self._validation) if part]
                    self._generate(teacher, [s for s in sets if not s.complete], observer, stop)
                    if stop.requested:
                        complete = False
                        break
        if world().size() > 1:
            ranks = mx.distributed.all_sum(mx.array(int(complete)), group=world())
            complete = ranks.item() == world().size()
        return complete

    def _generate(
        self,
        teacher: TeacherConfig,
        target_sets: Sequence[_TargetSet],
        observer: events.Observer,
        stop: StopRequest,
    ) -> None:
        if not target_sets:
            return
        name, count = name_of(teacher), sum(target_set.shape.targets for target_set in target_sets)
        size = human_bytes(sum(target_set.shape.nbytes for target_set in target_sets))
        each = f"{target_sets[0].shape.top_k:,} logits each"
        text = f"teacher {name}: {count:,} tokens, {each}, {size} in {self._cache}"
        observer.notify(events.Notice(text))
        mx.reset_peak_memory()
        model = load_teacher(teacher, self._dtype)
        done, reported = 0, 0
        for target_set in target_sets:
            generator = target_cache.TargetGenerator(
                model, target_set.shape, self.config.temperature, default_num_threads()
            )
            steps = target_cache.write(
                target_set.folder,
                target_set.key,
                target_set.shape,
                target_set.batcher,
                generator,
                stop=lambda: stop.requested,
            )
            for fraction in steps:
                tenths = int(10 * (done + fraction * target_set.shape.targets) / count)
                if tenths > reported:
                    reported = tenths
                    observer.notify(events.Notice(f"teacher {name}: {10 * tenths}%"))
            done += target_set.shape.targets
            del generator, steps
            if stop.requested:
                break
        peak = human_bytes(mx.get_peak_memory())
        observer.notify(events.Notice(f"teacher {name} is unloaded; peak memory {peak}"))
        del model
        gc.collect()
        mx.clear_cache()

    def record(self) -> JsonObject:
        """Return the teachers and their targets, for ``run.json``."""
        return {
            "distill": {
                "method": "logits",
                "teachers": [
                    {
                        "name": name_of(teacher),
                        "model": public_name(teacher.model or ""),
                        "share": loss_weight,
                        "key": hash_json(target_set.key),
                        "targets": target_set.shape.targets,
                        "kept": target_set.shape.top_k,
                    }
                    for teacher, loss_weight, target_set in zip(
                        self.teachers, self.token_loss.loss_weights, self._train, strict=True
                    )
                ],
                "cache_bytes": sum(target_set.shape.nbytes for target_set in self._target_sets),
            }
        }
