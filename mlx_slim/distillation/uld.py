"""Distillation from cached logits of teachers with other tokenizers (arXiv 2402.12030).

Invariant: the loop, run folder and resume of any fine-tune. A teacher reads the rows by its own
chat template and tokenizer (``uld_rows.py``); its distributions are merged where it has several
tokens for one of the student's and stored sorted, one row of the cache for each aligned group; a
teacher and the student are never in memory at the same time. Rows that cannot be aligned are
counted in a notice and in ``run.json``, and are learned from by cross-entropy alone. Try it:
``mlx-slim distill distill-smollm2 distill.method=uld "distill.teachers=[{model: OTHER}]" -o run``.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, final

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_slim.artifacts import hash_bytes
from mlx_slim.config.distill import DistillConfig, TeacherConfig
from mlx_slim.config.schema import Recipe
from mlx_slim.data.batches import Batch
from mlx_slim.data.prepare import Prepared
from mlx_slim.data.tokenize import unwrap
from mlx_slim.distillation import target_cache
from mlx_slim.distillation.logits import (
    CACHE_FOLDER,
    check_fit,
    grouped,
    loss_weights_of,
    targets_record,
)
from mlx_slim.distillation.target_cache import TargetLayout
from mlx_slim.distillation.target_generation import (
    CachedTargets,
    OpenTeacher,
    TargetSet,
    TargetTeacher,
)
from mlx_slim.distillation.teachers import fingerprint, load_teacher, name_of
from mlx_slim.distillation.uld_loss import (
    UNMATCHED,
    UNMATCHED_REST,
    MergedTargets,
    Overlap,
    ULDLoss,
)
from mlx_slim.distillation.uld_objective import (
    BatchTargets,
    ULDObjective,
    ULDValidation,
    scaling_arrays,
)
from mlx_slim.distillation.uld_rows import Alignment, TeacherReader, aligned_rows
from mlx_slim.distillation.uld_targets import MergedBatches, ULDTargetGenerator
from mlx_slim.evaluation.scoring.requests import max_length
from mlx_slim.finetuning.build import Tuned, prepare_data
from mlx_slim.finetuning.strategy import SingleModel
from mlx_slim.models.load import load_tokenizer, read_config
from mlx_slim.models.row_limits import row_limit
from mlx_slim.models.tokenizer import vocabulary_size
from mlx_slim.reading import JsonObject
from mlx_slim.runtime import default_num_threads, resolve_dtype, true_on_all_ranks, world
from mlx_slim.training.objective import Objective

_ALIGNMENTS = "alignment"  # inside a run folder


@dataclass(frozen=True)
class VocabularyMap:
    """Which of a teacher's tokens the student has too: those that are written alike.

    Attributes:
        students: The student's id of each of the teacher's, int32 (V + 1,), or ``UNMATCHED``; the
            last one stands for all unmatched tokens that are not stored.
        matched: Whether the teacher's token is matched, bool (V,).
    """

    students: np.ndarray
    matched: np.ndarray

    @classmethod
    def of(cls, student: Any, teacher: Any, sizes: tuple[int, int]) -> VocabularyMap:
        """Return the map of two tokenizers; ``sizes`` are the widths of both models' logits."""
        ours, theirs = (unwrap(tokenizer).get_vocab() for tokenizer in (student, teacher))
        students = np.full(sizes[1] + 1, UNMATCHED, np.int32)
        for token, number in theirs.items():
            if number < sizes[1] and ours.get(token, sizes[0]) < sizes[0]:
                students[number] = ours[token]
        students[-1] = UNMATCHED_REST
        return cls(students, students[:-1] >= 0)

    def overlap(self, config: DistillConfig, vocabulary: int) -> Overlap:
        """Return the hybrid distance for a student with ``vocabulary`` logits."""
        uld, fraction = config.uld, float(self.matched.mean())
        weights = (fraction, 1 - fraction)
        if uld.matched_weight is not None and uld.unmatched_weight is not None:
            weights = (uld.matched_weight, uld.unmatched_weight)
        matched_V = np.zeros(vocabulary, np.float32)
        matched_V[self.students[:-1][self.matched]] = 1.0
        return Overlap(mx.array(matched_V), weights, config.jsd_beta)


