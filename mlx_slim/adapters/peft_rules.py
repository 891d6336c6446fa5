"""Read an adapter folder of Hugging Face PEFT by PEFT's rules.

Invariant: PEFT's rules are here alone, and every tensor is returned as it is stored. What cannot
be expressed here is refused by name: settings that change the meaning of the tensors, and starts
(``init_lora_weights``) that changed the base in a way that cannot be computed again. So are tensors
of layers that PEFT would leave out (``peft_targets``). Rank and lora_alpha are those of the layer
(``rank_pattern``, ``alpha_pattern``), s = lora_alpha / r, or lora_alpha / √r with ``use_rslora``.
What the layers then compute is in ``peft_plain``. Try it: ``mlx-slim import peft -o adapters``.

Shapes: I inputs, O outputs, R rank.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_slim.adapters.inject import EMBEDDING_TYPES, sites
from mlx_slim.adapters.lora import dimensions, is_experts
from mlx_slim.adapters.peft_plain import PeftLayer, base_weight, taken_out
from mlx_slim.adapters.peft_saved import TIED_HEAD, saved_of
from mlx_slim.adapters.peft_targets import check_patterns, of_layer, target_settings, targeted
from mlx_slim.adapters.store import CONFIG
from mlx_slim.adapters.store import PEFT_WEIGHTS as WEIGHTS
from mlx_slim.artifacts import load_tensors
from mlx_slim.errors import SlimError
from mlx_slim.models.finite import check_finite
from mlx_slim.models.tensors import few
from mlx_slim.reading import JsonObject, field, read_object, short, shown
from mlx_slim.runtime import to_float

__all__ = ["CONFIG", "PREFIX", "TIED_HEAD", "WEIGHTS", "PeftFolder", "read_folder", "read_settings"]

PREFIX = "base_model.model."
_TAKE = "use the config that PEFT wrote"
_MERGE = "merge it with PEFT (merge_and_unload) and convert that"
_CONVERT = (
    "in PEFT make it an adapter of the original base: save_pretrained(..., "
    f"path_initial_model_for_weight_conversion=...); or {_MERGE}"
)
# Settings that change what the tensors mean, and the value that does not.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    "lora_bias": (False, None),
    "layer_replication": (None,),
    "use_qalora": (False, None),
    "use_bdlora": (False, None),
    "alora_invocation_tokens": (None,),
    "trainable_token_indices": (None,),
    "target_parameters": (None, []),
    "megatron_config": (None,),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "velora_config": (None,),
    "monteclora_config": (None,),
}
_KINDS = {
    "lora_A.weight": "a",
    "lora_B.weight": "b",
    "lora_embedding_A": "a",
    "lora_embedding_B": "b",
    "lora_magnitude_vector": "m",
    "lora_magnitude_vector.weight": "m",
}
# Starts (init_lora_weights) that leave the base as it is, and those that are taken out of it.
_BASE_UNCHANGED = (True, False, None, "gaussian", "eva", "mica", "orthogonal")
_BASE_COMPUTED = ("pissa", "olora")
_BASE_CHANGED = re.compile(r"pissa_niter_.*|corda.*|lora_ga|loftq")


@dataclass(frozen=True)
class PeftFolder:
    """An adapter folder of PEFT that fits a model.

    Attributes:
        layers: path -> what is stored of the layer, in the model's order.
        scale: s of the layers that no pattern names.
        rslora: Whether s = lora_alpha / √r.
        dropout: Of the adapters' inputs in training.
        dora: Whether it is DoRA.
        start: ``init_lora_weights``.
        saved: ``PATH.weight`` and the like of modules that were trained in full, as stored.
    """

    layers: dict[str, PeftLayer]
    scale: float
    rslora: bool
    dropout: float
    dora: bool
    start: bool | str | None
    saved: dict[str, mx.array]


def read_settings(folder: Path) -> JsonObject:
    """Return ``adapter_config.json`` of a PEFT folder whose every setting can be expressed here.

    Raises:
        SlimError: If it is no PEFT folder, asks for something else than LoRA or DoRA, or belongs to
            a base that PEFT changed in a way that cannot be computed again.
    """
    path = folder / CONFIG
    if not folder.is_dir() or not path.exists():
        raise SlimError(
            f"{folder} is not a PEFT folder: it has no {CONFIG}",
            "give the folder that PEFT's save_pretrained wrote",
        )
    settings = read_object(path)
    if "peft_type" not in settings:
        raise SlimError(
            f"{path} has no peft_type: it is not a PEFT adapter",
            "adapters of mlx-slim and mlx-lm need no import: give them with --adapter",
        )
    for key, plain in _PLAIN.items():
        if settings.get(key, plain[0]) not in plain:
            raise SlimError(
                f"{path}: {key} is {shown(settings[key])}, which cannot be imported",
                f"expected {plain[0]!r}; {_MERGE}",
            )
    where = short(path)
    for key, kind in (("r", int), ("lora_alpha", float)):
        _check_number(where, key, field(settings, where, key, kind))
    field(settings, where, "lora_dropout", float, 0.0, low=0, below=1)
    for key in ("use_rslora", "use_dora"):
        field(settings, where, key, bool, False)
    field(settings, where, "base_model_name_or_path", str, None)
    field(settings, where, "modules_to_save", list, None, of=str)
    field(settings, where, "ensure_weight_tying", bool, False)
    for key, kind in (("rank_pattern", int), ("alpha_pattern", float)):
        for name, value in field(settings, where, key, dict, {}, of=kind).items():
            _check_number(where, f"{key}[{shown(name)}]", value)
    check_patterns(settings, where)
    _check_start(path, settings)
    return settings


def _check_number(where: str, key: str, value: float) -> None:
    if not value > 0:
        raise SlimError(f"{where}: {key} is {value!r}, expected a number above 0")


def _start_of(settings: JsonObject) -> Any:
    """Return ``init_lora_weights``: how the factors began, in lower case."""
    start = settings.get("init_lora_weights", True)
    return start.lower() if isinstance(start, str) else start


def _check_start(path: Path, settings: JsonObject) -> None:
    """Refuse an adapter of a base that is not the one it names, unless that can be computed."""
    start = _start_of(settings)
    if isinstance(start, bool | str | None) and start in (*_BASE_UNCHANGED, *_BASE_COMPUTED):
        return
    setting = f"{path}: init_lora_weights is {shown(start)}"
    if not isinstance(start, str) or not _BASE_CHANGED.fullmatch(start):
        raise SlimError(
            f"{setting}, an unknown initialization that may have changed the base", _MERGE
        )
    raise SlimError(
        f"{setting}: PEFT changed the base before training, so this adapter gives wrong results "
        "on the original base",
        _MERGE if start == "loftq" else _CONVERT,
    )


def read_folder(folder: Path, model: nn.Module, *, tied: bool = False) -> PeftFolder:
    """Return the adapter of a PEFT folder, checked against ``model``.

    Args:
        folder: ``adapter_config.json`` and ``adapter_model.safetensors``.
        model: The base, without adapters; not changed.
        tied: Whether its head is the embedding.

    Raises:
        SlimError: As ``read_settings``; names and shapes that do not fit the model (all of them are
            listed); a start that the base does not determine, or a quantized base for one.
    """
    settings = read_settings(folder)
    stored, copies = _tensors(folder)
    places = {site.path: site for site in sites(model)}
    modules = {path: site.module for path, site in places.items()}
    problems = [f"not in the model: {path}" for path in stored if path not in modules]
    dora = bool(settings.get("use_dora"))
    for path in stored.keys() & modules.keys():
        problems += _misfits(path, stored[path], settings, modules[path], dora)
    if problems:
        name = settings.get("base_model_name_or_path")
        some = "; ".join(problems[:8]) + (f" and {len(problems) - 8} more" * (len(problems) > 8))
        raise SlimError(
            f"{folder} does not fit this model: {some[:2000]}",
            f"it was made for {name}" if name else "give the base that it was made for: --model",
        )
    if beyond := [p for p, site in places.items() if p in stored and not targeted(settings, site)]:
        raise SlimError(
            f"{folder} holds tensors for {few(beyond)}, which PEFT ignores: its {CONFIG} has "
            f"{target_settings(settings)}",
            "name these layers in target_modules if they belong to the adapter, else remove them",
        )
    embeddings = [path for path in modules if path in stored and stored[path].embedding]
    if embeddings and tied:
        raise SlimError(
            f"{folder} adapts {few(embeddings)}, which is tied to the output head: PEFT does not "
            "adapt the head with it, which is not supported here",
            _MERGE,
        )
    start = _start_of(settings)
    layers = {}
    for path in modules:
        if path not in stored:
            continue
        factors, scale = stored[path].factors, _rank_and_scale(settings, path)[1]
        embedding = stored[path].embedding
        layer = PeftLayer(factors["a"], factors["b"], factors.get("m"), scale, embedding)
        if start in _BASE_COMPUTED and not layer.embedding:  # PEFT starts embeddings as usual
            layer = replace(layer, start=_taken_out(folder, start, path, layer, modules[path]))
        layers[path] = layer
    saved, copies = saved_of(folder, copies, model, settings, tied=tied)
    _check_copies(folder, copies, modules, layers)
    common = {**settings, "rank_pattern": None, "alpha_pattern": None}
    return PeftFolder(
        layers,
        scale=_rank_and_scale(common, "")[1],
        rslora=bool(settings.get("use_rslora")),
        dropout=float(settings.get("lora_dropout") or 0.0),
        dora=dora,
        start=start,
        saved=saved,
    )


def _misfits(
    path: str, stored: _LayerTensors, settings: JsonObject, module: nn.Module, dora: bool
) -> list[str]:
    """Return what of a layer's tensors is missing, or has not the shape that PEFT gives it."""
    if is_experts(module):
        return [f"{path} holds the experts of a mixture, which PEFT keeps in another form"]
    inputs, outputs = dimensions(module)
    expected_kinds = {"a", "b", "m"} if dora and not stored.embedding else {"a", "b"}
    present = stored.factors.keys()
    if present != expected_kinds:
        return [f"{path} has {sorted(present)} of its factors, expected {sorted(expected_kinds)}"]
    if stored.embedding != isinstance(module, EMBEDDING_TYPES):
        return [f"{path} is {'no' if stored.embedding else 'an'} embedding of this model"]
    rank = _rank_and_scale(settings, path)[0]
    if _start_of(settings) in _BASE_COMPUTED and not stored.embedding:
        rank = min(rank, inputs, outputs)  # W has no more singular vectors
    expected = {"a": (rank, inputs), "b": (outputs, rank), "m": (outputs,)}
    return [
        f"{path}: {kind.upper()} is {stored.factors[kind].shape}, expected {expected[kind]}"
        for kind in sorted(present)
        if stored.factors[kind].shape != expected[kind]
    ]


