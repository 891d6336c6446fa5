"""Tokenised rows on disk: written as a stream, read through memory maps.

Invariant: memory holds some bytes a row, never the tokens. One set of rows on disk serves several
stores: a ``TokenStore`` is an index into it, so weights and the validation split copy nothing.

Layout of a folder (N rows, S their tokens): ``ids.bin`` int32 (S,), ``supervised.bin`` uint8 (S,),
``offsets.npy`` int64 (N + 1,), ``counts.npy`` int64 (N,); where some targets count other than once,
``weights.bin`` float32 (S,), 0 for what is no target; where some rows are pieces of one text, or
answers to one prompt, ``texts.npy`` int64 (N,), the number of each row's text; where rows have
labels, ``labels.npy`` bool (N,).
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from mlx_slim.data.tokenize import Tokens
from mlx_slim.errors import SlimError

_BLOCK = 1 << 20  # bytes copied at a time


@dataclass(frozen=True)
class TokenRows:
    """Some rows, back to back (R rows, S their tokens).

    Attributes:
        ids_S: int32 token ids.
        supervised_S: bool mask.
        lengths_R: int64 tokens of each row.
        counts_R: int64 supervised tokens of each row.
        hashes_R: uint64 hash of each row's ids.
        weights_S: float32 loss weights, None where every target's is 1.
        begins_R: bool, whether each row begins a text; None where all do, none being a later piece.
        labels_R: bool, whether each row's answer is label_file; None where rows have no labels.
    """

    ids_S: np.ndarray
    supervised_S: np.ndarray
    lengths_R: np.ndarray
    counts_R: np.ndarray
    hashes_R: np.ndarray
    weights_S: np.ndarray | None = None
    begins_R: np.ndarray | None = None
    labels_R: np.ndarray | None = None

    @classmethod
    def of(
        cls,
        rows: Sequence[Tokens],
        begins: Sequence[bool] | None = None,
        labels: Sequence[bool | None] = (),
    ) -> TokenRows:
        """Join rows; ``begins`` says which ones begin a text, None that all do."""
        ids = [np.ascontiguousarray(row.ids_T, np.int32) for row in rows]
        return cls(
            np.concatenate([*ids, np.empty(0, np.int32)]),
            np.concatenate([*(row.supervised_T for row in rows), np.empty(0, np.bool_)]),
            np.array([len(row) for row in ids], np.int64),
            np.array([np.count_nonzero(row.supervised_T) for row in rows], np.int64),
            np.array([_hash(row) for row in ids], np.uint64),
            None
            if all(row.weights_T is None for row in rows)
            else np.concatenate([_weights(row) for row in rows]),
            None if begins is None or all(begins) else np.array(begins, np.bool_),
            None if None in labels or not labels else np.array(labels, np.bool_),
        )

    @property
    def texts(self) -> int:
        """How many texts they are made of."""
        return len(self.lengths_R) if self.begins_R is None else int(self.begins_R.sum())


def _weights(row: Tokens) -> np.ndarray:
    return row.supervised_T.astype(np.float32) if row.weights_T is None else row.weights_T


def _hash(ids_T: np.ndarray) -> int:
    digest = hashlib.blake2b(ids_T.tobytes(), digest_size=8, person=b"row").digest()
    return int.from_bytes(digest, "little")


class TokenWriter:
    """Appends rows to a folder; some bytes a row stay for duplicates and the ledger."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._ids = (folder / "ids.bin").open("wb")
        self._supervised = (folder / "supervised.bin").open("wb")
        self._weights: BinaryIO | None = None  # from the first weighted row on
        self._lengths = array("q")
        self._counts = array("q")
        self._hashes = array("Q")
        self._begins = array("b")
        self._labels = array("b")

    def __len__(self) -> int:
        return len(self._counts)

    def add(self, rows: TokenRows) -> None:
        """Append rows."""
        if self._weights is None and rows.weights_S is not None:
            self._weights = self._from_the_first_row()
        self._ids.write(rows.ids_S.tobytes())
        self._supervised.write(rows.supervised_S.tobytes())
        if self._weights is not None:
            extra = rows.supervised_S if rows.weights_S is None else rows.weights_S
            self._weights.write(extra.astype(np.float32).tobytes())
        self._lengths.frombytes(rows.lengths_R.tobytes())
        self._counts.frombytes(rows.counts_R.tobytes())
        self._hashes.frombytes(rows.hashes_R.tobytes())
        begins = np.ones(len(rows.lengths_R), np.bool_) if rows.begins_R is None else rows.begins_R
        self._begins.frombytes(begins.tobytes())
        if rows.labels_R is not None:
            self._labels.frombytes(rows.labels_R.tobytes())

    def _from_the_first_row(self) -> BinaryIO:
        """Open ``weights.bin`` and write the weights of the rows so far: 1 for every target."""
        self._supervised.flush()
        weights = (self.folder / "weights.bin").open("wb")
        with (self.folder / "supervised.bin").open("rb") as before:
            while block := before.read(_BLOCK):
                weights.write(np.frombuffer(block, np.bool_).astype(np.float32).tobytes())
        return weights

    def close(self) -> np.ndarray:
        """Finish the files; return the hash of every row's ids, uint64 (N,)."""
        self._ids.close()
        self._supervised.close()
        if self._weights is not None:
            self._weights.close()
        offsets = np.zeros(len(self) + 1, np.int64)
        np.cumsum(np.asarray(self._lengths, np.int64), out=offsets[1:])
        np.save(self.folder / "offsets.npy", offsets)
        np.save(self.folder / "counts.npy", np.asarray(self._counts, np.int64))
        if not np.asarray(self._begins, np.bool_).all():
            np.save(self.folder / "texts.npy", self.texts())
        if self._labels:
            np.save(self.folder / "labels.npy", np.asarray(self._labels, np.bool_))
        return np.asarray(self._hashes, np.uint64)

    def texts(self) -> np.ndarray:
        """Return the number of the text that every row is of, int64 (N,)."""
        return np.cumsum(np.asarray(self._begins, np.int64)) - 1


