"""Adapter folders: ``adapters.safetensors`` and ``adapter_config.json`` in mlx-lm's format.

Invariant: stock mlx-lm (``mlx_lm.generate --adapter-path``) loads what is written here and gives
the same logits; what is loaded here matches its config tensor by tensor: missing, extra and wrongly
shaped tensors, and a base that the adapter was not trained on, are errors. PiSSA is written as a
plain adapter of twice the rank on the unmodified base, AdaLoRA as one of its largest rank. One
exception, of mlx-lm's: its DoRA counts the inputs of 3, 5 and 6 bit layers wrong and refuses them;
such adapters load here only.

Try it: ``python -m pytest tests/adapters/test_store.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_slim.adapters.adalora import AdaLoRALinear
from mlx_slim.adapters.inject import (
    Injected,
    Site,
    adapters_of,
    in_order,
    place,
    sites,
    summary,
)
from mlx_slim.adapters.lora import dimensions, factor_shapes, rank_axes
from mlx_slim.adapters.pooled import PooledLoRALinear, grouped, takes_pooled
from mlx_slim.artifacts import (
    SCHEMA_VERSION,
    atomic_folder,
    hash_files,
    load_tensors,
    save_tensors,
    write_json,
)
from mlx_slim.config.schema import AdapterConfig
from mlx_slim.errors import SlimError, did_you_mean
from mlx_slim.models.finite import check_finite
from mlx_slim.models.quantized import format_of
from mlx_slim.models.structure import blocks
from mlx_slim.reading import JsonObject, field, read_object, short, shown
from mlx_slim.runtime import DTYPES, dtype_name

WEIGHTS = "adapters.safetensors"
CONFIG = "adapter_config.json"
POOLED = "biases_rounded_to"
PEFT_WEIGHTS = "adapter_model.safetensors"
_SAMPLES = 64
_MOST = 1 << 20  # of a rank or a number of layers


def base_sample(model: nn.Module) -> list[float]:
    """Return 64 numbers of the input embedding at fixed places: which base is this?

    They survive a cast and (within a few percent) quantization, so the same model in another format
    is recognised. Empty for a model without an embedding.
    """
    for _, module in in_order(model):
        if isinstance(module, (nn.Embedding, nn.QuantizedEmbedding)):
            rows = mx.arange(_SAMPLES) * 7 % module.weight.shape[0]
            some_RD = module(rows).astype(mx.float32)
            columns = mx.arange(_SAMPLES) * 37 % some_RD.shape[1]
            return np.array(some_RD[mx.arange(_SAMPLES), columns]).tolist()
    return []


def _same_base(ours: list[float], theirs: list[float]) -> bool:
    a, b = np.array(ours), np.array(theirs)
    if a.shape != b.shape:
        return False
    lengths = np.linalg.norm(a) * np.linalg.norm(b)
    return bool(lengths == 0 or a @ b / lengths > 0.8)


def _stock_selection(model: Any, paths: list[str]) -> tuple[int, list[str]]:
    """Return mlx-lm's (num_layers, keys) that select exactly ``paths``.

    mlx-lm wraps a key in the last ``num_layers`` blocks when it is a path inside the block, and
    anywhere when it is a full path. The last N blocks with the same layers in each take the short
    form; any other choice is spelled out in full paths.
    """
    by_path = {site.path: site for site in sites(model)}
    chosen = [by_path[path] for path in paths]
    tuned = sorted({site.block for site in chosen if site.block is not None})
    inside = {block: {s.inside for s in chosen if s.block == block} for block in tuned}
    count = len(blocks(model))
    uniform = len({frozenset(names) for names in inside.values()}) == 1
    if tuned and uniform and tuned == list(range(count - len(tuned), count)):
        keys = [s.inside for s in chosen if s.block in (None, tuned[-1])]
        if _selected(model, len(tuned), keys) == set(paths):
            return len(tuned), keys
    return 1, list(paths)


def _selected(model: Any, num_layers: int, keys: list[str] | None) -> set[str]:
    """Return the full paths that mlx-lm wraps for this (num_layers, keys)."""
    everything = sites(model)
    if keys is None:
        keys = sorted({site.inside for site in everything if site.block is not None})
    first = len(blocks(model)) - num_layers if num_layers > 0 else 0
    paths = set(keys)
    return {
        s.path
        for s in everything
        if s.path in paths or (s.block is not None and s.block >= first and s.inside in paths)
    }


def save_adapter(
    folder: Path,
    model: nn.Module,
    config: AdapterConfig,
    injected: Injected,
    *,
    dora: bool,
    base: str,
    more: Mapping[str, Any] | None = None,
) -> None:
    """Write the adapters of ``model`` to ``folder``, whole or not at all; replaces a former one.

    Args:
        folder: The adapter folder.
        model: A model that ``inject`` or ``load_adapter`` prepared; not changed.
        config: The recipe's adapter section.
        injected: What ``inject`` returned.
        dora: Whether the adapters are DoRA.
        base: Name or path of the base, for people and for error messages.
        more: Further entries of the config.

    Raises:
        ResourceError: If the disk is full.
        SlimError: If the folder cannot be written.
    """
    tensors: dict[str, mx.array] = {}
    rank = config.rank
    rounded: mx.Dtype | None = None
    adapters = [(p, each) for p, each in adapters_of(model) if p in set(injected.paths)]
    ranks = {path: each.active for path, each in adapters if isinstance(each, AdaLoRALinear)}
    for path, adapter in adapters:
        if isinstance(adapter, AdaLoRALinear):  # one rank for all, as mlx-lm has it
            a_IR, b_RO = adapter.plain_factors(max(1, *ranks.values()))
        else:
            a_IR, b_RO = adapter.factors()
        if isinstance(adapter, PooledLoRALinear):
            rounded = adapter.stored
        rank = a_IR.shape[rank_axes(adapter.base)[0]]
        tensors |= {f"{path}.lora_a": a_IR, f"{path}.lora_b": b_RO}
        if dora:
            tensors[f"{path}.m"] = adapter["m"]
    num_layers, keys = _stock_selection(model, injected.paths)
    description = {
        "fine_tune_type": "dora" if dora else "lora",
        "num_layers": num_layers,
        "lora_parameters": {
            "rank": rank,
            "scale": injected.scale,
            "dropout": config.dropout,
            "keys": keys,
        },
        "model": base,
        "schema_version": SCHEMA_VERSION,
        "alpha": injected.scale * rank,
        "trained_with": config.model_dump(),
        "paths": injected.paths,
        "parameters": injected.parameters,
        "base_sample": base_sample(model),
        **({"ranks": ranks} if ranks else {}),
        **({POOLED: dtype_name(rounded)} if rounded else {}),
        **(more or {}),
    }
    with atomic_folder(folder, replace=True) as temporary:
        save_tensors(temporary / WEIGHTS, tensors)
        write_json(temporary / CONFIG, description)


def _read(folder: Path) -> tuple[JsonObject, dict[str, mx.array]]:
    if not folder.is_dir():
        raise SlimError(
            f"{folder} is not an adapter folder", f"it should hold {WEIGHTS} and {CONFIG}"
        )
    if not (folder / CONFIG).is_file():
        raise SlimError(
            f"{folder / CONFIG} does not exist",
            "give the adapters/ of a run, or a folder that mlx_lm.lora wrote",
        )
    config = read_object(folder / CONFIG)
    if "peft_type" in config:
        raise SlimError(
            f"{folder} is an adapter of PEFT", f"import it first: mlx-slim import {folder} -o DIR"
        )
    return config, load_tensors(folder / WEIGHTS)


@dataclass(frozen=True)
class _Settings:
    """What ``adapter_config.json`` says, ours or mlx-lm's.

    Attributes:
        dora: Whether it is a DoRA.
        rank: Of the update.
        scale: s in ΔWᵀ = s · A B.
        dropout: Of the adapter's inputs in training.
        num_layers: Last blocks that it adapts; -1 for all.
        keys: Layers of a block; None for mlx-lm's choice.
        model: The base, as it was given; None where it is not recorded.
        base_sample: Numbers that tell bases of one shape apart; None likewise.
        pooled: What its biases were rounded to in training, if it folds into them.
    """

    dora: bool
    rank: int
    scale: float
    dropout: float
    num_layers: int
    keys: list[str] | None
    model: str | None
    base_sample: list[float] | None
    pooled: mx.Dtype | None


def _settings(config: JsonObject, folder: Path) -> _Settings:
    where = short(folder / CONFIG)
    if not isinstance(config.get("lora_parameters"), dict):
        raise SlimError(
            f"{where} has no lora_parameters", "expected the adapter config of mlx-slim or mlx-lm"
        )
    kind = config.get("fine_tune_type", "lora")
    if kind not in ("lora", "dora"):
        raise SlimError(
            f"{where}: fine_tune_type is {kind!r}, expected lora or dora",
            "full fine-tunes are whole models: load the folder that holds the model",
        )
    lora = config["lora_parameters"]
    return _Settings(
        dora=kind == "dora",
        rank=field(lora, where, "rank", int, low=1, high=_MOST),
        scale=float(field(lora, where, "scale", float)),
        dropout=float(field(lora, where, "dropout", float, 0.0, low=0, below=1)),
        num_layers=field(config, where, "num_layers", int, low=-1, high=_MOST),
        keys=field(lora, where, "keys", list, None, of=str),
        model=field(config, where, "model", str, None),
        base_sample=field(config, where, "base_sample", list, None, of=float),
        pooled=_pooled(config, where),
    )


def _pooled(config: JsonObject, where: str) -> mx.Dtype | None:
    name = field(config, where, POOLED, str, None)
    if name is not None and name not in DTYPES:
        raise SlimError(f"{where}: {POOLED} is {shown(name)}", did_you_mean(name, DTYPES))
    return None if name is None else DTYPES[name]


def adapter_hash(folder: Path) -> str:
    """Return the SHA-256 of an adapter's weights and configuration, PEFT's too."""
    names = (WEIGHTS, PEFT_WEIGHTS, CONFIG)
    return hash_files({path for name in names if (path := folder / name).is_file()})


def check_adapter(folder: str | Path) -> None:
    """Refuse, without a model, a folder that ``load_adapter`` could not read.

    Raises:
        SlimError: Files absent or corrupt, or a full fine-tune.
    """
    folder = Path(folder)
    _settings(_read(folder)[0], folder)


def _listed(problems: list[str], limit: int = 12) -> str:
    more = len(problems) - limit
    return "; ".join(problems[:limit]) + (f"; and {more} more" if more > 0 else "")


def load_adapter(model: nn.Module, folder: str | Path) -> Injected:
    """Put the adapters of ``folder`` on ``model``, strictly; ours and mlx-lm's folders alike.

    Args:
        model: The base, without adapters; changed in place, frozen but for the adapters.
        folder: A folder that ``save_adapter`` or ``mlx_lm.lora`` wrote.

    Raises:
        SlimError: Files absent or corrupt, a full fine-tune, tensors that are missing, extra or
            wrongly shaped (all of them, with shapes), or another base. ``model`` is unchanged then.
    """
    return put(model, read_adapter(model, Path(folder)))


@dataclass(frozen=True)
class StoredAdapter:
    """An adapter folder that fits a model.

    Attributes:
        chosen: The model's layers that it adapts.
        tensors: ``PATH.lora_a`` (I, R), ``PATH.lora_b`` (R, O), of experts (E, R, I) and (E, O, R),
            and ``PATH.m`` of a DoRA.
        rank: R.
        scale: s in ΔWᵀ = s · A B.
        dropout: Of the adapter's inputs in training.
        dora: Whether it is a DoRA.
        pooled: What the biases of the base were rounded to in training, if it folds into them and
            the model has these; None computes as an ordinary LoRA.
    """

    chosen: list[Site]
    tensors: dict[str, mx.array]
    rank: int
    scale: float
    dropout: float
    dora: bool
    pooled: mx.Dtype | None = None


def put(model: nn.Module, stored: StoredAdapter) -> Injected:
    """Put ``stored`` on ``model``, which it was read for and which has no adapters yet."""
    placed = place(
        model,
        stored.chosen,
        stored.rank,
        stored.scale,
        stored.dropout,
        dora=stored.dora,
        pooled=stored.pooled,
    )
    tensors = dict(stored.tensors)
    for path, adapter in placed:
        if isinstance(adapter, PooledLoRALinear):
            tensors[f"{path}.lora_a"] = tensors[f"{path}.lora_a"][:: adapter.group_size]
    model.load_weights(list(tensors.items()), strict=False)
    mx.eval([adapter.parameters() for _, adapter in placed])
    return summary(placed, stored.scale, stored.scale * stored.rank)


def read_adapter(model: nn.Module, folder: Path) -> StoredAdapter:
    """Return the adapter of ``folder``, checked against ``model``, which stays as it is.

    Raises:
        SlimError: As ``load_adapter``.
    """
    config, tensors = _read(folder)
    settings = _settings(config, folder)
    base_note = f"the adapter was made for {settings.model}" if settings.model else ""
    selected = _selected(model, settings.num_layers, settings.keys)
    chosen = [site for site in sites(model) if site.path in selected]
    problems = _differences(chosen, tensors, settings.rank, settings.dora)
    if problems:
        raise SlimError(f"{folder} does not fit this model: {_listed(problems)}", base_note)
    check_finite(tensors.items(), str(folder))
    ours, theirs = base_sample(model), settings.base_sample
    if theirs and not _same_base(ours, theirs):
        raise SlimError(
            f"{folder} was trained on another base of the same shape",
            f"{base_note}: load that base" if base_note else "load the base it was trained on",
        )
    pooled = settings.pooled
    if pooled is not None and not all(_folds(site, tensors) for site in chosen):
        pooled = None  # over a base without such groups it is the ordinary adapter that is stored
    return StoredAdapter(
        chosen, tensors, settings.rank, settings.scale, settings.dropout, settings.dora, pooled
    )


def _folds(site: Site, tensors: dict[str, mx.array]) -> bool:
    """Return whether the adapter of ``site`` is constant inside the groups of its base."""
    return takes_pooled(site.module) and (
        grouped(tensors[f"{site.path}.lora_a"], format_of(site.module).group_size) is not None
    )


def _differences(
    chosen: list[Site], tensors: dict[str, mx.array], rank: int, dora: bool
) -> list[str]:
    """Return what the file lacks, has too much, or has in another shape."""
    expected: dict[str, tuple[int, ...]] = {}
    for site in chosen:
        shapes = zip(("lora_a", "lora_b"), factor_shapes(site.module, rank), strict=True)
        expected |= {f"{site.path}.{name}": shape for name, shape in shapes}
        if dora:
            expected[f"{site.path}.m"] = dimensions(site.module)[1:]
    missing = [f"missing {name} {shape}" for name, shape in expected.items() if name not in tensors]
    extra = [
        f"not in the model {name} {tensor.shape}"
        for name, tensor in tensors.items()
        if name not in expected
    ]
    wrong = [
        f"{name} is {tensors[name].shape}, expected {shape}"
        for name, shape in expected.items()
        if name in tensors and tensors[name].shape != shape
    ]
    return missing + extra + wrong
