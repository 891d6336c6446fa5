"""What it costs that a run draws answers while it trains: the memory of a batch, and the tokens.

Invariant: rounds draw within the memory that is planned here, so a plan's peak holds for them too:
a batch of ``ANSWERS``, or what the budget leaves, and more where training itself needs more than
that (``finetuning/rounds.py``). Answers are counted as long as those of the rows.
Try it: ``mlx-slim plan smollm2-grpo``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from mlx_slim.config.schema import Recipe
from mlx_slim.evaluation.scoring.footprint import Footprint, planned_footprint
from mlx_slim.planner.work import TrainingWork
from mlx_slim.reading import ModelConfig

ANSWERS = 32  # of a planned batch, at most
ROOM = 0.8  # of the memory for answers, for caches and logits
PLANNED_ROOM = 0.7  # a little more is planned: a batch is halved where a byte is missing


def batch_of_answers(
    footprint: Footprint, room: int, positions: int, most: int, fraction: float = ROOM
) -> int:
    """Return how many answers are drawn at a time: a power of two.

    Args:
        footprint: Of an answer's cache.
        room: Bytes besides what the run holds in any case.
        positions: Of the longest prompt and its answer.
        most: Answers, at most.
        fraction: Of the room that caches and logits take.
    """
    count = min(most, footprint.answers(int(fraction * room), positions, 0, False))
    return 1 << (count.bit_length() - 1)


def drawing_bytes(
    config: ModelConfig,
    recipe: Recipe,
    size: int,
    lengths: Sequence[int] | None,
    room: int,
) -> int:
    """Return the bytes of a batch of answers besides weights and optimizer; 0 where none is drawn.

    Args:
        config: Of the model.
        recipe: Checked recipe.
        size: Bytes of a number of the computation.
        lengths: Tokens of each training row, if they are counted already.
        room: Bytes of the budget besides weights and optimizer: the batch is halved until it fits.
    """
    if not recipe.has_rounds:
        return 0
    footprint = planned_footprint(config, size)
    longest = recipe.train.max_length
    if lengths:
        longest = min(longest, max(lengths) + recipe.rounds.max_tokens)
    count = batch_of_answers(footprint, room, longest, ANSWERS, PLANNED_ROOM)
    return int(footprint.batch_bytes(count, longest) / PLANNED_ROOM)


def with_answers(recipe: Recipe, work: TrainingWork) -> TrainingWork:
    """Return the tokens of a run whose rows are answered: those learned from, those drawn."""
    if not recipe.has_rounds:
        return work
    if recipe.distill is not None:
        drawn = recipe.distill.sampled_fraction * work.tokens * work.supervised
        return replace(work, drawn=int(drawn))
    assert recipe.reward is not None
    answers = recipe.reward.group_size
    tokens = answers * work.tokens
    basis = f"{work.basis}, {answers} answers each"
    return replace(work, tokens=tokens, drawn=int(tokens * work.supervised), basis=basis)
