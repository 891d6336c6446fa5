"""What each layer loses in fewer bits, estimated: no text, no forward pass, no weight is read.

Invariant: losses have no unit; only their ratios count. Layer by layer, the loss falls with the
square of the rounding error; layers lose alike, however many numbers they hold, but for the
factors below. Try it: ``mlx-slim quantize MODEL -o DIR --bits-per-weight 4.5 --sensitivity rules``.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from mlx_slim.models.structure import SENSITIVE
from mlx_slim.quantization.sensitivity import Losses

# Bits -> ‖W − rounded W‖ / ‖W‖ of normal weights, affine, groups of 64, 16-bit scales; other groups
# scale all of them alike.
_ERRORS = {2: 0.396, 3: 0.190, 4: 0.091, 5: 0.0445, 6: 0.022, 8: 0.0083}
_OUTSIDE = 50.0  # head and embedding, which is both where they are tied
_EDGE = 2.0  # first and last block
_SENSITIVE = 2.0  # values and what leaves the MLP


def heuristic_losses(paths: Collection[str], blocks: Mapping[str, int]) -> Losses:
    """Return the loss of each layer at each number of bits, in a unit of its own.

    Args:
        paths: Of the layers.
        blocks: Path -> number of its block, of those inside of blocks.
    """
    edges = {min(blocks.values(), default=0), max(blocks.values(), default=0)}

    def factor(path: str) -> float:
        if path not in blocks:
            return _OUTSIDE
        edge = _EDGE if blocks[path] in edges else 1.0
        return edge * (_SENSITIVE if path.rsplit(".", 1)[-1] in SENSITIVE else 1.0)

    return {
        path: {bits: factor(path) * error**2 for bits, error in _ERRORS.items()} for path in paths
    }
