"""Everything a run needs to go on exactly, in one folder that is whole or absent.

Invariant: ``checkpoints/step-N`` is renamed into place after all its files are on disk, and holds
trainable weights, optimizer state (moments, float32 masters, step), what companions remember and
the loop's position. Nothing else has state: shuffles and dropout are functions of (seed, epoch,
step), the learning rate of the step, and checkpoints are taken between optimizer steps, when
nothing is accumulated.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_slim.artifacts import atomic_folder, load_tensors, save_tensors, write_json
from mlx_slim.errors import SlimError
from mlx_slim.reading import field, library_errors, read_object, short
from mlx_slim.training.callbacks import Companion, gather, hand_out
from mlx_slim.training.optim import Optimizer, set_trainable, trainable
from mlx_slim.training.rotation import CARRIED, STATE, path_of

VALIDATED = ("best_loss", "best_step", "since_best")
WATCHED = ("held_out_step", "held_out_over")


@dataclass
class Position:
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


def save(
    folder: Path,
    position: Position,
    model: nn.Module,
    optimizer: Optimizer,
    companions: Sequence[Companion] = (),
) -> Path:
    """Write the checkpoint of ``position`` under ``folder`` and return its path.

    Raises:
        ResourceError: If the disk is full; older checkpoints stay.
    """
    target = path_of(folder, position.step)
    with atomic_folder(target, replace=True) as temporary:
        save_tensors(temporary / "weights.safetensors", trainable(model))
        save_tensors(temporary / "optimizer.safetensors", optimizer.state())
        if carried := gather(companions):
            save_tensors(temporary / CARRIED, carried)
        write_json(temporary / STATE, asdict(position))
    return target


def load_weights(path: Path, model: nn.Module) -> None:
    """Put the trainable weights of the checkpoint at ``path`` into ``model``.

    Raises:
        SlimError: If names or shapes are not those of the model.
    """
    values = load_tensors(path / "weights.safetensors")
    expected = {name: value.shape for name, value in trainable(model).items()}
    if {name: value.shape for name, value in values.items()} != expected:
        raise SlimError(
            f"{path} was made for other trainable weights "
            f"({len(values)} tensors, this recipe trains {len(expected)})",
            "resume with the recipe that started the run",
        )
    set_trainable(model, values)
    mx.eval(model.parameters())


def load(
    path: Path, model: nn.Module, optimizer: Optimizer, companions: Sequence[Companion] = ()
) -> Position:
    """Put the checkpoint at ``path`` back and return its position.

    Raises:
        SlimError: If it belongs to another model or optimizer.
    """
    load_weights(path, model)
    try:
        optimizer.load_state(load_tensors(path / "optimizer.safetensors"))
        carried = path / CARRIED
        hand_out(companions, load_tensors(carried) if carried.exists() else {})
    except KeyError as error:
        raise SlimError(
            f"{path} was made with another optimizer: {error} is in one of the two only",
            "resume with the recipe that started the run",
        ) from error
    mx.eval(optimizer.arrays())
    return read_position(path)


def read_position(path: Path) -> Position:
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
        return Position(**values)
