"""Several adapters on one model: their weighted sum, in one layer each.

Invariant: a sum of LoRAs is a LoRA, exactly: Σ wᵢ sᵢ AᵢBᵢ is the product of the factors laid side
by side, [A₁ A₂ …] and [w₁s₁B₁; w₂s₂B₂; …], whatever their ranks, scales and layers are. So weights
1 and 0 are the first adapter alone, and the order does not matter but for rounding. A DoRA scales
the whole weight and is no sum: it cannot be combined, and its weight is 1. Try it:
``mlx-slim generate MODEL --adapter runs/a/adapters=0.7 --adapter runs/b/adapters=0.3 --prompt Hi``.

Shapes: I inputs, O outputs, R the sum of all ranks; of experts see ``experts``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

from mlx_slim.adapters.inject import Injected, place, sites, summary
from mlx_slim.adapters.lora import factor_shapes, rank_axes
from mlx_slim.adapters.store import CONFIG, load_adapter, read_adapter
from mlx_slim.errors import SlimError

# One adapter or several, each DIR or DIR=WEIGHT.
Adapters = str | Path | Sequence[str | Path]
Factors = dict[str, tuple[mx.array, mx.array]]


@dataclass(frozen=True)
class Weighted:
    """An adapter folder and how much of it is used."""

    folder: Path
    weight: float = 1.0

    def __str__(self) -> str:
        """Return it as on the command line: ``DIR`` or ``DIR=WEIGHT``."""
        return str(self.folder) if self.weight == 1 else f"{self.folder}={self.weight:g}"


def parse_adapters(adapters: Adapters | None) -> list[Weighted]:
    """Return adapter folders with their weights; a run folder means the adapters in it.

    Raises:
        SlimError: If a weight is no finite number.
    """
    if adapters is None:
        return []
    return [
        _parse(str(one)) for one in ([adapters] if isinstance(adapters, (str, Path)) else adapters)
    ]


def _parse(text: str) -> Weighted:
    name, equals, number = text.rpartition("=")
    if not equals or not name or Path(text).exists():
        return Weighted(adapter_folder(Path(text)))
    try:
        weight = float(number)
    except ValueError:
        weight = math.nan
    if not math.isfinite(weight):
        raise SlimError(
            f"--adapter {text}: the weight {number!r} is not a number", "write DIR or DIR=0.7"
        )
    return Weighted(adapter_folder(Path(name)), weight)


def adapter_folder(folder: Path) -> Path:
    """Return ``folder``, or the adapters in it if it is a run."""
    run = folder / "adapters"
    return run if not (folder / CONFIG).is_file() and (run / CONFIG).is_file() else folder


def used_folders(stack: Sequence[Weighted]) -> list[Path]:
    """Return the adapter folders that have a weight other than 0."""
    return [one.folder for one in stack if one.weight != 0]


def load_adapters(model: nn.Module, stack: Sequence[Weighted]) -> Injected:
    """Put the weighted sum of ``stack`` on ``model``, strictly, as ``load_adapter`` does with one.

    Args:
        model: The base, without adapters; changed in place, frozen but for the adapters.
        stack: At least one.

    Raises:
        SlimError: As ``load_adapter``; a DoRA that is not alone with weight 1; no weight but 0.
            ``model`` is unchanged then.
    """
    used = [one for one in stack if one.weight != 0]
    if not used:
        raise SlimError("no adapter has a weight other than 0", "leave --adapter out for the base")
    if len(used) == 1 and used[0].weight == 1:
        return load_adapter(model, used[0].folder)
    factors = combined(model, used)
    chosen = [site for site in sites(model) if site.path in factors]
    placed = place(model, chosen, 1, 1.0, 0.0, dora=False)
    for path, adapter in placed:
        adapter.lora_a, adapter.lora_b = factors[path]
        adapter.rank = adapter.stored_rank
    return summary(model, placed, 1.0, float(max(adapter.rank for _, adapter in placed)))


def combined(model: nn.Module, stack: Sequence[Weighted]) -> Factors:
    """Return path -> (A (I, R), B (R, O)), float32, with Δᵀ = A B the weighted sum of ``stack``.

    All layers have the R of the whole stack, zeros where an adapter leaves one alone.

    Raises:
        SlimError: As ``load_adapters``.
    """
    read = [(one, read_adapter(model, one.folder)) for one in stack]
    if doras := [str(one.folder) for one, stored in read if stored.dora]:
        raise SlimError(
            f"{', '.join(doras)}: a DoRA scales the whole weight, so it cannot be added to others "
            "or weighted",
            "use it alone, or fuse it into the base: mlx-slim fuse MODEL --adapter DIR -o OUT",
        )
    if whole := [str(one.folder) for one, stored in read if stored.saved]:
        raise SlimError(
            f"{', '.join(whole)}: it holds modules that were trained in full (modules_to_save), so "
            "it cannot be added to others or weighted",
            "use it alone, or fuse it into the base: mlx-slim fuse MODEL --adapter DIR -o OUT",
        )
    modules = {site.path: site.module for _, stored in read for site in stored.chosen}
    factors: Factors = {}
    for path, module in modules.items():
        a_factors, b_factors = [], []
        for one, stored in read:
            a_IR, b_RO = (mx.zeros(shape) for shape in factor_shapes(module, stored.rank))
            if f"{path}.lora_a" in stored.tensors:
                a_IR, b_RO = (stored.tensors[f"{path}.lora_{x}"].astype(mx.float32) for x in "ab")
            a_factors.append(a_IR)
            b_factors.append(one.weight * stored.scale * b_RO)
        axis_a, axis_b = rank_axes(module)
        factors[path] = mx.concatenate(a_factors, axis_a), mx.concatenate(b_factors, axis_b)
    mx.eval(factors)
    return factors
