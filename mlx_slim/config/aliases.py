"""Keys that had another name in version 0.1: the old name is still read, with one notice.

Invariant: only the table here knows the old names; everything behind ``config/load.py`` and every
file that is written has the new ones. To rename a key, change the schema and add a line. Try it:
``mlx-slim plan smollm2-lora quantize.aware=true``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from mlx_slim.errors import SlimError
from mlx_slim.reading import JsonObject

Keys = tuple[str, ...]  # of a key in nested sections
Aliases = Mapping[Keys, str]  # path of the old key -> the new name of its last part
RECIPE: Aliases = {("held_out",): "forgetting", ("quantize", "aware"): "qat"}
MATRIX: Aliases = {("held_out",): "forgetting"}


def current_path(path: Keys, aliases: Aliases) -> Keys:
    """Return today's path of the key at ``path``."""
    for old, name in aliases.items():
        if path[: len(old)] == old:
            return (*old[:-1], name, *path[len(old) :])
    return path


def rename(
    values: JsonObject, aliases: Aliases, origin: Callable[[Keys], str] | None = None
) -> tuple[JsonObject, list[str]]:
    """Return ``values`` (nested) under today's keys, and a notice for each key that was renamed.

    Args:
        values: Not changed.
        aliases: Old key -> new name.
        origin: Says where a key stands, for the notice and the error; None says nothing.

    Raises:
        SlimError: If a key is there under both names.
    """
    notices: list[str] = []
    for old, name in aliases.items():
        section: Any = values
        for part in old[:-1]:
            section = section.get(part) if isinstance(section, dict) else None
        if not isinstance(section, dict) or old[-1] not in section:
            continue
        before, after = ".".join(old), ".".join((*old[:-1], name))
        place = f" ({origin(old)})" if origin else ""
        if name in section:
            raise SlimError(
                f"{before}{place} and {after} are the same key", f"drop {before}, the old name"
            )
        renamed = {name if key == old[-1] else key: value for key, value in section.items()}
        values = _replaced(values, old[:-1], renamed)
        notices.append(f"{before}{place} is called {after} now; the old name is still read")
    return values, notices


def _replaced(values: JsonObject, path: Keys, section: JsonObject) -> JsonObject:
    if not path:
        return section
    return {**values, path[0]: _replaced(values[path[0]], path[1:], section)}
