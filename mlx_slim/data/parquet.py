"""Rows out of Parquet: what a file unpacks to is bounded before it is unpacked.

Invariant: pages, dictionaries, rows and nesting are measured on the file's own headers first, in
proportion to the file's size; texts stay references to their dictionary until a batch is known to
fit. A damaged file is one line. Used by ``data/readers.py``; try it: ``mlx-slim data preview
smollm2-lora data.path=rows.parquet``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from mlx_slim.data.lines import UNPACKED, UNPACKED_RATIO, ReadStatus
from mlx_slim.errors import SlimError
from mlx_slim.reading import MAX_DEPTH, library_errors, open_regular, shown

_HINT = "write it again: row groups of 1,000 rows, only the columns to train on"
_AGAIN = "download or copy it again"
_MAGIC = b"PAR1"
_MOST_FOOTER = 64 << 20  # bytes
_PAGE, _PAGE_RATIO = 64 << 20, 20  # bytes of an unpacked page, or so many times the packed ones
_ROWS, _ROWS_RATIO = 10_000_000, 100  # rows of a file, or so many for each of its bytes
_VALUES, _VALUES_RATIO = 1 << 20, 16  # of a nested page, or so many for each of its bytes
BATCH, _BATCH_BYTES = 1024, 64 << 20  # rows that become Python objects at once
_ROW_BYTES = 256 << 20
_EACH = 64  # bytes of a Python object


def read_parquet(path: Path, progress: ReadStatus) -> Iterator[tuple[int, Any]]:
    """Yield (row number, row), batch by batch.

    Raises:
        SlimError: If the file is damaged, unpacks to far more than it has, or names a column twice.
    """
    progress.unit = "row"
    with (
        open_regular(path) as handle,
        library_errors(f"{path.name} is not a readable Parquet file"),
    ):
        size = _check_footer(handle, path.name)
        yield from _rows(path, handle, size)


def _rows(path: Path, handle: BinaryIO, size: int) -> Iterator[tuple[int, Any]]:
    import pyarrow.parquet

    name = path.name
    with pyarrow.parquet.ParquetFile(path) as plain:
        about, schema = plain.metadata, plain.schema_arrow
        columns = [plain.schema.column(index) for index in range(len(plain.schema))]
    check_names(list(schema), name)
    if about.num_rows > max(_ROWS, _ROWS_RATIO * size):
        raise SlimError(
            f"{name} has {about.num_rows:,} rows, too many for a file of {size:,} bytes", _HINT
        )
    texts = [column.path for column in columns if column.physical_type == "BYTE_ARRAY"]
    number = unpacked = 0
    with pyarrow.parquet.ParquetFile(path, metadata=about, read_dictionary=texts) as file:
        for group in range(about.num_row_groups):
            rows = about.row_group(group).num_rows
            if not rows:  # its columns have no place
                continue
            held = sum(
                _check_chunk(handle, about.row_group(group).column(index), column, name, size)
                for index, column in enumerate(columns)
            )
            count = max(1, min(BATCH, _BATCH_BYTES * rows // max(held, 1)))
            for batch in file.iter_batches(batch_size=count, row_groups=[group]):
                for part, needed in split_batch(batch, name, number):
                    unpacked += needed
                    if unpacked > max(UNPACKED, UNPACKED_RATIO * size):
                        raise SlimError(
                            f"{name} unpacks to more than {unpacked >> 20} MB, and has {size:,} "
                            "bytes",
                            _HINT,
                        )
                    for value in part.cast(schema).to_pylist():
                        number += 1
                        yield number, value


def check_names(fields: list[Any], name: str) -> None:
    """Refuse two columns of one name, or two such fields inside a column: a row holds one only.

    Args:
        fields: Of an Arrow schema.
        name: The file's, for the message.

    Raises:
        SlimError: Names the column.
    """
    counts = Counter(field.name for field in fields)
    if len(counts) < len(fields):
        twice = next(column for column in counts if counts[column] > 1)
        raise SlimError(f"{name}: two columns are called {shown(twice)}", "rename one of them")
    for kind in (field.type for field in fields):
        check_names([kind.field(index) for index in range(kind.num_fields)], name)


def split_batch(batch: Any, name: str, number: int) -> Iterator[tuple[Any, int]]:
    """Yield (slice, bytes) of a batch so that each becomes little enough at once."""
    needed = sum(_bytes(column) for column in batch.columns)
    if batch.num_rows > 1 and needed > _BATCH_BYTES:
        half = batch.num_rows // 2
        yield from split_batch(batch.slice(0, half), name, number)
        yield from split_batch(batch.slice(half), name, number + half)
        return
    if needed > _ROW_BYTES:
        raise SlimError(f"{name}, row {number + 1}: {needed >> 20} MB, expected at most 256", _HINT)
    yield batch, needed


def _bytes(array: Any) -> int:
    """Return the bytes that an array's values take as Python objects, each one for itself."""
    import pyarrow
    from pyarrow.compute import call_function

    types, each = pyarrow.types, _EACH * len(array)
    if types.is_dictionary(array.type):
        if not (_is_text(array.type.value_type) and len(array.dictionary)):
            return each
        lengths = call_function("binary_length", [array.dictionary])
        taken = lengths.cast(pyarrow.int64()).take(array.indices)
        return each + (call_function("sum", [taken]).as_py() or 0)
    if types.is_struct(array.type):
        return each + sum(_bytes(child) for child in array.flatten())
    if types.is_list(array.type) or types.is_large_list(array.type):
        return each + _bytes(array.flatten())
    if types.is_map(array.type):
        first, last = array.offsets[0].as_py(), array.offsets[len(array)].as_py()
        inside = (array.keys.slice(first, last - first), array.items.slice(first, last - first))
        return each + sum(_bytes(child) for child in inside)
    return each + array.nbytes


