"""What a sharded run saves: the folders that one rank would, from the slices of all.

Invariant: every rank takes part, rank 0 writes; at no time does it hold more than its slices, one
whole tensor, the embedding and the trained adapters. What was written is read back against the
checksums of what was in memory: the saved model is loaded whole on no rank. Try it:
``mlx.launch -n 2 -- mlx-slim train smollm2-lora train.shard=full -o runs/two``.
"""

from __future__ import annotations

import shutil
from contextlib import ExitStack, nullcontext
from functools import partial
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_slim.adapters.inject import without_adapters
from mlx_slim.adapters.store import WEIGHTS, save_adapter
from mlx_slim.artifacts import load_tensors
from mlx_slim.config.schema import Recipe
from mlx_slim.errors import SlimError
from mlx_slim.finetuning.build import Tuned
from mlx_slim.models.lineage import carry
from mlx_slim.models.save import new_folder
from mlx_slim.models.verified_save import differing_tensors
from mlx_slim.quantization.base import as_record
from mlx_slim.sharding.files import place_of
from mlx_slim.sharding.model import ShardedModel
from mlx_slim.training.optim import trainable

BASE = "base"


def base_folder(target: Path) -> Path:
    """Return where a run keeps the quantized base of the adapters in ``target``."""
    return target.with_name(BASE if target.name == "adapters" else f"{target.name}-{BASE}")


def save_sharded(recipe: Recipe, tuned: Tuned, target: Path) -> None:
    """Write the adapters, or the whole model, to the folder ``target``; all ranks call it.

    A base that was quantized here is saved beside adapters, as where one rank has it all.

    Raises:
        ResourceError: If the disk is full.
        SlimError: If what is read back differs.
    """
    sharded, model = tuned.sharded, tuned.model
    assert sharded is not None
    first = sharded.collectives.rank == 0
    if tuned.injected is None:
        _save_model(target, tuned, sharded, adapted=False)
        return
    more = {}
    if tuned.base is not None:
        base = base_folder(target)
        _save_model(base, tuned, sharded, adapted=True)
        more = as_record(tuned.base, f"../{base.name}")
    with sharded.whole(trainable(model)):
        if not first:
            return
        save_adapter(
            target,
            model,
            recipe.adapter,
            tuned.injected,
            dora=False,
            base=recipe.model,
            more=more,
        )
        stored, trained = load_tensors(target / WEIGHTS), trainable(model)
        same = stored.keys() == trained.keys()
        if not (same and all(mx.array_equal(stored[path], trained[path]) for path in stored)):
            raise SlimError(
                f"{target}: the adapters read back otherwise",
                "the disk may be failing; else please report it",
            )


def _save_model(folder: Path, tuned: Tuned, sharded: ShardedModel, *, adapted: bool) -> None:
    """Write the model, a tensor at a time, and read it back; without its adapters if ``adapted``.

    Raises:
        SlimError: If what is read back differs.
    """
    model: nn.Module = tuned.model
    base = partial(without_adapters if adapted else nullcontext, model)
    with base():
        slices: dict[str, mx.array] = dict(tree_flatten(model.parameters()))  # pyright: ignore
    places = {name: place_of(name, value, sharded) for name, value in slices.items()}
    first = sharded.collectives.rank == 0
    with ExitStack() as stack:
        shards = None
        if first:
            shutil.rmtree(folder, ignore_errors=True)
            for context in (sharded.shapes_only(), base()):
                stack.enter_context(context)
            files = new_folder(folder, model, tuned.loaded.tokenizer, tuned.config)
            shards = stack.enter_context(files)
        for name, place in places.items():
            whole = slices[name] if place is None else sharded.gather(place, slices[name])
            if shards is not None:
                shards.write(name, whole)
            del whole
    if shards is None:
        return
    carry(folder, [tuned.loaded.path])
    if differing := sorted(differing_tensors(folder, shards.hashes)):
        raise SlimError(
            f"{folder}: {len(differing)} tensors read back otherwise {differing[:3]}",
            "the disk may be failing; else please report it",
        )
