"""From a recipe's name and the command line to one checked recipe that knows its origins.

Invariant: layers are applied in order (schema defaults, files named by ``extends``, the file, the
command line), the later one wins, and nothing is ignored: every unknown key and every wrong value
is reported, all in one error, with the file and line (or "command line") it came from. Relative
paths in a recipe (``model``, ``data.path``, a template) mean the current directory, not the
recipe's folder. Try it: ``mlx-slim train tinyllama-lora train.steps=3 --dry-run -o /tmp/run``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mlx_slim.config import library
from mlx_slim.config.aliases import RECIPE, Keys, current_path
from mlx_slim.config.layers import COMMAND_LINE, Layers, Origins, read_files
from mlx_slim.config.problems import Words, checked, words_for
from mlx_slim.config.read import parse_scalar
from mlx_slim.config.reward import RewardSource
from mlx_slim.config.schema import Recipe, Section
from mlx_slim.errors import SlimError
from mlx_slim.reading import MAX_DEPTH, JsonObject, shown

DEFAULT = "default"


@dataclass(frozen=True)
class Resolved:
    """A recipe that is ready to run.

    Attributes:
        recipe: Checked and frozen.
        origins: Dotted key -> ``default``, a file (with its line) or ``command line``, all keys.
        name: The recipe's name, or the stem of its file.
        source: What the user wrote: the recipe's name, or the path of its file.
        notices: One line for each key that was given under an old name.
        text: The recipe as a YAML file, for one that no file holds yet; a run puts it into its
            folder.
        reward: The function of ``--reward`` and the hash of its file, None without one.
    """

    recipe: Recipe
    origins: dict[str, str]
    name: str
    source: str
    notices: tuple[str, ...] = ()
    text: str = ""
    reward: RewardSource | None = None

    @property
    def overridden(self) -> set[str]:
        """The keys that the command line set."""
        return {key for key, origin in self.origins.items() if origin == COMMAND_LINE}


def load_recipe(name_or_path: str, overrides: Sequence[str] = ()) -> Resolved:
    """Return the recipe of that name or ``.yaml`` path with ``key=value`` overrides applied.

    Args:
        name_or_path: A shipped recipe's name, or the path of a ``.yaml`` file.
        overrides: Dotted assignments, values in YAML: ``train.steps=3``, ``data.path=./x.jsonl``.

    Raises:
        SlimError: Unknown recipe, unreadable file, or wrong keys and values: with several of them
            the message counts them and ``details`` has one line each.
    """
    text = str(name_or_path)
    layers = read_layers(text, overrides, Recipe, "recipes")
    return _check(layers, layers.file.stem, text)


def read_layers(
    name_or_path: str, overrides: Sequence[str], schema: type[Section], kind: library.Kind
) -> Layers:
    """Return the values of a file and the command line, unchecked.

    Args:
        name_or_path: A shipped file's name, or the path of a ``.yaml`` file.
        overrides: Dotted assignments.
        schema: What the values are meant for.
        kind: Which shipped files are meant.

    Raises:
        SlimError: Unknown name or unreadable file.
    """
    layers = read_files(name_or_path, kind)
    _apply_overrides(overrides, layers, words_for(schema))
    return layers


def from_values(values: JsonObject, name: str, origin: str) -> Resolved:
    """Return the recipe made of ``values`` (nested), all of them from ``origin``.

    Raises:
        SlimError: As ``load_recipe``.
    """
    return from_layers([(values, origin)], name)


def from_layers(
    layers: Sequence[tuple[JsonObject | str, str]], name: str, overrides: Sequence[str] = ()
) -> Resolved:
    """Return the recipe made of layers, the later one wins.

    Args:
        layers: Nested values and where they are from; or the name of a shipped recipe or part
            (its lines are the origins then).
        name: Of the recipe.
        overrides: Assignments of the command line, over all layers.

    Raises:
        SlimError: As ``load_recipe``.
    """
    merged = Layers(aliases=RECIPE)
    for values, origin in layers:
        if isinstance(values, str):
            merged.add_file(library.find("recipes", values))
        else:
            merged.add(values, lambda _, origin=origin: origin)
    _apply_overrides(overrides, merged, words_for(Recipe))
    return _check(merged, name, name)


def _check(layers: Layers, name: str, title: str) -> Resolved:
    what, problems = f"recipe {title}", layers.problems
    recipe = checked(Recipe, layers.values, layers.origins, problems, what, RECIPE)
    origins = _all_origins(recipe, layers.origins)
    return Resolved(recipe, origins, name, title, tuple(layers.notices))


def _override_value(path: Keys, text: str, words: Words) -> Any:
    kinds = words.kinds_at(path)
    if {"string"} <= kinds <= {"string", "null"}:
        return None if text in ("null", "~") else text
    value = parse_scalar(text)
    number = isinstance(value, int | float)
    return text if number and "string" in kinds and not kinds & {"integer", "number"} else value


def _apply_overrides(overrides: Sequence[str], layers: Layers, words: Words) -> None:
    problems = layers.problems
    for override in overrides:
        key, equals, text = override.partition("=")
        names = tuple(key.strip().split("."))
        if not equals or not all(names):
            problems.append(
                f"{shown(override)} ({COMMAND_LINE}) is not an override: write key=value"
            )
            continue
        if len(names) > MAX_DEPTH:
            problems.append(
                f"{shown(key)} ({COMMAND_LINE}) has {len(names)} names, at most {MAX_DEPTH} fit"
            )
            continue
        if names[0] == "extends":
            problems.append(f"extends ({COMMAND_LINE}): only a recipe file can extend another")
            continue
        try:
            value = _override_value(current_path(names, layers.aliases), text, words)
        except SlimError as error:
            problems.append(f"{key} ({COMMAND_LINE}): {error.message}")
            continue
        nested: Any = value
        for part in reversed(names):
            nested = {part: nested}
        layers.add(nested, lambda _: COMMAND_LINE)


def _leaves(section: Section, path: Keys = ()) -> list[tuple[Keys, Any]]:
    leaves: list[tuple[Keys, Any]] = []
    for key in type(section).model_fields:
        value = getattr(section, key)
        here = (*path, key)
        leaves += _leaves(value, here) if isinstance(value, Section) else [(here, value)]
    return leaves


def _all_origins(recipe: Recipe, origins: Origins) -> dict[str, str]:
    result = {}
    for path, value in _leaves(recipe):
        deeper = [v for k, v in origins.items() if k[: len(path)] == path and len(k) > len(path)]
        latest = deeper[-1] if deeper and isinstance(value, dict) else DEFAULT
        result[".".join(path)] = origins.get(path, latest) if not deeper else latest
    return result


def _plain(value: Any) -> Any:
    if isinstance(value, Section):
        return {k: v for k, v in value.model_dump().items() if v is not None}
    return [_plain(v) for v in value] if isinstance(value, list) else value


def _text(value: Any) -> str:
    value = _plain(value)
    return value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False)


def render(resolved: Resolved) -> str:
    """Return the recipe as YAML-like lines, each with the origin of its value, aligned.

    The one of ``adapter.alpha`` and ``adapter.scale`` that is not given is computed and shown.
    """
    recipe, origins = resolved.recipe, resolved.origins
    unused = {
        "adapter": recipe.method == "full",
        "quantize": recipe.method != "qlora" and not recipe.quantize.qat,
    }
    rows: list[tuple[str, str]] = []
    section = ""
    for path, value in _leaves(recipe):
        key = ".".join(path)
        text, origin = _text(value), origins[key]
        if key in ("adapter.alpha", "adapter.scale"):
            other = "scale" if path[1] == "alpha" else "alpha"
            if value is None:
                attribute = getattr(recipe.adapter, f"resolved_{path[1]}")
                text = f"{attribute:g}"
                is_set = getattr(recipe.adapter, other) is not None
                origin = f"follows from {other}" if is_set or path[1] == "scale" else DEFAULT
        elif key == "train.epochs" and recipe.train.steps is not None:
            origin += ", steps wins"
        if len(path) > 1 and path[0] != section:
            note = f"not used by {recipe.method}" if unused.get(path[0]) else ""
            rows.append((f"{path[0]}:", note))
        section = path[0] if len(path) > 1 else ""
        rows.append((f"{'  ' if len(path) > 1 else ''}{key.rsplit('.')[-1]}: {text}", origin))
    width = min(max(len(left) for left, _ in rows), 60)
    lines = [f"{left:<{width}}  # {note}" if note else left for left, note in rows]
    return "\n".join([*(f"# {notice}" for notice in resolved.notices), *lines])
