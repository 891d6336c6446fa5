"""Everything that a run needs to resume exactly, in one folder that is whole or absent.

Invariant: ``checkpoints/step-N`` is renamed into place after all its files are on disk, and holds
the trainable weights, the optimizer state (moments, float32 masters, step), the state of every
callback and the train state. Nothing else has state: shuffles and dropout are functions of (seed,
epoch, step), the learning rate of the step, and checkpoints are taken between optimizer steps, when
nothing is accumulated. Try it: ``python -m pytest tests/training/test_checkpoint.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

from mlx_slim.artifacts import atomic_folder, load_tensors, save_tensors, write_json
from mlx_slim.errors import SlimError
from mlx_slim.reading import JsonObject, field, read_object, short
from mlx_slim.runtime import all_gather_bytes
from mlx_slim.sharding.files import read_slices, receive_slices, write_whole
from mlx_slim.sharding.model import ShardedModel
from mlx_slim.training.callbacks import Callback, CallbackState, collect_states, restore_states
from mlx_slim.training.legacy import is_legacy, upgrade_arrays, upgrade_state
from mlx_slim.training.optim import Optimizer, set_trainable, trainable
from mlx_slim.training.rotation import CALLBACK_ARRAYS, OLD_ARRAYS, STATE, path_of
from mlx_slim.training.state import CALLBACKS, TrainState, read_state

WEIGHTS, OPTIMIZER = "weights.safetensors", "optimizer.safetensors"


def save(
    folder: Path,
    state: TrainState,
    model: nn.Module,
    optimizer: Optimizer,
    callbacks: Sequence[Callback] = (),
    sharded: ShardedModel | None = None,
) -> Path:
    """Write the checkpoint of ``state`` under ``folder`` and return its path.

    Of a ``sharded`` model every rank calls it, and rank 0 writes: whole tensors, one at a time.

    Raises:
        ResourceError: If the disk is full; older checkpoints stay.
    """
    target = path_of(folder, state.step)
    states = collect_states(callbacks)
    arrays = {
        f"{name}/{key}": array for name, one in states.items() for key, array in one.arrays.items()
    }
    values = {name: one.values for name, one in states.items()}
    tensors = {WEIGHTS: trainable(model), OPTIMIZER: optimizer.state()}
    if sharded is not None and sharded.collectives.rank > 0:
        for each in tensors.values():
            write_whole(None, each, sharded)
        return target
    with atomic_folder(target, replace=True) as temporary:
        for name, each in tensors.items():
            if sharded is None:
                save_tensors(temporary / name, each)
            else:
                write_whole(temporary / name, each, sharded)
        if arrays:
            save_tensors(temporary / CALLBACK_ARRAYS, arrays)
        write_json(temporary / STATE, {**asdict(state), CALLBACKS: values})
    return target


def load_weights(path: Path, model: nn.Module, sharded: ShardedModel | None = None) -> None:
    """Put the trainable weights of the checkpoint at ``path`` into ``model``, or its slices.

    Ranks of a ``sharded`` model that do not have the file get theirs from rank 0.

    Raises:
        SlimError: If names or shapes are not those of the model.
    """
    mine = trainable(model)
    if sharded is not None:
        here = (path / WEIGHTS).exists()
        if b"0" in all_gather_bytes(b"1" if here else b"0"):
            set_trainable(model, receive_slices(path / WEIGHTS, mine, sharded))
            return
    values = load_tensors(path / WEIGHTS)
    expected = {
        name: value.shape if sharded is None else sharded.layout[name].shape
        for name, value in mine.items()
    }
    if {name: value.shape for name, value in values.items()} != expected:
        raise SlimError(
            f"{path} was made for other trainable weights "
            f"({len(values)} tensors, this recipe trains {len(expected)})",
            "resume with the recipe that started the run",
        )
    if sharded is not None:
        values = read_slices(values, mine, sharded)
    set_trainable(model, values)
    mx.eval(model.parameters())


def load_callbacks(path: Path, callbacks: Sequence[Callback]) -> TrainState:
    """Restore the callbacks from the checkpoint at ``path``; return its train state.

    Raises:
        SlimError: If it is damaged, or belongs to other callbacks.
    """
    state, record = read_state(path), read_object(path / STATE)
    legacy = is_legacy(record)
    file = path / (OLD_ARRAYS if legacy else CALLBACK_ARRAYS)
    arrays = load_tensors(file) if file.exists() else {}
    if legacy:
        record = upgrade_state(record)
    values: dict[str, JsonObject] = field(record, short(path / STATE), CALLBACKS, dict, {}, of=dict)
    try:
        if legacy:
            arrays, values = upgrade_arrays(arrays, values)
        restore_states(callbacks, _by_callback(arrays, values))
    except KeyError as error:
        raise SlimError(
            f"{path} belongs to another recipe: {error} is in only one of the two",
            "resume with the recipe that started the run",
        ) from error
    return state


def _by_callback(
    arrays: dict[str, mx.array], values: dict[str, JsonObject]
) -> dict[str, CallbackState]:
    names = {*values, *(key.partition("/")[0] for key in arrays)}
    return {
        name: CallbackState(
            {k.removeprefix(f"{name}/"): v for k, v in arrays.items() if k.startswith(f"{name}/")},
            values.get(name, {}),
        )
        for name in names
    }


def load(
    path: Path,
    model: nn.Module,
    optimizer: Optimizer,
    callbacks: Sequence[Callback] = (),
    sharded: ShardedModel | None = None,
) -> TrainState:
    """Put the checkpoint at ``path`` back and return its train state.

    A ``sharded`` model takes its slices: a checkpoint is whole, whatever number of ranks wrote it.

    Raises:
        SlimError: If it belongs to another model, optimizer or recipe.
    """
    load_weights(path, model, sharded)
    try:
        moments = load_tensors(path / OPTIMIZER)
        if sharded is not None:
            moments = read_slices(moments, optimizer.state(), sharded)
        optimizer.load_state(moments)
    except KeyError as error:
        raise SlimError(
            f"{path} was made with another optimizer: {error} is in only one of the two",
            "resume with the recipe that started the run",
        ) from error
    state = load_callbacks(path, callbacks)
    mx.eval(optimizer.arrays())
    return state
