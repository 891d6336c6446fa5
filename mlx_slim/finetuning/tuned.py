"""A model whose trainable parameters are chosen, whole or in slices.

Invariant: what needs whole tensors asks for them here, so that the rest of a run does not look
whether the model is sharded. Try it: ``python -m pytest tests/finetuning/test_sharding.py``.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import mlx.nn as nn

from mlx_slim.adapters.inject import Injected
from mlx_slim.models.load import Loaded
from mlx_slim.quantization.base import QuantizedBase
from mlx_slim.reading import ModelConfig
from mlx_slim.sharding.model import ShardedModel
from mlx_slim.training.callbacks import Callback
from mlx_slim.training.optim import trainable


@dataclass
class Tuned:
    """A model ready to be tuned.

    Attributes:
        loaded: As it came from disk; ``loaded.model`` was changed in place.
        config: Its configuration, with ``quantization`` if it was quantized here.
        injected: The adapters, or None for full tuning.
        total: Parameters of the base, counted as dense.
        base: How the base was quantized here; None if it is the recipe's model as it is stored.
        sharded: What this rank's slices are of; None where each rank has the whole model.
        callbacks: What else takes part in its training.
    """

    loaded: Loaded
    config: ModelConfig
    injected: Injected | None
    total: int
    base: QuantizedBase | None = None
    sharded: ShardedModel | None = None
    callbacks: list[Callback] = field(default_factory=list)

    @property
    def model(self) -> nn.Module:
        """The model."""
        return self.loaded.model

    def trainable_count(self) -> int:
        """Return how many numbers are trained, over all ranks."""
        values = trainable(self.model)
        if self.sharded is None:
            return sum(value.size for value in values.values())
        return sum(self.sharded.layout[path].size for path in values)

    def computable(self) -> AbstractContextManager[None]:
        """Inside, all ranks can call the model."""
        return nullcontext() if self.sharded is None else self.sharded.outside_blocks()

    def shaped(self) -> AbstractContextManager[None]:
        """Inside, parameters have the shapes of whole tensors; nothing may be computed."""
        return nullcontext() if self.sharded is None else self.sharded.shapes_only()
