"""Paired statistics of two models on the same questions: difference and detectable difference.

Invariant: everything is paired, question by question; intervals are of the difference, never
of one model alone. Values are 0/1 for accuracies and real numbers for text (nats a window); the
difference is always second minus first. Try it: ``mlx-slim eval --compare OUT_A OUT_B``.
Legend: N questions, B bootstrap draws, M discordant pairs.

Sources: McNemar 1947 (exact form: a binomial test of the discordant pairs); Holm 1979; Efron 1979;
METHODS .7: SE √[((b+c)/n − ((b−c)/n)²)/n]. The minimum detectable difference is the smallest true
one that the test flags with 80% power at 5% divided by the number of tests, the level of the first
step of Holm's correction. The power of McNemar's test is exact: a sum over the binomial number of
discordant pairs and of those won by one side; 2.80 · √(discordant fraction / n) is its limit for
one test and many pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from mlx_slim.errors import SlimError

LEVEL = 0.95
DRAWS = 10_000
POWER = 0.8
_PAIRS = 128  # numbers of discordant pairs that the power is summed over
_BLOCK = 1 << 22  # counts that a block of bootstrap draws holds


@dataclass(frozen=True)
class Paired:
    """A paired comparison; every difference is second minus first.

    Attributes:
        n: Questions.
        first: Mean of the first model.
        second: Mean of the second.
        delta: ``second - first``.
        stderr: Standard error of ``delta``.
        interval: Confidence interval of ``delta`` at ``LEVEL``: normal for 0/1 values, else
            Student's t. Of one question: (-1, 1) for 0/1 values, else None.
        bootstrap: Percentile interval of ``DRAWS`` paired resamples, within strata.
        gained: Questions where only the second is right.
        lost: Questions where only the first is right.
        p_value: Exact McNemar for 0/1 values, else a paired t test.
        detectable: The smallest true difference that the corrected test flags with 80% power;
            None if there are too few questions for any.
    """

    n: int
    first: float
    second: float
    delta: float
    stderr: float
    interval: tuple[float, float] | None
    bootstrap: tuple[float, float]
    gained: int
    lost: int
    p_value: float
    detectable: float | None


def mcnemar(gained: int, lost: int) -> float:
    """Return the exact two-sided p of ``gained`` against ``lost`` discordant pairs.

    p = min(1, 2 Σ_{i ≤ min(b, c)} C(b+c, i) / 2^(b+c)).
    """
    from scipy.stats import binom

    return min(1.0, 2.0 * float(binom.cdf(min(gained, lost), gained + lost, 0.5)))


def standard_error(differences_N: np.ndarray) -> float:
    """Return the standard error of a mean of paired differences: √[(mean d² − (mean d)²) / n]."""
    return float(np.sqrt(differences_N.var() / len(differences_N)))


def bootstrap_interval(
    differences_N: np.ndarray,
    strata: Sequence[object] | None = None,
    *,
    draws: int = DRAWS,
    level: float = LEVEL,
    seed: int = 0,
) -> tuple[float, float]:
    """Return the percentile interval of the mean difference over paired resamples.

    Drawing n questions with replacement draws a multinomial count of each value that occurs, so the
    cost of a resample grows with the number of values (three for accuracies), not of questions.

    Args:
        differences_N: Second minus first, one a question.
        strata: Group of each question: resampled within groups, so their sizes stay.
        draws: Resamples.
        level: Of the interval.
        seed: Of the draws.
    """
    rng = np.random.default_rng(seed)
    sums_B = np.zeros(draws)
    groups = [differences_N]
    if strata is not None:
        _, group_N = np.unique(np.array([str(name) for name in strata]), return_inverse=True)
        groups = [differences_N[group_N == group] for group in range(group_N.max() + 1)]
    for members in groups:
        values, counts = np.unique(members, return_counts=True)
        block = max(1, _BLOCK // len(values))
        for begin in range(0, draws, block):
            drawn = rng.multinomial(len(members), counts / len(members), min(block, draws - begin))
            sums_B[begin : begin + block] += drawn @ values
    low, high = np.quantile(sums_B / len(differences_N), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


@lru_cache(maxsize=4096)
def detectable_difference(discordant: float, n: int, tests: int = 1) -> float | None:
    """Return the smallest true difference that McNemar's exact test flags with 80% power.

    With a fraction f of discordant pairs as observed, M of n are discordant (binomial), and the
    better side wins each with probability (1 + δ/f)/2. A difference above f takes more discordant
    pairs, all won by one side; at least as many as the test needs to flag them.

    Args:
        discordant: Questions that only one side got right; a mean may be a fraction.
        n: Questions.
        tests: Of the family: each is held to 5% divided by it.

    Returns:
        A fraction of the questions; None if even a difference of all questions is not flagged.
    """
    from scipy.stats import binom

    level, discordant_fraction = (1 - LEVEL) / tests, discordant / n
    least = int(np.ceil(1 - np.log2(level) - 1e-9))  # 2 · 2^−M ≤ level

    def one_sided(delta: float) -> float:
        return float(binom.sf(least - 1, n, delta)) - POWER

    if one_sided(1.0) < 0:
        return None
    if discordant:
        low, high = binom.interval(1 - 1e-7, n, discordant_fraction)
        pairs_M = np.unique(np.linspace(low, high, _PAIRS).astype(int))
        weight_M = binom.pmf(pairs_M, n, discordant_fraction)
        flagged_M = binom.ppf(level / 2, pairs_M, 0.5).astype(int)  # fewest wins that are too few
        flagged_M -= 2 * binom.cdf(flagged_M, pairs_M, 0.5) > level

        def power(delta: float) -> float:
            wins = (1 + delta / discordant_fraction) / 2
            power_M = binom.cdf(flagged_M, pairs_M, wins)
            power_M = power_M + binom.sf(pairs_M - flagged_M - 1, pairs_M, wins)
            return float(weight_M @ power_M / weight_M.sum()) - POWER

        if power(discordant_fraction) >= 0:
            return _root(power, 0.0, discordant_fraction)
    return _root(one_sided, discordant_fraction, 1.0)


def _root(function: Callable[[float], float], low: float, high: float) -> float:
    from scipy.optimize import brentq

    if function(low) >= 0:
        return low
    return float(brentq(function, low, high, xtol=1e-6))  # pyright: ignore[reportArgumentType]


def detectable_mean(differences_N: np.ndarray, tests: int = 1) -> float | None:
    """Return the smallest true mean difference that a paired t test flags with 80% power.

    Args:
        differences_N: Second minus first; their spread is what counts.
        tests: Of the family: each is held to 5% divided by it.
    """
    from scipy.stats import nct, t

    n = len(differences_N)
    if n < 2:
        return None
    freedom, error = n - 1, float(differences_N.std(ddof=1) / np.sqrt(n))
    if error == 0:
        return 0.0
    edge = float(t.ppf(1 - (1 - LEVEL) / tests / 2, freedom))

    def power(errors: float) -> float:
        return float(nct.sf(edge, freedom, errors)) - POWER

    return error * _root(power, 0.0, 2 * edge + 3)


def chance_level(samples: Sequence[Mapping[str, Any]]) -> float | None:
    """Return the expected accuracy of guessing: 1/choices, or 0 for generated answers.

    Args:
        samples: Per-question records of one task; other kinds of records give None.
    """
    if all("loglikelihoods" in sample for sample in samples):
        return float(np.mean([1 / len(sample["loglikelihoods"]) for sample in samples]))
    return 0.0 if all("generation" in sample for sample in samples) else None


def above_chance(right: float, n: int, chance: float) -> bool:
    """Return whether ``right`` answers of n are above chance (2.5%, one-sided).

    Args:
        right: Right answers; a mean over several runs may be a fraction.
        n: Questions.
        chance: Expected accuracy of guessing.
    """
    from scipy.stats import binom

    return float(binom.sf(np.floor(right + 1e-9) - 1, n, chance)) <= (1 - LEVEL) / 2


def paired(
    first_N: Sequence[float],
    second_N: Sequence[float],
    strata: Sequence[object] | None = None,
    *,
    draws: int = DRAWS,
    seed: int = 0,
    tests: int | None = 1,
) -> Paired:
    """Compare two models on the same questions.

    Args:
        first_N: The first model's value for each question.
        second_N: The second's, in the same order.
        strata: Group of each question, for the bootstrap.
        draws: Bootstrap resamples.
        seed: Of the bootstrap.
        tests: Of the family that the comparison belongs to, for ``detectable``; None leaves it out.

    Raises:
        SlimError: If there are no questions, or not as many on both sides.
    """
    from scipy.stats import norm, t, ttest_rel

    a_N, b_N = np.asarray(first_N, dtype=float), np.asarray(second_N, dtype=float)
    if a_N.shape != b_N.shape or not len(a_N):
        raise SlimError(
            f"{len(a_N)} and {len(b_N)} questions cannot be paired", "score both on the same rows"
        )
    differences_N = b_N - a_N
    n, delta, error = len(a_N), float(differences_N.mean()), standard_error(differences_N)
    binary = bool(np.isin(a_N, (0, 1)).all() and np.isin(b_N, (0, 1)).all())
    gained, lost = int((differences_N > 0).sum()), int((differences_N < 0).sum())
    detectable = None
    if binary:
        p_value = mcnemar(gained, lost)
        if tests is not None:
            detectable = detectable_difference(gained + lost, n, tests)
    else:
        p_value = float(ttest_rel(b_N, a_N).pvalue) if n > 1 and error > 0 else 1.0
        if tests is not None:
            detectable = detectable_mean(differences_N, tests)
    if n < 2:
        interval = (-1.0, 1.0) if binary else None
    else:
        if binary:
            half = float(norm.ppf((1 + LEVEL) / 2)) * error
        else:  # of few documents the normal interval is too narrow
            half = float(t.ppf((1 + LEVEL) / 2, n - 1) * differences_N.std(ddof=1) / np.sqrt(n))
        interval = (delta - half, delta + half)
    return Paired(
        n=n,
        first=float(a_N.mean()),
        second=float(b_N.mean()),
        delta=delta,
        stderr=error,
        interval=interval,
        bootstrap=bootstrap_interval(differences_N, strata, draws=draws, seed=seed),
        gained=gained,
        lost=lost,
        p_value=p_value,
        detectable=detectable,
    )


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p values adjusted for a family of tests (Holm's step-down), in the same order."""
    adjusted = [0.0] * len(p_values)
    highest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = highest
    return adjusted


def verdict(delta: float, p_value: float, detectable: float | None, *, unit: str = "points") -> str:
    """Return the comparison as a phrase; it never claims equality.

    Args:
        delta: Second minus first: a fraction where ``unit`` is ``points``, else in that unit.
        p_value: Adjusted for the family.
        detectable: The minimum detectable difference, as ``delta``; None if there is none.
        unit: ``points`` (hundredths), or what ``delta`` is measured in.
    """
    scale = 100 if unit == "points" else 1
    if p_value < 1 - LEVEL:
        return f"{'higher' if delta > 0 else 'lower'} by {abs(delta) * scale:.3g} {unit}"
    if detectable == 0:
        return "no difference in any part"
    if detectable is None:
        return "no detectable difference (too few questions to detect any)"
    return f"no detectable difference (MDE {detectable * scale:.2g} {unit})"
