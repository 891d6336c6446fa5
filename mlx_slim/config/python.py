"""Recipes and overrides as Python values: what the functions of ``mlx_slim`` take.

Invariant: a value is checked as one from a file is. Try it:
``python -c "import mlx_slim; mlx_slim.plan('smollm2-lora', overrides={'adapter.rank': 4})"``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlx_slim.config.load import Resolved, from_values, load_recipe
from mlx_slim.reading import JsonObject

# A shipped recipe's name, the path of a YAML file, a recipe's values, or a resolved recipe.
AnyRecipe = str | Path | Mapping[str, Any] | Resolved


def resolved_recipe(recipe: AnyRecipe, overrides: Mapping[str, Any] | None) -> Resolved:
    """Return the recipe with dotted ``overrides`` laid over it.

    Raises:
        SlimError: As ``load_recipe``.
    """
    if isinstance(recipe, Resolved):
        values, name = recipe.recipe.model_dump(mode="json"), recipe.name
        return recipe if not overrides else from_values(_laid(values, overrides), name, "Python")
    if isinstance(recipe, Mapping):
        return from_values(_laid(dict(recipe), overrides or {}), "recipe", "Python")
    words = [f"{key}={override_text(value)}" for key, value in (overrides or {}).items()]
    return load_recipe(str(recipe), words)


def override_text(value: Any) -> str:
    """Return ``value`` as the YAML of an override."""
    return str(value) if isinstance(value, (str, Path)) else json.dumps(value)


def _laid(values: JsonObject, overrides: Mapping[str, Any]) -> JsonObject:
    """Return ``values`` with dotted ``overrides`` laid over them."""
    for key, value in overrides.items():
        *sections, name = key.split(".")
        inside = values
        for section in sections:
            inside[section] = dict(inside.get(section) or {})
            inside = inside[section]
        inside[name] = value
    return values
