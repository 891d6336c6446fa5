"""Fold adapters into weights that MLX has not read yet.

Invariant: nothing of the model is evaluated here, so that whoever divides it over ranks afterwards
reads a tensor, adds its update, keeps a slice and forgets the rest, one tensor at a time. The sum
is ``merge``'s: in float32, cast last; quantized layers become dense ones. Try it:
``mlx.launch -n 2 --backend ring -- mlx-slim eval MODEL --adapter RUN --parallel tensor …``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import mlx.nn as nn
from mlx.utils import tree_unflatten

from mlx_slim.adapters.dora import DoRALinear
from mlx_slim.adapters.inject import Site, place, sites
from mlx_slim.adapters.lora import Adapter
from mlx_slim.adapters.stack import Weighted, combined
from mlx_slim.adapters.store import StoredAdapter, read_adapter
from mlx_slim.errors import SlimError
from mlx_slim.models.quantized import dense_layer, layer_dtype


def merge_unread(
    model: nn.Module, stack: Sequence[Weighted], again: Callable[[], nn.Module]
) -> int:
    """Fold the weighted sum of ``stack`` into ``model``, in place, nothing evaluated.

    Args:
        model: The base, unread, without adapters.
        stack: As ``load_adapters`` takes it.
        again: Opens the same model once more, unread: a DoRA reads the length of each row first,
            and a tensor that was read stays in memory with whoever holds it.

    Returns:
        The number of layers merged.

    Raises:
        SlimError: As ``load_adapters``; modules that were trained in full.
    """
    used = [one for one in stack if one.weight != 0]
    if not used:
        raise SlimError("no adapter has a weight other than 0", "leave --adapter out for the base")
    if len(used) > 1 or used[0].weight != 1:
        factors = combined(model, used)
        chosen = [site for site in sites(model) if site.path in factors]
        for path, adapter in place(model, chosen, 1, 1.0, 0.0, dora=False):
            adapter.lora_a, adapter.lora_b = factors[path]
            _fold(model, path, adapter)
        return len(chosen)
    stored = read_adapter(model, used[0].folder)
    if stored.saved:
        raise SlimError(
            f"{used[0].folder} holds modules that were trained in full (modules_to_save)",
            "fuse it into the base first: mlx-slim fuse MODEL --adapter DIR -o OUT",
        )
    if stored.dora:
        _merge_dora(model, stored, again())
        return len(stored.chosen)
    plain = replace(stored, pooled=None)
    for path, adapter in place(
        model, plain.chosen, plain.rank, plain.scale, 0.0, dora=False, pooled=stored.pooled
    ):
        a_IR = stored.tensors[f"{path}.lora_a"]
        adapter.lora_a = a_IR[:: getattr(adapter, "group_size", 1)]
        adapter.lora_b = stored.tensors[f"{path}.lora_b"]
        _fold(model, path, adapter)
    return len(stored.chosen)


def _fold(model: nn.Module, path: str, adapter: Adapter) -> None:
    base = adapter.base
    merged = dense_layer(base, adapter.merged_weight().astype(layer_dtype(base)))
    model.update_modules(tree_unflatten([(path, merged)]))


def _merge_dora(model: nn.Module, stored: StoredAdapter, other: nn.Module) -> None:
    """Fold a DoRA; the lengths of rows are read from ``other``, a layer at a time."""
    unread = {site.path: site.module for site in stored.chosen}
    others = {site.path: site for site in sites(other)}
    for path, module in unread.items():
        site: Site = others.pop(path)
        ((_, adapter),) = place(other, [site], stored.rank, stored.scale, 0.0, dora=True)
        if isinstance(adapter, DoRALinear):
            adapter.m = stored.tensors[f"{path}.m"]
        adapter.lora_a = stored.tensors[f"{path}.lora_a"]
        adapter.lora_b = stored.tensors[f"{path}.lora_b"]
        adapter[adapter.base_name] = module
        _fold(model, path, adapter)
        other.update_modules(tree_unflatten([(path, nn.Identity())]))
        del site, adapter
