"""The clipped loss against its definition: values, gradients, both clips, every head and chunk."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlx_slim.rewards.losses import METRICS, PolicyLoss
from mlx_slim.runtime import to_float
from mlx_slim.training.losses import linear_loss
from tests.training.test_losses import D, N, V, _head

LOSSES = [
    PolicyLoss(),
    PolicyLoss(low=0.1, high=0.3, beta=0.04),
    PolicyLoss(beta=0.5, bias_correction=False, temperature=0.7),
]


def columns(logits_NV: mx.array, token_loss: PolicyLoss) -> list[mx.array]:
    """Columns for which some tokens are clipped below and some above."""
    mx.random.seed(3)
    targets = mx.random.randint(0, V, (N,))
    scaled = logits_NV / token_loss.temperature
    logp = mx.log(mx.take_along_axis(mx.softmax(scaled, axis=-1), targets[:, None], axis=-1))[:, 0]
    old = logp + 0.6 * mx.random.normal((N,))
    advantage = mx.random.normal((N,))
    weight = mx.random.uniform(0.2, 2.0, (N,))
    weight[-1] = 0.0  # padding
    reference = [logp + 0.3 * mx.random.normal((N,))] if token_loss.beta else []
    every = [targets, old, advantage, weight, *reference]
    mx.eval(every)
    return every


def plain(logits_NV: mx.array, token_loss: PolicyLoss, *columns: mx.array) -> mx.array:
    """The loss from its definition, over full logits."""
    targets, old, advantage, weight, *reference = columns
    scaled = logits_NV / token_loss.temperature
    log_probs = scaled - mx.logsumexp(scaled, axis=-1, keepdims=True)
    logp = mx.take_along_axis(log_probs, targets[:, None], axis=-1)[:, 0]
    ratio = mx.exp(logp - old)
    clipped = mx.clip(ratio, 1 - token_loss.low, 1 + token_loss.high)
    # Of two equal branches autodiff takes half of each: inside the clips both have this gradient.
    loss = -mx.where(
        ratio * advantage <= clipped * advantage,
        ratio * advantage,
        mx.stop_gradient(clipped * advantage),
    )
    if token_loss.beta:
        gap = reference[0] - logp
        kl = mx.exp(gap) - gap - 1
        loss = loss + token_loss.beta * kl * (ratio if token_loss.bias_correction else 1.0)
    return (weight * loss).sum()


@pytest.mark.parametrize("token_loss", LOSSES)
def test_it_is_the_definition_with_gradient(token_loss: PolicyLoss) -> None:
    mx.random.seed(0)
    logits = 2 * mx.random.normal((N, V))
    inputs = columns(logits, token_loss)
    expected, by_logits = mx.value_and_grad(lambda q: plain(q, token_loss, *inputs))(logits)
    sums, gradient = token_loss.value_and_gradient(logits, *inputs)
    assert sums.shape == (1 + len(METRICS),)
    assert to_float(sums[0]) == pytest.approx(to_float(expected), rel=1e-5)
    ours = gradient.by_hidden(mx.eye(V))
    assert mx.allclose(ours, by_logits, rtol=1e-4, atol=1e-6)
    by_value = mx.grad(lambda q: token_loss.value(q, *inputs)[0])(logits)
    assert mx.allclose(by_value, by_logits, rtol=1e-4, atol=1e-6)
    assert mx.allclose(token_loss.value(logits, *inputs), sums, rtol=1e-5, atol=1e-5)


def test_metrics_are_sums_over_the_tokens_that_count() -> None:
    mx.random.seed(0)
    logits = 2 * mx.random.normal((N, V))
    token_loss = LOSSES[1]
    inputs = columns(logits, token_loss)
    targets, old, advantage, weight, reference = (np.array(one) for one in inputs)
    probs = np.array(mx.softmax(logits, axis=-1)).astype(np.float64)
    logp = np.log(probs[np.arange(N), targets])
    ratio, counted = np.exp(logp - old), weight > 0
    low = ((ratio < 0.9) & (advantage < 0))[counted].sum()
    high = ((ratio > 1.3) & (advantage > 0))[counted].sum()
    assert low > 0 and high > 0, "both clips are to be tried"
    gap = reference - logp
    kl = (ratio * (np.exp(gap) - gap - 1))[counted].sum()
    entropy = -(probs * np.log(probs)).sum(axis=1)[counted].sum()
    sums = token_loss.value_and_gradient(logits, *inputs)[0]
    assert np.array(sums)[1:].tolist() == pytest.approx([kl, low, high, entropy], rel=1e-4)


@pytest.mark.parametrize("kind", ["untied", "quantized", "adapted", "capped"])
def test_chunks_and_heads_give_the_same(kind: str) -> None:
    mx.random.seed(1)
    head, token_loss = _head(kind), LOSSES[1]
    hidden = mx.random.normal((N, D))
    inputs = tuple(columns(head(hidden).astype(mx.float32), token_loss))

    def chunked(hidden: mx.array, chunk: int) -> mx.array:
        return linear_loss(hidden, head, token_loss, inputs, chunk=chunk)[0]

    whole = mx.value_and_grad(lambda h: token_loss.value(head(h), *inputs)[0])(hidden)
    for chunk in (1, 3, N):
        value, gradient = mx.value_and_grad(lambda h, c=chunk: chunked(h, c))(hidden)
        assert to_float(value) == pytest.approx(to_float(whole[0]), rel=1e-4)
        assert mx.allclose(gradient, whole[1], rtol=1e-3, atol=1e-4)


def test_the_worked_example() -> None:
    """As in the module's docstring."""
    logits = mx.log(mx.array([[0.5, 0.5], [0.25, 0.75]]))
    inputs = (mx.array([0, 1]), mx.log(mx.array([0.5, 0.5])), mx.ones(2), mx.ones(2))
    sums, gradient = PolicyLoss().value_and_gradient(logits, *inputs)
    assert to_float(sums[0]) == pytest.approx(-2.2)
    by_logits = gradient.by_hidden(mx.eye(2))
    assert np.array(by_logits).ravel().tolist() == pytest.approx([-0.5, 0.5, 0, 0], abs=1e-6)
