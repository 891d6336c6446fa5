"""Which layers the settings of a PEFT adapter name: for ranks, alphas, and adapters at all.

Invariant: a layer is named here where PEFT's ``check_target_module_exists`` and
``get_pattern_key`` name it; PEFT drops the tensors of others without a word. Patterns are bounded
(``config/patterns.py``). Try it: ``mlx-slim import peft -o adapters``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from mlx_slim.adapters.inject import Site
from mlx_slim.adapters.store import CONFIG
from mlx_slim.config.patterns import compile_pattern
from mlx_slim.errors import SlimError
from mlx_slim.reading import JsonObject, shown

_TAKE = "use the config that PEFT wrote"
_TARGETS = {
    "target_modules": str,
    "exclude_modules": str,
    "layers_to_transform": int,
    "layers_pattern": str,
}


@contextlib.contextmanager
def _pattern_errors(where: str) -> Iterator[None]:
    """Name the place of a pattern that is none, or whose search takes too long."""
    try:
        yield
    except (ValueError, SlimError) as error:
        raise SlimError(f"{where}: {getattr(error, 'message', error)}", _TAKE) from error


def check_patterns(settings: JsonObject, where: str) -> None:
    """Refuse names of layers that are none.

    Args:
        settings: ``adapter_config.json``.
        where: Begins the message: the file.

    Raises:
        SlimError: A pattern that cannot be compiled, a value of another type.
    """
    for key in ("rank_pattern", "alpha_pattern"):
        for pattern in settings.get(key) or {}:
            with _pattern_errors(f"{where}: {key}"):
                compile_pattern(pattern)
    for key, kind in _TARGETS.items():
        value = settings.get(key)
        values = value if isinstance(value, list) else [] if value is None else [value]
        if any(type(value) is not kind for value in values):
            what = "names, or a pattern" if kind is str else "numbers of layers"
            raise SlimError(f"{where}: {key} is {shown(value)}, expected {what}", _TAKE)


def of_layer(patterns: JsonObject | None, path: str, default: float) -> float:
    """Return the value that PEFT gives the layer at ``path``: that of the first key that fits."""
    for key, value in (patterns or {}).items():
        if _match(rf"(.*\.)?({key})$", path):
            return value
    return default


def targeted(settings: JsonObject, site: Site) -> bool:
    """Return whether PEFT puts an adapter on a layer.

    Without ``target_modules`` PEFT has a default list for each model type: all are taken.

    Args:
        settings: ``adapter_config.json``.
        site: The layer, at the path that it has in the base.
    """
    targets, path = settings.get("target_modules"), site.path
    if _named(settings.get("exclude_modules") or [], path):
        return False
    if targets is None:
        return True
    if isinstance(targets, str) and targets.lower() == "all-linear":  # the head is none of them
        return site.block is not None
    layers = settings.get("layers_to_transform")
    if isinstance(targets, str) or layers in (None, []) or not _named(targets, path):
        return _named(targets, path)
    patterns = settings.get("layers_pattern") or r"[^.]*"
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        if match := _match(rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\.", path):
            return int(match["idx"]) in (layers if isinstance(layers, list) else [layers])
    return False


def target_settings(settings: JsonObject) -> str:
    """Return the settings that select the adapted layers, for a message."""
    return ", ".join(f"{key} {shown(settings[key])}" for key in _TARGETS if settings.get(key))


def _match(pattern: str, path: str) -> Any:
    """Return what ``re.match`` finds, with which PEFT reads these patterns; None if nothing."""
    with _pattern_errors(CONFIG):
        return next((m for m in compile_pattern(pattern).matches(path) if m.start() == 0), None)


def _named(names: str | list[str], path: str) -> bool:
    """Return whether a pattern is the whole of ``path``, or one of several names its end."""
    if isinstance(names, str):
        with _pattern_errors(CONFIG):
            return compile_pattern(names).fullmatch(path)
    return any(f".{path}".endswith(f".{name}") for name in names)
