"""Rows of token ids in memory, for tests of the objectives."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


class Rows:
    """A ``RowStore`` of (prompt, answer) pairs of token ids."""

    def __init__(self, rows: Sequence[tuple[list[int], list[int]]]) -> None:
        self.rows = list(rows)
        self.lengths = np.array([len(prompt) + len(answer) for prompt, answer in self.rows])
        self.supervised = np.array([len(answer) for _, answer in self.rows])

    def __len__(self) -> int:
        return len(self.rows)

    def row(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        prompt, answer = self.rows[i]
        ids_T = np.array(prompt + answer, np.int32)
        return ids_T, np.arange(len(ids_T)) >= len(prompt)

    def weights(self, i: int) -> np.ndarray | None:
        return None
