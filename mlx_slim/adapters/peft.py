"""Adapter folders of Hugging Face PEFT, written and read.

Invariant: the same base with the adapter computes the same logits there and here; what one side
cannot express is refused by name, never dropped. Factors are transposed on the way (PEFT stores
A (R, I) and B (O, R)); s = lora_alpha / r, or lora_alpha / √r with ``use_rslora``. Ranks and alphas
of single layers (``rank_pattern``, ``alpha_pattern``) become one rank and one s: factors are padded
with zeros and B takes the ratio, which is exact. Try it:
``mlx-slim export runs/mine/adapters --to peft -o peft`` and ``mlx-slim import peft -o adapters``.

Shapes: I inputs, O outputs, V vocabulary, D width, R rank.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_slim.adapters.inject import Injected, adapters_of, place, sites, summary
from mlx_slim.adapters.lora import LoRAEmbedding, dimensions
from mlx_slim.artifacts import read_json, save_tensors, write_json
from mlx_slim.config.schema import AdapterConfig
from mlx_slim.errors import SlimError
from mlx_slim.models.quantized import dequantize_weight
from mlx_slim.models.tensors import few
from mlx_slim.runtime import number

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
_PREFIX = "base_model.model."
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
    "modules_to_save": (None, []),
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


def write_peft(
    folder: Path,
    model: nn.Module,
    injected: Injected,
    *,
    base: str,
    dropout: float = 0.0,
    rslora: bool = False,
    tied: bool = False,
) -> None:
    """Write the adapters of ``model`` as a PEFT folder; not atomic by itself.

    Args:
        folder: An existing folder.
        model: With its adapters, as ``load_adapter`` leaves it.
        injected: What ``load_adapter`` returned.
        base: Name or path of the base, for ``base_model_name_or_path``.
        dropout: Of the adapters' inputs in training.
        rslora: Say s as lora_alpha / √r.
        tied: Whether the head is the embedding.

    Raises:
        SlimError: If an embedding is adapted that serves as the head too: PEFT leaves the head as
            it was.
    """
    tensors: dict[str, mx.array] = {}
    dora = False
    rank = 0
    for path, adapter in adapters_of(model):
        name = _PREFIX + path
        a_IR, b_RO = adapter.factors()
        rank = a_IR.shape[1]
        if isinstance(adapter, LoRAEmbedding):
            if tied:
                raise SlimError(
                    f"{path} is adapted and is the head of this model too, which PEFT cannot say",
                    "fuse the adapter (mlx-slim fuse) and export the model: --to hf",
                )
            tensors[f"{name}.lora_embedding_A"] = a_IR.T
            tensors[f"{name}.lora_embedding_B"] = b_RO.T
            continue
        tensors[f"{name}.lora_A.weight"] = a_IR.T
        tensors[f"{name}.lora_B.weight"] = b_RO.T
        if "m" in adapter:
            dora = True
            tensors[f"{name}.lora_magnitude_vector"] = adapter["m"]
    alpha = injected.scale * (math.sqrt(rank) if rslora else rank)
    save_tensors(folder / WEIGHTS, {name: mx.contiguous(value) for name, value in tensors.items()})
    write_json(
        folder / CONFIG,
        {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base,
            "inference_mode": True,
            "r": rank,
            "lora_alpha": round(alpha) if abs(alpha - round(alpha)) < 1e-9 else alpha,
            "lora_dropout": dropout,
            "use_rslora": rslora,
            "use_dora": dora,
            "bias": "none",
            "fan_in_fan_out": False,
            "init_lora_weights": True,
            "modules_to_save": None,
            "target_modules": _target_modules(model, injected.paths),
        },
    )


def _target_modules(model: nn.Module, paths: list[str]) -> list[str]:
    """Return short names (``q_proj``) if they mean exactly ``paths``, else full paths."""
    names = list(dict.fromkeys(path.rsplit(".", 1)[-1] for path in paths))
    meant = {path for path, _ in model.named_modules() if path.rsplit(".", 1)[-1] in names}
    return names if meant == set(paths) else paths


@dataclass(frozen=True)
class Imported:
    """A PEFT folder put on a model.

    Attributes:
        injected: What stands in the model now.
        config: The adapter section of a recipe that says the same.
        dora: Whether it is DoRA.
        notes: What was changed on the way.
    """

    injected: Injected
    config: AdapterConfig
    dora: bool
    notes: list[str]


def read_settings(folder: Path) -> dict[str, Any]:
    """Return ``adapter_config.json`` of a PEFT folder whose every setting can be expressed here.

    Raises:
        SlimError: If it is no PEFT folder, or asks for something else than LoRA or DoRA.
    """
    path = folder / CONFIG
    if not folder.is_dir() or not path.exists():
        raise SlimError(
            f"{folder} is no PEFT folder: it has no {CONFIG}", "give the adapter folder"
        )
    settings = read_json(path)
    if not isinstance(settings, dict) or "peft_type" not in settings:
        raise SlimError(
            f"{path} has no peft_type: it is no adapter of PEFT",
            "adapters of mlx-slim and mlx-lm need no import: give them with --adapter",
        )
    for key, plain in _PLAIN.items():
        if settings.get(key, plain[0]) not in plain:
            raise SlimError(
                f"{path}: {key} is {settings[key]!r}, which cannot be imported",
                f"expected {plain[0]!r}; merge it with PEFT (merge_and_unload) and convert that",
            )
    for key in ("r", "lora_alpha"):
        value = settings.get(key)
        if not isinstance(value, int | float) or not value > 0:
            raise SlimError(f"{path}: {key} is {value!r}, expected a number above 0")
    return settings


def read_peft(folder: Path, model: nn.Module, *, tied: bool = False) -> Imported:
    """Put the adapters of a PEFT folder on ``model``, strictly.

    Args:
        folder: ``adapter_config.json`` and ``adapter_model.safetensors``.
        model: The base, without adapters; changed in place.
        tied: Whether its head is the embedding.

    Raises:
        SlimError: If the folder is no LoRA or DoRA of PEFT, or names and shapes do not fit the
            model (all of them are listed); ``model`` is unchanged then.
    """
    settings = read_settings(folder)
    parts, copies = _tensors(folder)
    dora = bool(settings.get("use_dora"))
    by_path = {site.path: site for site in sites(model)}
    problems: list[str] = []
    for path, found in parts.items():
        if path not in by_path:
            problems.append(f"not in the model: {path}")
            continue
        inputs, outputs = dimensions(by_path[path].module)
        wanted = {"a", "b", "m"} if dora and found["embedding"] is None else {"a", "b"}
        given = {kind for kind in "abm" if kind in found}
        if given != wanted:
            problems.append(f"{path} has {sorted(given)} of its factors, expected {sorted(wanted)}")
            continue
        rank = found["a"].shape[0]
        expected = {"a": (rank, inputs), "b": (outputs, rank), "m": (outputs,)}
        problems += [
            f"{path}: {kind.upper()} is {found[kind].shape}, expected {expected[kind]}"
            for kind in sorted(given)
            if found[kind].shape != expected[kind]
        ]
    if problems:
        name = settings.get("base_model_name_or_path")
        shown = "; ".join(problems[:8]) + (f" and {len(problems) - 8} more" * (len(problems) > 8))
        raise SlimError(
            f"{folder} does not fit this model: {shown}",
            f"it was made for {name}" if name else "give the base that it was made for: --model",
        )
    _check_copies(folder, copies, {path: site.module for path, site in by_path.items()})
    embeddings = [path for path, found in parts.items() if found["embedding"] is not None]
    if embeddings and tied:
        raise SlimError(
            f"{folder} adapts {few(embeddings)}, which is the head of this model too: PEFT leaves "
            "the head as it was, which cannot be said here",
            "merge it with PEFT (merge_and_unload) and convert that",
        )
    return _placed(model, settings, parts, [by_path[p] for p in by_path if p in parts], dora)


def _tensors(folder: Path) -> tuple[dict[str, dict[str, Any]], dict[str, mx.array]]:
    """Return path -> {"a": (R, I), "b": (O, R), "m": (O,), "embedding": name or None}, and copies.

    The copies, path -> weight, are of layers of the base: PEFT adds them to adapted embeddings.
    """
    file = folder / WEIGHTS
    if not file.is_file():
        pickled = (folder / "adapter_model.bin").exists()
        raise SlimError(
            f"{file} does not exist",
            "adapter_model.bin is a pickle, which can run code when read: save it as safetensors"
            if pickled
            else "the adapter folder is not complete",
        )
    try:
        loaded = mx.load(str(file))
        assert isinstance(loaded, dict)
        mx.eval(loaded)
    except Exception as error:
        raise SlimError(
            f"{file} is no readable safetensors file: {' '.join(str(error).split())}",
            "copy or train it again",
        ) from error
    parts: dict[str, dict[str, Any]] = {}
    copies: dict[str, mx.array] = {}
    unknown = []
    for name, value in loaded.items():
        match = re.fullmatch(
            rf"{re.escape(_PREFIX)}(.+?)\.({'|'.join(map(re.escape, _KINDS))})", name
        )
        copied = re.fullmatch(rf"{re.escape(_PREFIX)}(.+?)(\.base_layer)?\.weight", name)
        if match is None and copied is not None and "lora_" not in name:
            copies[copied[1]] = value
            continue
        if match is None:
            unknown.append(f"{name} {tuple(value.shape)}")
            continue
        entry = parts.setdefault(match[1], {"embedding": None})
        entry[_KINDS[match[2]]] = value.astype(mx.float32)
        if "embedding" in match[2]:
            entry["embedding"] = name
    if unknown or not parts:
        raise SlimError(
            f"{file} holds tensors that are no part of a LoRA or DoRA: {few(unknown)}"
            if unknown
            else f"{file} holds no tensors",
            "merge it with PEFT (merge_and_unload) and convert that",
        )
    return parts, copies


def _check_copies(folder: Path, copies: dict[str, mx.array], modules: dict[str, Any]) -> None:
    """Refuse copies of base layers that are not the base's: they were trained or grown."""
    for path, value in copies.items():
        here = dequantize_weight(modules[path]) if path in modules else None
        if here is not None and here.shape == value.shape:
            there = value.astype(mx.float32)
            rounding = 0.2 if "scales" in modules[path] else 0.005
            if number(mx.linalg.norm(here - there)) <= rounding * number(mx.linalg.norm(there)):
                continue
        raise SlimError(
            f"{folder} brings a {path} of its own, {value.shape}, that is not the base's",
            "merge it with PEFT (merge_and_unload) and convert that",
        )


