"""Divergences against a plain reference: values, gradients, buckets, every head and chunk."""

from __future__ import annotations

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from mlx_slim.distillation.losses import DistillationLoss, Divergence, top
from mlx_slim.distillation.mutual import PeerLoss
from mlx_slim.models.logits import token_nll
from mlx_slim.runtime import to_float
from mlx_slim.training.losses import NLL, linear_loss
from tests.training.test_losses import (
    KINDS,
    ROWS,
    VOCABULARY,
    D,
    N,
    V,
    _head,
    _value_and_gradients,
    check_the_peak,
)

KINDS_OF_DIVERGENCE = ["forward", "reverse", "symmetric", "jsd"]


def _plain(p_NV: mx.array, q_NV: mx.array, kind: Divergence, temperature: float) -> mx.array:
    """The divergence over all tokens (N,), from its definition."""
    log_p = p_NV / temperature - mx.logsumexp(p_NV / temperature, axis=-1, keepdims=True)
    log_q = q_NV / temperature - mx.logsumexp(q_NV / temperature, axis=-1, keepdims=True)
    forward = (mx.exp(log_p) * (log_p - log_q)).sum(axis=-1)
    reverse = (mx.exp(log_q) * (log_q - log_p)).sum(axis=-1)
    mixed = mx.log(0.5 * mx.exp(log_p) + 0.5 * mx.exp(log_q))
    jsd = 0.5 * (mx.exp(log_p) * (log_p - mixed) + mx.exp(log_q) * (log_q - mixed)).sum(axis=-1)
    symmetric = (forward + reverse) / 2
    return {"forward": forward, "reverse": reverse, "symmetric": symmetric, "jsd": jsd}[kind]


def _lumped(
    p_NV: mx.array, q_NV: mx.array, ids_NK: mx.array, kind: Divergence, t: float
) -> mx.array:
    """The divergence of k + 1 buckets (N,), from probabilities."""
    p, q = mx.softmax(p_NV / t, axis=-1), mx.softmax(q_NV / t, axis=-1)
    p, q = (
        mx.concatenate([probs, 1 - probs.sum(axis=-1, keepdims=True)], axis=-1)
        for probs in (mx.take_along_axis(x, ids_NK, axis=-1) for x in (p, q))
    )
    return _plain(mx.log(p), mx.log(q), kind, 1.0)


def _targets(p_NV: mx.array, k: int, t: float) -> tuple[mx.array, ...]:
    return top(p_NV, k, t)


@pytest.mark.parametrize("kind", KINDS_OF_DIVERGENCE)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_with_all_tokens_it_is_the_definition_with_gradient(
    kind: Divergence, temperature: float
) -> None:
    mx.random.seed(0)
    p, q = 3 * mx.random.normal((N, V)), 3 * mx.random.normal((N, V))
    targets = mx.random.randint(0, V, (N,))
    token_loss = DistillationLoss(kind, temperature, 1.0)
    columns = (targets, *_targets(p, V, temperature))

    def plain(q: mx.array) -> mx.array:
        return temperature**2 * _plain(p, q, kind, temperature).sum()

    expected, by_logits = mx.value_and_grad(plain)(q)
    sums, logits_gradient = token_loss.value_and_gradient(q, *columns)
    assert sums[0].item() == pytest.approx(expected.item(), rel=1e-5)
    assert sums[1].item() == pytest.approx(token_nll(q, targets).sum().item(), rel=1e-6)
    assert temperature**2 * to_float(sums[2]) == pytest.approx(expected.item(), rel=1e-5)
    assert mx.allclose(logits_gradient.probs_CV, by_logits, rtol=1e-3, atol=1e-5)
    by_value = mx.grad(lambda q: token_loss.value(q, *columns)[0])(q)
    assert mx.allclose(by_value, by_logits, rtol=1e-3, atol=1e-5)
    assert mx.allclose(token_loss.value(q, *columns), sums, rtol=1e-5)
    if kind == "forward":
        pulled = temperature * (
            mx.softmax(q / temperature, axis=-1) - mx.softmax(p / temperature, axis=-1)
        )
        assert mx.allclose(logits_gradient.probs_CV, pulled, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS_OF_DIVERGENCE)