class TokenStore:
    """Rows of token ids, memory-mapped and read-only.

    Attributes:
        lengths: Tokens of each row, int64 (N,).
        supervised: Supervised targets of each row, int64 (N,).
        index: Number of each row among all rows of the folder, int64 (N,).
        texts: Number of the text that each row is, or is a piece of, int64 (N,).
        labels: Whether each row's answer is label_file, bool (N,); None where rows have no labels.
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
            weights = folder / "weights.bin"
            self._weights = np.memmap(weights, np.float32, "r") if weights.is_file() else None
            pieces = folder / "texts.npy"
            texts = np.load(pieces) if pieces.is_file() else np.arange(len(counts))
            label_file = folder / "labels.npy"
            labels = np.load(label_file) if label_file.is_file() else None
        except (OSError, ValueError) as error:
            raise SlimError(
                f"the tokenised rows in {folder} cannot be read: {error}",
                "remove the folder; it is made again",
            ) from error
        sizes = {len(self._ids), len(self._mask), offsets[-1] if len(offsets) else -1}
        if self._weights is not None:
            sizes.add(len(self._weights))
        rows = {len(one) for one in (counts, texts, labels) if one is not None}
        if rows != {len(offsets) - 1} or len(sizes) > 1:
            raise SlimError(
                f"the tokenised rows in {folder} are damaged", "remove the folder; it is made again"
            )
        self.folder = folder
        self.fingerprint = fingerprint
        self.index = np.arange(len(counts)) if index is None else np.asarray(index, np.int64)
        self._start = offsets[:-1][self.index]
        self.lengths: np.ndarray = np.diff(offsets)[self.index]
        self.supervised: np.ndarray = counts[self.index]
        self.texts: np.ndarray = texts[self.index]
        self.labels: np.ndarray | None = None if labels is None else labels[self.index]

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

    def hashes(self) -> np.ndarray:
        """Return a hash of every row's ids, uint64 (N,): equal rows have equal hashes."""
        return np.array([_hash(self.row(i)[0]) for i in range(len(self))], np.uint64)

    def weights(self, i: int) -> np.ndarray | None:
        """Return the loss weights of row ``i``, float32 (T,); None where all targets' are 1."""
        if self._weights is None:
            return None
        start = int(self._start[i])
        return self._weights[start : start + int(self.lengths[i])]
