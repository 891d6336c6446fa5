"""What the literature advises on an adapter's rank, where it is worth acting on.

Invariant: one short line, at most once a run, and only for a run that is known to be long. LoRA of
a low rank puts directions on top of a weight's spectrum that the base did not have ("intruder
dimensions", arXiv 2410.21228); a model with many of them forgets more, and more with every further
task. From rank 16 on they are few. They come with long training: the paper counts them after
epochs over tens of thousands of rows, and a run of a few hundred steps at rank 8 had none (the
demo's, ``analyze intruders``). Try it: ``mlx-slim plan smollm2-lora train.steps=2000``.
"""

from __future__ import annotations

from mlx_slim.config.schema import Recipe

RANK = 16
STEPS = 1000  # a shorter run tunes too little: none were seen after some hundred steps


def rank_advice(recipe: Recipe, steps: int | None = None) -> str:
    """Return the advice for a recipe, or an empty string.

    Args:
        recipe: Its method and adapter.
        steps: Optimizer steps of the run; None where they are not known, which gives no advice.
    """
    rank = recipe.adapter.rank
    if recipe.method == "full" or rank >= RANK or steps is None or steps < STEPS:
        return ""
    why = "fewer intruder dimensions, less forgotten (arXiv 2410.21228)"
    if recipe.adapter.on:
        why = "every adapter of a stack adds its own intruder dimensions (arXiv 2410.21228)"
    return f"rank {rank} is low for a long run: adapter.rank={RANK} or more: {why}"
