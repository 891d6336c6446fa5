"""The ledger: what became of every row, and why.

Invariant: for each source, rows given = rows used + rows dropped; every reason has its count and
the first places where it struck.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING

from mlx_slim.reading import JsonObject
from mlx_slim.reading import field as value_of

if TYPE_CHECKING:  # the page of a run reads a ledger without what reads rows
    import numpy as np

    from mlx_slim.data.formats import Example
    from mlx_slim.data.sources import RawRow
    from mlx_slim.data.store import TokenRows

LEDGER_FILE = "data_ledger.json"
_FIRST = 5  # places named for each reason
_SUMS = (
    *("rows_read", "used", "tokens", "supervised_tokens"),
    *("cut_turns", "cut_tokens", "cut_characters"),
    *("pieces", "repeated_tokens"),
)


@dataclass
class RowCount:
    """A count, and the first places that it counted."""

    count: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, raw: RawRow) -> None:
        """Count one row."""
        self.count += 1
        if len(self.first) < _FIRST:
            self.first.append(raw.place)

    def merge(self, later: RowCount) -> None:
        """Count what ``later`` counted, of rows after these."""
        self.count += later.count
        self.first += later.first[: _FIRST - len(self.first)]


@dataclass
class SourceLedger:
    """What became of the rows of one source (``rows_read``: rows; ``tokens``: tokens used)."""

    path: str
    kind: str
    weight: float
    ignored_files: list[str]
    rows_read: int = 0
    used: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    blank_lines: int = 0
    cut_turns: int = 0
    cut_tokens: int = 0
    cut_characters: int = 0  # of texts cut before they were tokenised
    pieces: int = 0  # rows that the used ones became, whole or cut
    repeated_tokens: int = 0  # of pieces: context, learned in the piece before
    truncated: RowCount = field(default_factory=RowCount)
    split: RowCount = field(default_factory=RowCount)
    dropped: dict[str, RowCount] = field(default_factory=dict)
    formats: dict[str, int] = field(default_factory=dict)
    noted: dict[str, RowCount] = field(default_factory=dict)
    columns: set[str] = field(default_factory=set)  # of its rows; noted where some are renamed

    def drop(self, reason: str, raw: RawRow) -> None:
        """Count a row that is not used."""
        self.dropped.setdefault(reason, RowCount()).add(raw)

    def note(self, what: str, raw: RawRow) -> None:
        """Count a row that is used, though not all of it as it says."""
        self.noted.setdefault(what, RowCount()).add(raw)

    def truncate(self, raw: RawRow, tokens: int) -> None:
        """Count a row that lost ``tokens`` tokens."""
        self.truncated.add(raw)
        self.cut_tokens += tokens

    def cut(self, raw: RawRow, repeated: int) -> None:
        """Count a row that became several, which repeat ``repeated`` tokens as context."""
        self.split.add(raw)
        self.repeated_tokens += repeated

    def read(self, example: Example) -> None:
        """Count a row's format and the turns left out after its last answer."""
        self.formats[example.kind] = self.formats.get(example.kind, 0) + 1
        self.cut_turns += example.cut_turns

    def use(self, rows: TokenRows) -> None:
        """Count rows that are used."""
        self.used += rows.texts
        self.pieces += len(rows.lengths_R)
        self.tokens += int(rows.lengths_R.sum())
        self.supervised_tokens += int(rows.counts_R.sum())

    def merge(self, later: SourceLedger) -> None:
        """Count what ``later`` counted, of rows of the same source after these."""
        for name in _SUMS:
            setattr(self, name, getattr(self, name) + getattr(later, name))
        self.truncated.merge(later.truncated)
        self.split.merge(later.split)
        for reason, tally in later.dropped.items():
            self.dropped.setdefault(reason, RowCount()).merge(tally)
        for what, tally in later.noted.items():
            self.noted.setdefault(what, RowCount()).merge(tally)
        for kind, count in later.formats.items():
            self.formats[kind] = self.formats.get(kind, 0) + count
        self.columns |= later.columns

    def reasons(self) -> list[str]:
        """Return ``12 empty answer`` for each reason."""
        return [f"{tally.count:,} {reason}" for reason, tally in self.dropped.items()]

    def as_record(self) -> JsonObject:
        """Return the JSON object of this source."""
        return {
            "path": self.path,
            "kind": self.kind,
            "weight": self.weight,
            "formats": self.formats,
            "rows_given": self.rows_read,
            "rows_used": self.used,
            "rows_truncated": {"count": self.truncated.count, "first": self.truncated.first},
            "tokens_cut": self.cut_tokens,
            "rows_split": {"count": self.split.count, "first": self.split.first},
            "rows_after_splitting": self.pieces,
            "tokens_repeated_as_context": self.repeated_tokens,
            "characters_cut_before_tokenising": self.cut_characters,
            "rows_dropped": {
                reason: {"count": tally.count, "first": tally.first}
                for reason, tally in self.dropped.items()
            },
            "rows_noted": {
                what: {"count": tally.count, "first": tally.first}
                for what, tally in self.noted.items()
            },
            "turns_cut_after_last_answer": self.cut_turns,
            "blank_lines_skipped": self.blank_lines,
            "files_ignored": self.ignored_files,
            "tokens": self.tokens,
            "supervised_tokens": self.supervised_tokens,
        }


