"""The train state: how far a run is, between two optimizer steps; the numbers of a checkpoint.

Invariant: with the trainable weights, the optimizer and the state of the callbacks, it is all that
a run needs to resume exactly; see ``training/checkpoint.py``.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from mlx_slim.errors import SlimError
from mlx_slim.reading import JsonObject, field, library_errors, read_object, short
from mlx_slim.training.legacy import is_legacy, upgrade_state
from mlx_slim.training.rotation import STATE

CALLBACKS = "callbacks"  # in ``state.json``: name of a callback -> its JSON values
_VALIDATED = ("best_loss", "best_score", "best_step", "since_best")


@dataclass
class TrainState:
    """How far a run is.

    Attributes:
        step: Optimizer steps done.
        epoch: Epoch that the next micro-batch belongs to.
        taken: Micro-batches of that epoch already used, over all ranks.
        tokens: Real tokens trained on.
        seconds: Wall time of training steps.
        best_loss: Lowest validation loss so far, nats per token.
        best_score: Best figure of the metric that decides in place of the loss, if there is one.
        best_step: Step that the better of these was reached at: of the metric, else of the loss.
        since_best: Validations since then.
        total: Steps that the run was to take when this was saved; None of version 0.1.
        open: The validation fields before the validation that only the last step made: a longer run
            has not made it.
        required: Steps of other checkpoints that may become the result of this run or a longer one.
    """

    step: int = 0
    epoch: int = 0
    taken: int = 0
    tokens: int = 0
    seconds: float = 0.0
    best_loss: float | None = None
    best_score: float | None = None
    best_step: int | None = None
    since_best: int = 0
    total: int | None = None
    open: JsonObject = dataclasses.field(default_factory=dict)
    required: list[int] = dataclasses.field(default_factory=list)

    def keep_open(self) -> None:
        """Remember the validation fields, before a validation that a longer run does not make."""
        self.open = {name: getattr(self, name) for name in _VALIDATED}

    def reopen(self, undo: bool) -> bool:
        """Forget that validation, or keep it with ``undo=False``; return whether undone."""
        undone = undo and bool(self.open)
        if undone:
            for name, value in self.open.items():
                setattr(self, name, value)
        self.open = {}
        return undone

    def best_steps(self) -> set[int]:
        """Return the steps of the best validation: of this run, and of a longer one."""
        steps = (self.best_step, self.open.get("best_step"))
        return {step for step in steps if step is not None}


def read_state(path: Path) -> TrainState:
    """Return the train state of the checkpoint at ``path``.

    Raises:
        SlimError: If its ``state.json`` is damaged.
    """
    values, where = read_object(path / STATE), short(path / STATE)
    if is_legacy(values):
        values = upgrade_state(values)
    values.pop(CALLBACKS, None)
    for key in ("step", "epoch", "taken", "tokens", "since_best"):
        field(values, where, key, int, 0, low=0)
    field(values, where, "best_step", int, None, low=0)
    for key in ("seconds", "best_loss", "best_score"):
        field(values, where, key, float, None)
    field(values, where, "total", int, None, low=1)
    field(values, where, "required", list, [], of=int)
    opened = field(values, where, "open", dict, {})
    for key in opened:
        kind = float if key in ("best_loss", "best_score") else int
        field(opened, f"{where}: open", key, kind, None, low=None if kind is float else 0)
    if unknown := opened.keys() - {*_VALIDATED}:
        raise SlimError(
            f"{where}: open has the unknown key {min(unknown)}", "resume from an older checkpoint"
        )
    with library_errors(f"{where} is damaged", "resume from an older checkpoint"):
        return TrainState(**values)
