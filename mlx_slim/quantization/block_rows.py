"""What both phases of block-wise training work with: settings, rows on their way, a learning rate.

Invariant: activations of one place between two blocks are kept for each batch; the layers outside
the blocks exist twice, as they were and quantized, and one of them is in the model. Try it:
``mlx-slim quantize MODEL -o DIR --method blockwise --bits 2``.

Shapes: N rows, B rows of a batch, T tokens a row, D width.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_unflatten

from mlx_slim.models.streamed import BlockBatch, batch_of


@dataclass(frozen=True)
class Training:
    """How long and how fast.

    Attributes:
        epochs: Passes over the rows for each block.
        weight_rate: Adam's rate for weights, in distances between two codes.
        scale_rate: For scales and biases of a block, in the same unit.
        end_epochs: Passes of the second phase.
        end_rate: Of its scales and biases, in the same unit.
        batch: Rows of a step.
        seed: Of the order of the rows.
    """

    epochs: int = 4
    weight_rate: float = 0.01
    scale_rate: float = 0.005
    end_epochs: int = 2
    end_rate: float = 0.003
    batch: int = 4
    seed: int = 0


def batches_of(model: nn.Module, tokens_NT: mx.array, size: int) -> list[BlockBatch]:
    """Return the rows, ``size`` a batch, at the first block of ``model``."""
    starts = range(0, len(tokens_NT), size)
    return [batch_of(model, tokens_NT[start : start + size]) for start in starts]


@dataclass(frozen=True)
class Outside:
    """The layers outside the blocks: as they were, and quantized."""

    floats: list[tuple[str, nn.Module]]
    quantized: list[tuple[str, nn.Module]]

    @contextlib.contextmanager
    def as_it_was(self, model: nn.Module) -> Iterator[None]:
        """Give ``model`` its float layers back for a while."""
        model.update_modules(tree_unflatten(self.floats))
        try:
            yield
        finally:
            model.update_modules(tree_unflatten(self.quantized))


def orders(count: int, epochs: int, seed: int) -> Iterator[int]:
    """Yield the batches' numbers, each epoch in an order of its own."""
    random = np.random.default_rng(seed)
    for _ in range(epochs):
        yield from random.permutation(count).tolist()


def adam(rate: float, steps: int) -> optim.Adam:
    """Return Adam whose rate falls to 0 along a cosine."""
    return optim.Adam(optim.cosine_decay(rate, max(1, steps)), bias_correction=True)
