"""Rows in memory, in the shape of a token store."""

from __future__ import annotations

import numpy as np


class MemoryRows:
    """Random rows of given lengths; the last ``supervised`` ids of each are targets."""

    def __init__(self, lengths: list[int], *, seed: int = 0, vocabulary: int = 256) -> None:
        rng = np.random.default_rng(seed)
        self._rows = []
        for length in lengths:
            ids = rng.integers(0, vocabulary, length).astype(np.int32)
            supervised = np.zeros(length, dtype=bool)
            supervised[length // 2 :] = True
            supervised[0] = False
            supervised[-1] = True
            self._rows.append((ids, supervised))
        self.lengths = np.array(lengths, dtype=np.int64)
        self.supervised = np.array([int(s.sum()) for _, s in self._rows], dtype=np.int64)
        self.fingerprint = f"memory-{seed}-{lengths}"

    def __len__(self) -> int:
        return len(self._rows)

    def row(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        return self._rows[i]

    def weights(self, i: int) -> np.ndarray | None:
        return None
