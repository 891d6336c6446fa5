"""Whether a run is sharded: what the recipe asks for, what works, what one rank could hold.

Invariant: all ranks decide the same, before anything is loaded; what cannot be sharded is one line.
Try it: ``mlx.launch -n 2 -- mlx-slim train smollm2-lora train.shard=full -o runs/two``.
"""

from __future__ import annotations

from collections.abc import Callable

from mlx_slim import events
from mlx_slim.config.schema import Recipe
from mlx_slim.errors import SlimError
from mlx_slim.planner.memory import Prediction
from mlx_slim.planner.suggest import changed
from mlx_slim.runtime import all_gather_bytes, world
from mlx_slim.units import human_bytes

# Their update of a number needs numbers of other rows, which other ranks have.
_WHOLE_MATRICES = ("adafactor", "muon")


def shards(recipe: Recipe) -> bool:
    """Return whether a run of ``recipe``, as ``resolve`` returned it, is sharded."""
    return recipe.train.shard == "full" and world().size() > 1


def why_not(recipe: Recipe) -> str:
    """Return what of ``recipe`` cannot be sharded; empty if all can."""
    train, adapter = recipe.train, recipe.adapter
    settings = {
        "method=dora": recipe.method == "dora",
        f"train.optimizer={train.optimizer}": train.optimizer in _WHOLE_MATRICES,
        "train.validate_task": train.validate_task is not None,
        "quantize.qat=true": recipe.quantize.qat,
        "the section distill": recipe.distill is not None,
        "the section preference": recipe.preference is not None,
        "the section reward": recipe.reward is not None,
        "the section forgetting": recipe.forgetting is not None,
    }
    if recipe.method != "full":
        settings |= {
            "adapter.adaptive": adapter.adaptive is not None,
            f"adapter.init={adapter.init}": adapter.init != "standard",
            "adapter.init_from": adapter.init_from is not None,
            "adapter.on": bool(adapter.on),
            "adapter.pooled=true": adapter.pooled,
            "adapter.modules_to_save": bool(adapter.modules_to_save),
        }
    return next((name for name, is_set in settings.items() if is_set), "")


def resolve(
    recipe: Recipe,
    expect: Callable[[Recipe], Prediction],
    budget: int,
    observer: events.Observer,
) -> tuple[Recipe, Prediction]:
    """Return ``recipe`` with ``train.shard`` as ``none`` or ``full``, and what it will need.

    All ranks call it. ``auto`` shards where a rank's predicted peak does not fit its budget and the
    recipe can be sharded.

    Raises:
        SlimError: If ``full`` is set for what cannot be sharded.
    """
    expected = expect(changed(recipe, {"train.shard": "none"}))
    ranks, setting, reason = world().size(), recipe.train.shard, why_not(recipe)
    if ranks == 1 or setting == "none":
        return recipe, expected
    if setting == "full" and reason:
        raise SlimError(
            f"train.shard=full: a model cannot be sharded with {reason}",
            "set train.shard=none, or leave that out",
        )
    whole = expected.predicted_peak_bytes
    if setting == "auto":
        over = all_gather_bytes(b"1" if whole > budget else b"0")
        if reason or b"1" not in over:
            return changed(recipe, {"train.shard": "none"}), expected
    text = (
        f"sharded among {ranks} ranks (alone, one would need {human_bytes(whole)}, predicted); "
        "gradients are summed, then cut: a backend that scatters sums (JACCL) would send half"
    )
    observer.notify(events.Notice(text))
    recipe = changed(recipe, {"train.shard": "full"})
    return recipe, expect(recipe)