def _of(pattern: dict[str, Any], path: str, default: float) -> float:
    """Return the value that PEFT gives the layer at ``path``: keys are ends of paths, or regex."""
    for key, value in (pattern or {}).items():
        if re.match(rf"(.*\.)?({key})$", path):
            return value
    return default


def _placed(
    model: nn.Module,
    settings: dict[str, Any],
    parts: dict[str, dict[str, Any]],
    chosen: list[Any],
    dora: bool,
) -> Imported:
    root = bool(settings.get("use_rslora"))
    scales: dict[str, float] = {}
    for path, found in parts.items():
        rank = found["a"].shape[0]
        alpha = float(_of(settings.get("alpha_pattern") or {}, path, settings["lora_alpha"]))
        scales[path] = alpha / (math.sqrt(rank) if root else rank)
    rank = max(found["a"].shape[0] for found in parts.values())
    alpha = float(settings["lora_alpha"])
    scale = alpha / (math.sqrt(rank) if root else rank)
    notes = []
    if len({found["a"].shape[0] for found in parts.values()}) > 1:
        notes.append(f"layers of smaller rank padded with zeros to rank {rank}")
    if any(abs(own - scale) > 1e-9 * abs(scale) for own in scales.values()):
        notes.append(f"layers of another scale brought to {scale:g}: B takes the ratio")
    dropout = float(settings.get("lora_dropout") or 0.0)
    placed = place(model, chosen, rank, scale, dropout, dora=dora)
    for path, adapter in placed:
        found = parts[path]
        pad = rank - found["a"].shape[0]
        adapter.lora_a = mx.pad(found["a"].T, [(0, 0), (0, pad)])
        adapter.lora_b = mx.pad(found["b"].T * (scales[path] / scale), [(0, pad), (0, 0)])
        if dora:
            adapter["m"] = found["m"]
    mx.eval([adapter.parameters() for _, adapter in placed])
    config = AdapterConfig(
        rank=rank,
        alpha=alpha,
        dropout=dropout,
        scaling="rslora" if root else "standard",
        targets=list(dict.fromkeys(site.inside for site in chosen)),
    )
    return Imported(summary(placed, scale, scale * rank), config, dora, notes)
