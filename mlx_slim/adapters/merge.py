"""Fold adapters into the weights they adapt.

Invariant: the sum is made in float32 and cast last. A delta of 1% of a bf16 weight would otherwise
lose a sixth of itself (of 0.1%: four fifths). Quantized layers become dense ones: requantizing
would destroy most of a small delta. Afterwards the model has plain layers and no adapters.

Try it: ``python -m pytest tests/adapters/test_merge.py``.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from mlx_slim.adapters.inject import adapters_of
from mlx_slim.adapters.lora import Adapter
from mlx_slim.models.quantized import dense_layer, layer_dtype


def merged_layer(adapter: Adapter, dtype: mx.Dtype | None, *, read: bool = True) -> nn.Module:
    """Return the plain dense layer with the outputs of ``adapter``; with ``read``, evaluated."""
    base = adapter.base
    merged = dense_layer(base, adapter.merged_weight().astype(dtype or layer_dtype(base)))
    if read:
        mx.eval(merged.parameters())  # one layer at a time: float32 copies must not pile up
    merged.freeze()
    return merged.train(adapter.training)


def merge(model: nn.Module, dtype: mx.Dtype | None = None) -> int:
    """Replace every adapter of ``model`` by a plain dense layer with the same outputs, in place.

    Args:
        model: A model with adapters: LoRA, DoRA, PiSSA, over dense or quantized layers.
        dtype: Of the merged weights; None keeps the base layer's (of its scales, if quantized).

    Returns:
        The number of layers merged; 0 leaves the model as it is.
    """
    waiting = adapters_of(model)
    count = len(waiting)
    while waiting:  # popped, so that each former layer is freed as soon as it is replaced
        path, adapter = waiting.pop()
        model.update_modules(tree_unflatten([(path, merged_layer(adapter, dtype))]))
    return count
