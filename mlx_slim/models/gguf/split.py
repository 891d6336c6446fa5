"""A GGUF file in several shards (``NAME-00001-of-00003.gguf``) as one.

Invariant: what is returned has every tensor of every part once, as many as the first part promises;
a part that is missing, of another split or in another's place is named. Try it:
``mlx-slim convert model-00001-of-00003.gguf -o DIR``.
"""

from __future__ import annotations

import re
from pathlib import Path

from mlx_slim.errors import SlimError
from mlx_slim.models.gguf.file import GGUFFile, GGUFTensor, read_gguf
from mlx_slim.models.tensors import few

_PART = re.compile(r"(.+-)(\d{5})(-of-)(\d{5})(\.gguf)", re.IGNORECASE)
_AGAIN = "download all shards again, of one version"


def open_gguf(path: Path) -> GGUFFile:
    """Return a GGUF file; of a split one, opened by any of its shards, the whole.

    Raises:
        SlimError: As ``read_gguf``; if shards are missing or are of different models.
    """
    file = read_gguf(path)
    count = int(file.metadata.get("split.count", 1))
    return file if count <= 1 else _joined(file, count)


def _joined(file: GGUFFile, count: int) -> GGUFFile:
    """Return a split file as one: the first part's metadata, and the tensors of all."""
    match = _PART.fullmatch(file.path.name)
    if match is None or int(match[4]) != count:
        raise SlimError(
            f"{file.path} is one of {count} shards of a split GGUF; its name does not say which",
            f"use the original file names: NAME-00001-of-{count:05d}.gguf",
        )
    names = [
        f"{match[1]}{number:05d}{match[3]}{match[4]}{match[5]}" for number in range(1, count + 1)
    ]
    paths = [file.path.with_name(name) for name in names]
    missing = [part.name for part in paths if not part.is_file()]
    if missing:
        raise SlimError(
            f"{file.path} is one of {count} shards of a split GGUF, without {few(missing)}",
            "put all shards into one folder",
        )
    files = [file if part.name == file.path.name else read_gguf(part) for part in paths]
    tensors: dict[str, GGUFTensor] = {}
    shards: dict[str, Path] = {}
    for number, part in enumerate(files):
        numbering = (part.metadata.get("split.no"), part.metadata.get("split.count"))
        twice = tensors.keys() & part.tensors.keys()
        if numbering != (number, count) or twice:
            again = f"it holds {few(sorted(twice))} again"
            what = again if twice else f"it says {numbering[0]} of {numbering[1]}"
            raise SlimError(
                f"{part.path} is not part {number + 1} of {count}: {what}",
                _AGAIN,
            )
        tensors |= part.tensors
        shards |= dict.fromkeys(part.tensors, part.path)
    total = files[0].metadata.get("split.tensors.count", len(tensors))
    if total != len(tensors):
        raise SlimError(
            f"the {count} shards of {file.path} have {len(tensors)} tensors, expected {total}",
            _AGAIN,
        )
    return GGUFFile(file.path, files[0].metadata, tensors, shards)
