"""Which layers mlx-lm's settings of an adapter mean, and the settings that mean some layers.

Invariant: ``selected`` follows mlx-lm's ``linear_to_lora_layers``, and ``stock_selection`` is its
inverse. Used by ``store.py``. Try it: ``python -m pytest tests/adapters/test_store.py``.
"""

from __future__ import annotations

from typing import Any

from mlx_slim.adapters.inject import sites
from mlx_slim.models.structure import blocks


def stock_selection(model: Any, paths: list[str]) -> tuple[int, list[str]]:
    """Return mlx-lm's (num_layers, keys) that select exactly ``paths``.

    mlx-lm wraps a key in the last ``num_layers`` blocks when it is a path inside the block, and
    anywhere when it is a full path. The last N blocks with the same layers in each take the short
    form; any other choice is spelled out in full paths.
    """
    by_path = {site.path: site for site in sites(model)}
    chosen = [by_path[path] for path in paths]
    tuned = sorted({site.block for site in chosen if site.block is not None})
    inside = {block: {s.inside for s in chosen if s.block == block} for block in tuned}
    count = len(blocks(model))
    uniform = len({frozenset(names) for names in inside.values()}) == 1
    if tuned and uniform and tuned == list(range(count - len(tuned), count)):
        keys = [s.inside for s in chosen if s.block in (None, tuned[-1])]
        if selected(model, len(tuned), keys) == set(paths):
            return len(tuned), keys
    return 1, list(paths)


def selected(model: Any, num_layers: int, keys: list[str] | None) -> set[str]:
    """Return the full paths that mlx-lm wraps for this (num_layers, keys)."""
    everything = sites(model)
    if keys is None:
        keys = sorted({site.inside for site in everything if site.block is not None})
    first = len(blocks(model)) - num_layers if num_layers > 0 else 0
    paths = set(keys)
    return {
        s.path
        for s in everything
        if s.path in paths or (s.block is not None and s.block >= first and s.inside in paths)
    }
