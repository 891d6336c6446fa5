"""Values of recipe files laid over each other: a file over those that it names under ``extends``.

Invariant: the later layer wins; every value knows the file and line it came from; nothing is
checked against a schema here, and no schema is imported. Try it: ``mlx-slim recipes``.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from mlx_slim.config import library
from mlx_slim.config.aliases import MATRIX, RECIPE, Aliases, Keys, current_path, rename
from mlx_slim.config.read import read_mapping
from mlx_slim.errors import SlimError
from mlx_slim.reading import JsonObject, exists, short, shown

COMMAND_LINE = "command line"  # where an override comes from
Origins = dict[Keys, str]
_MOST_FILES = 64  # that one recipe extends, each counted as often as it is named
# Two ways to say one thing: whichever is said later wins.
_RIVALS: dict[Keys, Keys] = {
    ("adapter", "alpha"): ("adapter", "scale"),
    ("adapter", "scale"): ("adapter", "alpha"),
    ("train", "steps"): ("train", "epochs"),
    ("train", "epochs"): ("train", "steps"),
}
_ALIASES: dict[library.Kind, Aliases] = {"recipes": RECIPE, "matrices": MATRIX}


@dataclass
class Layers:
    """Values of files and of the command line, laid over each other, unchecked.

    Attributes:
        values: Nested.
        origins: Where each value came from.
        aliases: Old keys that are still read.
        file: The file that was named.
        problems: One line for each override that cannot be read.
        notices: One line for each key that was given under an old name.
    """

    values: JsonObject = field(default_factory=dict)
    origins: Origins = field(default_factory=dict)
    aliases: Aliases = field(default_factory=dict)
    file: Path = Path()
    problems: list[str] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)

    def add(self, values: JsonObject, origin: Callable[[Keys], str]) -> None:
        """Lay ``values`` (nested) over what is there; ``origin`` says where a key stands."""
        values, notices = rename(values, self.aliases, origin)
        self.notices += [notice for notice in notices if notice not in self.notices]
        _merge(values, (), self.values, self.origins, origin)

    def add_file(self, file: Path) -> None:
        """Lay a file, and before it those that it extends, over what is there.

        Raises:
            SlimError: If a file cannot be read, or files extend each other in a circle.
        """
        _apply_file(file, self, ())


def read_files(name_or_path: str, kind: library.Kind) -> Layers:
    """Return the values of a file and of those that it extends.

    Args:
        name_or_path: A shipped file's name, or the path of a ``.yaml`` file.
        kind: Which shipped files are meant.

    Raises:
        SlimError: Unknown name or unreadable file.
    """
    if name_or_path.endswith((".yaml", ".yml")) or "/" in name_or_path:
        file = Path(name_or_path)
    else:
        file = library.find(kind, name_or_path)
    layers = Layers(aliases=_ALIASES.get(kind, {}), file=file)
    layers.add_file(file)
    return layers


def _apply_file(
    file: Path,
    layers: Layers,
    chain: tuple[Path, ...],
    count: Iterator[int] | None = None,
) -> None:
    content, lines = read_mapping(file)  # says so where the path itself cannot be
    real = Path(os.path.realpath(file))  # Path.resolve raises where links lead in a circle
    file = real if chain else file
    count = count or iter(range(_MOST_FILES))
    if next(count, None) is None:
        raise SlimError(
            f"{short(chain[0])} extends more than {_MOST_FILES} files", "extend fewer recipes"
        )
    if real in chain:
        names = " -> ".join(p.name for p in (*chain, file))
        raise SlimError(f"recipes extend each other in a circle: {names}", "remove one `extends`")
    parents = content.pop("extends", [])
    parents = [parents] if isinstance(parents, str) else parents
    if not isinstance(parents, list) or not all(isinstance(p, str) for p in parents):
        raise SlimError(
            f"{short(file)}, line {lines[('extends',)]}: extends is {shown(parents)}",
            "give a recipe's name, or a list of names",
        )
    for parent in parents:
        _apply_file(_parent(file, parent), layers, (*chain, real), count)
    lines |= {current_path(path, layers.aliases): line for path, line in lines.items()}
    layers.add(content, lambda path: f"{file.name}:{lines.get(path, 1)}")


def _parent(file: Path, name: str) -> Path:
    """The file that ``extends: name`` means: beside ``file`` first, then a shipped recipe."""
    beside = file.parent / (name if name.endswith((".yaml", ".yml")) else f"{name}.yaml")
    if name.endswith((".yaml", ".yml")) or exists(beside):
        return beside
    return library.find("recipes", name)


def _merge(
    new: JsonObject,
    path: Keys,
    into: JsonObject,
    origins: Origins,
    origin: Callable[[Keys], str],
) -> None:
    """Lay ``new`` over ``into`` at ``path``: mappings merge, everything else replaces."""
    for key, value in new.items():
        here = (*path, key)
        if isinstance(value, dict) and value:
            if not isinstance(into.get(key), dict):
                into[key] = {}
            origins.setdefault(here, origin(here))
            _merge(value, here, into[key], origins, origin)
            continue
        rival = _RIVALS.get(here)
        if rival and value is not None and rival[1] not in new:
            into.pop(rival[1], None)
            origins.pop(rival, None)
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            continue  # an empty section changes nothing
        into[key] = value
        for stale in [k for k in origins if k[: len(here)] == here]:
            del origins[stale]
        origins[here] = origin(here)  # re-inserted: the newest stands last
