"""Noise on the input embeddings while a model learns: NEFTune (arXiv 2310.05914).

Each position t of a row gets ε_t · alpha/√(L·d), ε uniform in [−1, 1], with L the row's own number
of inputs, padding and the other rows of a packed sequence not counted, and d the width. Invariant:
it is added to what the table gives, before a family's own scale of it (gemma's √d, granite's
multiplier), so that it is as large beside the embedding there as elsewhere; validation has none, a
tied head has none. The noise has a key of its own, from (seed, step, micro-batch): other random
numbers are those of a run without it, and a resumed run repeats it. Try it:
``mlx-slim train smollm2-lora train.neftune_alpha=5 -o runs/try``.

Legend: B sequences, T positions, D width.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_slim.data.batches import Batch
from mlx_slim.errors import SlimError
from mlx_slim.models.dropout import drawn
from mlx_slim.models.structure import EMBEDDINGS
from mlx_slim.training.objective import Arrays, Objective

_STREAM = 2310  # parts this noise from all else that is drawn from the same numbers


def input_embedding(model: nn.Module) -> nn.Module:
    """Return the table that the ids of a batch are looked up in, without an adapter around it.

    Raises:
        SlimError: If none is known by name.
    """
    modules = reversed(model.named_modules())
    for path, module in modules:
        name = path.rsplit(".", 1)[-1]
        if name in EMBEDDINGS and isinstance(module, (nn.Embedding, nn.QuantizedEmbedding)):
            return module
    raise SlimError(
        f"{type(model).__module__} has no input embedding of a known name",
        f"known are {', '.join(EMBEDDINGS)}",
    )


@contextlib.contextmanager
def _noise(embedding: Any, scale_BT: mx.array, key: mx.array) -> Iterator[None]:
    """Add noise to every look-up of a batch's ids; ``as_linear`` stays as it is.

    The module itself changes its class for a while, so that paths and parameters stay the same.
    """
    plain = type(embedding)

    class Noisy(plain):
        def __call__(self, ids: mx.array) -> mx.array:
            embedded_BTD = super().__call__(ids)
            if ids.shape != scale_BT.shape:
                return embedded_BTD
            scale_BT1 = scale_BT[..., None] * embedded_BTD.shape[-1] ** -0.5
            noise_BTD = scale_BT1 * drawn(
                lambda shape: mx.random.uniform(-1, 1, shape, key=key), embedded_BTD.shape
            )
            return embedded_BTD + noise_BTD.astype(embedded_BTD.dtype)

    embedding.__class__ = Noisy
    try:
        yield
    finally:
        embedding.__class__ = plain


class NoisyEmbeddings:
    """An objective whose model sees noisy embeddings where it learns.

    Args:
        objective: What is minimised.
        model: Its input embedding gets the noise.
        alpha: Size of the noise.

    Raises:
        SlimError: If the input embedding of ``model`` is not known.
    """

    def __init__(self, objective: Objective, model: nn.Module, alpha: float) -> None:
        self.objective = objective
        self.metrics = objective.metrics
        self._alpha = alpha
        self._embedding = input_embedding(model)

    def sharing(self) -> contextlib.AbstractContextManager[None]:
        """As that of the objective."""
        return getattr(self.objective, "sharing", contextlib.nullcontext)()

    def weight(self, batch: Batch) -> float:
        """As that of the objective."""
        return self.objective.weight(batch)

    def begin_step(self, model: nn.Module, batches: Iterable[Batch]) -> None:
        """As that of the objective; what it measures has no noise."""
        self.objective.begin_step(model, batches)

    def arrays(self, batch: Batch) -> Arrays:
        """Return the objective's arrays, after alpha/√L of each position (B, T) and the key."""
        root_BT = np.sqrt(np.maximum(batch.lengths_BT, 1))
        scale_BT = np.where(batch.lengths_BT > 0, self._alpha / root_BT, 0).astype(np.float32)
        entropy = np.random.SeedSequence([*batch.entropy, _STREAM])
        key = mx.array(entropy.generate_state(2))
        return (mx.array(scale_BT), key, *self.objective.arrays(batch))

    def __call__(self, model: nn.Module, arrays: Arrays, *, gradient: bool) -> mx.array:
        """Return what the objective returns; with noise where ``gradient``."""
        scale_BT, key, *rest = arrays
        if not gradient:
            return self.objective(model, tuple(rest), gradient=False)
        with _noise(self._embedding, scale_BT, key):
            return self.objective(model, tuple(rest), gradient=True)