def _rank_and_scale(settings: JsonObject, path: str) -> tuple[int, float]:
    rank = int(of_layer(settings.get("rank_pattern"), path, settings["r"]))
    alpha = float(of_layer(settings.get("alpha_pattern"), path, settings["lora_alpha"]))
    return rank, alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)


@dataclass(frozen=True)
class _LayerTensors:
    """What a PEFT file stores of one layer.

    Attributes:
        factors: ``a`` (R, I), ``b`` (O, R) and, of a DoRA, ``m`` (O,), float32; as far as stored.
        embedding: Whether they have the names of an embedding's.
    """

    factors: dict[str, mx.array]
    embedding: bool


def _tensors(folder: Path) -> tuple[dict[str, _LayerTensors], dict[str, mx.array]]:
    """Return path -> tensors of the adapted layers, and copies.

    The copies, name -> array, are of layers of the base: PEFT adds them to adapted embeddings, and
    those of modules that were trained in full.
    """
    file = folder / WEIGHTS
    if not file.exists() and (folder / "adapter_model.bin").exists():
        raise SlimError(
            f"{file} does not exist",
            "adapter_model.bin is a pickle, which can run code when read: save it as safetensors",
        )
    loaded = load_tensors(file)
    check_finite(loaded.items(), str(file))
    layers: dict[str, _LayerTensors] = {}
    copies: dict[str, mx.array] = {}
    unknown = []
    for name, value in loaded.items():
        match = re.fullmatch(
            rf"{re.escape(PREFIX)}(.+?)\.({'|'.join(map(re.escape, _KINDS))})", name
        )
        copied = re.fullmatch(rf"{re.escape(PREFIX)}(.+?)(\.base_layer)?(\.weight|\.bias)", name)
        if match is None and copied is not None and "lora_" not in name:
            copies[copied[1] + copied[3]] = value
            continue
        if match is None:
            unknown.append(f"{name} {tuple(value.shape)}")
            continue
        stored = layers.get(match[1], _LayerTensors({}, False))
        factors = {**stored.factors, _KINDS[match[2]]: value.astype(mx.float32)}
        embedding = stored.embedding or "embedding" in match[2]
        layers[match[1]] = _LayerTensors(factors, embedding)
    if unknown or not layers:
        raise SlimError(
            f"{file} holds tensors that do not belong to a LoRA or DoRA: {few(unknown)}"
            if unknown
            else f"{file} holds no tensors",
            _MERGE,
        )
    return layers, copies


