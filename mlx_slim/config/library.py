"""Where the shipped recipes and task definitions lie.

Invariant: a checkout uses its top-level ``recipes/`` and ``evals/``, an installed wheel the copy
inside the package; callers see names only. Files that begin with an underscore are shared bases:
found by name (``extends: _alpaca``), never listed. Matrices and spaces of a sweep are among the
recipes; their names begin with ``matrix-`` and ``space-``. Try it: ``mlx-slim recipes``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from mlx_slim.errors import SlimError, did_you_mean
from mlx_slim.reading import exists, shown

Kind = Literal["recipes", "evals", "matrices", "spaces"]
_SINGULAR = {"recipes": "recipe", "evals": "task", "matrices": "matrix", "spaces": "space"}
_LIST_COMMAND = {
    "recipes": "mlx-slim recipes",
    "evals": "mlx-slim tasks",
    "matrices": "mlx-slim compare",
    "spaces": "mlx-slim sweep",
}
_FOLDER = {"matrices": "recipes", "spaces": "recipes"}
_PREFIX = {"matrices": "matrix-", "spaces": "space-"}


def folder(kind: Kind) -> Path:
    """Return the folder of ``kind``: inside the installed package, else the checkout's top level.

    Raises:
        SlimError: If neither exists (a broken installation).
    """
    name = _FOLDER.get(kind, kind)
    package = Path(__file__).resolve().parents[1]
    if (package / name).is_dir():
        return package / name
    checkout = package.parent
    if (checkout / "pyproject.toml").is_file() and (checkout / name).is_dir():
        return checkout / name
    raise SlimError(f"the installed mlx-slim has no {name}/ folder", "install it again")


def names(kind: Kind) -> list[str]:
    """Return the names of ``kind``, sorted, without the shared bases."""
    stems = (path.stem for path in folder(kind).glob("*.yaml"))
    return sorted(stem for stem in stems if stem[0] != "_" and _is_of(kind, stem))


def _is_of(kind: Kind, name: str) -> bool:
    if kind in _PREFIX:
        return name.startswith(_PREFIX[kind])
    return kind == "evals" or not name.startswith(tuple(_PREFIX.values()))


def find(kind: Kind, name: str) -> Path:
    """Return the file of ``name``.

    Raises:
        SlimError: If there is none; the hint names the closest.
    """
    path = folder(kind) / f"{name}.yaml"
    if Path(name).name == name and exists(path) and _is_of(kind, name):
        return path
    raise SlimError(
        f"no {_SINGULAR[kind]} is called {shown(name)}",
        f"{did_you_mean(name, names(kind))} ({_LIST_COMMAND[kind]} lists them; "
        "a file of your own ends in .yaml)",
    )
