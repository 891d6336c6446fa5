"""What ``mlx-slim train`` runs: a fine-tune on rows, preferences, or rewards of drawn answers.

Invariant: learning from rewards is a fine-tune with another strategy: the same loop, run folder,
resume, memory guard and verification of what was saved. Try it:
``mlx-slim train smollm2-grpo -o runs/grpo``.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

from mlx_slim import events
from mlx_slim.config.load import Resolved
from mlx_slim.errors import SlimError
from mlx_slim.finetuning.run import finetune
from mlx_slim.finetuning.run_dir import Result
from mlx_slim.preferences.run import train as without_rewards
from mlx_slim.rewards.policy import PolicyStrategy
from mlx_slim.rewards.reward import FunctionReward, reward_of


def train(
    resolved: Resolved,
    out: Path,
    *,
    observer: events.Observer,
    resume: bool = False,
    reward: str | None = None,
) -> Result:
    """Run a recipe into the folder ``out``.

    Args:
        resolved: The recipe and where its values come from.
        out: The run folder; must be new unless ``resume``.
        observer: Hears of every event.
        resume: Resume an interrupted run.
        reward: ``FILE.py:FUNCTION`` that scores answers, or None. The file is run.

    Raises:
        SlimError: As ``finetune``, and if rewards and recipe do not fit.
        ResourceError: Over the memory budget or out of disk, before training.
        Interrupted: Ctrl-C; the state is saved.
    """
    config = resolved.recipe.reward
    if config is None:
        if reward is not None:
            raise SlimError(
                f"--reward {reward} scores drawn answers, and {resolved.source} draws none",
                "give it a reward section: reward={} takes the defaults",
            )
        return without_rewards(resolved, out, observer=observer, resume=resume)
    function = None if reward is None else FunctionReward(reward)
    say = partial(_warn, observer)
    strategy = PolicyStrategy(resolved.recipe, reward_of(config, function), say)
    if function is not None:
        resolved = replace(resolved, reward=function.source)
    return finetune(resolved, out, observer=observer, resume=resume, strategy=strategy)


def _warn(observer: events.Observer, text: str) -> None:
    observer.notify(events.Notice(text, "warning"))
