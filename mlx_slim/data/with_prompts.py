"""Rows of which the prompt is learned too, beside answers that are compared.

Invariant: token ids are the store's; of the first row of each unit every token but the first is a
target, of the others the answer alone, as the store says. ``answers_S`` tells the targets apart.
ORPO's loss reads it with ``preference.nll=all``.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np

from mlx_slim.data.collate import RowStore


class WithPrompts:
    """A view of a store of answers; a ``RowStore``.

    Args:
        store: The rows.
        unit: Rows of a unit, the one whose prompt is learned first.
    """

    def __init__(self, store: RowStore, unit: int) -> None:
        self._store = store
        self._unit = unit
        self.lengths: np.ndarray = store.lengths
        whole = np.arange(len(store)) % unit == 0
        self.supervised: np.ndarray = np.where(whole, store.lengths - 1, store.supervised)

    def __len__(self) -> int:
        return len(self._store)

    def row(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """Return row ``i`` as a store does; of a unit's first row all tokens are targets."""
        ids_T, supervised_T = self._store.row(i)
        if i % self._unit:
            return ids_T, supervised_T
        return ids_T, np.arange(len(ids_T)) > 0

    def weights(self, i: int) -> np.ndarray | None:
        """Return None: every target counts once."""
        return None

    @cached_property
    def answers_S(self) -> np.ndarray:
        """Whether each target is of an answer, bool, by its number (``Batch.sources_N``)."""
        masks = [self._store.row(i)[1][self.row(i)[1]] for i in range(len(self))]
        return np.concatenate(masks)
