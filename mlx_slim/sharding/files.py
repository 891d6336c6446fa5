"""Safetensors files of whole tensors, from ranks that have slices: one tensor is whole at a time.

Invariant: the same tensors give the same bytes, whatever the number of ranks; rank 0 writes them,
and never holds a second copy of the model.
All ranks must write the same files in the same order. Try it:
``python -m pytest tests/sharding/test_model.py``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import mlx.core as mx

from mlx_slim.artifacts import disk_errors, load_tensors
from mlx_slim.errors import SlimError
from mlx_slim.models.shards import file_layout, raw_bytes
from mlx_slim.sharding.model import ShardedModel

_BASES = ("linear", "embedding")  # where an adapter keeps the layer that it is on
_BITS = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32, 8: mx.uint64}  # by bytes


def place_of(name: str, value: mx.array, sharded: ShardedModel) -> str | None:
    """Return the parameter that the array ``name`` is cut like; None if it is whole.

    Names are parameters (``model.norm.weight``), those of a layer without its adapter, or of
    optimizer state (``adamw@1.0/model.norm.weight/m``).
    """
    layer, _, leaf = name.rpartition(".")
    below = [f"{layer}.{base}.{leaf}" for base in _BASES]
    for path in (name, *name.split("/")[1:2], *below):
        place = sharded.layout.get(path)
        if place is not None and place.rows and tuple(value.shape) == place.slice_shape:
            return path
    return None


def write_whole(path: Path | None, arrays: Mapping[str, mx.array], sharded: ShardedModel) -> None:
    """Write the whole of ``arrays`` to one file.

    Args:
        path: The file on rank 0; None on the others, which give their slices.
        arrays: Name -> slice, or whole array.
        sharded: What they are cut by.

    Raises:
        ResourceError: If the disk is full.
        SlimError: If the file cannot be written.
    """
    places = {name: place_of(name, value, sharded) for name, value in sorted(arrays.items())}
    if path is None:
        for name, place in places.items():
            if place is not None:
                sharded.gather(place, arrays[name])
        return
    promised = {
        name: arrays[name]
        if place is None
        else mx.zeros(sharded.layout[place].shape, arrays[name].dtype)  # never computed
        for name, place in places.items()
    }
    header, begins = file_layout(promised)
    with disk_errors(path), path.open("wb") as handle:
        handle.write(header)
        for name, place in places.items():
            value = arrays[name] if place is None else sharded.gather(place, arrays[name])
            handle.seek(begins[name])
            handle.write(raw_bytes(value))
            del value


def read_slices(
    tensors: dict[str, mx.array], mine: Mapping[str, mx.array], sharded: ShardedModel
) -> dict[str, mx.array]:
    """Return what this rank keeps of ``tensors``, read and cut one at a time; they are emptied.

    Args:
        tensors: Name -> whole tensor, unread.
        mine: The arrays that they replace; those that are slices of a whole become slices.
        sharded: What they are cut by.

    Raises:
        KeyError: A name that is in only one of the two.
        SlimError: If a shape is another one.
    """
    if differing := sorted(tensors.keys() ^ mine.keys()):
        raise KeyError(differing[0])
    slices = {}
    for name, value in mine.items():
        place, whole = place_of(name, value, sharded), tensors.pop(name)
        expected = tuple(value.shape) if place is None else sharded.layout[place].shape
        if tuple(whole.shape) != expected:
            raise SlimError(
                f"{name} is {list(whole.shape)} in the checkpoint, expected {list(expected)}",
                "resume with the recipe that started the run",
            )
        slices[name] = whole if place is None else sharded.cut(place, whole)
        mx.eval(slices[name])
        del whole
    return slices


def receive_slices(
    path: Path, mine: Mapping[str, mx.array], sharded: ShardedModel
) -> dict[str, mx.array]:
    """Return what this rank keeps of a file that only rank 0 has; all ranks call it.

    Args:
        path: The file; read on rank 0 alone.
        mine: As ``read_slices`` takes it.
        sharded: Likewise.
    """
    first = sharded.collectives.rank == 0
    tensors = load_tensors(path) if first else {}
    slices = {}
    for name, value in sorted(mine.items()):
        place = place_of(name, value, sharded)
        shape = tuple(value.shape) if place is None else sharded.layout[place].shape
        bits = _BITS[value.dtype.size]  # summed with zeros, as integers, a number stays what it is
        whole = tensors.pop(name).view(bits).reshape(-1) if first else None
        if whole is None:
            whole = mx.zeros((math.prod(shape),), bits)
        whole = sharded.collectives.total(whole).view(value.dtype).reshape(shape)
        slices[name] = whole if place is None else sharded.cut(place, whole)
        mx.eval(slices[name])
        del whole
    return slices
