"""However rows are batched, packed, accumulated, checkpointed or compiled: one gradient."""

from __future__ import annotations

import contextlib
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_slim.data.batches import Batcher, collate, first_targets
from mlx_slim.models import structure
from mlx_slim.runtime import to_float
from mlx_slim.training.cross_entropy import CrossEntropy
from mlx_slim.training.grad_checkpoint import checkpointed
from mlx_slim.training.optim import trainable
from mlx_slim.training.step import Stepper
from mlx_slim.training.step_result import StepResult
from tests.support.rows import MemoryRows
from tests.support.stock import stock_load
from tests.support.tiny import TinyModels

LENGTHS = [5, 9, 17, 3, 30, 12, 2, 25, 8, 31]
ROWS = MemoryRows(LENGTHS)
SEPARATE = [[[i]] for i in range(len(LENGTHS))]
PACKED = [[[0, 4], [1, 2, 3]], [[5, 6, 7], [8, 9]]]
GROUPED = [[[0], [1], [2]], [[3], [4], [5], [6]], [[7], [8], [9]]]


def _result(
    folder: Path,
    plan: list[list[list[int]]],
    *,
    isolate: bool = False,
    checkpoint: bool = False,
    compiled: bool = False,
    num_threads: int = 1,
) -> StepResult:
    model, _ = stock_load(str(folder))
    stepper = Stepper(
        model, CrossEntropy(model, chunk=16), compiled=compiled, num_threads=num_threads
    )
    with checkpointed(structure.blocks(model), checkpoint):
        return stepper.step(collate(ROWS, groups, isolate=isolate) for groups in plan)


def _differing(ours: StepResult, plain: StepResult) -> list[str]:
    """What differs between two steps: counts, loss (1e-5), gradients by path (1e-3)."""
    different = []
    if ours.supervised != plain.supervised:
        different.append("supervised tokens")
    if ours.loss != pytest.approx(plain.loss, rel=1e-5):
        different.append("loss")
    for path, value in plain.gradients.items():
        scale = to_float(mx.abs(value).max()) + 1e-6
        if not to_float(mx.abs(ours.gradients[path] - value).max()) < 1e-3 * scale:
            different.append(path)
    return different


@pytest.mark.parametrize("architecture", ["llama", "llama-tied", "mistral", "phi", "qwen2"])
@pytest.mark.parametrize(
    "way",
    [
        {"plan": GROUPED},
        {"plan": [[[i] for i in range(len(LENGTHS))]]},
        {"plan": PACKED, "isolate": True},
        {"plan": GROUPED, "checkpoint": True},
        {"plan": PACKED, "isolate": True, "checkpoint": True},
        {"plan": GROUPED, "num_threads": 2},
        {"plan": PACKED, "isolate": True, "checkpoint": True, "num_threads": 3},
    ],
    ids=[
        "accumulated",
        "one-batch",
        "packed",
        "checkpointed",
        "packed-checkpointed",
        "num_threads",
        "threads-packed-checkpointed",
    ],
)
def test_every_way_gives_the_gradient_of_separate_rows(
    tiny: TinyModels, architecture: str, way: dict
) -> None:
    folder = tiny(architecture)
    assert _differing(_result(folder, **way), _result(folder, SEPARATE)) == []


@pytest.mark.parametrize("isolate", [False, True])
def test_compiled_equals_eager(tiny: TinyModels, isolate: bool) -> None:
    plan = PACKED if isolate else GROUPED
    eager = _result(tiny("llama"), plan, isolate=isolate)
    assert _differing(_result(tiny("llama"), plan, isolate=isolate, compiled=True), eager) == []


def test_loss_is_the_token_mean_not_a_mean_of_means(tiny: TinyModels) -> None:
    model, _ = stock_load(str(tiny("llama")))
    micro_batches = [
        Stepper(model, CrossEntropy(model)).step([collate(ROWS, g, isolate=False)]) for g in GROUPED
    ]
    whole = _result(tiny("llama"), GROUPED)
    total = sum(p.loss * p.supervised for p in micro_batches) / sum(
        p.supervised for p in micro_batches
    )
    assert whole.loss == pytest.approx(total, rel=1e-6)
    assert whole.supervised == int(ROWS.supervised.sum())
    assert whole.tokens == sum(LENGTHS)


