"""Small preference runs for tests: pairs, labelled rows and recipes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mlx_slim.config.load import Resolved, from_values
from tests.support.runs import WORDS, recipe


def pairs(count: int = 24) -> list[dict[str, Any]]:
    """Return pairs of different lengths: the chosen answer has small letters."""
    rows = []
    for i in range(count):
        word = WORDS[i % 10]
        prompt = f"{i}: {' '.join(WORDS[: 1 + i % 7])}"
        rows.append(
            {"prompt": prompt, "chosen": word * (1 + i % 2), "rejected": word.upper() * (1 + i % 3)}
        )
    return rows


def labelled(count: int = 24) -> list[dict[str, Any]]:
    """Return single answers with labels."""
    return [
        {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
        for i, row in enumerate(pairs(count))
        for side in [("chosen", "rejected")[(i * 5 // 3) % 2]]
    ]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Write JSON lines; return the file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def preference_recipe(
    model: Path, rows: Path, loss: str = "sigmoid", method: str = "lora", **changes: Any
) -> Resolved:
    """Return the small recipe with a ``preference`` section.

    Args:
        model: Folder of the base.
        rows: File of rows.
        loss: Of the section.
        method: Of the recipe.
        changes: Keys of ``train``, or of ``preference``, ``data`` and ``adapter`` as mappings.
    """
    values = recipe(model, rows, method).recipe.model_dump(mode="json", exclude_unset=True)
    sections = {k: changes.pop(k, {}) for k in ("preference", "data", "adapter")}
    smoothing = {"label_smoothing": 0.1} if loss == "robust" else {}
    values["preference"] = {"loss": loss, **smoothing, **sections["preference"]}
    values["data"] |= sections["data"]
    values["adapter"] |= {"dropout": 0.0, **sections["adapter"]}
    values["train"] |= {"steps": 4, "batch_tokens": 512, "accumulate": 2, **changes}
    return from_values(values, "small", "test")
