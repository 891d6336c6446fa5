"""Checkpoints of version 0.1 in today's form, so that its runs resume exactly.

0.1 stored the forgetting measurement in the train state (``held_out_*`` in ``state.json``), and the
arrays of its callbacks by their number (``0/mask``) in ``companions.safetensors``. Invariant:
nothing else reads the old names, and nothing writes them. Try it: ``python -m pytest
tests/training/test_legacy.py``.
"""

from __future__ import annotations

from collections import defaultdict

import mlx.core as mx
import numpy as np

from mlx_slim.reading import JsonObject

FORGETTING, ADALORA = "forgetting", "adalora"  # names of the callbacks that had a state in 0.1
_MARKS = {"text": FORGETTING, "mask": ADALORA}  # an array that only this callback stored
_OLD = "held_out_"


def is_legacy(record: JsonObject) -> bool:
    """Return whether a ``state.json`` was written by version 0.1."""
    return "required" not in record


def upgrade_state(record: JsonObject) -> JsonObject:
    """Return a ``state.json`` of 0.1 in today's form."""
    opened = record.get("open")
    opened = opened if isinstance(opened, dict) else {}
    steps = [at.get(name) for at in (record, opened) for name in ("best_step", f"{_OLD}step")]
    current = {key: value for key, value in record.items() if not key.startswith(_OLD)}
    if opened:
        current["open"] = {k: value for k, value in opened.items() if not k.startswith(_OLD)}
    current["required"] = sorted({step for step in steps if isinstance(step, int)})
    values = {name: record.get(f"{_OLD}{name}") for name in ("start", "step", "over")}
    if f"{_OLD}over" in opened:
        values["open"] = {name: opened.get(f"{_OLD}{name}") for name in ("step", "over")}
    current["callbacks"] = {FORGETTING: values}  # of a run without one too: ``upgrade_arrays``
    return current


def upgrade_arrays(
    arrays: dict[str, mx.array], values: dict[str, JsonObject]
) -> tuple[dict[str, mx.array], dict[str, JsonObject]]:
    """Return arrays and values of the callbacks under their names instead of their numbers.

    Args:
        arrays: ``companions.safetensors``: ``NUMBER/name`` -> array; empty if there is none.
        values: ``callbacks`` of ``upgrade_state``.

    Raises:
        KeyError: If a number holds the arrays of no callback that 0.1 had.
    """
    groups: dict[str, dict[str, mx.array]] = defaultdict(dict)
    for key, array in arrays.items():
        number, _, name = key.partition("/")
        groups[number][name] = array
    upgraded: dict[str, mx.array] = {}
    present: dict[str, JsonObject] = {}
    for number, group in groups.items():
        callback = next((_MARKS[name] for name in group if name in _MARKS), None)
        if callback is None:
            raise KeyError(number)
        if callback == FORGETTING:
            text = np.array(group["text"]).tobytes().hex()
            present[callback] = {"text": text, **values.get(callback, {})}
        else:
            upgraded |= {f"{callback}/{name}": array for name, array in group.items()}
    return upgraded, present
