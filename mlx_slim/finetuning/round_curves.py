"""The curves of a run's page that tell of its rounds of answers.

Invariant: empty of a run without rounds. Try it: ``mlx-slim distill distill-on-policy-smollm2
-o runs/on-policy`` and open ``runs/on-policy/report.html``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from mlx_slim.finetuning.curves import Series, chart
from mlx_slim.units import human_seconds


def round_charts(
    rounds: Sequence[Mapping[str, Any]], trained_seconds: float | None
) -> list[tuple[str, Markup]]:
    """Return (title, picture) of the lengths and cut answers, and of what each round took.

    Args:
        rounds: The ``round`` events of ``metrics.jsonl``.
        trained_seconds: Of the whole run; None if it is not complete.
    """
    begun = [one for one in rounds if one["answers"]]
    if not begun:
        return []
    lengths = [(float(one["step"]), one["tokens"] / one["answers"]) for one in begun]
    cut = [(float(one["step"]), one["cut"] / one["answers"]) for one in begun]
    seconds = {
        name: [(float(one["step"]), float(one[f"{name}_seconds"])) for one in begun]
        for name in ("writing", "scoring")
    }
    tokens, answers = sum(one["tokens"] for one in begun), sum(one["answers"] for one in begun)
    spent = ", ".join(
        f"{human_seconds(sum(value for _, value in points))} {name}"
        for name, points in seconds.items()
    )
    training = "" if trained_seconds is None else f", {human_seconds(trained_seconds)} training"
    drawn = [
        (
            f"Answers of the model: {answers:,} in {len(begun)} rounds, {tokens:,} tokens",
            chart(
                "mean tokens of an answer by step of its round",
                [Series("tokens", lengths, "--c2", "dots")],
                y=lambda value: f"{value:.3g}",
                zero=True,
            ),
        ),
        (
            f"Answers that ran into their limit: {sum(one['cut'] for one in begun):,}",
            chart(
                "share of cut answers by step of their round",
                [Series("cut", cut, "--c5", "dots")],
                y=lambda value: f"{value:.0%}",
                zero=True,
            ),
        ),
        (
            f"Time of rounds: {spent}{training}",
            chart(
                "seconds of writing and of scoring by step of the round",
                [
                    Series("writing", seconds["writing"], "--c2", "dots"),
                    Series("scoring", seconds["scoring"], "--c3", "dots"),
                ],
                y=lambda value: f"{value:.3g}",
                zero=True,
            ),
        ),
    ]
    figures = [(float(one["step"]), one.get("metrics")) for one in begun]
    named = [(step, one) for step, one in figures if isinstance(one, dict)]
    for name in dict.fromkeys(name for _, one in named for name in one):
        points = [(step, one[name]) for step, one in named if type(one.get(name)) is float]
        picture = chart(
            f"{name} by step", [Series(name, points, "--c5", "dots")], y="{:.3g}".format
        )
        drawn.append((name.replace("_", " ").capitalize(), picture))
    return [(title, picture) for title, picture in drawn if picture is not None]
