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
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from mlx_slim.adapters.inject import Injected, adapters_of, sites
from mlx_slim.adapters.lora import LoRAEmbedding, is_experts
from mlx_slim.adapters.peft_plain import PeftLayer, PlainLayer
from mlx_slim.adapters.peft_rules import CONFIG, PREFIX, TIED_HEAD, WEIGHTS, PeftFolder
from mlx_slim.adapters.saved import saved_table, saved_tensors, train_in_full
from mlx_slim.adapters.store import StoredAdapter, put
from mlx_slim.artifacts import save_tensors, write_json
from mlx_slim.config.schema import AdapterConfig
from mlx_slim.errors import SlimError
from mlx_slim.reading import library_errors
from mlx_slim.runtime import to_float


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
        name = PREFIX + path
        if is_experts(adapter.base):
            raise SlimError(
                f"{path} holds the experts of a mixture, which transformers keeps in one array "
                "that PEFT adapts otherwise: it has no place for this adapter",
                "fuse it (mlx-slim fuse) and export the model: --to hf, or use --to gguf-adapter",
            )
        a_IR, b_RO = adapter.factors()
        rank = a_IR.shape[1]
        if isinstance(adapter, LoRAEmbedding):
            if tied:
                raise SlimError(
                    f"{path} is adapted and tied to the output head, which PEFT does not support",
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
    whole = saved_tensors(model)
    table = saved_table(injected.saved) if tied else None
    if table is not None:  # PEFT has the matrix twice, and one weight for both where it is told to
        whole[f"{TIED_HEAD}.weight"] = whole[f"{table}.weight"]
    tensors |= {PREFIX + path: value for path, value in whole.items()}
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
            "modules_to_save": injected.saved or None,
            **({"ensure_weight_tying": True} if table is not None else {}),
            "target_modules": _target_modules(model, injected.paths),
        },
    )


def _target_modules(model: nn.Module, paths: list[str]) -> list[str]:
    """Return short names (``q_proj``) if they mean exactly ``paths``, else full paths."""
    names = list(dict.fromkeys(path.rsplit(".", 1)[-1] for path in paths))
    meant = {path for path, _ in model.named_modules() if path.rsplit(".", 1)[-1] in names}
    return names if meant == set(paths) else paths


@dataclass(frozen=True)
class ImportedAdapter:
    """A PEFT folder put on a model.

    Attributes:
        injected: The adapters in the model.
        config: The adapter section of the equivalent recipe.
        dora: Whether it is DoRA.
        notes: What was changed on the way.
    """

    injected: Injected
    config: AdapterConfig
    dora: bool
    notes: list[str]


def place_peft(model: nn.Module, folder: PeftFolder) -> ImportedAdapter:
    """Put the adapters of a PEFT folder on ``model`` as layers of ours.

    Args:
        model: The base that ``folder`` was read for, without adapters; changed in place.
        folder: What ``read_folder`` returned.
    """
    stored = as_stored(model, folder)
    rank = stored.rank
    notes = []
    if any(layer.start is not None for layer in folder.layers.values()):
        notes.append(
            f"what {folder.start} took out of the base is added back by additional factors: the "
            "adapter is for the original base and has twice the rank"
        )
    if any(_rank(layer) < rank for layer in folder.layers.values()):
        notes.append(f"layers of smaller rank padded with zeros to rank {rank}")
    if any(layer.scale != folder.scale for layer in folder.layers.values()):
        notes.append(f"layers of another scale brought to {folder.scale:g}: B takes the ratio")
    with library_errors(f"{CONFIG} cannot be imported", "use the config that PEFT wrote"):
        config = AdapterConfig(
            rank=rank,
            alpha=folder.scale * (math.sqrt(rank) if folder.rslora else rank),
            dropout=folder.dropout,
            scaling="rslora" if folder.rslora else "standard",
            targets=list(dict.fromkeys(site.inside for site in stored.chosen)),
            modules_to_save=list(stored.saved),
        )
    return ImportedAdapter(put(model, stored), config, folder.dora, notes)


def as_stored(model: nn.Module, folder: PeftFolder) -> StoredAdapter:
    """Return a PEFT folder as an adapter folder of ours would have it, for ``model``."""
    rank = max(_rank(layer) for layer in folder.layers.values())
    tensors: dict[str, mx.array] = {}
    for path, layer in folder.layers.items():
        a_IR, b_RO = _factors(layer, folder.scale)
        pad = rank - a_IR.shape[1]
        tensors[f"{path}.lora_a"] = mx.pad(a_IR, [(0, 0), (0, pad)])
        tensors[f"{path}.lora_b"] = mx.pad(b_RO, [(0, pad), (0, 0)])
        if layer.m_O is not None:
            tensors[f"{path}.m"] = layer.m_O
    chosen = [site for site in sites(model) if site.path in folder.layers]
    tensors |= folder.saved
    saved = tuple(dict.fromkeys(name.rpartition(".")[0] for name in folder.saved))
    return StoredAdapter(
        chosen, tensors, rank, folder.scale, folder.dropout, folder.dora, saved=saved
    )


def _rank(layer: PeftLayer) -> int:
    return layer.a_RI.shape[0] * (1 if layer.start is None else 2)


def _factors(layer: PeftLayer, scale: float) -> tuple[mx.array, mx.array]:
    """Return (A (I, R), B (R, O)) with scale · A B the layer's whole update of its base, Δᵀ."""
    ratio = layer.scale / scale
    a_IR, b_RO = layer.a_RI.T, layer.b_OR.T * ratio
    if layer.start is not None:
        start_a_RI, start_b_OR = layer.start
        a_IR = mx.concatenate([a_IR, start_a_RI.T], axis=1)
        b_RO = mx.concatenate([b_RO, -ratio * start_b_OR.T], axis=0)
    return a_IR, b_RO


def place_plain(model: nn.Module, folder: PeftFolder) -> None:
    """Put ``folder`` on ``model`` by PEFT's formula, written out; for comparison."""
    modules = {site.path: site.module for site in sites(model)}
    plain = [(path, PlainLayer(modules[path], layer)) for path, layer in folder.layers.items()]
    model.update_modules(tree_unflatten(plain))
    train_in_full(model, {name.rpartition(".")[0] for name in folder.saved}, keep=False)
    model.load_weights(list(folder.saved.items()), strict=False)


def differing(model: nn.Module, folder: PeftFolder) -> list[str]:
    """Return the layers whose weight with the adapters of ``model`` is not the one PEFT forms.

    One layer's weight is formed at a time. Allowed are 1e-3 of the change, which is what a GPU's
    float32 products round, and 1e-5 of the weight.
    """
    adapters = dict(adapters_of(model))
    whole = saved_tensors(model)
    wrong = sorted((adapters.keys() ^ folder.layers.keys()) | (whole.keys() ^ folder.saved.keys()))
    for name in whole.keys() & folder.saved.keys():
        if not mx.array_equal(whole[name], folder.saved[name].astype(whole[name].dtype)).item():
            wrong.append(name)
    for path in adapters.keys() & folder.layers.keys():
        plain = PlainLayer(adapters[path].base, folder.layers[path])
        weight, change = plain.weight(), plain.change()
        gap = to_float(mx.linalg.norm(adapters[path].merged_weight() - weight))
        allowed = 1e-3 * to_float(mx.linalg.norm(change)) + 1e-5 * to_float(mx.linalg.norm(weight))
        if not gap <= allowed:
            wrong.append(path)
    return wrong
