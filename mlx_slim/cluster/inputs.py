"""Models and rows of a job: named by the coordinator, looked up and checked by a worker.

Invariant: what a worker uses has the checksum that the coordinator saw; a name is looked up where
the coordinator has it, then under the worker's ``--models`` (``MLX_SLIM_MODELS``) or ``--data-dir``
(``MLX_SLIM_DATA``), and nowhere else. Used by ``cluster/worker.py``.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path

from mlx_slim.cluster.jobs import Input
from mlx_slim.config import library
from mlx_slim.data.sources import MIRROR_VARIABLE
from mlx_slim.errors import SlimError
from mlx_slim.hashing import hash_file
from mlx_slim.models.load import model_files, model_hash

MODELS_VARIABLE = "MLX_SLIM_MODELS"


def model_input(source: str) -> Iterator[Input]:
    """Yield the input of a model that is a folder or a file; none for a hub id."""
    path = Path(source).expanduser()
    if path.is_dir() or path.is_file():
        yield Input(source, "model", _checksum(path))


def data_inputs(files: Iterable[Path]) -> Iterator[Input]:
    """Yield the inputs of files of rows; those that the package brings are left out."""
    mirror = os.environ.get(MIRROR_VARIABLE)
    for file in files:
        whole = file.resolve()
        if file.is_absolute() and whole.is_relative_to(_shipped()):
            continue
        if mirror and whole.is_relative_to(Path(mirror).expanduser().resolve()):
            inside = whole.relative_to(Path(mirror).expanduser().resolve())
            yield Input(inside.as_posix(), "data", _checksum(whole), mirrored=True)
        else:
            yield Input(str(file), "data", _checksum(whole))


def find(one: Input, origin: Path) -> Path:
    """Return where an input is on this machine.

    Args:
        one: The input.
        origin: Working folder of the coordinator.

    Raises:
        SlimError: If it is nowhere, or has other contents.
    """
    variable = MODELS_VARIABLE if one.kind == "model" else MIRROR_VARIABLE
    option = "--models" if one.kind == "model" else "--data-dir"
    places = [] if one.mirrored else [origin / Path(one.path).expanduser()]
    if setting := os.environ.get(variable):
        folder = Path(setting).expanduser().resolve()
        inside = [one.path] if one.mirrored else [one.path, Path(one.path).name]
        places += [folder / name for name in inside if not Path(name).is_absolute()]
    if one.kind == "data" and Path(one.path).parts[0] == "evals":
        places.append(_shipped().parent / one.path)
    there = [place for place in places if place.exists()]
    for place in there:
        if _checksum(place) == one.sha256:
            return place
    if there:
        raise SlimError(
            f"{one.path} is another one here: SHA-256 {_checksum(there[0])[:12]}…, expected "
            f"{one.sha256[:12]}…",
            f"copy it from the machine that started the command into {option} of the worker",
        )
    raise SlimError(f"{one.path} is not here", f"put it into {option} of the worker")


def place(one: Input, source: Path, origin: Path, folder: Path) -> None:
    """Let ``folder`` have an input under the name that the job has for it: by a link.

    Raises:
        SlimError: If no link can give it that name: it is absolute, or outside the working folder.
    """
    if one.mirrored:
        return
    path = Path(one.path).expanduser()
    if path.is_absolute() and source == path:
        return
    if path.is_absolute() or ".." in path.parts:
        raise SlimError(
            f"{one.path} is not here under this name",
            "start the command in the folder that holds models and rows, and name them from there",
        )
    link = folder / path
    link.parent.mkdir(parents=True, exist_ok=True)
    if link.is_symlink():
        link.unlink()
    if not link.exists():
        link.symlink_to(source.resolve())


def _shipped() -> Path:
    """Return the folder of the tasks and rows that the package brings."""
    return library.folder("evals").resolve()


def _checksum(path: Path) -> str:
    files = model_files(path) if path.is_dir() else [path]
    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return _checksum_of(path, tuple(stats))


@lru_cache(maxsize=256)
def _checksum_of(path: Path, files: tuple[tuple[str, int, int], ...]) -> str:
    """Return the SHA-256 of files as they are: read once, as long as sizes and times stay."""
    return model_hash(path) if path.is_dir() else hash_file(path)
