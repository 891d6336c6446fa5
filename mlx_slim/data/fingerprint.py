"""What tokenised rows were made from: content, template, tokenizer, settings.

Invariant: equal fingerprints mean equal rows in equal order; a difference is described in words.
"""

from __future__ import annotations

from typing import Any

from mlx_slim.config.schema import SourceConfig
from mlx_slim.data.sources import Source
from mlx_slim.reading import JsonObject


def source_fingerprint(source: Source, config: SourceConfig) -> JsonObject:
    """Return what identifies a source and how it is read."""
    return {
        **source.fingerprint(),
        "format": config.format,
        "split": config.split,
        "weight": config.weight,
        **({"system": config.system} if config.system else {}),
        **({"skip": config.skip} if config.skip else {}),
        **({"limit": config.limit} if config.limit else {}),
    }


def without_rows(fingerprint: JsonObject) -> JsonObject:
    """The fingerprint as it is known before the rows are read."""
    stripped = [{k: v for k, v in s.items() if k != "rows"} for s in fingerprint["sources"]]
    return {**fingerprint, "sources": stripped}


def fingerprint_difference(old: JsonObject, new: JsonObject, path: str = "data") -> list[str]:
    """Return one readable line for each thing that differs; ``path`` is how the lines begin."""
    lines: list[str] = []
    _compare(path, old, new, lines)
    return lines


def _compare(path: str, old: Any, new: Any, lines: list[str]) -> None:
    if old == new:
        return
    if isinstance(old, dict) and isinstance(new, dict):
        if "path" in old and old.get("path") == new.get("path"):
            path = f"{path} ({old['path']})"
        for key in [*old, *(key for key in new if key not in old)]:
            _compare(f"{path}.{key}".lstrip("."), old.get(key), new.get(key), lines)
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for number, (before, after) in enumerate(zip(old, new, strict=True)):
            _compare(f"{path}[{number}]", before, after, lines)
    else:
        lines.append(f"{path}: {_short(old)} → {_short(new)}")


def _short(value: Any) -> str:
    if isinstance(value, str) and len(value) == 64:
        return value[:12]
    if isinstance(value, list):
        names = [item.get("path", item) if isinstance(item, dict) else item for item in value]
        return f"[{', '.join(map(str, names))}]"
    return repr(value)