@dataclass(frozen=True)
class RowTotals:
    """Sums over all sources: ``totals`` of ``data_ledger.json``.

    Attributes:
        rows_given: Rows that were read.
        rows_used: Rows that are learned from.
        rows_truncated: Of those, the ones that were cut.
        rows_dropped: Rows that are left out.
        tokens: Of the rows used.
        supervised_tokens: Of those, the ones that a loss is computed on.
        exact_duplicates: Rows used that are equal to another one.
        rows_split: Rows that were cut into several, each token of which is learned once.
        rows_after_splitting: What the used rows became.
        tokens_repeated_as_context: Of ``tokens``: at the beginnings of pieces, not learned again.
    """

    rows_given: int
    rows_used: int
    rows_truncated: int
    rows_dropped: int
    tokens: int
    supervised_tokens: int
    exact_duplicates: int
    rows_split: int = 0
    rows_after_splitting: int = 0
    tokens_repeated_as_context: int = 0

    @classmethod
    def read(cls, ledger: JsonObject, where: str) -> RowTotals:
        """Return the sums of a whole ledger.

        Raises:
            SlimError: Names ``where``, the key and its value.
        """
        values = value_of(ledger, where, "totals", dict)
        return cls(**{key.name: value_of(values, where, key.name, int, 0) for key in fields(cls)})


def notes(ledger: JsonObject) -> list[str]:
    """Return one line for each thing that rows have and that is left out, of a whole ledger."""
    return [
        f"{source['path']}: rows with {what}: {entry['count']:,} (first: {entry['first'][0]})"
        for source in ledger["sources"]
        for what, entry in source.get("rows_noted", {}).items()
    ]


def totals(ledgers: list[SourceLedger], hashes: np.ndarray) -> RowTotals:
    """Return the sums over all sources; ``hashes`` (uint64, one a used row) give duplicates."""
    return RowTotals(
        rows_given=sum(ledger.rows_read for ledger in ledgers),
        rows_used=sum(ledger.used for ledger in ledgers),
        rows_truncated=sum(ledger.truncated.count for ledger in ledgers),
        rows_dropped=sum(t.count for ledger in ledgers for t in ledger.dropped.values()),
        tokens=sum(ledger.tokens for ledger in ledgers),
        supervised_tokens=sum(ledger.supervised_tokens for ledger in ledgers),
        exact_duplicates=len(hashes) - len(set(hashes.tolist())),
        rows_split=sum(ledger.split.count for ledger in ledgers),
        rows_after_splitting=sum(ledger.pieces for ledger in ledgers),
        tokens_repeated_as_context=sum(ledger.repeated_tokens for ledger in ledgers),
    )


def split_ledger(
    setting: float | str, train: np.ndarray, validation: np.ndarray, leaked: int
) -> JsonObject:
    """Return how the rows were split; weights count (a row taken twice counts twice)."""
    return {
        "validation": setting,
        "train_rows": len(train),
        "train_rows_distinct": len(set(train.tolist())),
        "validation_rows": len(validation),
        "removed_from_train_as_duplicates_of_validation": leaked,
    }
