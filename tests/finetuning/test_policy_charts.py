"""The page of a run that trains a policy."""

from __future__ import annotations

from typing import Any

from mlx_slim.events import StepDone
from mlx_slim.finetuning.policy_charts import policy_charts, reward_curve


def step_event(step: int, kl: float) -> dict[str, Any]:
    terms = {"kl": kl, "clip_low": 0.01, "clip_high": 0.02, "entropy": 1.5}
    return {"event": "step", "step": step, StepDone.record_keys["metrics"]: terms}


def test_a_policy_shows_itself() -> None:
    titles = [title for title, _ in policy_charts([step_event(1, 0.0)])]
    assert titles == ["Entropy of the policy, nats", "Tokens clipped"]
    titles = [title for title, _ in policy_charts([step_event(1, 0.1)])]
    assert "KL divergence from the start, nats per token" in titles
    assert policy_charts([{"event": "step", "step": 1}]) == []


def test_the_headline_follows_the_rewards() -> None:
    rounds = [{"step": 0, "metrics": {"reward": 0.25}}, {"step": 2, "metrics": {"reward": 0.5}}]
    assert [step for step, _ in reward_curve(rounds)] == [0.0, 2.0]
    assert reward_curve([{"step": 0, "metrics": None}, {"step": 1}]) == []
