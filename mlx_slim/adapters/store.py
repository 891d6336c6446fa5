"""Adapter folders: ``adapters.safetensors`` and ``adapter_config.json`` in mlx-lm's format.

Invariant: stock mlx-lm (``mlx_lm.generate --adapter-path``) loads what is written here and gives
the same logits; what is loaded here matches its config tensor by tensor: missing, extra and wrongly
shaped tensors, and a base that the adapter was not trained on, are errors. PiSSA is written as a
plain adapter of twice the rank on the unmodified base, AdaLoRA as one of its largest rank. Two
exceptions, which stock mlx-lm refuses: its DoRA counts the inputs of 3, 5 and 6 bit layers wrong,
and it knows no modules trained in full (``saved.py``); such adapters load here only.

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
    place,
    sites,
    summary,
)
from mlx_slim.adapters.lora import dimensions, factor_shapes, rank_axes
from mlx_slim.adapters.pooled import PooledLoRALinear, grouped, takes_pooled
from mlx_slim.adapters.saved import (
    base_sample,
    candidates,
    saved_shapes,
    saved_tensors,
    train_in_full,
)
from mlx_slim.adapters.stock import selected, stock_selection
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
from mlx_slim.reading import JsonObject, field, read_object, short, shown
from mlx_slim.runtime import DTYPES, dtype_name

WEIGHTS = "adapters.safetensors"
CONFIG = "adapter_config.json"
POOLED = "biases_rounded_to"
SAVED = "modules_to_save"
PEFT_WEIGHTS = "adapter_model.safetensors"
_MOST = 1 << 20  # of a rank or a number of layers


def _same_base(ours: list[float], theirs: list[float]) -> bool:
    a, b = np.array(ours), np.array(theirs)
    if a.shape != b.shape:
        return False
    lengths = np.linalg.norm(a) * np.linalg.norm(b)
    return bool(lengths == 0 or a @ b / lengths > 0.8)


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
    tensors |= saved_tensors(model)
    num_layers, keys = stock_selection(model, injected.paths)
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
        **({SAVED: injected.saved} if injected.saved else {}),
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
        saved: Modules that were trained in full.
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
    saved: list[str]


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
        saved=field(config, where, SAVED, list, [], of=str),
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
        saved: Modules that ``tensors`` hold whole, under the names of their parameters.
    """

    chosen: list[Site]
    tensors: dict[str, mx.array]
    rank: int
    scale: float
    dropout: float
    dora: bool
    pooled: mx.Dtype | None = None
    saved: tuple[str, ...] = ()


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
    train_in_full(model, stored.saved, keep=True)
    tensors = dict(stored.tensors)
    for name, value in saved_tensors(model).items():
        tensors[name] = tensors[name].astype(value.dtype)
    for path, adapter in placed:
        if isinstance(adapter, PooledLoRALinear):
            tensors[f"{path}.lora_a"] = tensors[f"{path}.lora_a"][:: adapter.group_size]
    model.load_weights(list(tensors.items()), strict=False)
    factors = [value for _, one in placed for value in one.values() if isinstance(value, mx.array)]
    mx.eval(factors, saved_tensors(model))  # the base may be unread, and stays so
    return summary(model, placed, stored.scale, stored.scale * stored.rank)


def read_adapter(model: nn.Module, folder: Path) -> StoredAdapter:
    """Return the adapter of ``folder``, checked against ``model``, which stays as it is.

    Raises:
        SlimError: As ``load_adapter``.
    """
    config, tensors = _read(folder)
    settings = _settings(config, folder)
    base_note = f"the adapter was made for {settings.model}" if settings.model else ""
    paths = selected(model, settings.num_layers, settings.keys)
    chosen = [site for site in sites(model) if site.path in paths]
    saved = [path for path in settings.saved if path in candidates(model)]
    problems = [f"no module {path}" for path in settings.saved if path not in saved]
    whole = saved_shapes(model, saved)
    problems += _differences(chosen, whole, tensors, settings.rank, settings.dora)
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
        chosen,
        tensors,
        settings.rank,
        settings.scale,
        settings.dropout,
        settings.dora,
        pooled,
        tuple(saved),
    )


def _folds(site: Site, tensors: dict[str, mx.array]) -> bool:
    """Return whether the adapter of ``site`` is constant inside the groups of its base."""
    return takes_pooled(site.module) and (
        grouped(tensors[f"{site.path}.lora_a"], format_of(site.module).group_size) is not None
    )


def _differences(
    chosen: list[Site],
    whole: dict[str, tuple[int, ...]],
    tensors: dict[str, mx.array],
    rank: int,
    dora: bool,
) -> list[str]:
    """Return what the file lacks, has too much, or has in another shape."""
    expected = dict(whole)
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
