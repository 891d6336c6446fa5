"""What sampler, trainer and reference say about the same tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import mlx.core as mx
import numpy as np
import pytest

from mlx_slim.adapters.inject import inject, without_adapters
from mlx_slim.config.adapter import AdapterConfig
from mlx_slim.data.batches import Batcher
from mlx_slim.evaluation.scoring.generate import generate_batch
from mlx_slim.evaluation.scoring.sampling import Sampling
from mlx_slim.models.load import load
from mlx_slim.rewards.losses import PolicyLoss
from mlx_slim.rewards.objective import PolicyColumns, PolicyObjective
from mlx_slim.rewards.reference import ReferenceModel, drawn_log_probs
from mlx_slim.training.optim import set_trainable, trainable
from mlx_slim.training.step import Stepper
from tests.support.rows import MemoryRows
from tests.support.tiny import VOCAB, TinyModels


class Drawn(MemoryRows):
    """Prompts with the answers that a model drew."""

    def __init__(self, prompts: list[list[int]], answers: list[list[int]]) -> None:
        pairs = list(zip(prompts, answers, strict=True))
        self._rows = [
            (
                np.array([*prompt, *answer], np.int32),
                np.arange(len(prompt) + len(answer)) >= len(prompt),
            )
            for prompt, answer in pairs
        ]
        self.lengths = np.array([len(ids) for ids, _ in self._rows])
        self.supervised = np.array([len(answer) for answer in answers])


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_sampler_knows_the_probabilities_of_the_trainer(
    tiny: TinyModels, temperature: float
) -> None:
    """To 1e-5 in float32, so that ρ is 1 in the first step of a round."""
    loaded = load(tiny(), dtype=mx.float32)
    prompts = [[5, 9, 70, 31, 8, 12, 40, 3, 77, 15]] * 3 + [[5, 9, 70, 31, 8, 12, 40, 3, 2]] * 3
    answers = generate_batch(
        loaded.model,
        loaded.tokenizer,
        prompts,
        12,
        sampling=Sampling(temperature),
        keys=[(0, number) for number in range(6)],
        log_probs=True,
    )
    rows = Drawn(prompts, [one.drawn for one in answers])
    drawn = np.concatenate([one.log_probs or [] for one in answers])
    batcher = Batcher(rows, 64, 32, "grouped", 0)
    computed = drawn_log_probs(loaded.model, batcher, temperature, vocabulary=VOCAB, chunk=5)
    assert np.abs(computed - drawn).max() < 1e-5
    columns = PolicyColumns.of(
        "bnpo", 12, rows.supervised, np.ones(6, bool), np.ones(6), drawn, computed
    )
    token_loss = PolicyLoss(beta=1.0, temperature=temperature)
    objective = PolicyObjective(token_loss, lambda: columns, loaded.model)
    result = Stepper(loaded.model, objective).step(map(batcher.batch, batcher.plan(0)))
    assert result.loss == pytest.approx(-1, abs=1e-5)  # ρ = 1, A = 1
    assert result.metrics["kl"] == pytest.approx(0, abs=1e-8)


@pytest.mark.parametrize("init", ["standard", "pissa"])
def test_the_reference_is_the_model_with_the_adapter_off(
    tiny: TinyModels, init: Literal["standard", "pissa"]
) -> None:
    folder: Path = tiny()
    model = load(folder, dtype=mx.float32).model
    rows = MemoryRows([9, 14, 20, 7])
    batcher = Batcher(rows, 64, 32, "grouped", 0)

    def computed() -> np.ndarray:
        return drawn_log_probs(model, batcher, 1.0, vocabulary=VOCAB)

    base = computed()
    inject(model, AdapterConfig(rank=4, init=init), dora=False)
    reference = ReferenceModel(model)
    moved = {path: value + 0.05 for path, value in trainable(model).items()}
    set_trainable(model, moved)
    now = computed()
    assert np.abs(now - base).max() > 1e-2
    with reference.applied(model):
        assert computed() == pytest.approx(base, abs=1e-4)
    assert (computed() == now).all()
    if init == "standard":
        with without_adapters(model):
            assert (computed() == base).all()
