"""The curves of a run's page that tell of its policy: entropy, divergence from the start, clips.

Invariant: a curve stands there only if the run reported what it shows; those of the rewards are
among the curves of the rounds (``round_curves.py``). Try it: ``mlx-slim train smollm2-grpo -o
runs/grpo`` and open ``runs/grpo/report.html``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from mlx_slim.events import StepDone
from mlx_slim.finetuning.curves import Series, chart, smooth

_TERMS = StepDone.record_keys["metrics"]  # where a step's event has the terms of its loss


def policy_charts(steps: Sequence[Mapping[str, Any]]) -> list[tuple[str, Markup]]:
    """Return (title, picture) of each curve that has points.

    Args:
        steps: The ``step`` events of ``metrics.jsonl``.
    """

    def term(name: str) -> list[tuple[float, float]]:
        values = [(float(event["step"]), _figure(event, _TERMS, name)) for event in steps]
        return [(step, float(y)) for step, y in values if isinstance(y, int | float)]

    kl = term("kl")
    drawn = [
        (
            "Entropy of the policy, nats",
            chart(
                "entropy of the policy by step",
                [Series("entropy", smooth(term("entropy")), "--c1")],
                y=lambda value: f"{value:.3g}",
                zero=True,
            ),
        ),
        (
            "KL divergence from the start, nats per token",
            chart(
                "KL divergence by step",
                [Series("KL", smooth(kl if any(y for _, y in kl) else []), "--c3")],
                y=lambda value: f"{value:.2g}",
                zero=True,
            ),
        ),
        (
            "Tokens clipped",
            chart(
                "share of tokens clipped by step",
                [
                    Series("below", term("clip_low"), "--c4"),
                    Series("above", term("clip_high"), "--c5"),
                ],
                y=lambda value: f"{value:.2%}",
                zero=True,
            ),
        ),
    ]
    return [(title, picture) for title, picture in drawn if picture is not None]


def reward_curve(rounds: Sequence[Mapping[str, Any]]) -> list[tuple[float, float]]:
    """Return (step, mean reward, smoothed) of each round that was scored by rewards."""
    means = [(float(one["step"]), _figure(one, "metrics", "reward")) for one in rounds]
    return smooth([(step, mean) for step, mean in means if isinstance(mean, int | float)])


def _figure(event: Mapping[str, Any], key: str, name: str) -> Any:
    """Return a figure among others of an event; None where there is none."""
    figures = event.get(key)
    return figures.get(name) if isinstance(figures, Mapping) else None
