"""What ``mlx-slim sweep`` is given besides the recipe and its space.

Invariant: the only home of these defaults; nothing heavy is imported. Try it:
``mlx-slim sweep --help``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal, get_args

from annotated_types import Interval

from mlx_slim.cluster.options import PoolOptions
from mlx_slim.config.options import option
from mlx_slim.config.values import Count, PositiveInt, Seed
from mlx_slim.errors import SlimError, did_you_mean

Objective = Literal["validation_loss", "peak_memory"]
OBJECTIVES: tuple[Objective, ...] = get_args(Objective)
LOSS: Objective = "validation_loss"
PrunerName = Literal["median", "hyperband", "none"]


@dataclass(frozen=True)
class SweepOptions(PoolOptions):
    """How many trials, judged by what; how many at a time and where, says ``PoolOptions``.

    Attributes:
        trials: Settings that are tried.
        objective: What is minimised: ``validation_loss`` (the best of a trial, nats per token),
            ``peak_memory`` (predicted, bytes), or both.
        pruner: Which trials end before their last step (``median``: worse than the median of the
            others at the same step; ``hyperband``); without effect with two objectives.
        seeds: Other seeds that the best trial is run again on.
        seed: Of the proposals.
    """

    trials: PositiveInt = field(default=20, metadata=option("Settings to try.", metavar="N"))
    objective: tuple[str, ...] = field(
        default=(LOSS,),
        metadata=option(
            "What to minimise: validation_loss, peak_memory; repeat it for both [validation_loss].",
            metavar="NAME",
            multiple=True,
        ),
    )
    pruner: PrunerName = field(
        default="median", metadata=option("Which trials end before their last step.")
    )
    seeds: Annotated[Count, Interval(le=100)] = field(
        default=2, metadata=option("Other seeds to run the best trial again on.", metavar="N")
    )
    seed: Seed = field(default=0, metadata=option("Seed of the proposals.", metavar="N"))

    @property
    def prunes(self) -> bool:
        """Whether trials may end before their last step."""
        return self.pruner != "none" and len(self.objective) == 1


def check(options: SweepOptions) -> None:
    """Check what can be checked without a recipe.

    Raises:
        SlimError: An objective is unknown, given twice, or the loss is not among them.
    """
    for name in options.objective:
        if name not in OBJECTIVES:
            raise SlimError(f"no objective is called {name!r}", did_you_mean(name, OBJECTIVES))
        if options.objective.count(name) > 1:
            raise SlimError(f"the objective {name} is given twice", "give it once")
    if LOSS not in options.objective:
        raise SlimError(
            f"the objectives are {', '.join(options.objective) or 'none'}, without {LOSS}",
            f"add --objective {LOSS}: the least memory alone is the smallest setting",
        )
