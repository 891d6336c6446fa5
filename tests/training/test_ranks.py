"""What ranks compute of a step adds up to what one does; dropout and noise included."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_slim.adapters.inject import inject
from mlx_slim.config.adapter import AdapterConfig
from mlx_slim.data.batches import Batch, collate
from mlx_slim.data.collate import padded
from mlx_slim.data.shapes import Shape
from mlx_slim.models import structure
from mlx_slim.runtime import to_float
from mlx_slim.training.cross_entropy import CrossEntropy
from mlx_slim.training.grad_checkpoint import checkpointed
from mlx_slim.training.neftune import NoisyEmbeddings
from mlx_slim.training.objective import Objective
from mlx_slim.training.ranks import random_unit
from mlx_slim.training.step import Stepper
from tests.support.rows import MemoryRows
from tests.support.stock import stock_load
from tests.support.tiny import TinyModels

LENGTHS = [5, 9, 17, 3, 30, 12, 2, 25, 8, 31]
ROWS = MemoryRows(LENGTHS)


def _batches(count: int, *, packed: bool = False) -> list[Batch]:
    """Return ``count`` micro-batches of some rows each."""
    rows = [[row] for row in range(len(LENGTHS))] if not packed else [[0, 4], [1, 2, 3], [5, 6]]
    each = [part.tolist() for part in np.array_split(np.arange(len(rows)), count)]
    return [
        replace(
            collate(ROWS, [rows[i] for i in part], isolate=packed),
            entropy=(7, 3, index),
        )
        for index, part in enumerate(each)
    ]


def _stepper(
    tiny: TinyModels,
    architecture: str = "llama",
    *,
    noise: bool = False,
    targets: str | list[str] = "all-linear",
    **settings: Any,
) -> Stepper:
    model, _ = stock_load(str(tiny(architecture)))
    model.freeze()
    mx.random.seed(0)
    inject(model, AdapterConfig(rank=4, dropout=0.3, targets=targets), dora=False)
    for path, module in model.named_modules():
        if "lora_b" in module:
            module.lora_b = 0.1 * mx.random.normal(
                module.lora_b.shape, key=mx.random.key(len(path))
            )
    objective: Objective = CrossEntropy(model, chunk=16)
    if noise:
        objective = NoisyEmbeddings(objective, model, 5.0)
    model.train()
    return Stepper(model, objective, **settings)


def _gap(stepper: Stepper, batches: list[Batch], ranks: int) -> float:
    """Return the largest difference of loss or gradient as a multiple of what is allowed."""
    sums, gradients, _ = stepper.sums(batches)
    of_ranks = [stepper.sums(batches, rank, ranks) for rank in range(ranks)]
    total = sum(float(np.array(one).sum()) for one, _, _ in of_ranks)
    whole = float(np.array(sums).sum())
    gaps = [abs(total - whole) / (1e-5 * abs(whole))]
    for path, value in gradients.items():
        added = sum(one.get(path, mx.zeros_like(value)) for _, one, _ in of_ranks)
        difference = float(np.abs(np.array(added - value)).max())
        gaps.append(difference / (1e-4 * to_float(mx.abs(value).max()) + 1e-7))
    return max(gaps)


@pytest.mark.parametrize("ranks", [2, 3, 5])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"noise": True},
        {"num_threads": 2},
        {"num_threads": 2, "noise": True},
        {"compiled": True},
    ],
    ids=lambda settings: "-".join(settings) or "plain",
)
def test_ranks_add_up_to_one(tiny: TinyModels, settings: dict[str, Any], ranks: int) -> None:
    with contextlib.ExitStack() as stack:
        if settings.get("compiled"):
            patch = stack.enter_context(pytest.MonkeyPatch.context())
            patch.setattr(mx, "compile", lambda function, **_: function)
        stepper = _stepper(tiny, **settings)
        for count in (1, 3, 4):
            batches = _batches(count)
            if settings.get("compiled"):
                batches = [padded(one, Shape(11, 32, 96)) for one in batches]
            assert _gap(stepper, batches, ranks) <= 1


def test_packed_sequences_and_recomputed_blocks_too(tiny: TinyModels) -> None:
    stepper = _stepper(tiny)
    with checkpointed(structure.blocks(stepper.model)):
        assert _gap(stepper, _batches(1, packed=True), 2) <= 1


def test_without_work_a_rank_has_no_gradient(tiny: TinyModels) -> None:
    batch = replace(collate(ROWS, [[0]], isolate=False), entropy=(0, 0, 0))
    stepper = _stepper(tiny)
    assert stepper.sums([batch], 1, 2)[1:] == ({}, 0)
    assert _gap(stepper, [batch], 2) <= 1


@pytest.mark.parametrize(
    ("architecture", "targets"), [("mixtral", "all-linear"), ("llama", ["lm_head"])]
)
def test_what_is_not_drawn_row_by_row_is_computed_by_one_rank(
    tiny: TinyModels, architecture: str, targets: str | list[str]
) -> None:
    stepper = _stepper(tiny, architecture, targets=targets)
    assert random_unit(stepper.model) == "micro-batch"
    assert _gap(stepper, _batches(1), 2) <= 1
    assert stepper.sums(_batches(1), 1, 2)[2] == 0
