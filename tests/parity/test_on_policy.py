"""The generalized Jensen-Shannon divergence against TRL's: values and gradients.

TRL's loss has no T² and divides by the number of supervised positions; ours is a sum with T².
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_slim.distillation.losses import DistillationLoss, top
from mlx_slim.runtime import to_float
from tests.parity.optional import needed

torch = needed("torch")
gkd = needed("trl.experimental.gkd.gkd_trainer")

C, V, K = 7, 40, 6
BETAS = [0.0, 0.1, 0.5, 0.9, 1.0]


def _theirs(
    student: np.ndarray, teacher: np.ndarray, beta: float, temperature: float, **options: Any
) -> tuple[float, np.ndarray]:
    logits = torch.tensor(student, requires_grad=True)
    loss = gkd.GKDTrainer.generalized_jsd_loss(
        logits[None], torch.tensor(teacher)[None], beta=beta, temperature=temperature, **options
    )
    loss.backward()
    return loss.item(), logits.grad.numpy()


def _ours(
    student: np.ndarray, teacher: np.ndarray, beta: float, temperature: float, k: int
) -> tuple[float, np.ndarray]:
    """Return the mean over positions and its gradient, at T² = 1."""
    token_loss = DistillationLoss("jsd", temperature, 1.0, beta=beta)
    columns = top(mx.array(teacher), k, temperature)
    targets_C = mx.zeros((C,), dtype=mx.int32)
    sums, gradient = token_loss.value_and_gradient(mx.array(student), targets_C, *columns)
    value = token_loss.value(mx.array(student), targets_C, *columns)
    assert np.allclose(np.array(value), np.array(sums), rtol=1e-5)
    scale = C * temperature**2
    return to_float(sums[0]) / scale, np.array(gradient.probs_CV) / scale


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_all_tokens(beta: float, temperature: float) -> None:
    random = np.random.default_rng(0)
    student, teacher = random.normal(0, 3, (2, C, V)).astype(np.float32)
    labels = torch.zeros((1, C), dtype=torch.long)
    expected, by_logits = _theirs(student, teacher, beta, temperature, labels=labels)
    value, gradient = _ours(student, teacher, beta, temperature, V)
    assert value == pytest.approx(expected, rel=1e-5)
    assert np.abs(gradient - by_logits).max() < 1e-5 * np.abs(by_logits).max()


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_cache_of_k_tokens_is_theirs_on_k_plus_1_buckets(beta: float, temperature: float) -> None:
    random = np.random.default_rng(1)
    student, teacher = random.normal(0, 3, (2, C, V)).astype(np.float32)
    ids_CK = torch.tensor(np.array(top(mx.array(teacher), K, temperature)[0])).long()

    def buckets(logits: Any) -> Any:
        probs = torch.softmax(logits / temperature, dim=-1)
        chosen = probs.gather(-1, ids_CK)
        return torch.log(torch.cat([chosen, 1 - chosen.sum(-1, keepdim=True)], dim=-1))

    logits = torch.tensor(student, requires_grad=True)
    labels = torch.zeros((1, C), dtype=torch.long)
    loss = gkd.GKDTrainer.generalized_jsd_loss(
        buckets(logits)[None], buckets(torch.tensor(teacher))[None], labels=labels, beta=beta
    )
    loss.backward()
    by_logits = logits.grad.numpy()
    value, gradient = _ours(student, teacher, beta, temperature, K)
    assert value == pytest.approx(loss.item(), rel=2e-5)
    assert np.abs(gradient - by_logits).max() < 5e-5 * np.abs(by_logits).max()
    whole, _ = _ours(student, teacher, beta, temperature, V)
    assert value <= whole * (1 + 1e-6)
