"""Rows out of tables: CSV, TSV and Arrow files.

Invariant: rows stream, some at a time; a line with other than the header's number of cells is an
error that names it, never a row with shifted columns. Used by ``data/readers.py``; try it:
``mlx-slim data preview smollm2-lora data.path=rows.csv``.
"""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlx_slim.data.lines import ReadStatus, lines, one_line
from mlx_slim.data.parquet import BATCH, check_names, split_batch
from mlx_slim.errors import SlimError
from mlx_slim.reading import library_errors, open_regular, shown

_LARGEST_CELL = 1 << 26  # characters: a quote that is never closed would take the whole file


def read_csv(path: Path, progress: ReadStatus) -> Iterator[tuple[int, Any]]:
    """Yield (line number, row) of a table with a header; quoted cells may hold line ends.

    Cells are separated by commas, or in a file whose header has none, by semicolons or tabs.
    """
    yield from _table(path, progress, None)


def read_tsv(path: Path, progress: ReadStatus) -> Iterator[tuple[int, Any]]:
    """Yield (line number, row) of a table with a header, cells separated by tabs."""
    yield from _table(path, progress, "\t")


def _table(path: Path, progress: ReadStatus, delimiter: str | None) -> Iterator[tuple[int, Any]]:
    progress.unit = "line"
    csv.field_size_limit(_LARGEST_CELL)
    skipped = 0  # blank lines before the header
    text = (line for _, line in lines(path, progress, keep_blank=True))
    first = ""
    for first in text:
        if first.strip():
            break
        progress.blank_lines += 1
        skipped += 1
    if delimiter is None:
        delimiter = next((mark for mark in ",;\t" if mark in first), ",")

    def whole() -> Iterator[str]:
        yield first
        yield from text

    table = csv.reader(whole(), delimiter=delimiter, strict=True)
    header: list[str] = []
    last = skipped  # line that the row before ended on
    try:
        for cells in table:
            begin, last = last + 1, skipped + table.line_num
            if not cells or (len(cells) == 1 and not cells[0].strip() and header[1:]):
                progress.blank_lines += 1
            elif not header:
                header = [name.strip() for name in cells]
                header[0] = header[0] or "Unnamed: 0"  # the index that pandas writes
                _check_header(path, header)
            elif len(cells) == len(header):
                yield begin, dict(zip(header, cells, strict=True))
            else:
                raise SlimError(
                    f"{path.name}, line {begin}: {len(cells)} cells, the header has {len(header)}",
                    f"cells are separated by {delimiter!r}; put a cell that holds one into quotes",
                )
    except csv.Error as error:
        raise SlimError(
            f"{path.name}, line {last + 1}: not a valid table: {one_line(error)}",
            'quote cells that contain a quote, a separator or a line end: "say ""hi"""',
        ) from error


def _check_header(path: Path, header: list[str]) -> None:
    counts = Counter(header)
    for name in header:
        if not name or counts[name] > 1:
            what = f"two columns are called {shown(name)}" if name else "a column has no name"
            raise SlimError(f"{path.name}: {what}", "the first line names the columns, each once")


def read_arrow(path: Path, progress: ReadStatus) -> Iterator[tuple[int, Any]]:
    """Yield (row number, row) of an Arrow file: a stream, as ``datasets`` writes, or IPC."""
    import pyarrow

    progress.unit = "row"
    number = 0
    open_regular(path).close()
    what = f"{path.name} is not a readable Arrow file"
    with library_errors(what), pyarrow.OSFile(str(path)) as source:
        for batch in _batches(source):
            check_names(list(batch.schema), path.name)
            batch.validate(full=True)  # offsets of a damaged file lead anywhere
            for start in range(0, batch.num_rows, BATCH):
                for part, _ in split_batch(batch.slice(start, BATCH), path.name, number):
                    for value in part.to_pylist():
                        number += 1
                        yield number, value


def _batches(source: Any) -> Iterator[Any]:
    """Yield the record batches of either kind of file."""
    import pyarrow

    if source.read(6) == b"ARROW1":
        file = pyarrow.ipc.open_file(source)
        for index in range(file.num_record_batches):
            yield file.get_batch(index)
        return
    source.seek(0)
    yield from pyarrow.ipc.open_stream(source)
