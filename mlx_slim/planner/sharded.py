"""Memory of a rank that has a slice of every tensor (``mlx_slim/sharding``), from shapes.

Invariant: no rank is predicted less than the model over the number of ranks, one gathered block
with its gradient, and embedding and head with theirs. Blocks are taken to be of the size of their
weight matrices, and all weights of a model to be stored alike. Try it:
``python -m pytest tests/planner/test_sharded.py``.
"""

from __future__ import annotations

from mlx_slim.config.schema import Recipe
from mlx_slim.planner.shapes import FULL_PRECISION_BYTES, TrainingShapes

# Whole float32 gradients of one block, or of embedding and head: each rank's, and their sum.
_GRADIENTS = 2


def among_ranks(
    by_kind: dict[str, int], shapes: TrainingShapes, recipe: Recipe, ranks: int
) -> dict[str, int]:
    """Return the bytes of each kind on one of ``ranks``, from those of a rank that has all.

    Args:
        by_kind: Of training with ``train.grad_checkpoint``, as sharded blocks are computed.
        shapes: Of the model under this recipe.
        recipe: Checked recipe.
        ranks: How many.
    """
    block = max(block.linear for block in shapes.blocks)
    outside = max(0, shapes.parameters - sum(block.linear for block in shapes.blocks))
    whole = block + outside  # what is whole at a time
    weights = by_kind["weights"]
    gathered = int(weights * whole / shapes.parameters)
    gradients = by_kind["gradients"] // ranks
    if recipe.trains_weights:
        gradients += _GRADIENTS * FULL_PRECISION_BYTES * whole
    return {
        **by_kind,
        "weights": weights // ranks + gathered,
        "gradients": gradients,
        "optimizer": by_kind["optimizer"] // ranks,
    }


def loading_bytes(shapes: TrainingShapes, ranks: int) -> int:
    """Return the peak while a rank reads the model: its slices, and one tensor whole."""
    return shapes.base_bytes // ranks + shapes.loading_bytes - shapes.base_bytes
