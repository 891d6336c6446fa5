"""Two students that learn from each other, against a plain step of two models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from mlx_lm import load

from mlx_slim.data.batches import collate
from mlx_slim.distillation.losses import Divergence
from mlx_slim.distillation.mutual import ModelPair, MutualObjective, MutualValidation
from mlx_slim.models import structure
from mlx_slim.models.logits import token_nll
from mlx_slim.runtime import to_float
from mlx_slim.training.cross_entropy import batch_arrays
from mlx_slim.training.step import Stepper
from tests.distillation.test_losses import KINDS_OF_DIVERGENCE, _plain
from tests.support.rows import MemoryRows
from tests.support.tiny import VOCAB, tiny_model

ROWS = MemoryRows([9, 17, 12, 25])
BATCH = collate(ROWS, [[i] for i in range(4)], isolate=False)
PACKED = collate(ROWS, [[0, 1], [2, 3]], isolate=True)


@pytest.fixture
def pair(tiny: Callable[..., Path], tmp_path: Path) -> ModelPair:
    first: Any = load(str(tiny("llama-tied")))[0]
    second: Any = load(str(tiny_model(tmp_path / "second", seed=5, num_hidden_layers=2)))[0]
    second.freeze()  # adapters of a kind: only some parameters learn
    second.model.layers[0].self_attn.q_proj.unfreeze()
    for norm in (first.model.norm, second.model.norm):
        norm.weight = 6 * norm.weight  # a fresh model is almost uniform
    return ModelPair(first, second)


@pytest.mark.parametrize("kind", KINDS_OF_DIVERGENCE)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_step_is_that_of_two_plain_models(
    pair: ModelPair, kind: Divergence, temperature: float
) -> None:
    tokens, positions, targets, _ = batch_arrays(BATCH)
    weight = 0.7

    def plain(parameters: dict) -> mx.array:
        pair.update(parameters)
        logits = [one(tokens).reshape(-1, VOCAB)[positions] for one in (pair.first, pair.second)]
        loss = mx.array(0.0)
        for me, other in ((0, 1), (1, 0)):
            apart = _plain(mx.stop_gradient(logits[other]), logits[me], kind, temperature)
            loss = loss + token_nll(logits[me], targets).sum()
            loss = loss + weight * temperature**2 * apart.sum()
        return loss

    parameters = pair.trainable_parameters()
    expected, gradients = mx.value_and_grad(plain)(parameters)
    pair.update(parameters)
    count = BATCH.supervised_tokens
    for chunk, num_threads, batch in ((5, 1, BATCH), (1000, 2, BATCH), (1000, 1, PACKED)):
        objective = MutualObjective(pair, kind, temperature, weight, chunk=chunk, vocabulary=VOCAB)
        result = Stepper(pair, objective, num_threads=num_threads).step([batch])
        assert result.loss == pytest.approx(to_float(expected) / count, rel=1e-5)
        assert result.gradients.keys() == dict(tree_flatten(gradients)).keys()
        for path, value in dict(tree_flatten(gradients)).items():
            scale = to_float(mx.abs(value).max()) / count + 1e-7
            error = to_float(mx.abs(result.gradients[path] - value / count).max())
            assert error < 2e-3 * scale, path


def test_what_is_reported(pair: ModelPair) -> None:
    arrays = batch_arrays(BATCH)
    training = MutualObjective(pair, "forward", 2.0, 0.5, vocabulary=VOCAB)(
        pair, arrays, gradient=False
    )
    loss, first, second, apart = (to_float(value) for value in training)
    assert loss == pytest.approx(first + second + 2 * 0.5 * 4 * apart, rel=1e-5)
    validation = MutualValidation(pair, "forward", 2.0, 0.5, vocabulary=VOCAB)
    mean, *metrics = (to_float(value) for value in validation(pair, arrays, gradient=False))
    assert mean == pytest.approx((first + second) / 2, rel=1e-6)
    assert metrics == [first, second, apart]


def test_a_pair_looks_like_a_model(pair: ModelPair) -> None:
    assert len(structure.blocks(pair)) == 5
    assert structure.supports_packing(pair)
    assert pair(mx.array([[1, 2]])).shape == (1, 2, 2 * VOCAB)
