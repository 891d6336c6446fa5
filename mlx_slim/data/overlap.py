"""Do training rows hold evaluation questions? Counted by shared runs of words.

Invariant: a training row overlaps a question when it holds ``LONG`` words of it in a row (``SHORT``
where the question is shorter than ``LONG``); case and punctuation aside. Questions shorter than
``SHORT`` are not checked, and the report says how many. What a question is, the task definitions
say (``overlap``). Memory: 12 bytes a word of the mirrors.
The measure is that of the GPT-3 report (arXiv 2005.14165, appendix C).
Try it: ``mlx-slim data overlap rows.jsonl``.

Legend: W words of a text, G hashed runs (n-grams).
"""

from __future__ import annotations

import os
import re
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import numpy as np

from mlx_slim.config import library
from mlx_slim.config.task import TaskSpec, read_task
from mlx_slim.data.mirror import records, split_file
from mlx_slim.data.sources import MIRROR_VARIABLE, RawRow, Source
from mlx_slim.reading import JsonObject

LONG, SHORT = 13, 8
_FIRST = 5
_BLOCK = 1 << 16  # words hashed at once
_WORD = re.compile(r"\w+")
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


def _evaluations() -> Iterator[tuple[str, str, TaskSpec]]:
    """Yield (data set, scored split, task) of the shipped tasks that name their question."""
    for name in library.names("evals"):
        spec = read_task(library.find("evals", name), shipped=True)
        if spec.overlap:
            yield spec.data.mirror or name, spec.data.split, spec


def _runs(words_W: np.ndarray, n: int) -> np.ndarray:
    """Return the hash of every run of ``n`` word codes: uint64 (W - n + 1,)."""
    count = len(words_W) - n + 1
    if count <= 0:
        return np.empty(0, np.uint64)
    hashes_G = np.full(count, np.uint64(n))
    for start in range(n):
        hashes_G = (hashes_G ^ words_W[start : start + count]) * _MULTIPLIER
        hashes_G ^= hashes_G >> np.uint64(29)
    return hashes_G


def words(text: str) -> list[str]:
    """Return the words of a text in lower case, without punctuation."""
    return _WORD.findall(text.lower())


@dataclass(frozen=True)
class Index:
    """The runs of all questions: ``hashes_G`` sorted uint64, ``owners_G`` their questions."""

    vocabulary: dict[str, int]
    hashes_G: np.ndarray
    owners_G: np.ndarray
    datasets: list[str]
    edges: np.ndarray  # first question of each data set, and the end
    too_short: list[int]  # questions of each data set that are not checked


@lru_cache(maxsize=2)
def build_index(mirror: Path) -> Index:
    """Hash the questions of the tasks' scored splits in a mirror (a second or two for 25 MB).

    Raises:
        SlimError: If a file of the mirror cannot be read.
    """
    vocabulary: dict[str, int] = {}
    datasets, edges = [], [0]
    codes, lengths = array("Q"), array("q")
    for name, split, spec in _evaluations():
        file = split_file(mirror / name, split)
        if file is None:
            continue
        for text in _questions(file, spec):
            text_words = words(text)
            codes.extend([vocabulary.setdefault(word, len(vocabulary) + 1) for word in text_words])
            lengths.append(len(text_words))
        datasets.append(name)
        edges.append(len(lengths))
    codes_W, length_Q = np.array(codes, np.uint64), np.array(lengths, np.int64)
    owner_W = np.repeat(np.arange(len(length_Q), dtype=np.int32), length_Q)
    left_W = np.repeat(np.cumsum(length_Q), length_Q) - np.arange(len(codes_W))  # words to its end
    hashes: list[np.ndarray] = []
    owners: list[np.ndarray] = []
    for n, is_length_Q in ((LONG, length_Q >= LONG), (SHORT, length_Q < LONG)):
        runs_G = _runs(codes_W, n)
        whole_G = ((left_W >= n) & is_length_Q[owner_W])[: len(runs_G)]
        hashes.append(runs_G[whole_G])
        owners.append(owner_W[: len(runs_G)][whole_G])
    every = np.concatenate(hashes)
    order = np.argsort(every, kind="stable")
    short = [int((length_Q[a:b] < SHORT).sum()) for a, b in pairwise(edges)]
    return Index(
        vocabulary, every[order], np.concatenate(owners)[order], datasets, np.array(edges), short
    )


def _questions(file: Path, spec: TaskSpec) -> Iterator[str]:
    for row in records(Source(str(file), "file", [file]), spec.data.records):
        yield " ".join(str(row.value.get(column, "")) for column in spec.overlap)


