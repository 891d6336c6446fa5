"""Means over tasks: the test, its power, and ratios, against simulation and single tasks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mlx_slim.evaluation.pooled import (
    PAIRS,
    SCORES,
    detectable_pooled,
    mean_and_error,
    mean_interval,
    ratio,
    sign_flip,
)
from mlx_slim.evaluation.stats import detectable_difference, mcnemar, standard_error


def _ratio(first: list[Any], second: list[Any], *chance: float) -> Any:
    """Return a ratio that is defined, and its interval."""
    result = ratio(first, second, *chance)
    assert result is not None
    return result


def test_one_task_is_mcnemars_test_and_its_error_and_power() -> None:
    rng = np.random.default_rng(0)
    differences = rng.choice([-1.0, 0.0, 1.0], 150, p=[0.1, 0.7, 0.2])
    gained, lost = int((differences > 0).sum()), int((differences < 0).sum())
    assert sign_flip([differences]) == mcnemar(gained, lost)
    error = mean_and_error([differences], PAIRS)[1]
    assert error == pytest.approx(standard_error(differences), rel=0.03)
    assert detectable_pooled([differences], 7) == detectable_difference(gained + lost, 150, 7)
    assert sign_flip([np.zeros(9), np.zeros(4)]) == 1.0


@pytest.mark.parametrize("tests", [1, 6])
@pytest.mark.parametrize("n", [1, 12, 50, 400])
@pytest.mark.parametrize("fraction", [0.0, 0.02, 0.1])
def test_intervals_of_differences_cover_what_is_true(fraction: float, n: int, tests: int) -> None:
    rng = np.random.default_rng(n)
    for delta in (0.0, fraction):
        chances = [(fraction - delta) / 2, 1 - fraction, (fraction + delta) / 2]
        drawn = [rng.choice([-1.0, 0.0, 1.0], n, p=chances) for _ in range(600)]
        intervals = [mean_interval([x], PAIRS, tests) for x in drawn]
        hits = np.mean([low <= delta <= high for low, high in intervals])
        assert hits > 1 - 0.05 / tests - 0.05  # the plain one: 0 where no pair differs


@pytest.mark.parametrize("n", [1, 5, 40, 1000])
def test_no_interval_is_a_point(n: int) -> None:
    for right in (np.ones(n), np.zeros(n)):
        low, high = mean_interval([right], SCORES)
        assert 0 <= low <= right[0] <= high <= 1
        assert high - low > 3 / (n + 4)  # the rule of three
    for same in (np.zeros(n), np.ones(n), -np.ones(n)):
        low, high = mean_interval([same], PAIRS)
        assert -1 <= low < high <= 1 and low <= same[0] <= high
        low, high = mean_interval([same, same], PAIRS)
        assert low < high
    retention, (low, high) = ratio([np.ones(n)], [np.ones(n)]) or (0, (0, 0))
    assert low < retention == 1 < high


def test_signs_are_drawn_where_tasks_weigh_differently() -> None:
    """Brute force over all signs of a few differences."""
    tasks = [np.array([1.0, 1.0, 0.0, -1.0]), np.array([1.0, 1.0, 0.0, 0.0, 0.5, 0.5])]
    weighted = np.concatenate([x / len(x) for x in tasks])
    moving = weighted[weighted != 0]
    signs = np.array(np.meshgrid(*[[-1, 1]] * len(moving))).reshape(len(moving), -1)
    exact = (np.abs(np.abs(moving) @ signs) >= abs(moving.sum()) - 1e-9).mean()
    assert sign_flip(tasks) == pytest.approx(exact, abs=0.005)
    assert sign_flip(tasks) == sign_flip(tasks)


@pytest.mark.parametrize(
    ("sizes", "fraction"), [((200, 60), 0.3), ((100, 100), 0.2), ((80, 30), 0.04)]
)
def test_the_stated_power_is_reached(sizes: Any, fraction: float) -> None:
    """A true mean difference of the stated size is flagged in four of five cases, or more."""
    rng = np.random.default_rng(5)

    def drawn(delta: float) -> list[np.ndarray]:
        there = max(fraction, delta)
        chances = [(there - delta) / 2, 1 - there, (there + delta) / 2]
        return [rng.choice([-1.0, 0.0, 1.0], n, p=chances) for n in sizes]

    expected = [np.zeros(n) for n in sizes]
    for x in expected:
        pairs = round(fraction * len(x))
        x[:pairs] = np.resize([1.0, -1.0], pairs)
    delta = detectable_pooled(expected, 3)
    assert delta is not None
    runs = 300
    flagged = sum(sign_flip(drawn(delta), draws=4_000) <= 0.05 / 3 for _ in range(runs))
    assert flagged / runs > 0.74
    assert flagged / runs < (0.86 if fraction > 0.1 else 1.01)


def test_ratios_cover_what_is_true_and_chance_is_taken_off() -> None:
    rng = np.random.default_rng(2)
    runs, hits = 400, 0
    for _ in range(runs):
        easy = rng.random(300)
        first = (easy < 0.6).astype(float)
        second = ((easy < 0.5) | (rng.random(300) < 0.1)).astype(float)
        true = (0.5 + 0.1 * 0.5) / 0.6
        _, (low, high) = _ratio([first], [second])
        hits += low <= true <= high
    assert 0.91 < hits / runs < 0.98
    one, two = np.array([1.0, 1.0, 1.0, 0.0]), np.array([1.0, 1.0, 0.0, 0.0])
    assert _ratio([one], [two])[0] == pytest.approx(0.5 / 0.75)
    assert _ratio([one], [two], 0.25)[0] == pytest.approx(0.25 / 0.5)
    assert ratio([two], [one], 0.5) is None
    low, high = _ratio([one], [one])[1]
    assert low < 1 < high
