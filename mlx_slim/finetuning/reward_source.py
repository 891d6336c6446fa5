"""The function of ``--reward`` in the record of a run: which one, and whether it is still the same.

Invariant: a run is resumed with the function that it was started with, by its name and the hash of
its file, which may have moved. Try it: ``mlx-slim train smollm2-grpo --reward f.py:f -o runs/try``.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mlx_slim.errors import SlimError
from mlx_slim.reading import JsonObject, library_errors, read_object, short

if TYPE_CHECKING:
    from mlx_slim.config.reward import RewardSource


def reward_source(state: JsonObject, file: Path) -> RewardSource | None:
    """Return the function that scores the answers of a run, from its ``recipe.json``.

    Raises:
        SlimError: If the record is damaged; ``file`` is named.
    """
    reward = state.get("reward")
    if reward is None:
        return None
    from mlx_slim.config.reward import RewardSource

    with library_errors(f"{short(file)} is damaged", "start a new run"):
        return RewardSource(**reward)


def check_same_reward(file: Path, reward: RewardSource | None) -> None:
    """Refuse to resume a run with another function than its ``recipe.json`` names.

    Raises:
        SlimError: Names both.
    """
    started = reward_source(read_object(file), file)
    if (started and started.same) == (reward and reward.same):
        return
    before = "without --reward" if started is None else f"with --reward {started.function}"
    now = "none is given" if reward is None else f"{reward.function} is given"
    if started and reward and started.same[0] == reward.same[0]:
        now = "its file has other contents now"
    raise SlimError(
        f"{file.parent} was started {before}, {now}",
        "resume with the function that it was started with, or start a new run",
    )
