"""What each layer loses in fewer bits, estimated: no text, no forward pass, no weight is read.

Invariant: losses have no unit; only their ratios count. Layer by layer, the loss falls with the
square of the rounding error; layers lose alike, however many numbers they hold, but for the
factors below. Try it: ``mlx-slim quantize MODEL -o DIR --bits-per-weight 4.5 --sensitivity rules``.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from mlx_slim.models.structure import EMBEDDINGS, ROBUST, SENSITIVE
from mlx_slim.quantization.sensitivity import Losses

# Bits -> ‖W − rounded W‖ / ‖W‖ of normal weights, affine, groups of 64, 16-bit scales; other groups
# scale all of them alike.
_ERRORS = {2: 0.396, 3: 0.190, 4: 0.091, 5: 0.0445, 6: 0.022, 8: 0.0083}
# By what a layer loses more than the others, of SmolLM2-135M and Qwen2.5-0.5B (docs/lab-log.md).
_TIED = 100.0  # an embedding that is the head, too
_HEAD, _EMBEDDING = 50.0, 4.0
_EDGE = 2.0  # first and last block
_SENSITIVE, _ROBUST = 2.0, 0.5


def heuristic_losses(paths: Collection[str], blocks: Mapping[str, int]) -> Losses:
    """Return the loss of each layer at each number of bits, in a unit of its own.

    Args:
        paths: Of the layers.
        blocks: Path -> number of its block, of those inside of blocks.
    """
    edges = {min(blocks.values(), default=0), max(blocks.values(), default=0)}
    outside = [path for path in paths if path not in blocks]

    def factor(path: str) -> float:
        name = path.rsplit(".", 1)[-1]
        if path not in blocks:
            embeds = name in EMBEDDINGS
            return _TIED if embeds and len(outside) == 1 else _EMBEDDING if embeds else _HEAD
        kind = _SENSITIVE if name in SENSITIVE else _ROBUST if name in ROBUST else 1.0
        return kind * (_EDGE if blocks[path] in edges else 1.0)

    return {
        path: {bits: factor(path) * error**2 for bits, error in _ERRORS.items()} for path in paths
    }
