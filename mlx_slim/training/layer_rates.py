"""Learning rates that fall with depth: ``train.layer_decay``.

Of a model with L blocks, block l (from 1) learns at decay^(L − l) times the rate of the run, so the
last one at the full rate; the input embedding is below the first block, at l = 0, a matrix that is
embedding and head too; a head of its own and the last norm are at the top, at the full rate
(ULMFiT, arXiv 1801.06146; ELECTRA, arXiv 2003.10555). Adapters learn at the rate of the layer that
they are on. Invariant: multiples are a function of the parameters' paths alone, so all optimizers
and every resume have the same. Try it:
``mlx-slim train smollm2-lora train.layer_decay=0.9 -o runs/try``.
"""

from __future__ import annotations

from collections.abc import Collection

import mlx.nn as nn

from mlx_slim.models.structure import EMBEDDINGS, block_numbers, blocks

EMBEDDING, TOP = "embedding", "top"  # of what is outside of the blocks
_POSITIONS = "wpe"  # learned positions, beside the tokens' table


def layer_multiples(model: nn.Module, paths: Collection[str], decay: float) -> dict[str, float]:
    """Return the multiple of the learning rate of each parameter.

    Args:
        model: That has them.
        paths: Of parameters.
        decay: Ratio of the rates of two neighbouring blocks, above 0 and at most 1.
    """
    if decay == 1:
        return dict.fromkeys(paths, 1.0)
    count, inside = len(blocks(model)), block_numbers(model, paths)
    return {path: decay ** (count - _level(path, inside, count)) for path in paths}


def _level(path: str, inside: dict[str, int], count: int) -> int:
    """Return l of a parameter: 0 of the embedding, 1 of the first block, ``count`` of the last."""
    if path in inside:
        return inside[path] + 1
    return 0 if {*path.split(".")} & {*EMBEDDINGS, _POSITIONS} else count


def described(model: nn.Module, paths: Collection[str], decay: float) -> dict[str, float]:
    """Return the multiples by place, bottom to top: ``embedding``, ``block 1`` …, ``top``."""
    inside = block_numbers(model, paths)
    multiples = layer_multiples(model, paths, decay)
    places: dict[str, float] = {}
    for path in sorted(paths, key=lambda path: (multiples[path], path not in inside)):
        outside = TOP if multiples[path] == 1 else EMBEDDING
        places[f"block {inside[path] + 1}" if path in inside else outside] = multiples[path]
    return places
