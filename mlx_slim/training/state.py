"""Where a run stands between two optimizer steps: the part of a checkpoint that is numbers.

Invariant: with the trainable weights, the optimizer and the state of the callbacks, it is all that
a run needs to go on exactly; see ``training/checkpoint.py``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_slim.errors import SlimError
from mlx_slim.reading import field, library_errors, read_object, short
from mlx_slim.training.rotation import STATE

VALIDATED = ("best_loss", "best_step", "since_best")


WATCHED = ("held_out_step", "held_out_over")


@dataclass
class TrainState:
    """Where a run stands.

    Attributes:
        step: Optimizer steps done.
        epoch: Epoch that the next micro-batch belongs to.
        taken: Micro-batches of that epoch already used, over all ranks.
        tokens: Real tokens trained on.
        seconds: Wall time of training steps.
        best_loss: Lowest validation loss so far, nats per token.
        best_step: Step it was reached at.
        since_best: Validations since then.
        held_out_start: Bits per byte of the held-out text before the first step.
        held_out_step: Newest step at which that text was within its limit.
        held_out_over: Measurements above the limit since then.
        total: Steps that the run was to take when this was saved; None of version 0.1.
        open: What the measurements after the last step alone have changed, as it was before: a
            longer run has not made them.
    """

    step: int = 0
    epoch: int = 0
    taken: int = 0
    tokens: int = 0
    seconds: float = 0.0
    best_loss: float | None = None
    best_step: int | None = None
    since_best: int = 0
    held_out_start: float | None = None
    held_out_step: int | None = None
    held_out_over: int = 0
    total: int | None = None
    open: dict[str, Any] = dataclasses.field(default_factory=dict)

    def keep_open(self, names: Sequence[str]) -> None:
        """Remember ``names`` as they are, before a measurement that a longer run does not make."""
        self.open |= {name: getattr(self, name) for name in names}

    def reopen(self) -> None:
        """Forget those measurements."""
        for name, value in self.open.items():
            setattr(self, name, value)
        self.open = {}

    def needed(self) -> set[int | None]:
        """Return the steps whose weights may become the result, of this run or a longer one."""
        names = ("best_step", "held_out_step")
        return {at.get(name) for at in (vars(self), self.open) for name in names}


def read_position(path: Path) -> TrainState:
    """Return the position of the checkpoint at ``path``.

    Raises:
        SlimError: If its ``state.json`` is damaged.
    """
    values, where = read_object(path / STATE), short(path / STATE)
    whole = ("step", "epoch", "taken", "tokens", "since_best", "held_out_over")
    for key in whole:
        field(values, where, key, int, 0, low=0)
    for key in ("best_step", "held_out_step"):
        field(values, where, key, int, None, low=0)
    for key in ("seconds", "best_loss", "held_out_start"):
        field(values, where, key, float, None)
    field(values, where, "total", int, None, low=1)
    opened = field(values, where, "open", dict, {})
    for key in opened:
        kind = float if key == "best_loss" else int
        field(opened, f"{where}: open", key, kind, None, low=None if kind is float else 0)
    if unknown := opened.keys() - {*VALIDATED, *WATCHED}:
        raise SlimError(f"{where}: open names {min(unknown)}", "resume from an older checkpoint")
    with library_errors(f"{where} is damaged", "resume from an older checkpoint"):
        return TrainState(**values)
