"""Which rows train, which validate, and how often each is used.

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
    """Return the sorted indices of the validation rows: a fraction below 1, else a count."""
    fraction = float(setting)
    count = round(fraction * rows) if fraction < 1 else int(fraction)
    if fraction >= 1 and count >= rows:
        raise SlimError(
            f"data.validation={count} rows, but only {rows} rows are usable",
            "use fewer validation rows, or set data.validation=0",
        )
    count = min(count, rows - 1)
    return np.sort(np.random.default_rng([seed, 1]).permutation(rows)[:count])


def no_row_left(candidates: int) -> SlimError:
    """Return the refusal of ``candidates`` training rows that are all validation rows too."""
    return SlimError(
        f"no training row is left: all {candidates:,} are in the validation set too",
        "set data.validation=0, or give other rows",
    )


def split_rows(
    setting: float | str, hashes: np.ndarray, texts: np.ndarray, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the indices of the validation rows, and of those that are left to train on.

    A text that was cut into several rows is on one side with all of them, as are both answers of a
    pair.

    Args:
        setting: ``data.validation``, a fraction below 1 or a count, of texts.
        hashes: Of each row's tokens, (N,): a row that equals a validation row is not trained on,
            nor is a pair of which an answer does.
        texts: Number of the text that each row is, or is a piece of, ascending (N,).
        seed: Of the recipe.

    Raises:
        SlimError: If there are not more rows than a count asks for.
    """
    count = int(texts[-1]) + 1 if len(texts) else 0
    validation = np.flatnonzero(np.isin(texts, choose_validation(setting, count, seed)))
    others = np.setdiff1d(np.arange(len(hashes)), validation)
    return validation, others[~np.isin(hashes[others], hashes[validation])]


def whole_units(rows_left: np.ndarray, unit: int) -> np.ndarray:
    """Return those rows of which all ``unit`` rows of their unit are left."""
    numbers, counts = np.unique(rows_left // unit, return_counts=True)
    return rows_left[np.isin(rows_left // unit, numbers[counts == unit])]


def weighted(
    rows_left: np.ndarray, bounds: list[int], weights: list[float], seed: int, unit: int = 1
) -> np.ndarray:
    """Return the training index: each source's rows as often as its weight says.

    Each ``unit`` neighbouring rows, such as both answers of a pair, are taken or left as one.
    """
    indices: list[np.ndarray] = []
    for number, weight in enumerate(weights):
        rows = rows_left[(rows_left >= bounds[number]) & (rows_left < bounds[number + 1])]
        whole, rest = int(weight), weight - int(weight)
        generator = np.random.default_rng([seed, 2, number])
        firsts = rows[::unit]
        some = np.sort(generator.permutation(firsts)[: round(rest * len(firsts))])
        indices += [rows] * whole + [(some[:, None] + np.arange(unit)).reshape(-1)]
    train = np.concatenate(indices)
    if not len(train):
        raise SlimError(
            f"the weights {weights} select no training row", "raise the weights in data.path"
        )
    return train
