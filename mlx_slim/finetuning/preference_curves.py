"""Curves of a run that compares answers: reward margins, rewards of both answers, accuracies.

Invariant: they are read from the metrics of its events; a value that is no number is left out. A
run that learns its rows has none. Try it: ``mlx-slim report runs/dpo``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from mlx_slim.events import StepDone
from mlx_slim.finetuning.curves import Series, chart, smooth

METRICS = StepDone.record_keys["metrics"]


def _metric_points(events: Sequence[Mapping[str, Any]], name: str) -> list[tuple[float, float]]:
    """Return the points of one of the terms that a loss reports besides."""
    terms = [(event["step"], event.get(METRICS)) for event in events]
    values = [(step, one.get(name)) for step, one in terms if isinstance(one, dict)]
    return [(float(step), value) for step, value in values if isinstance(value, float)]


def loss_title(recipe: Mapping[str, Any]) -> str:
    """Return the title of the loss curve: what the loss of a run is counted by."""
    preference = recipe.get("preference")
    if preference is None:
        return "Loss, nats per supervised token"
    return "Loss, a row" if preference.get("loss") == "kto" else "Loss, a pair"


def preference_charts(
    steps: Sequence[Mapping[str, Any]], validations: Sequence[Mapping[str, Any]]
) -> list[tuple[str, Markup]]:
    """Return the curves of a run that compares answers: rewards and accuracies."""

    def both(name: str, label: str, color: str) -> list[Series]:
        training, validation = _metric_points(steps, name), _metric_points(validations, name)
        return [
            Series(f"{label}, smoothed", smooth(training), color),
            Series(f"{label}, validation", validation, color, "dots"),
        ]

    rewards = (("rewards/chosen", "chosen", "--c1"), ("rewards/rejected", "rejected", "--c5"))
    accuracies = (
        ("rewards/accuracies", "by reward", "--c2"),
        ("policy/accuracies", "by the policy alone", "--c3"),
    )
    drawn = [
        (
            "Reward margin",
            chart(
                "mean reward of chosen minus rejected answers by step",
                both("rewards/margins", "margin", "--c4"),
                y=lambda value: f"{value:.3g}",
            ),
        ),
        (
            "Rewards",
            chart(
                "mean rewards of both answers by step",
                [one for row in rewards for one in both(*row)],
                y=lambda value: f"{value:.3g}",
            ),
        ),
        (
            "Accuracy: the chosen answer is ahead",
            chart(
                "share of pairs whose chosen answer is ahead by step",
                [one for row in accuracies for one in both(*row)],
                y=lambda value: f"{value:.0%}",
            ),
        ),
    ]
    return [(title, picture) for title, picture in drawn if picture is not None]
