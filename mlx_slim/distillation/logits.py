"""Distillation from cached logits of one teacher or several.

Invariant: a teacher and the student are never in memory at the same time; the targets of a teacher
are stored under a key of all that they depend on, and a run that is killed while targets are
generated resumes there. Try it: ``mlx-slim distill distill-smollm2 -o runs/distilled``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import final

import mlx.core as mx
import mlx.nn as nn

from mlx_slim.artifacts import hash_json, public_name
from mlx_slim.config.distill import DistillConfig, TeacherConfig
from mlx_slim.config.schema import Recipe
from mlx_slim.data.batches import Batcher, RowStore
from mlx_slim.data.prepare import Prepared
from mlx_slim.distillation import target_cache
from mlx_slim.distillation.losses import DistillationLoss
from mlx_slim.distillation.objective import DistillationObjective, DistillationValidation
from mlx_slim.distillation.on_policy import OnPolicyObjective, TeacherScorer
from mlx_slim.distillation.scoring_endpoint import ScoringEndpoint, scoring_endpoints
from mlx_slim.distillation.target_generation import (
    CachedTargets,
    OpenTeacher,
    TargetSet,
    TargetTeacher,
)
from mlx_slim.distillation.teachers import fingerprint, load_teacher, name_of
from mlx_slim.errors import ResourceError
from mlx_slim.finetuning.build import Tuned, prepare_data
from mlx_slim.finetuning.strategy import SingleModel
from mlx_slim.models.load import read_config
from mlx_slim.models.tokenizer import vocabulary_size
from mlx_slim.planner.memory import weight_bytes
from mlx_slim.reading import JsonObject
from mlx_slim.runtime import default_num_threads, dtype_name, memory_budget, resolve_dtype
from mlx_slim.training.objective import Objective
from mlx_slim.units import human_bytes

CACHE_FOLDER = "targets"  # inside a run folder, unless distill.cache names another


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
        self._targets = CachedTargets(Path(CACHE_FOLDER), [])
        self._endpoints: list[ScoringEndpoint | None] = []
        self._sets: list[list[TargetSet]] = []  # of each teacher: training rows, validation rows
        self._scorer: TeacherScorer | None = None
        if config.sampled_fraction > 0:
            names = [name_of(teacher) for teacher in teachers]
            self._scorer = TeacherScorer(
                lambda: self._targets, self._weight_bytes, names, config.sampled_fraction
            )

    @property
    def targets(self) -> CachedTargets:
        """The teachers' logits, cached before the student is trained."""
        return self._targets

    @property
    def scorer(self) -> TeacherScorer | None:
        """What scores the student's answers, if it writes some (``on_policy.py``)."""
        return self._scorer

    def _weight_bytes(self) -> list[int]:
        return [teacher_bytes(teacher, self._dtype) for teacher in self.teachers]

    def check(self, recipe: Recipe) -> None:
        """Check that every teacher fits into the memory budget, or that its endpoint can score.

        Raises:
            ResourceError: Names it.
            SlimError: An endpoint that does not score given texts.
        """
        self._dtype = resolve_dtype(recipe.train.dtype)
        check_fit(recipe, self.teachers)
        self._endpoints = scoring_endpoints(recipe, self.config, self.teachers)

    def _config(self, teacher: TeacherConfig) -> JsonObject:
        assert teacher.model is not None
        return read_config(teacher.model, teacher.revision)

    def rows(self, recipe: Recipe, tuned: Tuned, out: Path, *, unchanged: bool) -> Prepared:
        """Return the recipe's rows, within the limits of the teachers too."""
        readers = [self._config(teacher) for teacher in self.teachers if teacher.base_url is None]
        data = prepare_data(recipe, tuned, out, unchanged=unchanged, readers=readers)
        if not self._targets.teachers:
            self._locate_targets(recipe, tuned, data, out)
        return data

    def _locate_targets(self, recipe: Recipe, tuned: Tuned, data: Prepared, out: Path) -> None:
        """Determine the cache of each teacher."""
        cache = Path(self.config.cache or out / CACHE_FOLDER)
        tokenizer = str(data.fingerprint["tokenizer"])
        teachers = []
        for teacher, endpoint in zip(self.teachers, self._endpoints, strict=True):
            shared = vocabulary_size(tuned.config)
            if endpoint is None:
                teacher_hash = fingerprint(teacher, self._dtype)
                shared = min(shared, vocabulary_size(self._config(teacher)))
            else:
                teacher_hash = endpoint.fingerprint
            set_of = partial(self._set_of, recipe, cache, teacher_hash, tokenizer, shared)
            sets = [set_of(rows) for rows in filter(None, (data.train, data.validation))]
            self._sets.append(sets)
            if endpoint is None:
                open_teacher = partial(self._open, teacher)
            else:
                missing = not all(one.complete for one in sets)
                endpoint.require(needed=missing or self._scorer is not None)
                open_teacher = endpoint.opened
            teachers.append(TargetTeacher(name_of(teacher), open_teacher, sets, set_of=set_of))
        self._targets = CachedTargets(cache, teachers)

    def _set_of(
        self,
        recipe: Recipe,
        cache: Path,
        teacher: JsonObject,
        tokenizer: str,
        shared: int,
        rows: RowStore,
    ) -> TargetSet:
        """Return the targets of a teacher for ``rows``."""
        shape = target_cache.target_layout(rows, self.config.top_k, shared)
        temperature = self.config.temperature
        key = target_cache.cache_key(teacher, tokenizer, rows, shape, temperature)
        return TargetSet(shape, key, target_cache.folder_of(cache, key), grouped(recipe, rows))

    @contextlib.contextmanager
    def _open(self, teacher: TeacherConfig) -> Iterator[OpenTeacher]:
        model = load_teacher(teacher, self._dtype)
        yield lambda target_set: target_cache.TargetGenerator(
            model, target_set.shape, self.config.temperature, default_num_threads()
        )

    @property
    def token_loss(self) -> DistillationLoss:
        """The loss."""
        config, loss_weights = self.config, loss_weights_of(self.teachers)
        of_teachers = config.weight, loss_weights, config.jsd_beta
        return DistillationLoss(config.divergence, config.temperature, *of_teachers)

    def objectives(
        self, model: nn.Module, chunk: int | None, vocabulary: int, num_threads: int
    ) -> tuple[Objective, Objective | None]:
        """Return the mixed loss for training, and cross-entropy with divergence for validation."""
        columns = [[one.columns() for one in sets] for sets in self._sets]
        train, *validation = (list(part) for part in zip(*columns, strict=True))
        of_model = model, chunk, vocabulary, num_threads
        objective = DistillationObjective(self.token_loss, train, *of_model)
        if self._scorer is not None:
            placeholders = [target_cache.PlaceholderTargets(sets[0].shape) for sets in self._sets]
            answers = self._scorer.columns(placeholders)
            objective = OnPolicyObjective(self.token_loss, train, answers, *of_model)
        if not validation:
            return objective, None
        return objective, DistillationValidation(self.token_loss, validation[0], *of_model)

    def record(self) -> JsonObject:
        """Return the teachers and their targets, for ``run.json``."""
        record = targets_record(self._targets, self.teachers)
        if self._scorer is None:
            return {"distill": {"method": "logits", **record}}
        return {
            "distill": {"method": "on-policy", "fraction": self._scorer.fraction, **record},
        }