def _check_copies(
    folder: Path,
    copies: dict[str, mx.array],
    modules: dict[str, nn.Module],
    layers: dict[str, PeftLayer],
) -> None:
    """Refuse copies of base layers that are not those under the adapter: trained, or grown."""
    for name, value in copies.items():
        path = name.removesuffix(".weight")
        here = base_weight(modules[path], layers.get(path)) if path in modules else None
        if here is not None and here.shape == value.shape:
            there = value.astype(mx.float32)
            rounding = 0.2 if "scales" in modules[path] else 0.005
            if to_float(mx.linalg.norm(here - there)) <= rounding * to_float(mx.linalg.norm(there)):
                continue
        raise SlimError(
            f"{folder} contains {path}, {value.shape}, which differs from the base's", _MERGE
        )


def _taken_out(
    folder: Path, start: str, path: str, layer: PeftLayer, module: Any
) -> tuple[mx.array, mx.array]:
    """Return (A₀, B₀) of the layer at ``path``: what its start took out of the base.

    Raises:
        SlimError: If the weight is quantized, or does not determine them.
    """
    setting = f"{folder}: init_lora_weights is {start!r}"
    if "scales" in module:
        raise SlimError(
            f"{setting}: PEFT subtracted a part of the base, which needs unquantized weights, "
            f"and {path} is quantized here",
            "give the unquantized base with --model; the imported adapter works on both",
        )
    factors = taken_out(start, module["weight"], layer.a_RI.shape[0], layer.scale)
    if factors is None:
        raise SlimError(
            f"{setting}: what PEFT subtracted from {path} cannot be computed again: the "
            + ("singular values" if start == "pissa" else "first columns")
            + f" around rank {layer.a_RI.shape[0]} are too close to each other",
            _CONVERT,
        )
    return factors
