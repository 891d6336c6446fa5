"""A recipe as a YAML file to edit, with a comment at the keys that have a reason.

Invariant: ``load_recipe`` of the file gives the recipe, value for value. What was set is in it; the
rest has its default. Try it: ``mlx-slim train MODEL --data rows.jsonl -o runs/mine``, which makes
``runs/mine/recipe.yaml``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mlx_slim.config.read import parse_scalar
from mlx_slim.config.schema import Recipe
from mlx_slim.errors import printable

_PLAIN = re.compile(r"[A-Za-z~./][\w./@:+-]*")


def value_text(value: Any) -> str:
    """Return a value as YAML on one line: as it is typed where that reads the same, else as JSON.

    ``1e-05`` and ``rows.jsonl`` stay bare; ``"null"`` and ``"3"`` are quoted.
    """
    if isinstance(value, str) and _PLAIN.fullmatch(value) and not value.endswith(":"):
        return value if parse_scalar(value) == value else json.dumps(value)
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e9:
        value = int(value)
    return json.dumps(value, ensure_ascii=False)


def recipe_text(recipe: Recipe, reasons: Mapping[str, str], header: Sequence[str]) -> str:
    """Return the file.

    Args:
        recipe: What was set in it is in the file.
        reasons: Dotted key -> why it has its value: a comment above it.
        header: Lines of a comment at the top.
    """
    values = recipe.model_dump(mode="json", exclude_unset=True)
    lines = [f"# {printable(line)}".rstrip() for line in header]
    for key, value in values.items():
        if isinstance(getattr(recipe, key), list) or not isinstance(value, dict):
            lines += _entry(key, key, value, reasons, "")
            continue
        lines.append(f"{key}:")
        for name, inner in value.items():
            lines += _entry(name, f"{key}.{name}", inner, reasons, "  ")
    return "\n".join(lines) + "\n"


def _entry(
    name: str, key: str, value: Any, reasons: Mapping[str, str], indent: str
) -> Iterator[str]:
    if key in reasons:
        yield f"{indent}# {printable(reasons[key])}"
    yield f"{indent}{name}: {value_text(value)}"
