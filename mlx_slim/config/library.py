"""Where the shipped recipes and task definitions lie.

Invariant: a checkout uses its top-level ``recipes/`` and ``evals/``, an installed wheel the copy
inside the package; callers see names only. Files that begin with an underscore are shared parts:
found by name (``extends: _alpaca``), never listed. Try it: ``mlx-slim recipes``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from mlx_slim.errors import SlimError, did_you_mean

Kind = Literal["recipes", "evals"]
_SINGULAR = {"recipes": "recipe", "evals": "task"}
_LIST_COMMAND = {"recipes": "mlx-slim recipes", "evals": "mlx-slim tasks"}


def folder(kind: Kind) -> Path:
    """Return the folder of ``kind``: inside the installed package, else the checkout's top level.

    Raises:
        SlimError: If neither exists (a broken installation).
    """
    package = Path(__file__).resolve().parents[1]
    if (package / kind).is_dir():
        return package / kind
    checkout = package.parent
    if (checkout / "pyproject.toml").is_file() and (checkout / kind).is_dir():
        return checkout / kind
    raise SlimError(f"the installed mlx-slim has no {kind}/ folder", "install it again")


def names(kind: Kind) -> list[str]:
    """Return the names of ``kind``, sorted, without the shared parts."""
    return sorted(p.stem for p in folder(kind).glob("*.yaml") if not p.name.startswith("_"))


def find(kind: Kind, name: str) -> Path:
    """Return the file of ``name``.

    Raises:
        SlimError: If there is none; the hint names the closest.
    """
    path = folder(kind) / f"{name}.yaml"
    if Path(name).name == name and path.is_file():
        return path
    raise SlimError(
        f"no {_SINGULAR[kind]} is called {name!r}",
        f"{did_you_mean(name, names(kind))} ({_LIST_COMMAND[kind]} lists them; "
        "a file of your own ends in .yaml)",
    )
