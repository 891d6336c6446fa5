"""Tokenised rows on disk: written as a stream, read through memory maps.

Invariant: memory holds some bytes a row, never the tokens. One set of rows on disk serves several
stores: a ``TokenStore`` is an index into it, so weights and the validation split copy nothing.

Layout of a folder (N rows, S their tokens): ``ids.bin`` int32 (S,), ``supervised.bin`` uint8 (S,),
``offsets.npy`` int64 (N + 1,), ``counts.npy`` int64 (N,).
"""

from __future__ import annotations

import hashlib
from array import array
from pathlib import Path

import numpy as np

from mlx_slim.data.tokenize import Tokens
from mlx_slim.errors import SlimError


class TokenWriter:
    """Appends rows to a folder; ``hashes`` and ``counts`` stay for duplicates and the ledger."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._ids = (folder / "ids.bin").open("wb")
        self._supervised = (folder / "supervised.bin").open("wb")
        self._offsets = array("q", [0])
        self._counts = array("q")
        self._hashes = array("Q")

    def __len__(self) -> int:
        return len(self._counts)

    def add(self, row: Tokens) -> None:
        """Append a row."""
        data = np.ascontiguousarray(row.ids_T, np.int32).tobytes()
        mask = np.ascontiguousarray(row.supervised_T, np.uint8).tobytes()
        self._ids.write(data)
        self._supervised.write(mask)
        self._offsets.append(self._offsets[-1] + len(row.ids_T))
        self._counts.append(int(row.supervised_T.sum()))
        digest = hashlib.blake2b(data, digest_size=8, person=b"row").digest()
        self._hashes.append(int.from_bytes(digest, "little"))

    def close(self) -> np.ndarray:
        """Finish the files; return the hash of every row's ids, uint64 (N,)."""
        self._ids.close()
        self._supervised.close()
        np.save(self.folder / "offsets.npy", np.asarray(self._offsets, np.int64))
        np.save(self.folder / "counts.npy", np.asarray(self._counts, np.int64))
        return np.asarray(self._hashes, np.uint64)


class TokenStore:
    """Rows of token ids, memory-mapped and read-only.

    Attributes:
        lengths: Tokens of each row, int64 (N,).
        supervised: Supervised targets of each row, int64 (N,).
        index: Number of each row among all rows of the folder, int64 (N,).
        fingerprint: Hash of what the rows were made from, and of which rows these are.
    """

    def __init__(self, folder: Path, *, index: np.ndarray | None = None, fingerprint: str = ""):
        """Open the rows of ``folder`` (all, or those of ``index``, in its order, repeats allowed).

        Raises:
            SlimError: If the folder's files are missing or do not fit each other.
        """
        try:
            offsets = np.load(folder / "offsets.npy")
            counts = np.load(folder / "counts.npy")
            self._ids = np.memmap(folder / "ids.bin", np.int32, "r")
            self._mask = np.memmap(folder / "supervised.bin", np.bool_, "r")
        except (OSError, ValueError) as error:
            raise SlimError(
                f"the tokenised rows in {folder} cannot be read: {error}",
                "remove the folder; it is made again",
            ) from error
        if not len(offsets) == len(counts) + 1 or not offsets[-1] == len(self._ids) == len(
            self._mask
        ):
            raise SlimError(
                f"the tokenised rows in {folder} are damaged", "remove the folder; it is made again"
            )
        self.folder = folder
        self.fingerprint = fingerprint
        self.index = np.arange(len(counts)) if index is None else np.asarray(index, np.int64)
        self._start = offsets[:-1][self.index]
        self.lengths: np.ndarray = np.diff(offsets)[self.index]
        self.supervised: np.ndarray = counts[self.index]

    def __len__(self) -> int:
        return len(self.index)

    def row(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """Return row ``i``: ids int32 (T,), supervised bool (T,); ``supervised[0]`` is False.

        ``supervised[t]`` says that token t is a target, predicted from ``ids[:t]``. Both are views
        of the mapped files: copy before changing.
        """
        start = int(self._start[i])
        span = slice(start, start + int(self.lengths[i]))
        return self._ids[span], self._mask[span]
