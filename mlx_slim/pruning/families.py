"""The groups of coupled weights that pruning removes, by block.

Invariant: of a dense model heads, neurons and the channels of the residual stream, which are the
same family in every block; of a mixture the experts, in the blocks that have some. Try it:
``mlx-slim prune MODEL -o DIR --ratio 0.2 --dry-run``.
"""

from __future__ import annotations

import mlx.nn as nn

from mlx_slim.models import structure
from mlx_slim.models.kinds import EXPERTS, HIDDEN
from mlx_slim.models.mixtures import Mixture
from mlx_slim.models.residual import residual
from mlx_slim.models.structure import Coupled

# Of each block, kind -> family.
Families = list[dict[str, Coupled]]


def families_of(model: nn.Module, mixture: Mixture | None = None) -> Families:
    """Return the families of each block of ``model``, whose weights need not be there.

    Args:
        model: Dense, or the model of ``mixture``.
        mixture: From ``mixture_of`` its config.
    """
    if mixture is not None:
        return [{EXPERTS: family} if family else {} for family in mixture.families]
    channels = residual(model).channels
    blocks = structure.blocks(model)
    return [{**structure.coupled(block), HIDDEN: channels} for block in blocks]
