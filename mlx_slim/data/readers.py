"""Rows out of files: which reader reads which file; plain text stands here.

Invariant: no file is ever held whole in memory, and what cannot be read is an error that names file
and line. Names count in any case; text formats may be gzipped. Used by ``data/sources.py``.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mlx_slim.data.json_rows import read_json, read_jsonl
from mlx_slim.data.lines import ReadStatus, lines
from mlx_slim.data.parquet import read_parquet
from mlx_slim.data.tables import read_arrow, read_csv, read_tsv
from mlx_slim.errors import SlimError


def _read_text(path: Path, progress: ReadStatus) -> Iterator[tuple[int, Any]]:
    """Yield the paragraphs (parted by blank lines) of a text file, numbered by their first line."""
    progress.unit = "line"
    first, previous, paragraph = 0, 0, []
    for number, text in lines(path, progress):
        if not first and _is_json_row(text):
            raise SlimError(
                f"{path.name} holds rows in JSON, and is named as plain text",
                f"name it {path.name.partition('.txt')[0]}.jsonl",
            )
        if paragraph and number > previous + 1:
            yield first, {"text": "".join(paragraph).strip("\r\n")}
            paragraph = []
        if not paragraph:
            first = number
        paragraph.append(text)
        previous = number
    if paragraph:
        yield first, {"text": "".join(paragraph).strip("\r\n")}


def _is_json_row(line: str) -> bool:
    with contextlib.suppress(ValueError, RecursionError):
        return line.startswith("{") and bool(json.loads(line))
    return False


Reader = Callable[[Path, ReadStatus], Iterator[tuple[int, Any]]]
_TEXT: dict[str, Reader] = {
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".json": read_json,
    ".csv": read_csv,
    ".tsv": read_tsv,
    ".txt": _read_text,
}
READERS: dict[str, Reader] = {
    **_TEXT,
    ".parquet": read_parquet,
    ".arrow": read_arrow,
    **{f"{suffix}.gz": reader for suffix, reader in _TEXT.items()},
}


def suffix_of(path: str | Path) -> str:
    """Return the ending that decides how a file is read, in lower case: ``.jsonl``, ``.csv.gz``."""
    name = Path(path).name.lower()
    ends = [suffix for suffix in READERS if name.endswith(suffix) and name != suffix]
    return max(ends, key=len) if ends else Path(name).suffix


def is_data(path: str | Path) -> bool:
    """Whether a file's name is one that a reader knows."""
    return suffix_of(path) in READERS


def stem_of(path: Path) -> str:
    """Return a data file's name without the ending that ``suffix_of`` gives."""
    return path.name[: len(path.name) - len(suffix_of(path))]


def count_lines(path: Path) -> int | None:
    """Return the rows of JSON lines without decoding them; None for any other kind of file."""
    if suffix_of(path) not in (".jsonl", ".ndjson"):
        return None
    with path.open("rb") as handle:
        for line in handle:
            if line.strip():  # one object a line begins and ends with it
                if not (
                    line.lstrip(b"\xef\xbb\xbf \t").startswith(b"{")
                    and line.rstrip().endswith(b"}")
                ):
                    return None
                break
        handle.seek(0)
        return sum(1 for line in handle if line.strip())
