"""Which micro-batches each optimizer step takes: a function of the epochs' plans alone.

Invariant: the place of a run in its plan is (epoch, micro-batches taken), which ``TrainState``
holds. Try it: ``python -m pytest tests/training/test_step_plan.py``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice

from mlx_slim.config.train import TrainConfig
from mlx_slim.data.batches import Batcher
from mlx_slim.data.plans import Plan
from mlx_slim.runtime import world
from mlx_slim.training.state import TrainState


def steps_of_epoch(micro_batches: int, accumulate: int) -> int:
    """Return the optimizer steps of an epoch; the last may have fewer micro-batches."""
    return -(-micro_batches // (accumulate * world().size()))


def total_steps(config: TrainConfig, batcher: Batcher) -> tuple[int, float]:
    """Return the optimizer steps of the run and the epochs they make."""
    if config.steps is not None:
        per_epoch = steps_of_epoch(len(batcher.plan(0)), config.accumulate)
        return config.steps, config.steps / per_epoch
    whole, part = int(config.epochs), config.epochs - int(config.epochs)
    count = [steps_of_epoch(len(batcher.plan(epoch)), config.accumulate) for epoch in range(whole)]
    if part:
        rest = steps_of_epoch(len(batcher.plan(whole)), config.accumulate)
        count.append(max(1, round(part * rest)))
    return sum(count), config.epochs


def planned_steps(
    batcher: Batcher, accumulate: int, at: TrainState
) -> Iterator[tuple[int, float, Plan]]:
    """Yield epoch, fraction of it done after the step, and the step's plan over all ranks, forever.

    ``at`` moves along.
    """
    width = accumulate * world().size()
    while True:
        plan = batcher.plan(at.epoch)
        while at.taken < len(plan):
            step_plan = plan[at.taken : at.taken + width]
            at.taken += len(step_plan)
            yield at.epoch, at.taken / len(plan), step_plan
        at.epoch, at.taken = at.epoch + 1, 0


def next_plans(batcher: Batcher, accumulate: int, at: TrainState, count: int) -> list[Plan]:
    """Return the plans of the next ``count`` steps; ``at`` stays."""
    steps = planned_steps(batcher, accumulate, replace(at))
    return [plan for _, _, plan in islice(steps, count)]