@dataclass
class _Overlap:
    """What rows share with one data set: how many, which questions, and the first rows."""

    rows: int = 0
    questions: set[int] = field(default_factory=set)
    first: list[str] = field(default_factory=list)


@dataclass
class Checker:
    """Counts the rows that hold a question; without a mirror it only says so."""

    index: Index | None
    rows: int = 0
    overlapping: int = 0
    questions: dict[str, _Overlap] = field(default_factory=dict)
    _waiting: list[str] = field(default_factory=list)  # their places
    _codes: array[int] = field(default_factory=lambda: array("Q"))
    _ends: list[int] = field(default_factory=list)

    @classmethod
    def from_mirror(cls, mirror: str | Path | None = None) -> Checker:
        """Return a checker against ``mirror`` (``MLX_SLIM_DATA`` when None)."""
        mirror = mirror or os.environ.get(MIRROR_VARIABLE)
        if not mirror or not Path(mirror).expanduser().is_dir():
            return cls(None)
        index = build_index(Path(mirror).expanduser().resolve())
        return cls(index if index.datasets else None)

    def add(self, raw: RawRow, texts: Iterable[str]) -> None:
        """Check one training row (in blocks, so that the work is numpy's)."""
        if self.index is None:
            return
        get = self.index.vocabulary.get
        self._codes.extend([get(word, 0) for word in words(" ".join(texts))])
        self._codes.append(0)  # a word of no question: no run reaches into the next row
        self._waiting.append(raw.place)
        self._ends.append(len(self._codes))
        if len(self._codes) >= _BLOCK:
            self._flush()

    def _flush(self) -> None:
        if self.index is None or not self._waiting:
            return
        codes_W = np.array(self._codes, np.uint64)
        pairs: list[np.ndarray] = []
        for n in (LONG, SHORT):
            runs_G = _runs(codes_W, n)
            is_shared_G = np.convolve(codes_W == 0, np.ones(n), "valid")[: len(runs_G)] < 0.5
            at_G = np.flatnonzero(is_shared_G) if len(runs_G) else np.empty(0, np.int64)
            low = np.searchsorted(self.index.hashes_G, runs_G[at_G], "left")
            last = len(self.index.hashes_G) - 1
            hit = (
                self.index.hashes_G[np.minimum(low, last)] == runs_G[at_G] if last >= 0 else low < 0
            )
            at_G, low = at_G[hit], low[hit]
            high = np.searchsorted(self.index.hashes_G, runs_G[at_G], "right")
            row = np.searchsorted(np.asarray(self._ends), at_G, "right")
            times = high - low  # questions that share the run
            first = np.cumsum(times) - times
            inside = np.arange(times.sum()) - np.repeat(first, times)
            owners = self.index.owners_G[np.repeat(low, times) + inside].astype(np.int64)
            pairs.append(np.repeat(row, times) * self.index.edges[-1] + owners)
        pairs_P = np.unique(np.concatenate(pairs))
        if len(pairs_P):
            self._count(pairs_P // self.index.edges[-1], pairs_P % self.index.edges[-1])
        self.rows += len(self._waiting)
        self._codes, self._waiting, self._ends = array("Q"), [], []

    def _count(self, rows_P: np.ndarray, questions_P: np.ndarray) -> None:
        """Count the distinct (row, question) pairs of a block."""
        assert self.index is not None
        self.overlapping += len(np.unique(rows_P))
        datasets_P = np.searchsorted(self.index.edges, questions_P, "right") - 1
        for number in np.unique(datasets_P):
            mine = datasets_P == number
            entry = self.questions.setdefault(self.index.datasets[number], _Overlap())
            rows = np.unique(rows_P[mine])
            entry.rows += len(rows)
            entry.questions.update(questions_P[mine].tolist())
            room = _FIRST - len(entry.first)
            entry.first += [self._waiting[row] for row in rows[:room]]

    def report(self) -> JsonObject:
        """Return the ledger's section: per data set the rows and questions that overlap."""
        self._flush()
        if self.index is None:
            return {"checked": False, "why": f"no evaluation data under {MIRROR_VARIABLE}"}
        datasets = {}
        for number, name in enumerate(self.index.datasets):
            entry = self.questions.get(name, _Overlap())
            edges = self.index.edges
            datasets[name] = {
                "questions": int(edges[number + 1] - edges[number]),
                "questions_too_short_to_check": self.index.too_short[number],
                "questions_found": len(entry.questions),
                "rows_overlapping": entry.rows,
                "first": entry.first,
            }
        return {
            "checked": True,
            "words_in_a_row": {"long": LONG, "short": SHORT},
            "rows_checked": self.rows,
            "rows_overlapping": self.overlapping,
            "datasets": datasets,
        }