@pytest.mark.parametrize("k", [1, 7, 60])
def test_buckets_equal_their_definition_with_gradient(kind: Divergence, k: int) -> None:
    mx.random.seed(1)
    p, q = 3 * mx.random.normal((N, V)), 3 * mx.random.normal((N, V))
    targets = mx.random.randint(0, V, (N,))
    for temperature, weight in ((1.0, 1.0), (1.0, 0.3), (2.0, 0.3)):
        columns = (targets, *_targets(p, k, temperature))
        token_loss = DistillationLoss(kind, temperature, weight)

        def plain(
            q: mx.array, t: float = temperature, w: float = weight, ids: mx.array = columns[1]
        ) -> mx.array:
            apart = _lumped(p, q, ids, kind, t).sum()
            return (1 - w) * token_nll(q, targets).sum() + w * t**2 * apart

        expected, by_logits = mx.value_and_grad(plain)(q)
        sums, logits_gradient = token_loss.value_and_gradient(q, *columns)
        assert sums[0].item() == pytest.approx(expected.item(), rel=1e-4)
        ours = logits_gradient.by_hidden(mx.eye(V))  # logits as hidden states: the gradient by them
        assert mx.allclose(ours, by_logits, rtol=1e-3, atol=1e-4)
        by_value = mx.grad(lambda q, c=columns, r=token_loss: r.value(q, *c)[0])(q)
        assert mx.allclose(by_value, by_logits, rtol=1e-3, atol=1e-4)


def test_the_worked_example() -> None:
    """As in the module's docstring."""
    p, q = mx.log(mx.array([[0.7, 0.2, 0.1]])), mx.log(mx.array([[0.5, 0.3, 0.2]]))
    columns = (mx.array([0]), *top(p, 1, 1.0))
    sums, gradient = DistillationLoss(weight=1.0).value_and_gradient(q, *columns)
    assert sums[0].item() == pytest.approx(0.0823, abs=1e-4)
    assert gradient.probs_CV[0].tolist() == pytest.approx([-0.2, 0.12, 0.08], abs=1e-5)


@pytest.mark.parametrize("kind", KINDS_OF_DIVERGENCE)
def test_more_tokens_come_nearer_from_below(kind: Divergence) -> None:
    mx.random.seed(2)
    p, q = 4 * mx.random.normal((N, V)), 4 * mx.random.normal((N, V))
    targets = mx.zeros((N,), dtype=mx.int32)
    full = to_float(_plain(p, q, kind, 1.0).sum())
    values = [
        to_float(DistillationLoss(kind).value(q, targets, *_targets(p, k, 1.0))[2])
        for k in (1, 2, 5, 20, 80, V)
    ]
    assert values == sorted(values)
    assert values[0] < 0.9 * full
    assert values[-1] == pytest.approx(full, rel=1e-5)


@pytest.mark.parametrize("kind", KINDS_OF_DIVERGENCE)
@pytest.mark.parametrize("k", [1, 10, V])
def test_equal_distributions_are_apart_by_nothing_and_stay(kind: Divergence, k: int) -> None:
    mx.random.seed(3)
    q = 5 * mx.random.normal((N, V))
    targets = mx.zeros((N,), dtype=mx.int32)
    for temperature in (1.0, 3.0):
        token_loss = DistillationLoss(kind, temperature, 1.0)
        sums, logits_gradient = token_loss.value_and_gradient(
            q, targets, *_targets(q, k, temperature)
        )
        assert abs(to_float(sums[2])) < 1e-5 * N
        assert to_float(mx.abs(logits_gradient.probs_CV).max()) < 1e-5


