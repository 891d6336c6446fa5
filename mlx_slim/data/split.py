"""Which rows train, which are held out, and how often each comes.

Invariant: everything depends on the seed, the rows and the settings of the data alone, never on the
batches.
"""

from __future__ import annotations

import numpy as np

from mlx_slim.errors import SlimError


def quotas(max_rows: int | None, weights: list[float]) -> list[int | None]:
    """Return how many rows each source may give (``max_rows`` shared by weight), None for all."""
    if max_rows is None:
        return [None] * len(weights)
    edges = np.round(np.cumsum([0.0, *weights]) / sum(weights) * max_rows).astype(int)
    return [int(n) for n in np.diff(edges)]


def choose_validation(setting: float | str, rows: int, seed: int) -> np.ndarray:
    """Return the sorted indices of the held-out rows: a share below 1, else a count."""
    share = float(setting)
    count = round(share * rows) if share < 1 else int(share)
    if share >= 1 and count >= rows:
        raise SlimError(
            f"data.validation={count} rows, but only {rows} rows are usable",
            "hold out fewer rows, or set data.validation=0",
        )
    count = min(count, rows - 1)
    return np.sort(np.random.default_rng([seed, 1]).permutation(rows)[:count])


def weighted(kept: np.ndarray, bounds: list[int], weights: list[float], seed: int) -> np.ndarray:
    """Return the training index: each source's rows as often as its weight says."""
    parts: list[np.ndarray] = []
    for number, weight in enumerate(weights):
        rows = kept[(kept >= bounds[number]) & (kept < bounds[number + 1])]
        whole, rest = int(weight), weight - int(weight)
        generator = np.random.default_rng([seed, 2, number])
        some = np.sort(generator.permutation(rows)[: round(rest * len(rows))])
        parts += [rows] * whole + [some]
    train = np.concatenate(parts)
    if not len(train):
        raise SlimError(f"weights {weights} leave no training row", "raise data.path weights")
    return train
