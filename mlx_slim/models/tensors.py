"""What a model folder's safetensors files hold, read from their headers.

Invariant: a file that is truncated, corrupt or missing is found here, before MLX maps it; nothing
but headers is read. Try it: ``mlx-slim plan RECIPE`` reads shapes this way.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from mlx_slim.errors import SlimError
from mlx_slim.reading import field, read_object, short, shown
from mlx_slim.tensor_files import safetensors_header

WEIGHTS = "model*.safetensors"
INDEX = "model.safetensors.index.json"
FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_LONGEST_NAME = 255  # bytes of a file's name
_PIECE = 1 << 20  # bytes that are compared at a time


@dataclass(frozen=True)
class Tensor:
    """One tensor on disk: its safetensors dtype (``BF16``), shape, bytes, file and place in it."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    file: Path
    begin: int


def read_header(path: Path) -> dict[str, Tensor]:
    """Return the tensors of one safetensors file, its size checked against its header.

    Raises:
        SlimError: If the file is truncated or is no safetensors file.
    """
    return {
        name: Tensor(one.dtype, one.shape, one.nbytes, path, one.begin)
        for name, one in safetensors_header(path).items()
    }


def read_index(folder: Path) -> dict[str, str]:
    """Return tensor name -> file name of ``model.safetensors.index.json``.

    Raises:
        SlimError: If it is no such file, or a file that it names would lie outside the folder.
    """
    path = folder / INDEX
    files_of: dict[str, str] = field(read_object(path), short(path), "weight_map", dict, {}, of=str)
    for tensor, name in files_of.items():
        if name != Path(name).name or len(name) > _LONGEST_NAME:
            raise SlimError(
                f"{short(path)}: weight_map gives {shown(tensor)} the file {shown(name)}, "
                "expected the name of a file beside it",
                "download or copy it again",
            )
    return files_of


def folder_tensors(folder: Path) -> dict[str, Tensor]:
    """Return every tensor of a model folder, by name.

    Raises:
        SlimError: If there are no safetensors, a shard of the index is absent, a file is corrupt,
            or two files hold the same tensor.
    """
    files = sorted(folder.glob(WEIGHTS))
    promised: dict[str, str] = {}
    if (folder / INDEX).exists():
        promised = read_index(folder)
        absent = sorted({name for name in promised.values() if not (folder / name).exists()})
        if absent:
            raise SlimError(
                f"{folder} lacks {few(absent)}: named in {INDEX}", "download or copy it again"
            )
    if not files:
        raise _no_weights(folder)
    tensors: dict[str, Tensor] = {}
    for file in files:
        header = read_header(file)
        twice = sorted(header.keys() & tensors.keys())
        if twice:
            raise SlimError(
                f"{file.name} and {tensors[twice[0]].file.name} of {folder} both hold {few(twice)}",
                "keep the files of one model only",
            )
        tensors.update(header)
    missing = sorted(promised.keys() - tensors.keys())
    if missing:
        raise SlimError(
            f"{folder} lacks {few(missing)}: named in {INDEX} but in no file",
            "download or copy it again",
        )
    return tensors


def common_dtype(tensors: dict[str, Tensor]) -> str:
    """Return the safetensors dtype of most floating bytes (``BF16``); F32 if there are none."""
    bytes_of: Counter[str] = Counter()
    for tensor in tensors.values():
        if tensor.dtype in FLOATS:
            bytes_of[tensor.dtype] += tensor.nbytes
    return bytes_of.most_common(1)[0][0] if bytes_of else "F32"


def same_bytes(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors are equal byte for byte; neither is read as a whole."""
    if one.nbytes != other.nbytes:
        return False
    with one.file.open("rb") as first, other.file.open("rb") as second:
        first.seek(one.begin)
        second.seek(other.begin)
        left = one.nbytes
        while left:
            size = min(_PIECE, left)
            if first.read(size) != second.read(size):
                return False
            left -= size
    return True


def _no_weights(folder: Path) -> SlimError:
    pickles = [p.name for kind in ("*.bin", "*.pt", "*.pth") for p in sorted(folder.glob(kind))]
    if pickles:
        return SlimError(
            f"{folder} has its weights only as pickle ({few(pickles)}), which can run code when "
            "read and is refused",
            "load it with transformers and save_pretrained() it: that writes safetensors",
        )
    others = sorted(p.name for p in folder.glob("*.gguf"))
    if others:
        return SlimError(
            f"{folder} holds GGUF files, no {WEIGHTS}",
            f"import one first: mlx-slim convert {folder / others[0]} -o DIR",
        )
    return SlimError(f"{folder} has no {WEIGHTS}", "give the folder of a complete model")


def few(names: list[str], limit: int = 3) -> str:
    """Return the first names and how many more there are: ``a, b, c and 7 more``."""
    shown = ", ".join(names[:limit])
    return f"{shown} and {len(names) - limit} more" if len(names) > limit else shown
