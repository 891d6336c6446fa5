"""The fraction of a score that is kept: its interval, and how many questions a claim needs."""

from __future__ import annotations

import math

import numpy as np
import pytest

from mlx_slim.slimming import proof
from mlx_slim.slimming.proof import PairedAnswers


def pair(first: np.ndarray, second: np.ndarray, chance: float = 0.25) -> PairedAnswers:
    return PairedAnswers("task", "acc", first.astype(np.int8), second.astype(np.int8), chance)


def drawn(rng: np.random.Generator, n: int, accuracy: float, fraction: float) -> PairedAnswers:
    """Two models, the first of ``accuracy``, the second keeps a fraction of it; correlated."""
    first = rng.random(n) < accuracy
    stays = rng.random(n) < 0.9 * fraction
    gained = rng.random(n) < accuracy * (fraction - 0.9 * fraction) / (1 - accuracy)
    return pair(first, np.where(first, stays, gained))


def test_equal_answers_keep_everything() -> None:
    answers = np.array([1, 0, 1, 1, 0, 1])
    retention = proof.retention([pair(answers, answers)])
    assert (
        retention.value == 1
        and retention.interval == pytest.approx((1, 1))
        and retention.corrected == 1
    )
    assert retention.keeps(1.0)


def test_ends_are_where_the_paired_difference_is_two_errors_from_zero() -> None:
    rng = np.random.default_rng(0)
    pairs = [drawn(rng, 300, 0.6, 0.9), drawn(rng, 150, 0.4, 0.9)]
    retention = proof.retention(pairs)
    assert retention.interval is not None and retention.value is not None
    for end in retention.interval:
        rests = [p.second_N - end * p.first_N for p in pairs]
        mean = np.mean([rest.mean() for rest in rests])
        error = math.sqrt(sum(rest.var() / len(rest) for rest in rests)) / len(rests)
        assert abs(mean) == pytest.approx(proof.Z * error, rel=1e-6)
    assert retention.interval[0] < retention.value < retention.interval[1]


def test_interval_holds_the_true_share_about_95_times_of_100() -> None:
    rng = np.random.default_rng(1)
    held = 0
    for _ in range(600):
        retention = proof.retention([drawn(rng, 400, 0.5, 0.92)])
        assert retention.interval is not None
        held += retention.interval[0] <= 0.92 <= retention.interval[1]
    assert 0.92 < held / 600 < 0.98


def test_no_interval_without_a_score() -> None:
    retention = proof.retention([pair(np.array([0, 0, 1, 0]), np.array([0, 1, 0, 0]))])
    assert retention.interval is None and retention.least == -math.inf and not retention.keeps(0.01)
    nothing = proof.retention([pair(np.zeros(4), np.zeros(4))])
    assert nothing.value is None and nothing.corrected is None


@pytest.mark.parametrize(("accuracy", "least"), [(0.43, 832), (0.33, 1412)])
def test_questions_that_95_percent_needs(accuracy: float, least: int) -> None:
    """One discordant answer of ten: HellaSwag at 43% and OpenBookQA at 33%."""
    first = np.arange(1000) < round(1000 * accuracy)
    second = first.copy()
    second[:50], second[-50:] = False, True  # as many lost as gained
    pairs = [pair(first, second)]
    assert proof.needed(pairs, 0.95) == least
    assert proof.provable(pairs, [least]) >= 0.95 > proof.provable(pairs, [least - 2])


def test_more_tasks_prove_more() -> None:
    rng = np.random.default_rng(2)
    one, other = drawn(rng, 500, 0.5, 1.0), drawn(rng, 500, 0.5, 1.0)
    both = proof.provable([one, other], [250, 250])
    assert both > max(proof.provable([one], [250]), proof.provable([other], [250]))


def test_no_discordant_answer_seen_is_not_none() -> None:
    answers = np.array([1, 0] * 10)
    assert proof.provable([pair(answers, answers)], [100]) < 1
    assert proof.needed([pair(answers, answers)], 0.99) > 0
