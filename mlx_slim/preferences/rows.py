"""Rows of answers as KTO needs them: each prompt with the answer of another row.

Invariant: row i is the prompt of row i and the answer of the nearest row before it (around the end)
that has another prompt, as TRL rotates the answers of a batch by one; it is cut at ``max_length``.
So the pairing depends on the rows alone, and the reference's log-probabilities are kept.
"""

from __future__ import annotations

import numpy as np

from mlx_slim.data.collate import RowStore


class MismatchedRows:
    """A ``RowStore`` of the prompts of ``store``, each with another row's answer.

    Args:
        store: The rows.
        max_length: Longest row, tokens.
    """

    def __init__(self, store: RowStore, max_length: int) -> None:
        self._store = store
        starts, prompts, tails = [], [], []
        for i in range(len(store)):
            ids_T, supervised_T = store.row(i)
            start = int(np.argmax(supervised_T))
            starts.append(start)
            prompts.append(hash(np.ascontiguousarray(ids_T[:start]).tobytes()))
            tails.append(supervised_T[start:])
        self._starts = np.array(starts)
        self._donors = _donors(prompts)
        room = max_length - self._starts
        answers = (store.lengths - self._starts)[self._donors]
        self.lengths: np.ndarray = self._starts + np.minimum(answers, room)
        pairs = zip(self._donors, room, strict=True)
        self.supervised: np.ndarray = np.array([tails[d][:left].sum() for d, left in pairs])

    def __len__(self) -> int:
        return len(self._store)

    def row(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """Return row ``i`` as a store does."""
        donor = int(self._donors[i])
        prompt_T = self._store.row(i)[0][: self._starts[i]]
        ids_T, supervised_T = self._store.row(donor)
        answer = slice(int(self._starts[donor]), None)
        ids_T = np.concatenate([prompt_T, ids_T[answer]])
        mask_T = np.concatenate([np.zeros(len(prompt_T), bool), supervised_T[answer]])
        return ids_T[: self.lengths[i]], mask_T[: self.lengths[i]]

    def weights(self, i: int) -> np.ndarray | None:
        """Return None: every target counts once."""
        return None


def _donors(prompts: list[int]) -> np.ndarray:
    """Return, for each row, the nearest row before it with another prompt; else the one before."""
    count = len(prompts)
    donors = np.arange(-1, count - 1) % count
    for _ in range(2):  # a run of equal prompts at the beginning looks behind the end
        for i in range(count):
            if prompts[donors[i]] == prompts[i]:
                donors[i] = donors[donors[i]]
    same = [prompts[donor] == prompt for donor, prompt in zip(donors, prompts, strict=True)]
    return np.where(same, np.arange(-1, count - 1) % count, donors)
