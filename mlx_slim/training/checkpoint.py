"""Everything a run needs to go on exactly, in one folder that is whole or absent.

Invariant: ``checkpoints/step-N`` is renamed into place after all its files are on disk, and holds
trainable weights, optimizer state (moments, float32 masters, step), what callbacks remember and
the loop's position. Nothing else has state: shuffles and dropout are functions of (seed, epoch,
step), the learning rate of the step, and checkpoints are taken between optimizer steps, when
nothing is accumulated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

from mlx_slim.artifacts import atomic_folder, load_tensors, save_tensors, write_json
from mlx_slim.errors import SlimError
from mlx_slim.training.callbacks import Callback, gather, hand_out
from mlx_slim.training.optim import Optimizer, set_trainable, trainable
from mlx_slim.training.rotation import CARRIED, STATE, path_of
from mlx_slim.training.state import TrainState, read_position


def save(
    folder: Path,
    position: TrainState,
    model: nn.Module,
    optimizer: Optimizer,
    callbacks: Sequence[Callback] = (),
) -> Path:
    """Write the checkpoint of ``position`` under ``folder`` and return its path.

    Raises:
        ResourceError: If the disk is full; older checkpoints stay.
    """
    target = path_of(folder, position.step)
    with atomic_folder(target, replace=True) as temporary:
        save_tensors(temporary / "weights.safetensors", trainable(model))
        save_tensors(temporary / "optimizer.safetensors", optimizer.state())
        if carried := gather(callbacks):
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
    path: Path, model: nn.Module, optimizer: Optimizer, callbacks: Sequence[Callback] = ()
) -> TrainState:
    """Put the checkpoint at ``path`` back and return its position.

    Raises:
        SlimError: If it belongs to another model or optimizer.
    """
    load_weights(path, model)
    try:
        optimizer.load_state(load_tensors(path / "optimizer.safetensors"))
        carried = path / CARRIED
        hand_out(callbacks, load_tensors(carried) if carried.exists() else {})
    except KeyError as error:
        raise SlimError(
            f"{path} was made with another optimizer: {error} is in one of the two only",
            "resume with the recipe that started the run",
        ) from error
    mx.eval(optimizer.arrays())
    return read_position(path)
