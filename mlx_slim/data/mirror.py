"""Files of a data mirror: ``<mirror>/<data set>/<split>.jsonl``, or ``.json``, or ``.parquet``.

Invariant: of several files of one split the first of ``SUFFIXES`` counts; a JSON file may hold its
rows in a list under a key. Try it: ``mlx-slim tasks --data-dir DIR``.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from mlx_slim.data.sources import RawRow, Source
from mlx_slim.errors import SlimError

SUFFIXES = (".jsonl", ".json", ".parquet")


def split_file(folder: Path, split: str) -> Path | None:
    """Return the file of a split in a data set's folder; None if there is none."""
    files = (folder / f"{split}{suffix}" for suffix in SUFFIXES)
    return next((file for file in files if file.is_file()), None)


def records(source: Source, key: str | None) -> Iterator[RawRow]:
    """Yield the rows of ``source``; where an object holds a list under ``key``, the list's.

    Raises:
        SlimError: If an entry of that list is no object.
    """
    for raw in source:
        inner = raw.value.get(key) if key else None
        if not isinstance(inner, list):
            yield raw
            continue
        for number, value in enumerate(inner, 1):
            row = RawRow(f"{raw.where}, {key}", number, value)
            if not isinstance(value, dict):
                raise SlimError(
                    f"{row.place}: a row is a JSON object, "
                    f"not {type(value).__name__} {str(value)[:40]!r}"
                )
            yield row
