"""Start a run from an adapter that is there already, ours, mlx-lm's or PEFT's.

Invariant: before its first step the model computes what the base with that adapter computes, and
the run trains these factors on; the recipe's rank, scale, layers and kind is what the
folder holds, or it is refused. Try it:
``mlx-slim train smollm2-lora adapter.init_from=runs/a data.path=more.jsonl -o runs/b``.
"""

from __future__ import annotations

import math
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

from mlx_slim.adapters.inject import Injected, adapters_of
from mlx_slim.adapters.peft import as_stored
from mlx_slim.adapters.peft_rules import read_folder
from mlx_slim.adapters.saved import saved_tensors
from mlx_slim.adapters.store import CONFIG, StoredAdapter, read_adapter
from mlx_slim.config.schema import AdapterConfig
from mlx_slim.errors import SlimError
from mlx_slim.models.tensors import few
from mlx_slim.reading import read_object


def read_start(model: nn.Module, folder: Path, *, tied: bool) -> StoredAdapter:
    """Return the adapter of ``folder``, checked against ``model``.

    Args:
        model: The base, without adapters; not changed.
        folder: An adapter folder of mlx-slim, mlx-lm or PEFT.
        tied: Whether the head of ``model`` is its embedding.

    Raises:
        SlimError: As ``read_adapter``, or as ``read_folder`` for one of PEFT.
    """
    if (folder / CONFIG).is_file() and "peft_type" in read_object(folder / CONFIG):
        return as_stored(model, read_folder(folder, model, tied=tied))
    return read_adapter(model, folder)


def start_from(
    model: nn.Module,
    stored: StoredAdapter,
    config: AdapterConfig,
    injected: Injected,
    *,
    dora: bool,
) -> None:
    """Begin the adapters that ``inject`` put on ``model`` at the factors of ``stored``.

    Raises:
        SlimError: If kind, rank, scale or layers are not those of ``config``; all of them.
    """
    problems = []
    if stored.dora != dora:
        kinds = {True: "a DoRA", False: "a LoRA"}
        problems.append(f"it is {kinds[stored.dora]}, not {kinds[dora]} (method)")
    if stored.rank != config.rank:
        problems.append(f"its rank is {stored.rank}, not {config.rank} (adapter.rank)")
    if not math.isclose(stored.scale, injected.scale, rel_tol=1e-6):
        per_alpha = math.sqrt(stored.rank) if config.scaling == "rslora" else stored.rank
        problems.append(
            f"its scale is {stored.scale:g}, not {injected.scale:g} "
            f"(adapter.alpha={stored.scale * per_alpha:g} gives it)"
        )
    theirs, ours = {site.path for site in stored.chosen}, set(injected.paths)
    if more := sorted(theirs - ours):
        problems.append(f"it adapts {few(more)} too (adapter.targets, adapter.layers)")
    if less := sorted(ours - theirs):
        problems.append(f"it does not adapt {few(less)} (adapter.targets, adapter.layers)")
    if set(stored.saved) != set(injected.saved):
        whole = few(sorted(stored.saved)) if stored.saved else "no module"
        problems.append(f"it holds {whole} trained in full (adapter.modules_to_save)")
    if problems:
        raise SlimError(
            f"adapter.init_from={config.init_from} does not match this recipe: "
            + "; ".join(problems),
            "set these keys to the values of that adapter, or train a new one on top: adapter.on",
        )
    for path, adapter in adapters_of(model):
        if path in ours:
            adapter.lora_a = stored.tensors[f"{path}.lora_a"].astype(mx.float32)
            b_RO = stored.tensors[f"{path}.lora_b"].astype(mx.float32)
            same = stored.scale == injected.scale  # but for rounding of alpha / r
            adapter.lora_b = b_RO if same else b_RO * (stored.scale / injected.scale)
            if dora:
                adapter["m"] = stored.tensors[f"{path}.m"].astype(mx.float32)
    whole = saved_tensors(model).items()
    model.load_weights([(n, stored.tensors[n].astype(v.dtype)) for n, v in whole], strict=False)
