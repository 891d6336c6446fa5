"""Gradient checkpointing of chosen blocks, on and off.

Invariant: only the chosen instances change: each gets a subclass of its class, so
parameter paths, ``isinstance`` and every other model in the process stay as they were. A
checkpointed block keeps its input and recomputes the rest in the backward pass (arXiv 1604.06174).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_slim.models.dropout import draw_key, dropout_from
from mlx_slim.sharding.model import is_sharded


def _checkpointed_class(original: type) -> type:
    class Checkpointed(original):  # type: ignore[misc, valid-type]
        """The same block; its forward pass is recomputed in the backward pass."""

        recomputed = True

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            parameters = self.trainable_parameters()

            def forward(parameters: dict, key: mx.array, *args: Any, **kwargs: Any) -> Any:
                self.update(parameters)
                with dropout_from(key):
                    return original.__call__(self, *args, **kwargs)

            # Trainable parameters are arguments: captured, they would get no gradient. So is the
            # random key: the second forward pass must drop what the first one dropped.
            output = mx.checkpoint(forward)(parameters, draw_key(), *args, **kwargs)
            self.update(parameters)
            return output

    Checkpointed.__name__ = f"Checkpointed{original.__name__}"
    return Checkpointed


@contextlib.contextmanager
def checkpointed(blocks: list[nn.Module], enabled: bool = True) -> Iterator[None]:
    """Recompute ``blocks`` in the backward pass inside; sharded ones always are."""
    originals = [type(block) for block in blocks]
    if enabled and not any(map(is_sharded, blocks)):
        classes = {original: _checkpointed_class(original) for original in set(originals)}
        for block in blocks:
            block.__class__ = classes[type(block)]
    try:
        yield
    finally:
        for block, original in zip(blocks, originals, strict=True):
            block.__class__ = original
