"""On-policy distillation: the student writes answers, and learns its teachers' view of them.

Generalized knowledge distillation (arXiv 2306.13649): a share of the micro-batches learns from
answers of the student to the rows' prompts (``finetuning/rounds.py``), with the divergence from the
teachers at every position of an answer as the loss, the rest from the rows. No gradient goes
through the sampling. Invariant: the targets of a round are stored under the key of its token ids,
in the cache of the other targets; one model is in memory at a time, or all where the planner's
numbers say that they fit, and a notice says which. Try it:
``mlx-slim distill distill-on-policy-smollm2 -o runs/on-policy``.
"""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import final

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_slim import events
from mlx_slim.data.batches import Batch
from mlx_slim.distillation.losses import DistillationLoss
from mlx_slim.distillation.objective import Columns, DistillationObjective
from mlx_slim.distillation.target_generation import CachedTargets, OpenTeacher, check_sets
from mlx_slim.finetuning.round_answers import Round
from mlx_slim.planner.memory import Prediction
from mlx_slim.planner.students import beside_teachers
from mlx_slim.progress import stage
from mlx_slim.runtime import from_first_rank
from mlx_slim.training.cross_entropy import supervised_rows
from mlx_slim.training.objective import Arrays
from mlx_slim.training.rounds import Begun
from mlx_slim.training.stop import StopRequest
from mlx_slim.units import human_bytes


class OnPolicyObjective(DistillationObjective):
    """The mixed loss on rows, the divergence alone on answers (``Batch.sampled``).

    Args:
        token_loss: Of the rows.
        teachers: The targets of the rows.
        answers: The targets of the answers.
        model, chunk, vocabulary, num_threads: As ``CrossEntropy``.
    """

    def __init__(
        self,
        token_loss: DistillationLoss,
        teachers: Sequence[Columns],
        answers: Sequence[Columns],
        model: nn.Module,
        chunk: int | None = None,
        vocabulary: int = 8,
        num_threads: int = 1,
    ) -> None:
        super().__init__(token_loss, teachers, model, chunk, vocabulary, num_threads)
        self._divergence = replace(token_loss, weight=1.0)
        self._answers = list(answers)

    def arrays(self, batch: Batch) -> Arrays:
        """Return those of ``DistillationObjective``, and whether they are of answers."""
        teachers = self._answers if batch.sampled else self._teachers
        return (*self.arrays_of(batch, teachers), batch.sampled)

    def __call__(self, model: nn.Module, arrays: Arrays, *, gradient: bool) -> mx.array:
        """Return Σ loss, Σ CE and Σ divergence, float32 (3,), nats."""
        tokens_BT, positions_N, targets_N, segments_BT, *columns, sampled = arrays
        rows = supervised_rows(model, self.split, tokens_BT, positions_N, segments_BT)
        token_loss = self._divergence if sampled else self.token_loss
        columns = (targets_N, *columns)
        return self.head_loss(rows, columns, gradient=gradient, token_loss=token_loss)


class RoundColumns:
    """The targets of one teacher for the round at hand; before one, placeholders.

    Args:
        placeholder: Of the same shape.
    """

    def __init__(self, placeholder: Columns) -> None:
        self.current = placeholder

    def columns(self, sources_N: np.ndarray) -> tuple[mx.array, mx.array, mx.array]:
        """Return ids_NK, top_NK and rest_N of the numbered targets."""
        return self.current.columns(sources_N)


@final
class TeacherScorer:
    """Scores rounds by teachers.

    Args:
        teachers: Gives them, once the run knows where their targets are.
        weights: Bytes of each teacher's weights.
        names: Of the teachers.
        fraction: Share of the micro-batches that learn from answers.
    """

    answers = 1
    log_probs = False
    until: Sequence[str] = ()

    def __init__(
        self,
        teachers: Callable[[], CachedTargets],
        weights: Callable[[], list[int]],
        names: Sequence[str],
        fraction: float,
    ) -> None:
        self.fraction = fraction
        self._teachers, self._weights, self._names = teachers, weights, names
        self._beside = False
        self._open: dict[str, OpenTeacher] = {}  # teachers that stay in memory
        self._until_end = contextlib.ExitStack()
        self._columns: list[RoundColumns] = []
        self._waiting: Round | None = None

    def columns(self, placeholders: Sequence[Columns]) -> list[RoundColumns]:
        """Return what an objective reads the targets of answers from, one a teacher."""
        self._columns = [RoundColumns(one) for one in placeholders]
        return self._columns

    def place(self, prediction: Prediction, budget: int, observer: events.Observer) -> Prediction:
        """Decide whether the teachers stay beside the student; return the cost with them."""
        sizes = self._weights()
        beside, whole = beside_teachers(prediction, sizes, budget)
        names = " and ".join(self._names)
        student = human_bytes(prediction.predicted_peak_bytes)
        need = f"{student} to train and {human_bytes(sum(sizes))} of {names}"
        text = f"teacher beside the student: {need} fit into {human_bytes(budget)}"
        if not beside:
            text = (
                f"one model in memory at a time: {need} do not fit into {human_bytes(budget)}; "
                "the student is put away while a round is scored"
            )
        observer.notify(events.Notice(text))
        self._beside = beside
        return whole

    def score(self, answers: Round, model: nn.Module, stop: Callable[[], bool]) -> Begun:
        """Open the targets of the round; compute them first if the teachers may be loaded now."""
        sets = [teacher.set_of(answers) for teacher in self._teachers().teachers]
        if not from_first_rank(lambda: all(one.complete for one in sets)):
            if not self._beside:
                self._waiting = answers
                return Begun.PUT_AWAY
            if not from_first_rank(partial(self._fill, answers, stop)):
                return Begun.INTERRUPTED
        for columns, one in zip(self._columns, sets, strict=True):
            columns.current = one.columns()
        return Begun.READY

    def score_alone(self, observer: events.Observer) -> bool:
        """Compute the targets of the round that waits for it; False if interrupted."""
        answers, self._waiting = self._waiting, None
        assert answers is not None
        with StopRequest() as stop:
            return from_first_rank(partial(self._fill, answers, lambda: stop.requested))

    def close(self) -> None:
        """Free the teachers."""
        self._open.clear()
        self._until_end.close()
        gc.collect()
        mx.clear_cache()

    def figures(self, answers: Round) -> dict[str, float] | None:
        """Return none: the divergence is in every step."""
        return None

    def _fill(self, answers: Round, stop: Callable[[], bool]) -> bool:
        """Compute what is missing of a round's targets; return whether they are complete."""
        cached = self._teachers()
        sets = [(teacher, teacher.set_of(answers)) for teacher in cached.teachers]
        check_sets(cached.cache, [one for _, one in sets])
        for teacher, target_set in sets:
            if target_set.complete:
                continue
            began = time.perf_counter()
            with contextlib.ExitStack() as until_scored:
                until = self._until_end if self._beside else until_scored
                generator_of = self._open.get(teacher.name) or until.enter_context(teacher.open())
                if self._beside:
                    self._open[teacher.name] = generator_of
                with stage("teacher scores", target_set.shape.targets, "tokens") as work:
                    for fraction in target_set.write(generator_of(target_set), stop):
                        work.reach(fraction * target_set.shape.targets)
            del generator_of
            gc.collect()
            mx.clear_cache()
            answers.folder.add_seconds("scoring", time.perf_counter() - began)
            if not target_set.complete:
                return False
        return True