def check_fit(recipe: Recipe, teachers: Sequence[TeacherConfig]) -> None:
    """Check that the weights of every teacher fit into the memory budget.

    Raises:
        ResourceError: Names the teacher that does not.
    """
    dtype, budget = resolve_dtype(recipe.train.dtype), memory_budget(recipe.memory.budget)
    for teacher in teachers:
        needed = teacher_bytes(teacher, dtype)
        if needed > budget:
            raise ResourceError(
                f"the weights of teacher {name_of(teacher)} need {human_bytes(needed)}, "
                f"the budget is {human_bytes(budget)}",
                "take a smaller or a quantized teacher",
            )


def teacher_bytes(teacher: TeacherConfig, dtype: mx.Dtype) -> int:
    """Return the bytes of a teacher's weights: none of an endpoint's."""
    if teacher.base_url is not None:
        return 0
    assert teacher.model is not None
    config = {**read_config(teacher.model, teacher.revision), "dtype": dtype_name(dtype)}
    return sum(weight_bytes(config).values())


def loss_weights_of(teachers: Sequence[TeacherConfig]) -> tuple[float, ...]:
    """Return the teachers' weights, divided by their sum."""
    weights = [teacher.weight for teacher in teachers]
    return tuple(weight / sum(weights) for weight in weights)


def grouped(recipe: Recipe, rows: RowStore) -> Batcher:
    """Return the batches that a teacher computes."""
    train = recipe.train
    return Batcher(rows, train.batch_tokens, train.max_length, "grouped", train.seed)


def _first_set(sets: Sequence[TargetSet]) -> JsonObject:
    """Return key and size of the first of a teacher's sets that the run reads, if there is one."""
    return {
        name: value
        for one in [one for one in sets if one.rows][:1]
        for name, value in (
            ("key", hash_json(one.key)),
            ("targets", one.targets),
            ("kept", one.shape.top_k),
        )
    }


def targets_record(targets: CachedTargets, teachers: Sequence[TeacherConfig]) -> JsonObject:
    """Return the teachers and their targets, for ``run.json``."""
    return {
        "teachers": [
            {
                "name": name_of(teacher),
                "model": public_name(teacher.model or ""),
                "share": loss_weight,
                **_first_set(stored.sets),
            }
            for teacher, loss_weight, stored in zip(
                teachers, loss_weights_of(teachers), targets.teachers, strict=True
            )
        ],
        "cache_bytes": targets.nbytes,
    }
