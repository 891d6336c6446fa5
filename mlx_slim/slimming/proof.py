"""What a number of questions can prove of the share of a score that a model keeps.

Invariant: everything is paired, question by question. The score is the mean of the tasks'
accuracies; the share is the second model's score over the first's, and its interval is Fieller's:
all fractions s for which the mean of (second − s · first) is within 1.96 standard errors of 0. Try
it: ``mlx-slim slim MODEL -o DIR --keep 95 --task arc_easy``.

Legend: N questions of a task, a_N and b_N right (1) or wrong (0) of the first and second model,
D fraction of the questions that only one of two models answers right.
Source: Fieller 1954. n ≥ D (1.96 / ((1 − x) · score))² questions show that x is kept.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mlx_slim.evaluation import stats

Z = 1.959963984540054  # two-sided 95%


@dataclass(frozen=True)
class PairedAnswers:
    """ModelAnswers of two models to the same questions of a task.

    Attributes:
        task: Its name.
        metric: What is counted.
        first_N: 1 for a right answer of the first model, else 0.
        second_N: Of the second.
        chance: Expected accuracy of guessing.
    """

    task: str
    metric: str
    first_N: np.ndarray
    second_N: np.ndarray
    chance: float

    @property
    def discordant(self) -> float:
        """D."""
        return float(np.mean(self.first_N != self.second_N))


@dataclass(frozen=True)
class Retention:
    """How much of the score stays.

    Attributes:
        n: Questions of all tasks.
        first: Mean of the tasks' accuracies of the first model.
        second: Of the second.
        value: ``second / first``; None where the first has no right answer.
        interval: 95%; None where the first model's score is not above 0 by its own error.
        corrected: (second − chance) / (first − chance); None where the first does not exceed it.
    """

    n: int
    first: float
    second: float
    value: float | None
    interval: tuple[float, float] | None
    corrected: float | None

    @property
    def least(self) -> float:
        """The lower end of the interval; minus infinity without one."""
        return -math.inf if self.interval is None else self.interval[0]

    def keeps(self, fraction: float) -> bool:
        """Return whether it is shown that at least ``fraction`` stays."""
        return self.least >= fraction - 1e-12


def retention(pairs: Sequence[PairedAnswers]) -> Retention:
    """Return the share of the first model's mean score that the second has."""
    tasks = len(pairs)
    first = float(np.mean([pair.first_N.mean() for pair in pairs]))
    second = float(np.mean([pair.second_N.mean() for pair in pairs]))
    chance = float(np.mean([pair.chance for pair in pairs]))
    moments = np.zeros((2, 2))
    for pair in pairs:
        both = np.stack([pair.first_N, pair.second_N]).astype(float)
        moments += np.cov(both, bias=True) / both.shape[1] / tasks**2
    corrected = (second - chance) / (first - chance) if first > chance else None
    return Retention(
        n=sum(len(pair.first_N) for pair in pairs),
        first=first,
        second=second,
        value=second / first if first else None,
        interval=_fieller(first, second, moments),
        corrected=corrected,
    )


def _fieller(a: float, b: float, moments: np.ndarray) -> tuple[float, float] | None:
    """Return the ends of {s: (b − s·a)² ≤ z² (v_b − 2 s v_ab + s² v_a)}; None if unbounded."""
    v_a, v_ab, v_b = Z**2 * moments[0, 0], Z**2 * moments[0, 1], Z**2 * moments[1, 1]
    square, linear, constant = a * a - v_a, a * b - v_ab, b * b - v_b
    if square <= 0:
        return None
    root = math.sqrt(max(0.0, linear * linear - square * constant))
    return (linear - root) / square, (linear + root) / square


def provable(pairs: Sequence[PairedAnswers], questions: Sequence[int]) -> float:
    """Return the largest share below 1 that ``questions`` of each task can show.

    Args:
        pairs: The original and a model that is as good: the discordance of equals.
        questions: Of each task, for the claim.
    """
    tasks, score = len(pairs), _score(pairs)
    spread = sum(_discordance(p) / n for p, n in zip(pairs, questions, strict=True)) / tasks**2
    return max(0.0, 1 - Z * math.sqrt(spread) / score) if score else 0.0


def needed(pairs: Sequence[PairedAnswers], fraction: float) -> int:
    """Return the questions of each task, for the claim alone, that can show ``fraction``."""
    spread = sum(_discordance(pair) for pair in pairs) / len(pairs) ** 2
    return math.ceil(spread * (Z / ((1 - fraction) * max(_score(pairs), 1e-9))) ** 2)


def _score(pairs: Sequence[PairedAnswers]) -> float:
    return float(np.mean([pair.first_N.mean() for pair in pairs]))


def _discordance(pair: PairedAnswers) -> float:
    """Return D, at least that of one question: none seen is not none."""
    return max(pair.discordant, 1 / len(pair.first_N))


def paired(pair: PairedAnswers) -> stats.Paired:
    """Return the paired statistics of one task."""
    return stats.paired(pair.first_N.tolist(), pair.second_N.tolist(), tests=None)


def percent(retention: Retention) -> str:
    """Return a retention with its interval, in words."""
    if retention.value is None or retention.interval is None:
        return "an unknown share"
    low, high = retention.interval
    return f"{100 * retention.value:.1f}% [{100 * low:.1f}, {100 * high:.1f}]"
