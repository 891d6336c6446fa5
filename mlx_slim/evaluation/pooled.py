"""Statistics of the mean over several tasks: difference, retention, detectable difference.

Invariant: everything is paired, question by question, inside each task; tasks have equal weight.
For one task the test is McNemar's exact test, as in ``stats.py``. Used by the report's headline.

A mean of k/n over tasks is not a count, so its test draws the signs of the differences: without a
true difference both signs are equally likely (Fisher's paired randomization test). Intervals are
normal ones with a few observations added (Agresti & Coull 1998; of differences Agresti & Min 2005);
those of ratios come by the delta method.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mlx_slim.evaluation.stats import LEVEL, detectable_difference, mcnemar

SIGNS = 100_000  # draws of the signs


@dataclass(frozen=True)
class Added:
    """Observations added to each task, so that no interval has width 0 where all answers agree.

    Attributes:
        n: How many.
        total: Their sum.
        squares: The sum of their squares.
    """

    n: int
    total: float
    squares: float


PAIRS = Added(2, 0.0, 1.0)  # half a pair of each kind: both right, both wrong, gained, lost
SCORES = Added(4, 2.0, 2.0)  # two right, two wrong


def mean_and_error(values: Sequence[np.ndarray], added: Added) -> tuple[float, float]:
    """Return the mean over tasks of the mean over each task's questions, and its standard error.

    Both with ``added`` in each task: where no answer differs, or all are right, the plain error
    would be 0.

    Args:
        values: One array a task, a value a question.
        added: ``PAIRS`` for paired differences, ``SCORES`` for accuracies.
    """
    means = [(x.sum() + added.total) / (len(x) + added.n) for x in values]
    squares = [((x**2).sum() + added.squares) / (len(x) + added.n) for x in values]
    spreads = zip(values, means, squares, strict=True)
    error = float(np.sqrt(sum((s - m**2) / (len(x) + added.n) for x, m, s in spreads)))
    return float(np.mean(means)), error / len(values)


def mean_interval(
    values: Sequence[np.ndarray], added: Added, tests: int = 1
) -> tuple[float, float]:
    """Return the confidence interval of a mean over tasks, clipped to its possible range.

    Args:
        values: As ``mean_and_error``.
        added: As there.
        tests: Of the family: the interval leaves out 5% divided by it.
    """
    mean, error = mean_and_error(values, added)
    half, least = errors_wide(tests) * error, 0.0 if added is SCORES else -1.0
    return max(least, mean - half), min(1.0, mean + half)


def errors_wide(tests: int = 1) -> float:
    """Return half the width of a normal interval that leaves out 5% / ``tests``, in errors."""
    from scipy.stats import norm

    return float(norm.isf((1 - LEVEL) / tests / 2))


def sign_flip(differences: Sequence[np.ndarray], *, draws: int = SIGNS, seed: int = 0) -> float:
    """Return the two-sided p of a mean over tasks, under random signs of the differences.

    Where all differences have the same weight this is McNemar's exact test of them all.

    Args:
        differences: One array a task: second minus first, one a question.
        draws: Of the signs, where the weights differ.
        seed: Of the draws.
    """
    weighted = np.concatenate([x / len(x) for x in differences])
    sizes, counts = np.unique(np.abs(weighted[weighted != 0]).round(12), return_counts=True)
    if len(sizes) < 2:
        return mcnemar(int((weighted > 0).sum()), int((weighted < 0).sum()))
    wins = np.random.default_rng(seed).binomial(counts, 0.5, (draws, len(sizes)))
    sums_B = (2 * wins - counts) @ sizes
    extremes = int((np.abs(sums_B) >= abs(float(weighted.sum())) - 1e-9).sum())
    return (extremes + 1) / (draws + 1)


def detectable_pooled(differences: Sequence[np.ndarray], tests: int = 1) -> float | None:
    """Return the smallest true mean over tasks that ``sign_flip`` flags with 80% power.

    Computed as for one task of T² / Σ 1/nₜ questions (the same variance of the mean) and the same
    fraction of discordant pairs: exact where the tasks are equally large.

    Args:
        differences: As ``sign_flip``.
        tests: Of the family: each is held to 5% divided by it.
    """
    inverse = sum(1 / len(x) for x in differences)
    discordant_fraction = sum(float((x**2).mean()) / len(x) for x in differences) / inverse
    n = int(len(differences) ** 2 / inverse + 1e-9)
    return detectable_difference(round(discordant_fraction * n, 9), n, tests)


def ratio(
    first: Sequence[np.ndarray],
    second: Sequence[np.ndarray],
    chance: float = 0.0,
    *,
    tests: int = 1,
) -> tuple[float, tuple[float, float]] | None:
    """Return the ratio of the second mean to the first, and its paired interval (delta method).

    Args:
        first: One array a task: the values of the first, one a question.
        second: Of the second, on the same questions.
        chance: Mean chance level, subtracted from both.
        tests: Of the family: the interval leaves out 5% divided by it.

    Returns:
        The ratio and its interval; None if the first is not above ``chance``.
    """
    below = float(np.mean([x.mean() for x in first])) - chance
    above = float(np.mean([x.mean() for x in second])) - chance
    if below <= 0:
        return None
    retention = above / below
    left_N = [y - retention * x for x, y in zip(first, second, strict=True)]
    error = mean_and_error(left_N, PAIRS)[1] / below
    half = errors_wide(tests) * error
    return retention, (retention - half, retention + half)
