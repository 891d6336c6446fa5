"""Modules that are trained in full beside an adapter: PEFT's ``modules_to_save``.

Invariant: a module that is trained in full is a dense layer of the model itself, under the path of
the layer that it replaces; its tensors are stored beside the factors under their own names. Stock
mlx-lm has no such adapters and refuses the file by name: fuse it for mlx-lm. Where the head is the
embedding there is one matrix, trained in both places. What a module replaced is kept where it is
needed again (``give_back``). Try it:
``mlx-slim train smollm2-lora "adapter.modules_to_save=[embed_tokens,norm]" -o runs/try``.
"""

from __future__ import annotations

import copy
from collections.abc import Collection
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_unflatten

from mlx_slim.adapters.lora import dimensions, is_experts
from mlx_slim.errors import SlimError, did_you_mean
from mlx_slim.models.quantized import dense_layer, dequantize_weight, layer_dtype
from mlx_slim.models.structure import EMBEDDINGS, HEAD_NAMES

_SAMPLES = 64
EMBEDDING_TYPES = (nn.Embedding, nn.QuantizedEmbedding)


@dataclass(frozen=True)
class Replaced:
    """What a module that is trained in full was before; no part of its parameters.

    Attributes:
        former: The module; None where nobody needs it again.
        sample: ``base_sample`` of the model that it was in.
    """

    former: nn.Module | None
    sample: list[float]


def in_order(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return (path, module) with the leaves in the order of their definition.

    mlx lists modules from a stack, the last one first.
    """
    return list(reversed(model.named_modules()))


def base_sample(model: nn.Module) -> list[float]:
    """Return 64 numbers of the input embedding at fixed places: which base is this?

    They survive a cast and (within a few percent) quantization, so the same model in another format
    is recognised. Empty for a model without an embedding. Of one that is trained in full: of its
    start.
    """
    for _, module in in_order(model):
        if isinstance(module, EMBEDDING_TYPES):
            if (replaced := getattr(module, "replaced", None)) is not None:
                return replaced.sample
            rows = mx.arange(_SAMPLES) * 7 % module.weight.shape[0]
            some_RD = module(rows).astype(mx.float32)
            columns = mx.arange(_SAMPLES) * 37 % some_RD.shape[1]
            return np.array(some_RD[mx.arange(_SAMPLES), columns]).tolist()
    return []


def _parameters(module: nn.Module) -> dict[str, mx.array]:
    """Return the parameters of a module that are not those of a module in it."""
    return {
        name: value
        for name, value in module.items()
        if isinstance(value, mx.array) and not name.startswith("_")
    }


def candidates(model: nn.Module) -> dict[str, nn.Module]:
    """Return path -> module of all modules that hold parameters themselves."""
    return {path: module for path, module in in_order(model) if path and _parameters(module)}


def choose_saved(model: nn.Module, names: Collection[str], adapted: Collection[str]) -> list[str]:
    """Return the paths of the modules that ``names`` select, in the model's order.

    Args:
        model: The base, without adapters.
        names: Last names of paths (``embed_tokens``, ``norm``), or whole paths.
        adapted: Paths that carry an adapter.

    Raises:
        SlimError: If a name matches nothing, or a module has an adapter.
    """
    if not names:
        return []
    everything = candidates(model)
    chosen: set[str] = set()
    for name in names:
        matched = {path for path in everything if path == name or path.endswith(f".{name}")}
        if not matched:
            hint = did_you_mean(name, {path.rsplit(".", 1)[-1] for path in everything})
            if name in HEAD_NAMES:
                tied = next((e for e in EMBEDDINGS if any(p.endswith(e) for p in everything)), "")
                hint = f"its head is the embedding: name {tied}" if tied else hint
            raise SlimError(
                f"adapter.modules_to_save: {name!r} matches no module of this model", hint
            )
        chosen |= matched
    if both := sorted(chosen & set(adapted)):
        raise SlimError(
            f"adapter.modules_to_save and adapter.targets both name {both[0]}",
            "train it in full or with an adapter: drop it from one of them",
        )
    return [path for path in everything if path in chosen]


def saved_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return path -> module of the modules that are trained in full."""
    return {path: module for path, module in in_order(model) if hasattr(module, "replaced")}


def saved_table(paths: Collection[str]) -> str | None:
    """Return the path that is the tokens' embedding, None if it is not among ``paths``."""
    return next((path for path in paths if path.rsplit(".", 1)[-1] in EMBEDDINGS), None)


def saved_tensors(model: nn.Module) -> dict[str, mx.array]:
    """Return their parameters, ``PATH.weight`` and the like."""
    return {
        f"{path}.{name}": value
        for path, module in saved_modules(model).items()
        for name, value in _parameters(module).items()
    }


def saved_shapes(model: nn.Module, paths: Collection[str]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the parameters of modules, as they are when they are trained in full."""
    shapes: dict[str, tuple[int, ...]] = {}
    everything = candidates(model)
    for path in paths:
        module = everything[path]
        tensors = {name: value.shape for name, value in _parameters(module).items()}
        if "scales" in module:
            tensors = {name: tensors[name] for name in tensors if name not in ("scales", "biases")}
            one, other = dimensions(module)
            embeds = isinstance(module, EMBEDDING_TYPES)
            rows = (one, other) if embeds else (other, one)
            experts = tensors["weight"][:1] if is_experts(module) else ()
            tensors["weight"] = (*experts, *rows)
        shapes |= {f"{path}.{name}": shape for name, shape in tensors.items()}
    return shapes


def train_in_full(model: nn.Module, paths: Collection[str], *, keep: bool) -> None:
    """Make modules dense where they are quantized, and trainable; in place.

    Args:
        model: The base.
        paths: Of ``choose_saved``.
        keep: Whether what they replace is needed again; it stays in memory then.
    """
    everything, sample = candidates(model), base_sample(model)
    for path in paths:
        former = everything[path]
        if "scales" in former:
            dense = dense_layer(former, dequantize_weight(former).astype(layer_dtype(former)))
            mx.eval(dense.parameters())
        else:
            dense = copy.copy(former)
        dense.replaced = Replaced(former if keep else None, sample)
        dense.unfreeze(recurse=False)
        dense.train(former.training)
        model.update_modules(tree_unflatten([(path, dense)]))


def former_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return path -> module of what modules trained in full replaced, where it was kept."""
    replaced = {path: getattr(one, "replaced", None) for path, one in saved_modules(model).items()}
    return {path: one.former for path, one in replaced.items() if one and one.former is not None}


def give_back(model: nn.Module) -> None:
    """Give ``model`` the modules back that others are trained in full in place of."""
    formers = [*former_modules(model).items()]
    model.update_modules(tree_unflatten(formers))  # pyright: ignore[reportArgumentType]