@pytest.mark.parametrize("num_threads", [1, 2])
def test_weights_are_found_by_the_number_of_a_target(tiny: TinyModels, num_threads: int) -> None:
    """A row of weight 0 is as if it had no targets, however it is batched."""
    model, _ = stock_load(str(tiny("llama")))
    weights_S = np.ones(int(ROWS.supervised.sum()), np.float32)
    first = int(first_targets(ROWS)[4])
    weights_S[first : first + int(ROWS.supervised[4])] = 0.0
    weighted = Stepper(model, CrossEntropy(model, weights_S=weights_S), num_threads=num_threads)
    ours = weighted.step(collate(ROWS, groups, isolate=False) for groups in GROUPED)
    plain = Stepper(model, CrossEntropy(model)).step(
        collate(ROWS, [[i]], isolate=False) for i in range(len(LENGTHS)) if i != 4
    )
    assert ours.supervised == int(ROWS.supervised.sum())  # counted, with nothing to add
    fraction = plain.supervised / ours.supervised
    assert ours.loss == pytest.approx(fraction * plain.loss, rel=1e-5)
    for path, value in plain.gradients.items():
        assert mx.allclose(ours.gradients[path], fraction * value, rtol=1e-3, atol=1e-6), path


def test_checkpointing_is_undone_and_touches_no_other_instance(tiny: TinyModels) -> None:
    model, _ = stock_load(str(tiny("llama")))
    other, _ = stock_load(str(tiny("llama")))
    before = [type(block) for block in structure.blocks(model)]
    names = set(trainable(model))
    with contextlib.suppress(RuntimeError), checkpointed(structure.blocks(model)):
        assert type(structure.blocks(model)[0]) is not before[0]
        assert type(structure.blocks(other)[0]) is before[0]
        assert set(trainable(model)) == names
        raise RuntimeError
    assert [type(block) for block in structure.blocks(model)] == before


def test_checkpointing_saves_memory(tiny: TinyModels) -> None:
    def peak(checkpoint: bool) -> int:
        model, _ = stock_load(str(tiny("llama")))
        model.freeze()
        model.model.layers[0].self_attn.q_proj.unfreeze()
        rows = MemoryRows([200] * 8)
        stepper = Stepper(model, CrossEntropy(model, chunk=16))
        with checkpointed(structure.blocks(model), checkpoint):
            mx.reset_peak_memory()
            stepper.micro(collate(rows, [[i] for i in range(8)], isolate=False))
        return mx.get_peak_memory()

    assert peak(True) < 0.7 * peak(False)


def test_models_that_do_not_split_use_full_logits(tiny: TinyModels) -> None:
    model, _ = stock_load(str(tiny("llama")))
    objective = CrossEntropy(model, chunk=16)
    assert objective.split is not None
    plain = CrossEntropy(model, chunk=16)
    plain.split = None
    batches = [collate(ROWS, groups, isolate=True) for groups in PACKED]
    assert (
        _differing(Stepper(model, objective).step(batches), Stepper(model, plain).step(batches))
        == []
    )


def test_the_batcher_feeds_every_row_once(tiny: TinyModels) -> None:
    for mode in ("grouped", "packed"):
        batcher = Batcher(ROWS, batch_tokens=64, max_length=32, mode=mode, seed=3)
        seen = sorted(i for batch in batcher.plan(1) for group in batch for i in group)
        assert seen == list(range(len(LENGTHS)))
        result = Stepper(
            stock_load(str(tiny("llama")))[0], CrossEntropy(stock_load(str(tiny("llama")))[0])
        ).step(batcher.batch(groups) for groups in batcher.plan(1))
        assert result.tokens == sum(LENGTHS)
