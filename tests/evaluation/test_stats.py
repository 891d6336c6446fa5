"""Paired statistics: METHODS' closed-form cases, SciPy, and brute force."""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any

import numpy as np
import pytest
from scipy.stats import binomtest, ttest_1samp, ttest_rel

from mlx_slim.errors import SlimError
from mlx_slim.evaluation.stats import (
    above_chance,
    bootstrap_interval,
    chance_level,
    detectable_difference,
    detectable_mean,
    holm,
    mcnemar,
    paired,
    standard_error,
    verdict,
)


def test_mcnemar_is_the_closed_form_and_scipys_binomial_test() -> None:
    assert mcnemar(60, 40) == pytest.approx(0.0569, abs=5e-5)
    assert mcnemar(30, 10) == pytest.approx(0.0022, abs=5e-5)
    assert mcnemar(0, 0) == 1.0
    for b, c in itertools.product(range(9), range(9)):
        total = sum(math.comb(b + c, i) for i in range(min(b, c) + 1)) / 2 ** (b + c)
        assert mcnemar(b, c) == pytest.approx(min(1.0, 2 * total))
        if b + c:
            assert mcnemar(b, c) == pytest.approx(binomtest(b, b + c).pvalue)
        assert mcnemar(b, c) == mcnemar(c, b)


def _pair(both: int, gained: int, lost: int, neither: int) -> tuple[list[int], list[int]]:
    first = [1] * both + [0] * gained + [1] * lost + [0] * neither
    second = [1] * both + [1] * gained + [0] * lost + [0] * neither
    return first, second


def test_the_standard_error_is_the_closed_form() -> None:
    n, b, c = 500, 40, 25
    first, second = _pair(200, b, c, n - 200 - b - c)
    expected = math.sqrt(((b + c) / n - ((b - c) / n) ** 2) / n)
    result = paired(first, second)
    assert result.stderr == pytest.approx(expected)
    assert result.delta == pytest.approx((b - c) / n)
    assert (result.gained, result.lost, result.n) == (b, c, n)
    half = 1.959963984540054 * expected
    assert result.interval == pytest.approx((result.delta - half, result.delta + half))
    assert result.second - result.first == pytest.approx(result.delta)


def _detectable(discordant: int, n: int, tests: int = 1) -> float:
    difference = detectable_difference(discordant, n, tests)
    assert difference is not None
    return difference


def test_the_minimum_detectable_difference_is_near_the_formula_of_many_pairs() -> None:
    for discordant, n in ((1004, 10042), (3000, 14042), (60, 300)):
        formula = 2.80 * math.sqrt(discordant / n / n)
        assert formula < _detectable(discordant, n) < 1.08 * formula
    assert _detectable(300, 1000, tests=20) > _detectable(300, 1000)


@pytest.mark.parametrize(("discordant", "n", "tests"), [(1, 100, 1), (0, 40, 1), (2, 60, 12)])
def test_a_detectable_difference_can_be_flagged(discordant: int, n: int, tests: int) -> None:
    """One discordant pair of 100 shows nothing: the test needs six that point one way."""
    detectable = _detectable(discordant, n, tests)
    assert mcnemar(math.floor(detectable * n), 0) <= 0.05 / tests
    most = next(m for m in range(n) if mcnemar(m, 0) <= 0.05 / tests)
    assert detectable > most / n
    for few in range(1, 6):
        assert detectable_difference(0, few) is None
    assert "too few questions" in verdict(1.0, 1.0, None)


def _drawn(rng: np.random.Generator, n: int, fraction: float, delta: float, runs: int) -> list:
    """Return (gained, lost) of ``runs`` comparisons with that fraction of discordant pairs."""
    fraction = max(fraction, delta)
    wins = (fraction + delta) / 2
    return rng.multinomial(n, [wins, fraction - wins, 1 - fraction], runs)[:, :2].tolist()


@pytest.mark.parametrize(
    ("n", "discordant", "tests"),
    [(100, 10, 1), (100, 1, 1), (100, 25, 6), (400, 60, 12), (1000, 300, 38)],
)
def test_the_stated_power_is_the_power_after_holm(n: int, discordant: int, tests: int) -> None:
    """Simulated: one true difference of the stated size in a family without any other."""
    rng = np.random.default_rng(n + tests)
    runs, fraction = 1_500, discordant / n
    delta = _detectable(discordant, n, tests)
    true = _drawn(rng, n, fraction, delta, runs)
    null = np.array(_drawn(rng, n, fraction, 0.0, runs * (tests - 1))).reshape(runs, tests - 1, 2)
    p_of = functools.cache(mcnemar)
    flagged = 0
    for pair, others in zip(true, null.tolist(), strict=True):
        adjusted = holm([p_of(*pair), *(p_of(*other) for other in others)])
        flagged += adjusted[0] <= 0.05
    assert 0.77 < flagged / runs < 0.84


