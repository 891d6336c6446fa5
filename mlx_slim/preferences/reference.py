"""The reference's log-probabilities: those of the model before its first step, on disk.

Invariant: one file a list of rows, named by all that its numbers depend on. Micro-batches are
appended in the order of a fixed plan and synchronised; a killed run resumes with the first one that
is not whole; a complete file gets its last name, and a hash beside it: an edited one is refused. So
the numbers are the same bit for bit, no second copy of the weights exists, and a model with new
adapters is its own reference: these change nothing before the first step. Try it: ``mlx-slim train
smollm2-dpo -o runs/dpo``; the files are in ``runs/dpo/reference``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import mlx.nn as nn
import numpy as np

from mlx_slim.artifacts import disk_errors, fsync, hash_file, hash_json, write_json
from mlx_slim.data.batches import Batcher, RowStore
from mlx_slim.errors import SlimError
from mlx_slim.preferences.scorer import RowScorer
from mlx_slim.reading import JsonObject, read_object, short

_VERSION = 1  # of the files: raise it when the same key would give other numbers


class ReferenceCache:
    """The log-probability of each row of one store under the reference.

    Args:
        folder: Of the run's references.
        key: What the numbers depend on, besides the rows.
        batcher: The rows, ``grouped``; the batches of its epoch 0 are scored.
        rows_hash: Of the rows.
    """

    def __init__(self, folder: Path, key: JsonObject, batcher: Batcher, rows_hash: str) -> None:
        sizes = (batcher.batch_tokens, batcher.max_length, batcher.seed)
        name = hash_json({"version": _VERSION, **key, "rows": rows_hash, "plan": sizes})[:16]
        self._file, self._part = folder / f"{name}.bin", folder / f"{name}.part"
        self._hash = folder / f"{name}.json"
        self._batcher = batcher
        self._values: np.ndarray | None = None

    @property
    def rows(self) -> RowStore:
        """The rows."""
        return self._batcher.rows

    @property
    def complete(self) -> bool:
        """Whether all rows are scored."""
        return self._file.is_file() and self._file.stat().st_size == 4 * len(self.rows)

    def __call__(self, numbers_R: np.ndarray) -> np.ndarray:
        """Return the log-probability of each row, float32; 0 while they are not complete."""
        if self._values is None:
            if not self.complete:
                return np.zeros(len(numbers_R), np.float32)
            order = [row for groups in self._batcher.plan(0) for (row,) in groups]
            if self._edited():
                raise SlimError(
                    f"{short(self._file)} is not as this run wrote it",
                    "remove it: its rows are scored again, by the same model",
                )
            values = np.empty(len(self.rows), np.float32)
            values[order] = np.fromfile(self._file, np.float32)
            self._values = values  # filled: another thread may ask at the same time
        return self._values[numbers_R]

    def _edited(self) -> bool:
        """Return whether the file is not as it was written, where its hash is known."""
        if not self._hash.is_file():  # a run of an earlier version
            return False
        return hash_file(self._file) != read_object(self._hash, sha256=str)["sha256"]

    def write(self, scorer: RowScorer, model: nn.Module, stop: Callable[[], bool]) -> Iterator[int]:
        """Score the rows that are not scored yet; yield how many are after each micro-batch.

        Args:
            scorer: Of these rows.
            model: The reference, in evaluation mode.
            stop: Called after each micro-batch; true ends the iteration, what is written stays.

        Raises:
            ResourceError: If the disk is full.
        """
        with disk_errors(self._part):
            self._part.parent.mkdir(parents=True, exist_ok=True)
            self._part.touch()
            done, begun = self._part.stat().st_size // 4, 0
            with self._part.open("r+b") as handle:
                for groups in self._batcher.plan(0):
                    begun += len(groups)
                    if begun <= done:
                        continue
                    handle.seek(4 * (begun - len(groups)))
                    handle.truncate()
                    values = scorer(model, [row for (row,) in groups])
                    handle.write(values.astype(np.float32).tobytes())
                    handle.flush()
                    fsync(handle.fileno())
                    yield begun
                    if stop() and begun < len(self.rows):
                        return
            write_json(self._hash, {"sha256": hash_file(self._part)})
            self._part.replace(self._file)
