"""Names of the methods that rank what is removed, and of the options that say how much stays.

Invariant: importing this imports no MLX. Try it: ``mlx-slim prune --help``.
"""

from __future__ import annotations

from mlx_slim.models.kinds import EXPERTS, HEADS, HIDDEN, MLP

GRADIENT = ("taylor", "taylor2", "vector")
OF_EXPERTS = ("reap", "l2", "random")
OF_WIDTH = (*GRADIENT, "activation", "reap", "l2", "random")
BLOCK_INFLUENCE = "block-influence"
OF_DEPTH = (BLOCK_INFLUENCE, "angular", "perplexity", "random")
SIZE_FLAGS = {
    HEADS: "--kv-heads",
    MLP: "--intermediate-size",
    HIDDEN: "--hidden-size",
    EXPERTS: "--experts",
}