def test_the_power_of_a_t_test_is_as_stated_for_few_documents() -> None:
    rng = np.random.default_rng(1)
    for n, tests in ((5, 1), (12, 4)):
        shape = rng.normal(0, 1, n)
        shape = (shape - shape.mean()) / shape.std(ddof=1)  # a spread of exactly 1
        delta = detectable_mean(shape, tests)
        assert delta is not None
        samples = rng.normal(delta, 1, (4_000, n))
        tested: Any = ttest_1samp(samples, 0, axis=1)
        flagged = (tested.pvalue <= 0.05 / tests).mean()
        assert 0.78 < flagged < 0.82
    assert detectable_mean(np.ones(1)) is None and detectable_mean(np.ones(4)) == 0


def test_chance_and_what_is_above_it() -> None:
    two = {"loglikelihoods": [0.0, 0.0]}
    assert chance_level([two, {"loglikelihoods": [0.0] * 4}]) == pytest.approx(0.375)
    assert chance_level([{"generation": ""}]) == 0.0
    assert chance_level([{"acc": 1}]) is None
    assert not above_chance(30, 100, 0.25) and above_chance(36, 100, 0.25)
    assert above_chance(1, 100, 0.0) and not above_chance(0, 100, 0.0)


def test_the_bootstrap_covers_like_an_index_bootstrap() -> None:
    rng = np.random.default_rng(3)
    differences = rng.choice([-1.0, 0.0, 1.0], 120, p=[0.15, 0.6, 0.25])
    means = differences[rng.integers(0, 120, (20_000, 120))].mean(axis=1)
    expected = np.quantile(means, [0.025, 0.975])
    interval = bootstrap_interval(differences, draws=20_000)
    assert interval == pytest.approx(tuple(expected), abs=0.012)
    assert interval == bootstrap_interval(differences, draws=20_000)
    error = standard_error(differences)
    assert (interval[1] - interval[0]) / (2 * 1.96) == pytest.approx(error, rel=0.1)


def test_the_bootstrap_keeps_to_its_strata() -> None:
    # All the difference lies between the strata: within them nothing varies.
    differences = np.array([1.0] * 50 + [0.0] * 50)
    strata = ["a"] * 50 + ["b"] * 50
    assert bootstrap_interval(differences, strata) == (0.5, 0.5)
    low, high = bootstrap_interval(differences)
    assert low < 0.45 < 0.55 < high
    mixed = np.arange(100) % 2 * 1.0
    shuffled = bootstrap_interval(mixed, strata, draws=20_000)
    assert shuffled == pytest.approx(bootstrap_interval(mixed, draws=20_000), abs=0.02)


def test_real_values_get_a_paired_t_test() -> None:
    rng = np.random.default_rng(0)
    first = rng.normal(2.0, 1.0, 80)
    second = first + rng.normal(0.05, 0.1, 80)
    result = paired(first.tolist(), second.tolist())
    assert result.p_value == pytest.approx(ttest_rel(second, first).pvalue)
    assert result.detectable == pytest.approx(2.8 * result.stderr, rel=0.03)
    assert result.bootstrap == pytest.approx(result.interval, abs=0.01)
    assert paired([0.5, 0.7], [0.5, 0.7]).p_value == 1.0


def test_holm_steps_down() -> None:
    assert holm([0.01, 0.04, 0.03, 0.5]) == pytest.approx([0.04, 0.09, 0.09, 0.5])
    assert holm([0.2]) == [0.2]
    assert holm([]) == []
    assert holm([0.9, 0.8]) == [1.0, 1.0]


def test_no_difference_is_never_called_equal() -> None:
    same = paired(*_pair(50, 5, 5, 40))
    assert same.detectable is not None
    words = verdict(same.delta, same.p_value, same.detectable)
    assert words == f"no detectable difference (MDE {100 * same.detectable:.2g} points)"
    assert verdict(0.031, 0.001, 0.01) == "higher by 3.1 points"
    assert verdict(-0.02, 0.04, 0.01, unit="bits/byte") == "lower by 0.02 bits/byte"


def test_what_cannot_be_paired_is_refused() -> None:
    with pytest.raises(SlimError, match="2 and 3 questions"):
        paired([1, 0], [1, 0, 1])
    with pytest.raises(SlimError, match="0 and 0"):
        paired([], [])


def test_one_question_bears_no_interval() -> None:
    assert paired([0], [1]).interval == (-1.0, 1.0)
    assert paired([1.5], [1.2]).interval is None


def test_the_interval_over_few_documents_is_students() -> None:
    first, second = np.zeros(4), np.array([0.1, 0.3, -0.1, 0.2])
    result = paired(first.tolist(), second.tolist())
    assert result.interval is not None
    low, high = result.interval
    half = 3.182446305284263 * second.std(ddof=1) / 2  # t of 3 degrees of freedom
    assert (low, high) == pytest.approx((second.mean() - half, second.mean() + half))
