"""Two models on the same questions: is there a difference, and how small a one could be seen?

Invariant: everything is paired, question by question; intervals are about the difference, never
about each side alone. Values are 0/1 for accuracies and real numbers for text (nats a window); the
difference is always second minus first. Try it: ``mlx-slim eval --compare OUT_A OUT_B``.
Legend: N questions, B bootstrap draws.

Sources: McNemar 1947 (exact form: a binomial test of the discordant pairs); Holm 1979; Efron 1979;
the definitions of METHODS §7: SE √[((b+c)/n − ((b−c)/n)²)/n], minimum detectable difference
2.80 · √(discordant share / n), that is 5% two-sided at 80% power.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mlx_slim.errors import SlimError

LEVEL = 0.95
DRAWS = 10_000
_DETECT = 2.80  # 1.96 + 0.84
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
        interval: Normal confidence interval of ``delta`` at ``LEVEL``.
        bootstrap: Percentile interval of ``DRAWS`` paired resamples, within strata.
        gained: Questions where only the second is right.
        lost: Questions where only the first is right.
        p_value: Exact McNemar for 0/1 values, else a paired t test.
        detectable: The smallest difference that such a comparison finds in 4 of 5 cases.
    """

    n: int
    first: float
    second: float
    delta: float
    stderr: float
    interval: tuple[float, float]
    bootstrap: tuple[float, float]
    gained: int
    lost: int
    p_value: float
    detectable: float


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

    Drawing n questions with replacement draws a multinomial count of each value that occurs, so a
    resample costs as much as there are values, three for accuracies, not as there are questions.

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


def detectable_difference(discordant: int, n: int) -> float:
    """Return 2.80 · √(discordant share / n); without a discordant pair one is assumed."""
    return _DETECT * float(np.sqrt(max(discordant, 1) / n / n))


def paired(
    first_N: Sequence[float],
    second_N: Sequence[float],
    strata: Sequence[object] | None = None,
    *,
    draws: int = DRAWS,
    seed: int = 0,
) -> Paired:
    """Compare two models on the same questions.

    Args:
        first_N: The first model's value for each question.
        second_N: The second's, in the same order.
        strata: Group of each question, for the bootstrap.
        draws: Bootstrap resamples.
        seed: Of the bootstrap.

    Raises:
        SlimError: If there are no questions, or not as many on both sides.
    """
    from scipy.stats import norm, ttest_rel

    a_N, b_N = np.asarray(first_N, dtype=float), np.asarray(second_N, dtype=float)
    if a_N.shape != b_N.shape or not len(a_N):
        raise SlimError(
            f"{len(a_N)} and {len(b_N)} questions cannot be paired", "score both on the same rows"
        )
    differences_N = b_N - a_N
    n, delta, error = len(a_N), float(differences_N.mean()), standard_error(differences_N)
    binary = bool(np.isin(a_N, (0, 1)).all() and np.isin(b_N, (0, 1)).all())
    gained, lost = int((differences_N > 0).sum()), int((differences_N < 0).sum())
    if binary:
        p_value, detectable = mcnemar(gained, lost), detectable_difference(gained + lost, n)
    else:
        p_value = float(ttest_rel(b_N, a_N).pvalue) if n > 1 and error > 0 else 1.0
        detectable = _DETECT * error
    half = float(norm.ppf((1 + LEVEL) / 2)) * error
    return Paired(
        n=n,
        first=float(a_N.mean()),
        second=float(b_N.mean()),
        delta=delta,
        stderr=error,
        interval=(delta - half, delta + half),
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


def verdict(delta: float, p_value: float, detectable: float, *, unit: str = "points") -> str:
    """Return the comparison in words; ``equal`` is not one of them.

    Args:
        delta: Second minus first: a share where ``unit`` is ``points``, else in that unit.
        p_value: Adjusted for the family.
        detectable: The minimum detectable difference, as ``delta``.
        unit: ``points`` (hundredths), or what ``delta`` is measured in.
    """
    scale = 100 if unit == "points" else 1
    if p_value < 1 - LEVEL:
        return f"{'higher' if delta > 0 else 'lower'} by {abs(delta) * scale:.3g} {unit}"
    if detectable == 0:
        return "no difference in any part"
    return f"no detectable difference (MDE {detectable * scale:.2g} {unit})"
