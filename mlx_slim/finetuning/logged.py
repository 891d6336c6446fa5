"""The events of a run's ``metrics.jsonl``, as its page shows them.

Invariant: a line that is no event, or has numbers that no run can have, is left out. Try it:
``mlx-slim report runs/try``.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from mlx_slim.artifacts import json_lines
from mlx_slim.errors import SlimError
from mlx_slim.reading import JsonObject, parse_json

METRICS_FILE = "metrics.jsonl"
_BLOCK, _MOST = 1_024, 1 << 63  # lines that are parsed at once; more than any number of a run
_NUMBERS: dict[str, dict[str, type]] = {
    "predicted": {"predicted_peak_bytes": int},
    "started": {"total_steps": int, "budget_bytes": int},
    "step": {
        **{"step": int, "epoch": float, "loss": float, "learning_rate": float},
        **{"tokens_per_second": float, "active_memory_bytes": int, "peak_memory_bytes": int},
    },
    "validation": {"step": int, "loss": float},
    "task_validation": {"step": int, "value": float},
    "round": {
        **{"step": int, "answers": int, "tokens": int, "cut": int},
        **{"writing_seconds": float, "scoring_seconds": float},
    },
}


def events_of(out: Path) -> list[JsonObject]:
    """Return the events of ``metrics.jsonl``.

    Lines that are none are left out: one that a kill cut off, numbers that no step can have.
    """
    file = out / METRICS_FILE
    if not file.is_file():
        return []
    records: list[Any] = []
    lines = json_lines(file)
    while block := [line for _, line in islice(lines, _BLOCK)]:
        try:  # many at once: faster than one after the other
            records += parse_json(b"[" + b",".join(block) + b"]", "")
        except SlimError:
            for line in block:
                with contextlib.suppress(SlimError):
                    records.append(parse_json(line, ""))
    return [one for one in records if isinstance(one, dict) and _is_event(one)]


def _is_event(record: Mapping[str, Any]) -> bool:
    """Return whether an event has the numbers that the page shows, in their range."""
    name = record.get("event")
    needed = _NUMBERS.get(name, {}) if isinstance(name, str) else {}
    values = [(record.get(key), kind) for key, kind in needed.items()]
    if name == "predicted":
        breakdown = record.get("breakdown")
        if not isinstance(breakdown, dict):
            return False
        values += [(size, int) for size in breakdown.values()]
    return all(_fits(value, kind) for value, kind in values)


def _fits(value: Any, kind: type) -> bool:
    """Return whether a value can be a count (``int``) or a measurement (``float``: NaN too)."""
    if kind is int:
        return type(value) is int and 0 <= value < _MOST
    finite = type(value) is int or (type(value) is float and math.isfinite(value))
    return type(value) is float if not finite else abs(value) < _MOST
