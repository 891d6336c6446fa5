"""The folder of checkpoints: which are whole, which is the newest, which go.

Invariant: ``step-N`` is renamed into place when it is whole and is renamed away before it is
removed, so a kill leaves none that is half there; one that holds a file of somebody else's stays.
Nothing here needs MLX; ``checkpoint.py`` reads and writes what a checkpoint holds. Try it:
``python -m pytest tests/training/test_rotation.py``.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from mlx_slim.artifacts import remove_folder
from mlx_slim.errors import SlimError

STATE = "state.json"  # in every checkpoint
CALLBACK_ARRAYS = "callbacks.safetensors"
OLD_ARRAYS = "companions.safetensors"  # of version 0.1
FILES = ("weights.safetensors", "optimizer.safetensors", CALLBACK_ARRAYS, OLD_ARRAYS, STATE)


def _folders(folder: Path) -> dict[int, Path]:
    folders = {path.name[5:]: path for path in folder.glob("step-*")}
    return {int(name): folders[name] for name in folders if name.isdigit()}


def path_of(folder: Path, step: int) -> Path:
    """Return the folder of the checkpoint after ``step``."""
    return folder / f"step-{step}"


def steps(folder: Path) -> list[int]:
    """Return the steps of the whole checkpoints under ``folder``, ascending."""
    return sorted(step for step, path in _folders(folder).items() if (path / STATE).exists())


def latest(folder: Path) -> Path | None:
    """Return the newest whole checkpoint under ``folder``, or None."""
    whole = steps(folder)
    return path_of(folder, whole[-1]) if whole else None


def remove_after(folder: Path, step: int) -> None:
    """Remove the checkpoints of later steps, the newest first.

    Raises:
        SlimError: If one holds a file of somebody else's: the run would resume from it.
    """
    for later, path in sorted(_folders(folder).items(), reverse=True):
        if later > step and (path / STATE).exists() and not remove_folder(path, FILES):
            raise SlimError(f"{path} holds files that belong to no checkpoint", "move them away")


def rotate(folder: Path, keep: int, required: Collection[int]) -> None:
    """Remove all but the newest ``keep`` and the ``required`` steps, and those without a state.

    The latter are what version 0.1 left when it was killed while it removed them.
    """
    whole = steps(folder)
    stay = {*whole[-keep:], *required} & {*whole}
    for step, path in sorted(_folders(folder).items()):
        if step not in stay:
            remove_folder(path, FILES)
