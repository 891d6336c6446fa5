"""Targets of teachers, computed one teacher at a time while the student is not loaded.

Invariant: a teacher is opened only if targets of its are missing, alone, and freed before the next;
what is written is complete or resumed (``target_cache.py``). A teacher is a model here
(``logits.py``, ``uld.py``), or an endpoint that scores texts (``scoring_endpoint.py``).
Try it: ``mlx-slim distill distill-smollm2 -o runs/distilled``.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, final

import mlx.core as mx
import numpy as np

from mlx_slim import events
from mlx_slim.data.collate import RowStore
from mlx_slim.data.plans import Plan
from mlx_slim.distillation import target_cache
from mlx_slim.distillation.objective import Columns
from mlx_slim.distillation.target_cache import TargetCache, TargetLayout, TeacherTargets
from mlx_slim.finetuning.build import Tuned
from mlx_slim.reading import JsonObject
from mlx_slim.runtime import true_on_all_ranks, world
from mlx_slim.training.stop import StopRequest
from mlx_slim.units import human_bytes


class Batches(Protocol):
    """The rows whose targets are computed: a ``Batcher``, or one whose batches are merged."""

    def plan(self, epoch: int) -> Plan:
        """Return the batches of an epoch, as row numbers per sequence."""
        ...

    def batch(self, groups: Sequence[Sequence[int]]) -> Any:
        """Return a batch, with the numbers of its targets as ``sources_N``."""
        ...


Generator = Callable[[Any], TeacherTargets]  # of a batch


@dataclass
class TargetSet:
    """The targets of one teacher for one list of rows.

    Attributes:
        shape: Of the cache.
        key: All that its numbers depend on.
        folder: Of the cache.
        batches: The rows.
        among_N: Which rows of the data they are, bool (N,); None is all.
        needed_R: Those that the run reads, bool (R,); None is all.
    """

    shape: TargetLayout
    key: JsonObject
    folder: Path
    batches: Batches
    among_N: np.ndarray | None = None
    needed_R: np.ndarray | None = None

    def need(self, read_N: np.ndarray) -> None:
        """Leave out the rows of the data that no step reads."""
        self.needed_R = read_N if self.among_N is None else read_N[self.among_N]

    def columns(self) -> Columns:
        """Return the targets, or placeholders of the same shapes while they are not complete."""
        return _Columns(self)

    def opened(self) -> TargetCache | None:
        """Return what is on disk if the run needs nothing more, else None."""
        return target_cache.open_complete(self.folder, self.shape, self.needed_R)

    @property
    def complete(self) -> bool:
        """Whether all that are needed are on disk."""
        return self.opened() is not None or self.rows == 0

    @property
    def rows(self) -> int:
        """Rows that are computed: those of every batch with a needed one."""
        if self.needed_R is None:
            return self.shape.rows
        return sum(map(len, target_cache.batches_with(self.batches.plan(0), self.needed_R)))

    @property
    def targets(self) -> int:
        """Supervised ids of these rows; of a part of all rows, as many as of rows on average."""
        return round(self.shape.targets * self.rows / max(1, self.shape.rows))

    @property
    def nbytes(self) -> int:
        """Bytes of them on disk, likewise."""
        return round(self.shape.nbytes * self.rows / max(1, self.shape.rows))

    def write(self, generator: Generator, stop: Callable[[], bool]) -> Iterator[float]:
        """Compute what is missing; yield the fraction of these rows that is done."""
        return target_cache.write(
            self.folder,
            self.key,
            self.shape,
            self.batches,
            generator,
            needed_R=self.needed_R,
            stop=stop,
        )


@final
class _Columns:
    """The targets of a set: which rows are needed may be known after an objective has these."""

    def __init__(self, targets: TargetSet) -> None:
        self._targets = targets
        self._opened: TargetCache | None = None

    def columns(self, sources_N: np.ndarray) -> tuple[mx.array, mx.array, mx.array]:
        """Return ids_NK, top_NK and rest_N of the numbered targets."""
        self._opened = self._opened or self._targets.opened()
        stored = self._opened or target_cache.PlaceholderTargets(self._targets.shape)
        return stored.columns(sources_N)


def check_sets(cache: Path, sets: Sequence[TargetSet]) -> None:
    """Check that the disk can hold ``sets``; two of them may be one folder.

    Raises:
        ResourceError: Names the bytes needed and free.
    """
    missing = {
        one.folder: target_cache.missing_bytes(one.folder, one.nbytes)
        for one in sets
        if not one.complete
    }
    target_cache.check_disk(cache, sum(missing.values()))


class OpenTeacher(Protocol):
    """Gives the generator of each list of rows while a teacher is in memory."""

    def __call__(self, target_set: TargetSet) -> Generator:
        """Return what computes the targets of a batch."""
        ...


def _of_no_other_rows(rows: RowStore) -> TargetSet:
    raise NotImplementedError("this teacher scores the rows of the data only")


@dataclass
class TargetTeacher:
    """A teacher and its targets.

    Attributes:
        name: In notices.
        open: Loads it; it is freed with the context.
        sets: Its targets: of the training rows, then of the validation rows if there are any.
        set_of: Returns its targets of other rows: of a round of answers (``on_policy.py``).
    """

    name: str
    open: Callable[[], contextlib.AbstractContextManager[OpenTeacher]]
    sets: list[TargetSet] = field(default_factory=list)
    set_of: Callable[[RowStore], TargetSet] = field(kw_only=True, default=_of_no_other_rows)


@final
class CachedTargets:
    """The targets of all teachers of a run, in their caches.

    Args:
        cache: The folder that all of them are in.
        teachers: In the order of the recipe.
    """

    def __init__(self, cache: Path, teachers: Sequence[TargetTeacher]) -> None:
        self.cache = cache
        self.teachers = list(teachers)

    @property
    def sets(self) -> list[TargetSet]:
        """Those of all teachers."""
        return [one for teacher in self.teachers for one in teacher.sets]

    @property
    def nbytes(self) -> int:
        """Bytes of all of them on disk, once complete."""
        return sum(one.nbytes for one in self.sets)

    def need(self, read_N: np.ndarray) -> None:
        """Compute no targets of training rows that no step reads."""
        for teacher in self.teachers:
            teacher.sets[0].need(read_N)

    def check_disk(self, out: Path) -> None:
        """Check that the disk can hold the targets; two teachers may use one folder.

        Raises:
            ResourceError: Names the bytes needed and free.
        """
        check_sets(self.cache, self.sets)

    def missing(self) -> bool:
        """Return whether targets are missing."""
        return not all(one.complete for one in self.sets)

    from_student = False

    def generate(self, observer: events.Observer, student: Tuned | None = None) -> bool:
        """Run the teachers, each alone in memory; return False if the user stopped it."""
        complete = True
        if world().rank() == 0:
            with StopRequest() as stop:
                for teacher in self.teachers:
                    self._generate(teacher, observer, stop)
                    if stop.requested:
                        complete = False
                        break
        return true_on_all_ranks(complete)

    def _generate(
        self, teacher: TargetTeacher, observer: events.Observer, stop: StopRequest
    ) -> None:
        sets = [one for one in teacher.sets if not one.complete]
        if not sets:
            return
        count = sum(one.targets for one in sets)
        size = human_bytes(sum(one.nbytes for one in sets))
        each = f"{sets[0].shape.top_k:,} logits each"
        text = f"teacher {teacher.name}: {count:,} tokens, {each}, {size} in {self.cache}"
        if unread := sum(one.shape.rows - one.rows for one in sets):
            text += f"; none of {unread:,} rows that no step reads"
        observer.notify(events.Notice(text))
        mx.reset_peak_memory()
        done, reported = 0, 0
        with teacher.open() as generator_of:
            for one in sets:
                steps = one.write(generator_of(one), lambda: stop.requested)
                for fraction in steps:
                    tenths = int(10 * (done + fraction * one.targets) / count)
                    if tenths > reported:
                        reported = tenths
                        observer.notify(events.Notice(f"teacher {teacher.name}: {10 * tenths}%"))
                done += one.targets
                del steps
                if stop.requested:
                    break
        del generator_of
        peak = human_bytes(mx.get_peak_memory())
        observer.notify(events.Notice(f"teacher {teacher.name} is unloaded; peak memory {peak}"))
        gc.collect()
        mx.clear_cache()