def _is_text(kind: Any) -> bool:
    import pyarrow

    types = pyarrow.types
    return (
        types.is_string(kind)
        or types.is_binary(kind)
        or types.is_large_string(kind)
        or types.is_large_binary(kind)
    )


# -------------------------------------------------------------------------- headers of the file


def _check_footer(handle: BinaryIO, name: str) -> int:
    """Refuse what is no Parquet, or nested too deeply for a parser; return the file's bytes."""
    size = handle.seek(0, 2)
    handle.seek(max(size - 8, 0))
    tail = handle.read(8)
    length = int.from_bytes(tail[:4], "little")
    if size < 12 or tail[4:] != _MAGIC:
        raise SlimError(
            f"{name} is not a readable Parquet file: incomplete, or of another kind", _AGAIN
        )
    if length > min(size - 12, _MOST_FOOTER):
        raise SlimError(f"{name} is damaged: its footer would take {length:,} bytes of {size:,}")
    handle.seek(size - 8 - length)
    footer = _Compact(handle.read(length)).struct(until=3)
    elements = footer.get(2)
    if not isinstance(elements, list):
        raise SlimError(f"{name} is damaged: its footer has no schema")
    open_children: list[int] = []  # of each group around the element that comes
    for element in elements:
        while open_children and open_children[-1] == 0:
            open_children.pop()
        if open_children:
            open_children[-1] -= 1
        open_children.append(element.get(5, 0))
        if len(open_children) > MAX_DEPTH:
            raise SlimError(f"{name}: its columns are nested deeper than {MAX_DEPTH} levels")
    return size


def _check_chunk(handle: BinaryIO, chunk: Any, column: Any, name: str, size: int) -> int:
    """Refuse pages of a column that unpack to too much; return the bytes of all of them."""
    at = chunk.data_page_offset
    if chunk.has_dictionary_page and chunk.dictionary_page_offset:
        at = min(at, chunk.dictionary_page_offset)
    end = at + chunk.total_compressed_size
    place = f"{name}, column {column.path}"
    if not 0 < at <= end <= size:
        raise SlimError(f"{place} is damaged: bytes {at:,} to {end:,} of {size:,}")
    unpacked = 0
    while at < end:
        header, begin = _page_header(handle, at, end)
        page, packed = header.get(2), header.get(3)
        if not isinstance(page, int) or not isinstance(packed, int) or page < 0 or packed < 0:
            raise SlimError(f"{place} is damaged: a page at byte {at:,} has no size")
        if page > max(_PAGE, _PAGE_RATIO * packed):
            raise SlimError(f"{place}: a page of {packed:,} bytes unpacks to {page:,}", _HINT)
        about = header.get(5) or header.get(8) or {}
        values = about.get(1, 0) if isinstance(about, dict) else 0
        if column.max_repetition_level and values > max(_VALUES, _VALUES_RATIO * page):
            raise SlimError(f"{place}: a page of {page:,} bytes holds {values:,} values", _HINT)
        unpacked += page
        at = begin + packed
    return unpacked


def _page_header(handle: BinaryIO, at: int, end: int) -> tuple[dict[int, Any], int]:
    """Return the header of the page at a byte, and the byte after it."""
    for length in (512, 1 << 24):  # statistics can be as long as a value
        handle.seek(at)
        reader = _Compact(handle.read(min(length, end - at)))
        try:
            return reader.struct(), at + reader.at
        except IndexError:
            if length > 512 or end - at <= 512:
                raise
    raise AssertionError("unreachable")


class _Compact:
    """Thrift's compact protocol, as far as Parquet's headers need it; IndexError at the end."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at, self.depth = data, 0, 0

    def struct(self, until: int | None = None) -> dict[int, Any]:
        """Return field number -> value; stop before the field ``until``."""
        self.depth += 1
        if self.depth > 16:
            raise ValueError("a header is nested too deeply")
        fields: dict[int, Any] = {}
        field = 0
        while (head := self._byte()) & 0x0F:
            field = field + (head >> 4) if head >> 4 else self._integer()
            if until is not None and field >= until:
                break
            kind = head & 0x0F
            fields[field] = kind == 1 if kind <= 2 else self._value(kind)
        self.depth -= 1
        return fields

    def _byte(self) -> int:
        self.at += 1
        return self.data[self.at - 1]

    def _varint(self) -> int:
        value = shift = 0
        while True:
            byte = self._byte()
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
            shift += 7
            if shift > 63:
                raise ValueError("a number of a header is too long")

    def _integer(self) -> int:
        value = self._varint()
        return (value >> 1) ^ -(value & 1)

    def _value(self, kind: int) -> Any:
        if kind in (1, 2, 3):  # true, false, a byte
            return self._byte()
        if kind in (4, 5, 6):
            return self._integer()
        if kind == 7:
            return self._skip(8)
        if kind == 8:
            return self._skip(self._varint())
        if kind in (9, 10):
            head = self._byte()
            count = head >> 4 if head >> 4 < 15 else self._varint()
            if count > len(self.data) - self.at:  # each takes a byte at least
                raise ValueError("a list of a header is longer than the header")
            return [self._value(head & 0x0F) for _ in range(count)]
        if kind == 12:
            return self.struct()
        raise ValueError(f"a header holds a value of the unknown type {kind}")

    def _skip(self, count: int) -> None:
        self.at += count
        if self.at > len(self.data):
            raise IndexError("a header ends within a value")
