"""Paired statistics: METHODS' closed-form cases, SciPy, and brute force."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy.stats import binomtest, ttest_rel

from mlx_slim.errors import SlimError
from mlx_slim.evaluate.stats import (
    bootstrap_interval,
    detectable_difference,
    holm,
    mcnemar,
    paired,
    standard_error,
    verdict,
)


def test_mcnemar_is_the_closed_form_and_scipys_binomial_test():
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


def test_the_standard_error_is_the_closed_form():
    n, b, c = 500, 40, 25
    first, second = _pair(200, b, c, n - 200 - b - c)
    expected = math.sqrt(((b + c) / n - ((b - c) / n) ** 2) / n)
    found = paired(first, second)
    assert found.stderr == pytest.approx(expected)
    assert found.delta == pytest.approx((b - c) / n)
    assert (found.gained, found.lost, found.n) == (b, c, n)
    half = 1.959963984540054 * expected
    assert found.interval == pytest.approx((found.delta - half, found.delta + half))
    assert found.second - found.first == pytest.approx(found.delta)


def test_the_minimum_detectable_difference_is_that_of_the_methods():
    assert detectable_difference(1004, 10042) == pytest.approx(0.0088, abs=5e-5)
    assert detectable_difference(10, 100) == pytest.approx(0.0885, abs=5e-5)
    assert detectable_difference(0, 100) > 0


def test_the_bootstrap_covers_like_an_index_bootstrap():
    rng = np.random.default_rng(3)
    differences = rng.choice([-1.0, 0.0, 1.0], 120, p=[0.15, 0.6, 0.25])
    means = differences[rng.integers(0, 120, (20_000, 120))].mean(axis=1)
    expected = np.quantile(means, [0.025, 0.975])
    found = bootstrap_interval(differences, draws=20_000)
    assert found == pytest.approx(tuple(expected), abs=0.012)
    assert found == bootstrap_interval(differences, draws=20_000)
    error = standard_error(differences)
    assert (found[1] - found[0]) / (2 * 1.96) == pytest.approx(error, rel=0.1)


def test_the_bootstrap_keeps_to_its_strata():
    # All the difference lies between the strata: within them nothing varies.
    differences = np.array([1.0] * 50 + [0.0] * 50)
    strata = ["a"] * 50 + ["b"] * 50
    assert bootstrap_interval(differences, strata) == (0.5, 0.5)
    low, high = bootstrap_interval(differences)
    assert low < 0.45 < 0.55 < high
    mixed = np.arange(100) % 2 * 1.0
    shuffled = bootstrap_interval(mixed, strata, draws=20_000)
    assert shuffled == pytest.approx(bootstrap_interval(mixed, draws=20_000), abs=0.02)


def test_real_values_get_a_paired_t_test():
    rng = np.random.default_rng(0)
    first = rng.normal(2.0, 1.0, 80)
    second = first + rng.normal(0.05, 0.1, 80)
    found = paired(first.tolist(), second.tolist())
    assert found.p_value == pytest.approx(ttest_rel(second, first).pvalue)
    assert found.detectable == pytest.approx(2.8 * found.stderr)
    assert found.bootstrap == pytest.approx(found.interval, abs=0.01)
    assert paired([0.5, 0.7], [0.5, 0.7]).p_value == 1.0


def test_holm_steps_down():
    assert holm([0.01, 0.04, 0.03, 0.5]) == pytest.approx([0.04, 0.09, 0.09, 0.5])
    assert holm([0.2]) == [0.2]
    assert holm([]) == []
    assert holm([0.9, 0.8]) == [1.0, 1.0]


def test_no_difference_is_never_called_equal():
    same = paired(*_pair(50, 5, 5, 40))
    words = verdict(same.delta, same.p_value, same.detectable)
    assert words == f"no detectable difference (MDE {100 * same.detectable:.2g} points)"
    assert verdict(0.031, 0.001, 0.01) == "higher by 3.1 points"
    assert verdict(-0.02, 0.04, 0.01, unit="bits/byte") == "lower by 0.02 bits/byte"


def test_what_cannot_be_paired_is_refused():
    with pytest.raises(SlimError, match="2 and 3 questions"):
        paired([1, 0], [1, 0, 1])
    with pytest.raises(SlimError, match="0 and 0"):
        paired([], [])
