"""Distances of sorted probabilities: bounds, gradients, and what a scale does."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlx_slim.distillation.uld_loss import (
    UNMATCHED,
    UNMATCHED_REST,
    MergedTargets,
    Overlap,
    TemperedNLL,
    ULDLoss,
    sorted_distance,
)

POSITIONS, STUDENT, TEACHER = 6, 23, 31


def _teacher(k: int, seed: int = 1) -> tuple[MergedTargets, np.ndarray]:
    """Return k stored probabilities of a random teacher, and all of them sorted."""
    rng = np.random.default_rng(seed)
    probs = rng.dirichlet(np.full(TEACHER, 0.3), POSITIONS)
    ordered = -np.sort(-probs, axis=-1)
    rest = ordered[:, k:].sum(axis=-1)
    floor = 1e-40
    return MergedTargets(
        mx.zeros((POSITIONS, k), dtype=mx.int32),
        mx.array(np.log(np.maximum(ordered[:, :k], floor)).astype(np.float32)),
        mx.array(np.log(np.maximum(rest, floor)).astype(np.float32)),
        mx.array(rng.uniform(0.5, 2, POSITIONS).astype(np.float32)),
        mx.array(-rng.uniform(0, 2, POSITIONS).astype(np.float32)),
    ), ordered


def _logits(seed: int = 0) -> mx.array:
    return mx.array(np.random.default_rng(seed).normal(0, 3, (POSITIONS, STUDENT)), mx.float32)


@pytest.mark.parametrize("k", [1, 4, 22, 23, 24, TEACHER])
def test_stored_tokens_bound_the_full_distance(k: int) -> None:
    probs = np.array(mx.softmax(_logits(), axis=-1))
    targets, ordered = _teacher(k)
    sorted_probs = np.pad(-np.sort(-probs, axis=-1), ((0, 0), (0, TEACHER - STUDENT)))
    full = np.abs(sorted_probs - ordered).sum(axis=-1)
    ours = np.array(sorted_distance(mx.array(probs), targets))
    tails = np.minimum(sorted_probs[:, k:].sum(axis=-1), ordered[:, k:].sum(axis=-1))
    assert (ours <= full + 1e-5).all()
    assert (full <= ours + 2 * tails + 1e-5).all()
    if k == TEACHER:
        np.testing.assert_allclose(ours, full, atol=1e-5)
    if k == 1:
        assert (ours < full - 1e-3).any()


def _overlap(k: int) -> tuple[Overlap, MergedTargets]:
    rng = np.random.default_rng(4)
    targets, _ = _teacher(k)
    ids = np.stack([rng.permutation(STUDENT)[:k] for _ in range(POSITIONS)])
    ids = np.where(ids < 12, ids, UNMATCHED)  # the student's tokens below 12 are matched
    ids[:, -1] = UNMATCHED_REST
    matched = mx.array((np.arange(STUDENT) < 12).astype(np.float32))
    return Overlap(matched, (0.4, 0.6), 0.5), targets._replace(ids_CK=mx.array(ids))


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("hybrid", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_gradient_is_that_of_the_value(
    weight: float, temperature: float, hybrid: bool, weighted: bool
) -> None:
    k = 9
    overlap, targets = _overlap(k) if hybrid else (None, _teacher(k)[0])
    token_loss = ULDLoss(temperature, weight, (1.0,), (overlap,))
    labels = mx.arange(POSITIONS, dtype=mx.int32)
    weights = [mx.array([1.0, 0.0, 2.0, 1.0, 0.5, 1.0])] if weighted else []
    columns = (labels, *targets, *weights)
    logits = _logits()
    value, expected = mx.value_and_grad(lambda z: token_loss.value(z, *columns)[0])(logits)
    sums, gradient = token_loss.value_and_gradient(logits, *columns)
    assert sums[0].item() == pytest.approx(value.item(), rel=1e-5)
    assert mx.allclose(sums, token_loss.value(logits, *columns), rtol=1e-5)
    identity = mx.eye(STUDENT)
    assert mx.allclose(gradient.by_hidden(identity), expected, atol=1e-5)
    (head,) = gradient.by_head(identity[:POSITIONS], [mx.zeros((STUDENT, STUDENT))])
    assert mx.allclose(head.T[:POSITIONS], expected, atol=1e-5)


def test_the_slope_by_the_scale_is_that_of_the_value() -> None:
    targets, _ = _teacher(5)
    token_loss, logits, step = ULDLoss(weight=1.0), _logits(), 1e-2
    by_scale = token_loss.by_log_scale(logits, 0, targets)
    labels = mx.zeros(POSITIONS, dtype=mx.int32)
    for position in range(POSITIONS):
        nudge = step * (mx.arange(POSITIONS) == position)
        up, down = (
            token_loss.value(
                logits, labels, *targets._replace(log_scale_C=targets.log_scale_C + sign * nudge)
            )[2].item()
            for sign in (1, -1)
        )
        assert by_scale[position].item() == pytest.approx((up - down) / (2 * step), abs=2e-3)


def test_nothing_is_lost_between_stored_and_other_tokens_of_a_hybrid() -> None:
    """Kept whole, the two parts are those of the definition, token by token."""
    rng = np.random.default_rng(2)
    teacher = rng.dirichlet(np.full(8, 0.5), 1)
    student = rng.dirichlet(np.full(6, 0.5), 1)
    common = [(0, 5), (3, 1), (6, 2)]  # teacher's, student's
    order = np.argsort(-teacher[0])
    students = dict(common)
    ids = [students.get(int(token), UNMATCHED) for token in order] + [UNMATCHED_REST]
    matched = np.zeros(6, np.float32)
    matched[list(students.values())] = 1
    logs = [*np.log(teacher[0][order]), -100.0]
    targets = MergedTargets(
        mx.array([ids]), mx.array([logs]), mx.array([-100.0]), mx.ones(1), mx.zeros(1)
    )
    p = np.array([teacher[0][a] for a, _ in common])
    q = np.array([student[0][b] for _, b in common])
    m = 0.25 * p + 0.75 * q
    jsd = 0.25 * (p * np.log(p / m)).sum() + 0.75 * (q * np.log(q / m)).sum()
    others_p = sorted((teacher[0][i] for i in range(8) if i not in students), reverse=True)
    others_q = sorted((student[0][i] for i in range(6) if not matched[i]), reverse=True)
    others_q += [0.0] * (len(others_p) - len(others_q))
    apart = sum(abs(a - b) for a, b in zip(others_p, others_q, strict=True))
    overlap = Overlap(mx.array(matched), (2.0, 3.0), 0.25)
    value = overlap.distance(mx.array(student.astype(np.float32)), targets)
    assert value.item() == pytest.approx(2 * jsd + 3 * apart, rel=1e-4)


def test_a_tempered_likelihood_has_its_gradient() -> None:
    logits, token_loss = _logits(), TemperedNLL(3.0)
    columns = (mx.arange(POSITIONS, dtype=mx.int32), mx.array([1.0, -2.0, 0.0, 0.5, 1.0, 1.0]))
    expected = mx.grad(lambda z: token_loss.value(z, *columns))(logits)
    _, gradient = token_loss.value_and_gradient(logits, *columns)
    assert mx.allclose(gradient.by_hidden(mx.eye(STUDENT)), expected, atol=1e-5)