class StoredTargets:
    """The targets of one teacher, by the student's positions.

    Args:
        alignment: Of the rows.
        targets: Their cache, by the number of a group.
        vocabulary: Which tokens are common, for the hybrid distance.
    """

    def __init__(
        self, alignment: Alignment, targets: TargetSet, vocabulary: VocabularyMap | None
    ) -> None:
        self._alignment, self._vocabulary = alignment, vocabulary
        self._columns = targets.columns()

    def batch(self, batch: Batch) -> BatchTargets:
        """Return those of a batch; what is padded or not aligned has a weight of 0."""
        sources_N = batch.sources_N
        pairs_N2 = self._alignment.student_S2[sources_N]
        pairs_N2[sources_N < 0] = -1
        group_N, token_N = pairs_N2.T
        base_N = (group_N >= 0) & (token_N < 0)
        number_N = np.where(base_N, group_N, -1)
        ids_NK, top_NK, rest_N = self._columns.columns(number_N)
        if self._vocabulary is None:
            ids_NK = mx.zeros((len(number_N), 1), dtype=mx.int32)  # the sorted distance has no ids
        else:
            ids_NK = mx.array(self._vocabulary.students)[ids_NK]
        weight_N = np.where(base_N, self._alignment.weight_G[number_N], 0).astype(np.float32)
        merged = MergedTargets(ids_NK, top_NK, rest_N, mx.array(weight_N), mx.zeros(len(number_N)))
        # A batch of a fixed shape, and one for measuring, scale as many positions as any of its
        # size can: so many that the shape decides.
        fixed = batch.weights_N is not None or bool((sources_N < 0).all())
        size = math.ceil(self._alignment.scaled * len(sources_N)) if fixed else None
        return BatchTargets(merged, *map(mx.array, scaling_arrays(group_N, token_N, size)))


@dataclass
class _Teacher:
    """A teacher, and the alignments of the training rows and of the validation rows."""

    config: TeacherConfig
    alignments: list[Alignment]
    vocabulary: VocabularyMap | None


