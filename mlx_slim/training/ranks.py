"""What several ranks do as one: sums of what each computed, and that they are about the same run.

Invariant: every rank ends with the same bits. Gradients are summed in float32, many tensors at a
time; counts and losses in float64, in the order of the ranks. Try it:
``mlx.launch -n 2 --backend ring -- mlx-slim train smollm2-lora -o runs/two``.
"""

from __future__ import annotations

from typing import Literal

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_slim.adapters.lora import Adapter, LoRAEmbedding, is_experts
from mlx_slim.config.train import TrainConfig
from mlx_slim.models.structure import HEAD_NAMES
from mlx_slim.ranks.collectives import all_gather, all_sum
from mlx_slim.runtime import all_gather_bytes, world

RandomUnit = Literal["none", "row", "micro-batch"]

BUCKET = 32 << 20  # bytes of gradients that are summed at a time


def sum_numbers(*values: float) -> list[float]:
    """Return the sums over all ranks, float64, the same bits on all; all ranks must call it."""
    group = world()
    if group.size() == 1:
        return list(values)
    words = mx.array(np.array(values, dtype=np.float64).view(np.uint32))
    gathered = np.array(all_gather(words, group, "sums"))
    return gathered.view(np.float64).reshape(group.size(), -1).sum(axis=0).tolist()


def sum_gradients(gradients: dict[str, mx.array], bucket: int = BUCKET) -> dict[str, mx.array]:
    """Return path -> the sum over all ranks, float32; all ranks must call it with the same paths.

    Args:
        gradients: path -> float32 array; emptied, so that no gradient is in memory twice.
        bucket: Bytes that are summed at a time; a larger tensor is summed alone.
    """
    group = world()
    if group.size() == 1:
        return gradients
    sums: dict[str, mx.array] = {}
    waiting: list[tuple[str, mx.array]] = []

    def exchange() -> None:
        flat = mx.concatenate([value.reshape(-1) for _, value in waiting])
        total = all_sum(flat, group, "gradients")
        ends = np.cumsum([value.size for _, value in waiting])[:-1].tolist()
        pieces = mx.split(total, ends) if ends else [total]
        here = {
            path: piece.reshape(value.shape)
            for (path, value), piece in zip(waiting, pieces, strict=True)
        }
        mx.eval(here)
        sums.update(here)
        waiting.clear()

    for path in sorted(gradients):  # ranks must ask for the same sums in the same order
        waiting.append((path, gradients.pop(path)))
        if sum(value.nbytes for _, value in waiting) >= bucket:
            exchange()
    if waiting:
        exchange()
    return sums


def random_unit(model: nn.Module) -> RandomUnit:
    """Return what a model in training draws at random for: of each row, of whole micro-batches.

    Experts see rows in the order of their routing, and a head only those with a target.
    """
    unit: RandomUnit = "none"
    for path, module in model.named_modules():
        if isinstance(module, nn.Dropout) and module._p_1 < 1:
            return "micro-batch"
        if isinstance(module, Adapter) and module.dropout > 0:
            head = isinstance(module, LoRAEmbedding) or path.rsplit(".", 1)[-1] in HEAD_NAMES
            if head or is_experts(module.base):
                return "micro-batch"
            unit = "row"
    return unit


def number_of_ranks() -> int | None:
    """Return how many there are, for the record of a run; None for one."""
    return world().size() if world().size() > 1 else None


def fewest(value: int) -> int:
    """Return the least ``value`` of all ranks, on every one: they cut a batch alike."""
    return min(int(each) for each in all_gather_bytes(str(value).encode()))


def scaling_notice(config: TrainConfig) -> str:
    """Return what ``train.scale_with_ranks`` does on these ranks; empty where it does nothing."""
    ranks = world().size()
    if not config.scale_with_ranks or ranks == 1:
        return ""
    return (
        f"train.scale_with_ranks=true: a step has {ranks} × {config.accumulate:,} micro-batches, "
        "another run than on one rank; learning rate, warm-up and train.steps are not scaled"
    )