@pytest.mark.parametrize("kind", KINDS_OF_DIVERGENCE)
@pytest.mark.parametrize("k", [3, V])
def test_certain_and_far_apart_stays_finite(kind: Divergence, k: int) -> None:
    """One-hot against one-hot elsewhere: probabilities that float32 cannot hold."""
    p, q = mx.zeros((2, V)), mx.zeros((2, V))
    p[:, 5], q[:, 50] = 1000.0, 1000.0
    columns = (mx.array([5, 50]), *_targets(p, k, 1.0))
    sums, logits_gradient = DistillationLoss(kind, 1.0, 0.5).value_and_gradient(q, *columns)
    assert mx.isfinite(sums).all().item()
    assert mx.isfinite(logits_gradient.probs_CV).all().item()
    assert (
        mx.isfinite(mx.grad(lambda q: DistillationLoss(kind).value(q, *columns)[0])(q)).all().item()
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("divergence", KINDS_OF_DIVERGENCE)
@pytest.mark.parametrize("chunk", [5, 1000])
def test_chunked_equals_plain_for_every_head(
    kind: Divergence, divergence: Divergence, chunk: int
) -> None:
    head = _head(kind)
    hidden, p = mx.random.normal((N, D)), 2 * mx.random.normal((N, V))
    targets = mx.random.randint(0, V, (N,))
    token_loss = DistillationLoss(divergence, 2.0, 0.4)
    columns = (targets, *_targets(p, V, 2.0))

    def plain(hidden: mx.array) -> mx.array:
        logits = head(hidden)
        apart = _plain(p, logits, divergence, 2.0).sum()
        return 3 * (0.6 * token_nll(logits, targets).sum() + 0.4 * 4 * apart)

    expected = _value_and_gradients(head, hidden, plain)
    ours = _value_and_gradients(
        head, hidden, lambda h: 3 * linear_loss(h, head, token_loss, columns, chunk=chunk)[0]
    )
    assert ours[0].item() == pytest.approx(expected[0].item(), rel=1e-5)
    assert mx.allclose(ours[2], expected[2], rtol=1e-3, atol=1e-4)
    for path, value in expected[1].items():
        assert mx.allclose(ours[1][path], value, rtol=1e-3, atol=1e-3), path
    forward = linear_loss(hidden, head, token_loss, columns, chunk=chunk, gradient=False)
    assert 3 * forward[0].item() == pytest.approx(expected[0].item(), rel=1e-5)


def test_two_teachers_count_by_their_loss_weights() -> None:
    mx.random.seed(4)
    q = 2 * mx.random.normal((N, V))
    targets = mx.zeros((N,), dtype=mx.int32)
    teachers = [_targets(2 * mx.random.normal((N, V)), k, 1.0) for k in (4, 9)]
    alone = [DistillationLoss(weight=1.0).value_and_gradient(q, targets, *one) for one in teachers]
    token_loss = DistillationLoss(weight=1.0, loss_weights=(0.75, 0.25))
    sums, logits_gradient = token_loss.value_and_gradient(q, targets, *teachers[0], *teachers[1])
    expected = 0.75 * alone[0][0][2] + 0.25 * alone[1][0][2]
    assert to_float(sums[2]) == pytest.approx(expected.item(), rel=1e-6)
    mixed = 0.75 * alone[0][1].probs_CV + 0.25 * alone[1][1].probs_CV
    assert mx.allclose(logits_gradient.probs_CV, mixed, rtol=1e-4, atol=1e-6)
    value = token_loss.value(q, targets, *teachers[0], *teachers[1])
    assert mx.allclose(value, sums, rtol=1e-5)


@pytest.mark.parametrize("kind", ["untied", "frozen", "quantized", "adapted"])
def test_weight_zero_is_cross_entropy_bit_for_bit(kind: Divergence) -> None:
    head = _head(kind)
    hidden = mx.random.normal((N, D))
    targets = mx.random.randint(0, V, (N,))
    columns = (targets, *_targets(mx.random.normal((N, V)), 5, 2.0))
    plain = _value_and_gradients(
        head, hidden, lambda h: linear_loss(h, head, NLL(), (targets,), chunk=8)
    )
    token_loss = DistillationLoss("reverse", 2.0, 0.0)
    ours = _value_and_gradients(
        head, hidden, lambda h: linear_loss(h, head, token_loss, columns, chunk=8)[0]
    )
    flat = [dict(tree_flatten(side)) for side in (plain, ours)]
    assert all(mx.array_equal(flat[0][key], flat[1][key]).item() for key in flat[0])


@pytest.mark.parametrize("gradient", [True, False])
@pytest.mark.parametrize("kind", ["frozen", "quantized", "adapted"])
def test_the_peak_does_not_grow_with_the_rows(
    kind: Divergence, gradient: bool, request: pytest.FixtureRequest
) -> None:
    columns = top(mx.random.normal((ROWS, VOCABULARY)), 8, 1.0)
    check_the_peak(kind, DistillationLoss(), gradient, False, True, request, *columns)


@pytest.mark.parametrize("gradient", [True, False])
def test_nor_does_that_of_two_students(gradient: bool, request: pytest.FixtureRequest) -> None:
    token_loss = PeerLoss(_head("quantized", VOCABULARY), "symmetric", 1.0, 0.5)
    rows = mx.random.normal((ROWS, D))
    check_the_peak("quantized", token_loss, gradient, False, True, request, rows)
