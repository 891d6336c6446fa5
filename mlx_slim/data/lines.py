"""Data files as bytes and as lines: plain or gzipped, UTF-8, whatever their line ends are.

Invariant: only regular files are opened (a FIFO would wait for ever); they are read in blocks, so
memory holds one block or one line, whichever is longer, and a line has at most ``LONGEST`` bytes;
what is not UTF-8 is an error that names line and byte. Used by ``data/readers.py``.
"""

from __future__ import annotations

import codecs
import gzip
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Protocol, cast

from mlx_slim.errors import SlimError
from mlx_slim.reading import open_regular

CHUNK = 1 << 20  # bytes read at a time
LONGEST = 64 << 20  # bytes of a line, characters of a value
UNPACKED, UNPACKED_RATIO = 64 << 20, 200  # bytes of all rows, or so many for each byte of the file
_WIDE = (
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)


class ReadStatus(Protocol):
    """What a reader tells while it reads: blank lines skipped, and what its numbers count."""

    blank_lines: int
    unit: str


def one_line(error: BaseException) -> str:
    """Return an error as one line of at most 300 characters."""
    text = " ".join(str(error).split())
    return text[:300] or type(error).__name__


@contextmanager
def open_data(path: Path) -> Iterator[BinaryIO]:
    """Open a file for reading, unpacked if its name ends in ``.gz``.

    Raises:
        SlimError: If the packed data are damaged, or the text is UTF-16 or UTF-32.
    """
    packed = path.suffix.lower() == ".gz"
    try:
        with open_regular(path) as file:
            handle = cast(BinaryIO, _Unpacked(file, path.name)) if packed else file
            head = handle.read(4)
            kind = next((name for mark, name in _WIDE if head.startswith(mark)), None)
            if kind is None and b"\0" in head:
                kind = "UTF-16 or binary"
            if kind is not None:
                raise SlimError(
                    f"{path.name} is {kind}, expected UTF-8",
                    f"convert it: iconv -f {kind.split()[0]} -t UTF-8 {path.name} > new-file",
                )
            handle.seek(0)
            yield handle
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise SlimError(
            f"{path.name} cannot be unpacked: {one_line(error)}",
            "pack it again, or give the unpacked file",
        ) from error


class _Unpacked(gzip.GzipFile):
    """A packed file that may not unpack to far more than it has."""

    def __init__(self, file: BinaryIO, name: str) -> None:
        super().__init__(fileobj=file)
        self._title, self._packed = name, file.seek(0, 2)
        file.seek(0)

    def read(self, size: int | None = -1) -> bytes:
        block = super().read(size)
        if self.tell() > max(UNPACKED, UNPACKED_RATIO * self._packed):
            raise SlimError(
                f"{self._title} unpacks to more than {self.tell() >> 20} MB, and has "
                f"{self._packed:,} bytes",
                "if that is right, unpack it and give the unpacked file",
            )
        return block


def lines(
    path: Path, progress: ReadStatus, *, keep_blank: bool = False
) -> Iterator[tuple[int, str]]:
    r"""Yield (line number, text) of a UTF-8 file; count blank lines and skip them.

    Lines end in ``\n``, ``\r\n`` or ``\r``, which the text keeps; other characters that Unicode
    calls line ends (U+2028, U+0085) are text.

    Args:
        path: The file, plain or gzipped.
        progress: Gets the number of blank lines.
        keep_blank: Yield blank lines, too: they may stand inside a quoted cell.
    """
    number = start = 0
    with open_data(path) as handle:
        for line in _split(handle, path.name):
            number += 1
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            try:
                text = line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise not_utf8(path, number, start + error.start, line[error.start]) from error
            start += len(line)
            if keep_blank or text.strip():
                yield number, text
            else:
                progress.blank_lines += 1


def _split(handle: BinaryIO, name: str) -> Iterator[bytes]:
    """Yield lines with their ends, reading as much again as is waiting (linear for any line)."""
    waiting, number = b"", 0
    while block := handle.read(max(CHUNK, len(waiting))):
        whole = (waiting + block).splitlines(keepends=True)
        number += len(whole) - 1
        # The last line may go on, and a CR at its end may be half of a CRLF.
        waiting = b"" if whole[-1].endswith(b"\n") else whole.pop()
        number += not waiting
        if len(waiting) > LONGEST:
            raise SlimError(
                f"{name}, line {number + 1} has more than {LONGEST >> 20} MB",
                "split it into shorter rows",
            )
        yield from whole
    if waiting:
        yield waiting


def not_utf8(path: Path, line: int, offset: int, byte: int) -> SlimError:
    """Return the error about a byte that is not UTF-8."""
    return SlimError(
        f"{path.name}, line {line}: byte 0x{byte:02x} at byte offset {offset} is not UTF-8",
        "save the file as UTF-8, for example: iconv -f latin1 -t utf-8",
    )
