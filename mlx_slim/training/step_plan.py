"""Which micro-batches each optimizer step takes: a function of the epochs' plans alone.

Invariant: the place of a run in its plan is (epoch, micro-batches taken), which ``TrainState``
holds; a step holds as many on any number of ranks, unless ``train.scale_with_ranks`` is set. Try
it: ``python -m pytest tests/training/test_step_plan.py``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice

import numpy as np

from mlx_slim.config.train import TrainConfig
from mlx_slim.data.batches import Batcher
from mlx_slim.data.plans import Plan
from mlx_slim.errors import SlimError
from mlx_slim.runtime import world
from mlx_slim.training.rounds import Rounds
from mlx_slim.training.state import TrainState

MOST_RANKS = 65  # that are tried, where a run was begun with another number


def micro_batches_of(config: TrainConfig) -> int:
    """Return the micro-batches of a step, those of all ranks."""
    return config.accumulate * (world().size() if config.scale_with_ranks else 1)


def steps_of_epoch(micro_batches: int, a_step: int) -> int:
    """Return the optimizer steps of an epoch; the last may have fewer micro-batches."""
    return -(-micro_batches // a_step)


def total_steps(config: TrainConfig, batcher: Batcher) -> tuple[int, float]:
    """Return the optimizer steps of the run and the epochs they make."""
    a_step = micro_batches_of(config)
    if config.steps is not None:
        per_epoch = steps_of_epoch(len(batcher.plan(0)), a_step)
        return config.steps, config.steps / per_epoch
    whole, part = int(config.epochs), config.epochs - int(config.epochs)
    count = [steps_of_epoch(len(batcher.plan(epoch)), a_step) for epoch in range(whole)]
    if part:
        rest = steps_of_epoch(len(batcher.plan(whole)), a_step)
        count.append(max(1, round(part * rest)))
    return sum(count), config.epochs


def planned_steps(
    batcher: Batcher, config: TrainConfig, at: TrainState
) -> Iterator[tuple[int, float, Plan]]:
    """Yield epoch, fraction of it done after the step, and the step's plan over all ranks, forever.

    ``at`` moves along.
    """
    return _steps(batcher, micro_batches_of(config), at)


def _steps(batcher: Batcher, a_step: int, at: TrainState) -> Iterator[tuple[int, float, Plan]]:
    while True:
        plan = batcher.plan(at.epoch)
        while at.taken < len(plan):
            step_plan = plan[at.taken : at.taken + a_step]
            at.taken += len(step_plan)
            yield at.epoch, at.taken / len(plan), step_plan
        at.epoch, at.taken = at.epoch + 1, 0


def next_plans(batcher: Batcher, config: TrainConfig, at: TrainState, count: int) -> list[Plan]:
    """Return the plans of the next ``count`` steps; ``at`` stays."""
    steps = planned_steps(batcher, config, replace(at))
    return [plan for _, _, plan in islice(steps, count)]


def rows_read(
    batcher: Batcher, config: TrainConfig, total: int, rounds: Rounds | None
) -> np.ndarray:
    """Return which rows a run of ``total`` steps takes from its data, bool (N,).

    Args:
        batcher: The rows.
        config: The ``train`` section.
        total: Optimizer steps.
        rounds: Replaces some micro-batches; None replaces none.
    """
    read_N = np.zeros(len(batcher.rows), bool)
    steps = planned_steps(batcher, config, TrainState())
    for step, (epoch, _, plan) in enumerate(islice(steps, total)):
        if read_N.all() or (epoch and rounds is None):
            break
        for index, groups in enumerate(plan):
            if rounds is None or not rounds.replaces(step, index):
                read_N[[row for group in groups for row in group]] = True
    return read_N


def check_train_state(batcher: Batcher, config: TrainConfig, at: TrainState) -> None:
    """Check that steps of ``config`` on these ranks reach where ``at`` is.

    Raises:
        SlimError: With the number of ranks that do, if there is one: the run went on with
            ``scale_with_ranks``, or was made by version 0.6 or older, which always scaled.
    """

    def reaches(a_step: int) -> bool:
        here = TrainState()
        steps = _steps(batcher, a_step, here)
        for _ in range(at.step):
            next(steps)
        return (here.epoch, here.taken) == (at.epoch, at.taken)

    a_step = micro_batches_of(config)
    if reaches(a_step):
        return
    ranks = next((n for n in range(1, MOST_RANKS) if reaches(n * config.accumulate)), None)
    scaled = f"{ranks} ranks" if ranks != 1 else "one rank"
    raise SlimError(
        f"step {at.step:,} of this run is micro-batch {at.taken:,} of epoch {at.epoch + 1}, which "
        f"steps of {a_step:,} micro-batches do not reach"
        + (f": {scaled} took {ranks * config.accumulate:,} in each" if ranks else ""),
        (
            f"resume on {scaled}" + " with train.scale_with_ranks=true" * (ranks != 1)
            if ranks
            else "resume as it was started"
        )
        + ", or start a new run",
    )
