"""Where the tensors of a safetensors file lie, its header held against the file.

Invariant: MLX maps no file whose header promises bytes that are not there, or shapes that are not
those of their bytes. Try it: ``python -m pytest tests/test_tensor_files.py``.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_slim.errors import SlimError
from mlx_slim.reading import field, open_regular, parse_json, short, shown

_AGAIN = "download or copy it again"
_MAX_HEADER = 100_000_000  # bytes: the limit of the format's own reader
_MAX_DIMENSIONS, _MAX_LENGTH = 16, 2**31 - 1  # of an MLX array
_BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
}


@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor lies: its safetensors dtype (``BF16``), shape, first byte and bytes."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    nbytes: int


def safetensors_header(path: Path) -> dict[str, TensorEntry]:
    """Return the tensors of a safetensors file, each checked against the file's size.

    Raises:
        SlimError: If the file is truncated or is no safetensors file, or an entry of its header
            does not fit its place.
    """
    with open_regular(path) as handle:
        size = os.fstat(handle.fileno()).st_size
        length = int.from_bytes(handle.read(8), "little")
        where = f"{short(path)} is corrupt or no safetensors file: its header"
        if size < 8 or length > min(_MAX_HEADER, size - 8):
            raise SlimError(f"{where} needs {length:,} bytes, the file has {size:,}", _AGAIN)
        header = parse_json(handle.read(length), where, unique=True)
    if type(header) is not dict:
        raise SlimError(f"{where} is not an object: {shown(header)}", _AGAIN)
    header.pop("__metadata__", None)
    start = 8 + length
    tensors = {name: _stored(entry, name, where, start) for name, entry in header.items()}
    end = max((one.begin + one.nbytes for one in tensors.values()), default=start)
    if end != size:
        raise SlimError(
            f"{short(path)} is truncated or corrupt: {size:,} bytes, its header says {end:,}",
            _AGAIN,
        )
    check_apart(path, [(one.begin, one.begin + one.nbytes, key) for key, one in tensors.items()])
    return tensors


def check_apart(path: Path, places: Iterable[tuple[int, int, str]]) -> None:
    """Refuse tensors that share bytes of a file: one of them would be wrong.

    Args:
        path: For the message.
        places: First byte, end and name of each tensor.

    Raises:
        SlimError: Names two of them.
    """
    last = (0, 0, "")
    for place in sorted(place for place in places if place[0] < place[1]):
        if place[0] < last[1]:
            raise SlimError(
                f"{short(path)} is corrupt: the tensors {shown(last[2])} and {shown(place[2])} "
                "share bytes",
                _AGAIN,
            )
        last = place


def _stored(entry: Any, name: str, where: str, start: int) -> TensorEntry:
    what = f"{where}, tensor {shown(name)}"
    if type(entry) is not dict:
        raise SlimError(f"{what} is {shown(entry)}, expected an object", _AGAIN)
    dtype = field(entry, what, "dtype", str)
    shape = field(entry, what, "shape", list, high=_MAX_DIMENSIONS)
    place = field(entry, what, "data_offsets", list, low=2, high=2)
    if not all(type(one) is int and 0 <= one <= _MAX_LENGTH for one in shape):
        raise SlimError(f"{what}: shape is {shown(shape)}, expected whole numbers from 0", _AGAIN)
    if not all(type(one) is int for one in place) or not 0 <= place[0] <= place[1]:
        raise SlimError(f"{what}: data_offsets is {shown(place)}, expected begin and end", _AGAIN)
    nbytes = place[1] - place[0]
    bits = _BITS.get(dtype)
    if bits is not None and math.prod(shape) * bits != 8 * nbytes:
        raise SlimError(
            f"{what}: {dtype} of shape {shown(shape)} in {nbytes:,} bytes, expected "
            f"{math.prod(shape) * bits // 8:,}",
            _AGAIN,
        )
    return TensorEntry(dtype, tuple(shape), start + place[0], nbytes)
