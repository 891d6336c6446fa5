"""Adapters folded into the layers of a model that is read later, and how much of them is left.

Invariant: nothing is evaluated but while the change of a layer is measured, one layer at a time;
sums are float32 and cast last. A DoRA alone reads the layers that it adapts when it is loaded: its
norms. Try it: ``mlx-slim fuse MODEL --adapter DIR -o OUT``.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from mlx_slim.adapters.inject import Injected, adapters_of
from mlx_slim.adapters.lora import Adapter
from mlx_slim.adapters.merge import merged_layer
from mlx_slim.adapters.pooled import folded_biases
from mlx_slim.adapters.saved import former_modules, saved_modules
from mlx_slim.adapters.stack import Weighted, load_adapters
from mlx_slim.export.fuse_audit import weight_retention
from mlx_slim.models.quantized import (
    densify,
    dequantize_weight,
    format_of,
    use_fast_matmul,
)
from mlx_slim.models.recorded_logits import free_weights
from mlx_slim.models.streamed import Open, Unread
from mlx_slim.models.verified_save import compute_dtype
from mlx_slim.quantization.apply import quantize_layer
from mlx_slim.runtime import to_float


def with_adapters(base: Unread, stack: Sequence[Weighted]) -> tuple[nn.Module, Injected]:
    """Return the model with the weighted sum of ``stack``, the weights of the base unread."""
    model = base.open()
    injected = load_adapters(model, stack)
    # What was read meanwhile, to tell whether it is the adapter's base, is unread again.
    places = {path: adapter.base_name for path, adapter in adapters_of(model)}
    fresh: list[tuple[str, mx.array]] = []
    trained = tuple(f"{path}." for path in saved_modules(model))
    tensors: list[tuple[str, mx.array]] = tree_flatten(base.open().parameters())  # type: ignore[assignment]
    for name, value in tensors:
        owner, _, leaf = name.rpartition(".")
        if not name.startswith(trained):
            place = f"{owner}.{places[owner]}.{leaf}" if owner in places else name
            fresh.append((place, value))
    model.update(tree_unflatten(fresh))  # pyright: ignore[reportArgumentType]
    return model.eval(), injected


def fold(model: nn.Module, mode: str, stored: mx.Dtype) -> nn.Module:
    """Replace the adapters of ``model`` by layers that hold them, in place; nothing is evaluated.

    Args:
        model: With adapters.
        mode: ``merge``, ``biases``, ``dequantize`` or ``requantize``.
        stored: Dtype of the weights on disk.
    """
    wide = compute_dtype() is not None or mode == "requantize"
    for path, adapter in adapters_of(model):
        if mode == "biases":
            layer = _with_biases(adapter)
        else:
            layer = merged_layer(adapter, mx.float32 if wide else stored, read=False)
        if mode == "requantize":
            layer = _requantized(layer, adapter.base)
        model.update_modules(tree_unflatten([(path, layer)]))
    if mode == "requantize":
        for path, former in former_modules(model).items():
            layer = _requantized(saved_modules(model)[path], former)
            model.update_modules(tree_unflatten([(path, layer)]))
    if mode == "dequantize":
        densify(model, None if wide else stored, read=False)
    use_fast_matmul(model)
    model.freeze()
    return model


def retention(tuned: Open, fused: Open | None) -> tuple[dict[str, float], float]:
    """Return the fraction of each layer's change that is left, and that over all layers.

    Args:
        tuned: Opens the model with its adapters.
        fused: Opens the fused model, as it is stored; None keeps the adapters.
    """
    layers = dict(fused().named_modules()) if fused is not None else {}
    fractions: dict[str, float] = {}
    sizes: dict[str, float] = {}
    for path, adapter in adapters_of(tuned()):
        base, merged = dequantize_weight(adapter.base), adapter.merged_weight()
        now = dequantize_weight(layers[path]) if layers else merged
        sizes[path] = to_float(mx.square(merged - base).sum())
        fractions |= weight_retention([(path, base, merged, now)])
        del base, merged, now
        for module in filter(None, (adapter, layers.get(path))):
            free_weights(module)
    total = sum(sizes.values())
    along = sum(fractions[path] * sizes[path] for path in fractions)
    return fractions, along / total if total > 0 else 1.0


def _with_biases(adapter: Adapter) -> nn.Module:
    """Return the base layer of ``adapter`` with biases that hold its update, float32."""
    layer = copy.copy(adapter.base)  # codes and scales are the same arrays
    layer["biases"] = folded_biases(adapter)
    return layer


def _requantized(dense: nn.Module, former: Any) -> nn.Module:
    """Return ``dense`` in the format of ``former``, if that was quantized."""
    return quantize_layer(dense, format_of(former), read=False) if "scales" in former else dense
