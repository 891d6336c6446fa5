"""Put adapters on the chosen layers of a model.

Invariant: afterwards everything is frozen but the adapters' own parameters, the output is the
base's, and every target of the recipe matches a layer: one that matches none is an error. Adapters
are made in the model's order, so one ``mx.random.seed`` gives one set of parameters.

Try it: ``python -m pytest tests/adapters/test_inject.py``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from mlx_slim.adapters.adalora import AdaLoRALinear
from mlx_slim.adapters.dora import DoRALinear
from mlx_slim.adapters.experts import LoRASwitchLinear
from mlx_slim.adapters.lora import Adapter, LoRAEmbedding, LoRALinear, dimensions, is_experts
from mlx_slim.adapters.pooled import PooledLoRALinear, check_pooled
from mlx_slim.adapters.saved import (
    EMBEDDING_TYPES,
    choose_saved,
    give_back,
    in_order,
    saved_modules,
    saved_tensors,
    train_in_full,
)
from mlx_slim.adapters.variants import start_pissa
from mlx_slim.config.schema import AdapterConfig
from mlx_slim.errors import SlimError, did_you_mean
from mlx_slim.models.quantized import expert_types
from mlx_slim.models.structure import blocks, is_linear
from mlx_slim.progress import tracked

_LEAST = 8  # smaller side of a layer that all-linear takes: a gate or a few coefficients have less


@dataclass(frozen=True)
class Injected:
    """What ``inject`` did.

    Attributes:
        paths: Adapted modules, full paths in the model's order.
        scale: s in ΔW = s · BA.
        alpha: The alpha that gives s at this rank and scaling.
        parameters: Trainable numbers.
        saved: Modules that are trained in full, likewise.
    """

    paths: list[str]
    scale: float
    alpha: float
    parameters: int
    saved: list[str]


@dataclass(frozen=True)
class Site:
    """A layer that could carry an adapter: its block (None outside the blocks), paths, module."""

    block: int | None
    inside: str
    path: str
    module: nn.Module


def sites(model: Any) -> list[Site]:
    """Return every linear, embedding and expert layer, in the model's order.

    A layer that has an adapter is listed as the layer itself, under its path without the adapter.
    """
    types = (*EMBEDDING_TYPES, *expert_types())
    transformer = blocks(model)
    indices = {id(block): index for index, block in enumerate(transformer)}
    everything = in_order(model)  # once: a model has thousands of modules
    names = {id(module): path for path, module in everything if id(module) in indices}
    prefixes = sorted(((names[key] + ".", index) for key, index in indices.items()), reverse=True)
    carried = {id(m.base): path for path, m in everything if isinstance(m, Adapter)}
    matching = []
    for path, module in everything:
        if is_linear(module) or isinstance(module, types):
            path = carried.get(id(module), path)
            prefix, block = next((p for p in prefixes if path.startswith(p[0])), ("", None))
            matching.append(Site(block, path[len(prefix) :], path, module))
    return matching


def adapters_of(model: nn.Module) -> list[tuple[str, Adapter]]:
    """Return (path, adapter) of every adapter in ``model``."""
    return [(path, module) for path, module in in_order(model) if isinstance(module, Adapter)]


def _chosen_blocks(layers: Any, count: int) -> set[int]:
    if layers == "all":
        return set(range(count))
    if isinstance(layers, int):
        if layers > count:
            raise SlimError(
                f"adapter.layers={layers}: the model has only {count} blocks",
                f"give at most {count}, or all",
            )
        return set(range(count - layers, count))
    wrong = [index for index in layers if index >= count]
    if wrong or not layers:
        raise SlimError(
            f"adapter.layers={list(layers)} names no block {wrong or ''} of a model with {count}"
            if wrong
            else "adapter.layers is an empty list",
            f"block indices go from 0 to {count - 1}",
        )
    return set(layers)


def _ends_with(path: str, name: str) -> bool:
    return path == name or path.endswith("." + name)


def _matches(target: str, candidates: Collection[Site], rank: int) -> list[Site]:
    if target == "all-linear":
        mixtures = {s.block for s in candidates if is_experts(s.module)}

        def least(s: Site) -> int:
            """A router has as many outputs as experts: below the rank, it is none to adapt."""
            return max(_LEAST, rank) if s.block in mixtures else _LEAST

        return [
            s
            for s in candidates
            if s.block is not None
            and not isinstance(s.module, EMBEDDING_TYPES)
            and not (is_linear(s.module) and min(dimensions(s.module)) < least(s))
        ]
    if target.startswith("re:"):
        from mlx_slim.config.patterns import compile_pattern

        try:
            pattern = compile_pattern(target[3:])
        except ValueError as error:
            raise SlimError(f"adapter.targets: {error}") from error
        return [s for s in candidates if s.block is not None and pattern.matches(s.inside)]
    return [s for s in candidates if _ends_with(s.inside, target)]


def choose(model: Any, config: AdapterConfig, everything: list[Site] | None = None) -> list[Site]:
    """Return the layers that ``config`` selects, in the model's order.

    Args:
        model: With blocks.
        config: Targets, layers and rank.
        everything: ``sites(model)``, where the caller has it.

    Raises:
        SlimError: If a target matches nothing, or a block index is out of range.
    """
    chosen = _chosen_blocks(config.layers, len(blocks(model)))
    everything = sites(model) if everything is None else everything
    candidates = [s for s in everything if s.block is None or s.block in chosen]
    targets = [config.targets] if isinstance(config.targets, str) else config.targets
    selected: set[str] = set()
    for target in targets:
        matched = _matches(target, candidates, config.rank)
        if not matched:
            names = {s.inside for s in everything}
            if "." not in target:
                names = {name.rsplit(".", 1)[-1] for name in names}
            hint = did_you_mean(target, names | {"all-linear"})
            raise SlimError(f"adapter.targets: {target!r} matches no layer of this model", hint)
        selected.update(s.path for s in matched)
    if not selected:
        raise SlimError("adapter.targets is empty", "name layers, or set all-linear")
    return [s for s in everything if s.path in selected]


def _check_rank(chosen: list[Site], rank: int) -> None:
    for site in chosen:
        smallest = min(dimensions(site.module))
        if rank > smallest:
            raise SlimError(
                f"adapter.rank={rank} is above the smaller side of {site.path}, {smallest}",
                f"use a rank of at most {smallest}, or leave it out of adapter.targets",
            )


def _check_kinds(chosen: list[Site], dora: bool, adaptive: bool, pissa: bool = False) -> None:
    special = "AdaLoRA" if adaptive else "DoRA" if dora else ""
    for site in chosen:
        experts = is_experts(site.module)
        if special and (experts or isinstance(site.module, EMBEDDING_TYPES)):
            what = "holds the experts of a mixture" if experts else "is an embedding"
            raise SlimError(
                f"{site.path} {what}: {special} works on linear layers",
                "use a plain method: lora, or leave it out of adapter.targets",
            )
        if pissa and experts:
            raise SlimError(
                f"{site.path} holds the experts of a mixture, which PiSSA has no start for",
                "set adapter.init=standard, or leave it out of adapter.targets",
            )


def place(
    model: nn.Module,
    chosen: list[Site],
    rank: int,
    scale: float,
    dropout: float,
    *,
    dora: bool,
    adaptive: bool = False,
    pooled: mx.Dtype | None = None,
) -> list[tuple[str, Adapter]]:
    """Freeze ``model``, wrap the ``chosen`` layers, leave only the adapters trainable.

    ``pooled`` is the dtype of the base's stored biases, where the adapters shall fold into them.

    Raises:
        SlimError: If a layer cannot carry the adapter, or the model has adapters already.
    """
    if adapters_of(model):
        raise SlimError("this model has adapters already", "load the base again, or merge first")
    _check_kinds(chosen, dora, adaptive)
    model.freeze()
    placed: list[tuple[str, Adapter]] = []
    for site in chosen:
        if pooled is not None:
            check_pooled(site.path, site.module)
            adapter = PooledLoRALinear(site.module, rank, scale, dropout, pooled)
            adapter.train(model.training)
            placed.append((site.path, adapter))
            continue
        kind: type[LoRALinear] | type[LoRAEmbedding] | type[LoRASwitchLinear]
        if isinstance(site.module, EMBEDDING_TYPES):
            kind = LoRAEmbedding
        elif is_experts(site.module):
            kind = LoRASwitchLinear
        else:
            kind = AdaLoRALinear if adaptive else DoRALinear if dora else LoRALinear
        adapter = kind(site.module, rank, scale, dropout)
        adapter.train(model.training)
        placed.append((site.path, adapter))
    model.update_modules(tree_unflatten(placed))
    return placed


def summary(
    model: nn.Module, placed: list[tuple[str, Adapter]], scale: float, alpha: float
) -> Injected:
    """Return what is trained of ``model``: the adapters, and the modules beside them."""
    parameters = sum(adapter[name].size for _, adapter in placed for name in adapter.trainable)
    parameters += sum(value.size for value in saved_tensors(model).values())
    saved = list(saved_modules(model))
    return Injected([path for path, _ in placed], scale, alpha, parameters, saved)


def remove_adapters(model: nn.Module) -> None:
    """Give ``model`` its base layers back, as they were."""
    bases = [(path, adapter.base) for path, adapter in adapters_of(model)]
    model.update_modules(tree_unflatten(bases))  # pyright: ignore[reportArgumentType]
    give_back(model)


@contextlib.contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """Give ``model`` its base layers back for a while."""
    trained = [*adapters_of(model), *saved_modules(model).items()]
    remove_adapters(model)
    try:
        yield
    finally:
        model.update_modules(tree_unflatten(trained))  # pyright: ignore[reportArgumentType]


def inject(
    model: nn.Module,
    config: AdapterConfig,
    *,
    dora: bool,
    below: Mapping[str, tuple[mx.array, mx.array]] | None = None,
    stored: mx.Dtype | None = None,
    keep: bool = False,
) -> Injected:
    """Freeze ``model`` and put trainable adapters on the layers that ``config`` selects.

    Args:
        model: Any mlx-lm model, dense or quantized; changed in place.
        config: Rank, scale, targets, layers, start.
        dora: DoRA instead of LoRA.
        below: path -> (A, B) of frozen adapters that stay under the new ones (``stack.combined``).
        stored: Dtype of the base's biases on disk, for adapters that fold into them.
        keep: Whether ``without_adapters`` shall find the base's modules in place of those that
            ``modules_to_save`` trains in full; they stay in memory then.

    Raises:
        SlimError: A name that matches nothing, a block out of range, a rank above a layer's size,
            experts or an embedding with DoRA, a model that has adapters already.
    """
    scale = config.resolved_scale
    chosen = choose(model, config)
    adaptive = config.adaptive is not None
    _check_kinds(chosen, dora, adaptive, config.init == "pissa")
    _check_rank(chosen, config.rank)
    saved = choose_saved(model, config.modules_to_save, [site.path for site in chosen])
    below = below or {}
    chosen_paths = {site.path for site in chosen}
    carrying = [site for site in sites(model) if site.path in chosen_paths or site.path in below]
    placed = place(
        model,
        carrying,
        config.rank,
        scale,
        config.dropout,
        dora=dora,
        adaptive=adaptive,
        pooled=stored if config.pooled else None,
    )
    for path, adapter in placed:
        if path in below:
            adapter.stack_on(*below[path])
        if path not in chosen_paths:
            adapter.freeze()
    placed = [(path, adapter) for path, adapter in placed if path in chosen_paths]
    if config.init == "pissa":
        for _, adapter in tracked(placed, "decomposing weights for PiSSA", "layers"):
            start_pissa(adapter)
    train_in_full(model, saved, keep=keep)
    return summary(model, placed, scale, config.resolved_alpha)
