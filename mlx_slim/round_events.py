"""What a run reports of its rounds of answers (``training/rounds.py``); an event as in ``events``.

Invariant: figures are those of the answers on disk, so a run that is killed and resumed reports the
same ones. Try it: ``mlx-slim distill distill-on-policy-smollm2 -o runs/on-policy``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mlx_slim.events import Event


@dataclass(frozen=True)
class RoundBegun(Event):
    """The model has answered the prompts of a round, and the answers were scored.

    Attributes:
        step: Optimizer steps done.
        round: Number of the round, from 0.
        steps: Its optimizer steps.
        answers: Answers.
        tokens: Tokens of them.
        cut: Answers that ran into their limit.
        writing_seconds: Wall time of answering.
        scoring_seconds: Wall time of teachers or of rewards.
        metrics: Figures of the answers by name (rewards and what they vary by); None without.
    """

    name: ClassVar[str] = "round"
    step: int
    round: int
    steps: int
    answers: int
    tokens: int
    cut: int
    writing_seconds: float
    scoring_seconds: float
    metrics: dict[str, float] | None = None
