"""Do training rows hold evaluation questions? Counted by shared runs of words.

Invariant: a training row overlaps a question when it holds ``LONG`` words of it in a row (``SHORT``
where the question is shorter than ``LONG``); case and punctuation aside. Questions shorter than
``SHORT`` are not checked, and the report says how many. Memory: 12 bytes a word of the mirrors.
The measure is that of the GPT-3 report (arXiv 2005.14165, appendix C).
Try it: ``mlx-slim data overlap rows.jsonl``.

Legend: W words of a text, G hashed runs (n-grams).
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from mlx_slim.data.sources import MIRROR_VARIABLE, RawRow

LONG, SHORT = 13, 8
_FIRST = 5
_WORD = re.compile(r"\w+")
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
# Data set of a mirror, its scored split, and the fields that hold the question.
EVALUATIONS: dict[str, tuple[str, tuple[str, ...]]] = {
    "hellaswag": ("validation", ("ctx",)),
    "gsm8k": ("test", ("question",)),
    "mmlu": ("test", ("question",)),
    "arc_easy": ("test", ("question",)),
    "arc_challenge": ("test", ("question",)),
    "openbookqa": ("test", ("question_stem",)),
    "pubmedqa": ("test", ("question",)),
}


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


@dataclass(frozen=True)
class Index:
    """The runs of all questions: ``hashes_G`` sorted uint64, ``owners_G`` their questions."""

    vocabulary: dict[str, int]
    hashes_G: np.ndarray
    owners_G: np.ndarray
    datasets: list[str]
    first_question: np.ndarray  # of each data set, and the end: where a question number belongs
    too_short: dict[str, int]

    def codes(self, text: str) -> np.ndarray:
        """Return the code of each word; a word of no question is 0, which matches nothing."""
        get = self.vocabulary.get
        return np.array([get(word, 0) for word in _WORD.findall(text.lower())], np.uint64)


@lru_cache(maxsize=2)
def build_index(mirror: Path) -> Index:
    """Hash the questions of a mirror's scored splits (a few seconds for 25 MB)."""
    vocabulary: dict[str, int] = {}
    datasets: list[str] = []
    first, too_short = [0], {}
    hashes: list[np.ndarray] = []
    owners: list[np.ndarray] = []
    question = 0
    for name, (split, columns) in EVALUATIONS.items():
        file = mirror / name / f"{split}.jsonl"
        if not file.is_file():
            continue
        datasets.append(name)
        too_short[name] = 0
        for text in _questions(file, columns):
            words = _WORD.findall(text.lower())
            codes = [vocabulary.setdefault(word, len(vocabulary) + 1) for word in words]
            runs = _runs(np.array(codes, np.uint64), LONG if len(codes) >= LONG else SHORT)
            if len(runs):
                hashes.append(runs)
                owners.append(np.full(len(runs), question, np.int32))
            else:
                too_short[name] += 1
            question += 1
        first.append(question)
    every = np.concatenate(hashes) if hashes else np.empty(0, np.uint64)
    order = np.argsort(every, kind="stable")
    owned = np.concatenate(owners)[order] if owners else np.empty(0, np.int32)
    return Index(vocabulary, every[order], owned, datasets, np.array(first), too_short)


def _questions(file: Path, columns: tuple[str, ...]) -> Iterator[str]:
    with file.open(encoding="utf-8") as handle:
        for line in handle:
            if line.strip():
                row = json.loads(line)
                yield " ".join(str(row.get(column, "")) for column in columns)


@dataclass
class Checker:
    """Counts the rows that hold a question; without a mirror it only says so."""

    index: Index | None
    rows: int = 0
    overlapping: int = 0
    found: dict[str, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def from_mirror(cls, mirror: str | Path | None = None) -> Checker:
        """Return a checker against ``mirror`` (``MLX_SLIM_DATA`` when None)."""
        mirror = mirror or os.environ.get(MIRROR_VARIABLE)
        if not mirror or not Path(mirror).expanduser().is_dir():
            return cls(None)
        index = build_index(Path(mirror).expanduser().resolve())
        return cls(index if index.datasets else None)

    def add(self, raw: RawRow, texts: Iterable[str]) -> None:
        """Check one training row."""
        if self.index is None:
            return
        self.rows += 1
        codes_W = self.index.codes(" ".join(texts))
        seen: set[int] = set()
        for n in (LONG, SHORT):
            runs_G = _runs(codes_W, n)
            if len(runs_G) and len(self.index.hashes_G):
                low = np.searchsorted(self.index.hashes_G, runs_G, "left")
                high = np.searchsorted(self.index.hashes_G, runs_G, "right")
                for hit in np.flatnonzero(high > low):
                    seen.update(self.index.owners_G[low[hit] : high[hit]].tolist())
        if not seen:
            return
        self.overlapping += 1
        for dataset in {self._dataset(question) for question in seen}:
            self.found.setdefault(dataset, {"rows": 0, "questions": set(), "first": []})
            entry = self.found[dataset]
            entry["rows"] += 1
            entry["questions"] |= {q for q in seen if self._dataset(q) == dataset}
            if len(entry["first"]) < _FIRST:
                entry["first"].append(raw.place)

    def _dataset(self, question: int) -> str:
        assert self.index is not None
        number = int(np.searchsorted(self.index.first_question, question, "right")) - 1
        return self.index.datasets[number]

    def report(self) -> dict[str, Any]:
        """Return the ledger's section: per data set the rows and questions that overlap."""
        if self.index is None:
            return {"checked": False, "why": f"no evaluation data under {MIRROR_VARIABLE}"}
        datasets = {}
        for number, name in enumerate(self.index.datasets):
            entry = self.found.get(name, {"rows": 0, "questions": set(), "first": []})
            edges = self.index.first_question
            datasets[name] = {
                "questions": int(edges[number + 1] - edges[number]),
                "questions_too_short_to_check": self.index.too_short[name],
                "questions_found": len(entry["questions"]),
                "rows_overlapping": entry["rows"],
                "first": entry["first"],
            }
        return {
            "checked": True,
            "words_in_a_row": {"long": LONG, "short": SHORT},
            "rows_checked": self.rows,
            "rows_overlapping": self.overlapping,
            "datasets": datasets,
        }