@final
class ULDDistillation:
    """Distillation across tokenizers from cached logits.

    Args:
        config: The ``distill`` section.
        teachers: Its teachers, each with its model.
    """

    scorer = None

    def __init__(self, config: DistillConfig, teachers: list[TeacherConfig]) -> None:
        self.config = config
        self.teachers = teachers
        self.student = SingleModel()
        self._dtype = mx.float32
        self._targets = CachedTargets(Path(CACHE_FOLDER), [])
        self._read: list[_Teacher] = []
        self._unaligned: list[JsonObject] = []

    @property
    def targets(self) -> CachedTargets:
        """The teachers' merged logits, cached before the student is trained."""
        return self._targets

    def check(self, recipe: Recipe) -> None:
        """Check that every teacher fits into the memory budget.

        Raises:
            ResourceError: Names it.
        """
        self._dtype = resolve_dtype(recipe.train.dtype)
        check_fit(recipe, self.teachers)

    def rows(self, recipe: Recipe, tuned: Tuned, out: Path, *, unchanged: bool) -> Prepared:
        """Return the recipe's rows; align them with what each teacher reads."""
        data = prepare_data(recipe, tuned, out, unchanged=unchanged)
        if self._read:
            return data
        if world().size() > 1:
            if world().rank() == 0:
                self._align(recipe, tuned, data, out)
            true_on_all_ranks()
        notes = [data.note, *self._align(recipe, tuned, data, out)]
        return replace(data, note="; ".join(filter(None, notes)))

    def _align(self, recipe: Recipe, tuned: Tuned, data: Prepared, out: Path) -> list[str]:
        """Align the rows with every teacher and place its cache; return what is not aligned."""
        cache = Path(self.config.cache or out / CACHE_FOLDER)
        student, uld = tuned.loaded.tokenizer, self.config.uld
        notes: list[str] = []
        teachers, stored = [], []
        self._unaligned = []
        for teacher in self.teachers:
            assert teacher.model is not None
            tokenizer = load_tokenizer(teacher.model, revision=teacher.revision)
            config = read_config(teacher.model, teacher.revision)
            limit, longest = row_limit(config), max_length(config, tokenizer)
            longest = min(longest, limit.tokens) if limit else longest
            reader = TeacherReader(tokenizer, longest, uld.extended, uld.merge)
            alignments, record = aligned_rows(recipe, data, out, student, reader, out / _ALIGNMENTS)
            vocabulary = None
            if uld.hybrid:
                sizes = (vocabulary_size(tuned.config), vocabulary_size(config))
                vocabulary = VocabularyMap.of(student, tokenizer, sizes)
            one = _Teacher(teacher, alignments, vocabulary)
            teachers.append(one)
            sets = self._sets(recipe, one, vocabulary_size(config), cache)
            stored.append(TargetTeacher(name_of(teacher), partial(self._open, one), sets))
            self._unaligned.append(record)
            if record["unaligned"]:
                notes.append(f"teacher {name_of(teacher)}: {_unaligned(record)}")
        self._read = teachers
        self._targets = CachedTargets(cache, stored)
        return notes

    def _sets(
        self, recipe: Recipe, teacher: _Teacher, vocabulary: int, cache: Path
    ) -> list[TargetSet]:
        """Return the targets of a teacher: of the training rows, then of validation rows."""
        hashes = fingerprint(teacher.config, self._dtype)
        top_k, hybrid = self.config.top_k, teacher.vocabulary is not None
        k = vocabulary if top_k == "all" else min(top_k, vocabulary)
        sets = []
        for alignment in teacher.alignments:
            rows = alignment.teacher
            shape = TargetLayout(len(rows), alignment.groups, k + hybrid, vocabulary + hybrid)
            key = target_cache.cache_key(hashes, "", rows, shape, self.config.temperature)
            key["merged"] = alignment.fingerprint()
            if teacher.vocabulary is not None:
                key["matched"] = hash_bytes(teacher.vocabulary.matched.tobytes())
            folder = target_cache.folder_of(cache, key)
            batches = MergedBatches(grouped(recipe, rows), alignment.teacher_U2)
            sets.append(TargetSet(shape, key, folder, batches, alignment.aligned_R))
        return sets

    @contextlib.contextmanager
    def _open(self, teacher: _Teacher) -> Iterator[OpenTeacher]:
        model = load_teacher(teacher.config, self._dtype)
        vocabulary = teacher.vocabulary
        matched_V = None if vocabulary is None else mx.array(vocabulary.matched)
        yield lambda target_set: ULDTargetGenerator(
            model, target_set.shape, self.config.temperature, matched_V, default_num_threads()
        )

    def objectives(
        self, model: nn.Module, chunk: int | None, vocabulary: int, num_threads: int
    ) -> tuple[Objective, Objective | None]:
        """Return the mixed loss for training, and cross-entropy with distance for validation."""
        stored_sets: list[list[StoredTargets]] = [[], []]
        for teacher, stored in zip(self._read, self._targets.teachers, strict=True):
            for part, alignment, one in zip(
                stored_sets, teacher.alignments, stored.sets, strict=False
            ):
                part.append(StoredTargets(alignment, one, teacher.vocabulary))
        maps = [teacher.vocabulary for teacher in self._read]
        token_loss = ULDLoss(
            self.config.temperature,
            self.config.weight,
            loss_weights_of(self.teachers),
            [None if one is None else one.overlap(self.config, vocabulary) for one in maps],
        )
        settings = (model, chunk, vocabulary, num_threads)
        train, validation = stored_sets
        return (
            ULDObjective(token_loss, train, *settings),
            ULDValidation(token_loss, validation, *settings) if validation else None,
        )

    def record(self) -> JsonObject:
        """Return the teachers, their targets and the rows that are not aligned."""
        record = targets_record(self._targets, self.teachers)
        for teacher, unaligned in zip(record["teachers"], self._unaligned, strict=True):
            teacher.update(unaligned)
        return {"distill": {"method": "uld", **record}}


def _unaligned(record: JsonObject) -> str:
    entries = record["unaligned"]
    reasons = "; ".join(f"{entry['count']:,} {why}" for why, entry in entries.items())
    count = sum(entry["count"] for entry in entries.values())
    return (
        f"{count:,} of {record['rows']:,} rows cannot be aligned and have cross-entropy alone "
        f"({reasons})"
    )
