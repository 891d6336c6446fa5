"""A model's safetensors files, written a tensor at a time, in any order.

Invariant: the places of all tensors follow from names, shapes and dtypes, so that no tensor is read
before it is written and none is held afterwards; the same tensors give the same bytes. The hash of
each is what a reader of the files must see again. Try it: ``mlx-slim quantize MODEL -o DIR``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_slim.hashing import hash_bytes
from mlx_slim.models.tensors import INDEX
from mlx_slim.reading import JsonObject

_DTYPES = {
    mx.bool_: "BOOL",
    mx.uint8: "U8",
    mx.int8: "I8",
    mx.uint16: "U16",
    mx.int16: "I16",
    mx.float16: "F16",
    mx.bfloat16: "BF16",
    mx.uint32: "U32",
    mx.int32: "I32",
    mx.float32: "F32",
    mx.uint64: "U64",
    mx.int64: "I64",
    mx.complex64: "C64",
}
_ALIGNED = 8  # bytes: where the tensors of a file begin


def raw_bytes(value: mx.array) -> memoryview:
    """Return the bytes of an array, evaluated here, as safetensors stores them."""
    flat: Any = mx.contiguous(value.reshape(-1))
    if value.dtype != mx.uint8:
        flat = flat.view(mx.uint8)
    mx.eval(flat)
    return memoryview(flat)


class Shards:
    """The open files of one model; ``open_shards`` makes them.

    Attributes:
        hashes: Name -> SHA-256 of the bytes of each tensor that was written.
    """

    def __init__(self, places: dict[str, tuple[BinaryIO, int, mx.array]]) -> None:
        self._places = places
        self.hashes: dict[str, str] = {}

    def write(self, name: str, value: mx.array) -> None:
        """Write one tensor in its place, in the dtype that was promised."""
        file, begin, promised = self._places.pop(name)
        raw = raw_bytes(value.astype(promised.dtype))
        file.seek(begin)
        file.write(raw)
        self.hashes[name] = hash_bytes(cast(bytes, raw))

    def check_complete(self) -> None:
        """Raise a ``RuntimeError`` if a tensor was not written: a mistake of the caller."""
        if self._places:
            raise RuntimeError(f"tensors were not written: {sorted(self._places)[:3]}")


@contextmanager
def open_shards(folder: Path, model: nn.Module) -> Iterator[Shards]:
    """Open the files of ``model`` in ``folder``, with headers and index; each tensor follows.

    Files are divided as mlx-lm divides them.

    Args:
        folder: Exists.
        model: Its weights may be unread: names, shapes and dtypes are looked at.
    """
    from mlx_lm.utils import get_total_parameters, make_shards

    tensors: dict[str, mx.array] = dict(tree_flatten(model.parameters()))  # pyright: ignore
    shards: list[dict[str, mx.array]] = make_shards(tensors)
    places: dict[str, tuple[BinaryIO, int, mx.array]] = {}
    file_of: dict[str, str] = {}
    with ExitStack() as stack:
        for number, shard in enumerate(shards, 1):
            several = f"-{number:05d}-of-{len(shards):05d}" if len(shards) > 1 else ""
            name = f"model{several}.safetensors"
            file = stack.enter_context((folder / name).open("wb"))
            header, begins = file_layout(shard)
            file.write(header)
            places |= {key: (file, begins[key], value) for key, value in shard.items()}
            file_of |= dict.fromkeys(shard, name)
        opened = Shards(places)
        yield opened
        opened.check_complete()
    total = sum(value.nbytes for value in tensors.values())
    index = {
        "metadata": {"total_size": total, "total_parameters": get_total_parameters(model)},
        "weight_map": dict(sorted(file_of.items())),
    }
    (folder / INDEX).write_text(json.dumps(index, indent=4))


def file_layout(shard: dict[str, mx.array]) -> tuple[bytes, dict[str, int]]:
    """Return the header of a file, and the first byte of each tensor in it.

    Wide dtypes come first, so that each tensor is aligned to its own.
    """
    entries: JsonObject = {}
    end = 0
    for name in sorted(shard, key=lambda name: (-shard[name].dtype.size, name)):
        value = shard[name]
        place = [end, end + value.nbytes]
        entries[name] = {
            "dtype": _DTYPES[value.dtype],
            "shape": list(value.shape),
            "data_offsets": place,
        }
        end = place[1]
    text = json.dumps({"__metadata__": {"format": "mlx"}, **entries}, separators=(",", ":"))
    encoded = text.encode()
    encoded += b" " * (-len(encoded) % _ALIGNED)
    begin = 8 + len(encoded)
    begins = {name: begin + entry["data_offsets"][0] for name, entry in entries.items()}
    return len(encoded).to_bytes(8, "little") + encoded, begins
