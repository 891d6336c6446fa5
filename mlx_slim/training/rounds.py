"""Rounds: rows that the model itself writes while it is trained.

At the beginning of a round, some optimizer steps, the model answers the prompts of rows that these
steps will take; the steps then learn from these answers in place of the rows, where the round says
so. Invariant: which micro-batches and rows these are is a function of the plan and the
configuration, and what a round holds one of the weights at its beginning besides; so a run that is
killed and resumed takes the same steps. The loop only asks for batches: who answers, and what is
learned from it, ``finetuning/rounds.py`` says. Try it: ``mlx-slim distill distill-on-policy-smollm2
-o runs/on-policy``.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from typing import Protocol

from mlx_slim.data.batches import Batch
from mlx_slim.data.plans import Plan


class Begun(enum.Enum):
    """How the beginning of a round ended."""

    READY = enum.auto()
    INTERRUPTED = enum.auto()  # what there is so far is on disk
    PUT_AWAY = enum.auto()  # the rest of the work needs the memory of model and optimizer


class Rounds(Protocol):
    """The rounds of a run.

    Attributes:
        steps: Optimizer steps of a round.
    """

    steps: int

    def begin(
        self, step: int, plans: Sequence[Plan], rates: Sequence[float], stop: Callable[[], bool]
    ) -> Begun:
        """Have ready what the steps of the round after ``step`` steps need.

        Args:
            step: Steps done: a multiple of ``steps``.
            plans: Of the round's steps.
            rates: Learning rates of the steps done: with another one, the answers are others.
            stop: Whether to end early.

        Raises:
            SlimError: If the answers on disk are not those of the run.
        """
        ...

    def reopen(self, step: int, stop: Callable[[], bool]) -> Begun:
        """Have ready what the rest of a round needs, in whose midst ``step`` is.

        Raises:
            SlimError: If its answers are gone: the weights that wrote them are too.
        """
        ...

    def batches(self, step: int, index: int) -> list[Batch] | None:
        """Return what replaces micro-batch ``index`` of the step after ``step`` steps.

        None leaves it as it is. Several batches are as if one: a step sums them up.
        """
        ...

    def replaces(self, step: int, index: int) -> bool:
        """Return whether micro-batch ``index`` of the step after ``step`` steps is replaced."""
        ...

    def age(self, step: int) -> int:
        """Return how many steps ago the model had the weights that answered, before a step."""
        ...

    def largest_batch(self) -> Batch:
        """Return a batch, for measuring only, as large as the largest of any round."""
        ...
