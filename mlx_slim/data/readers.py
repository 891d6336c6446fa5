"""Rows out of files: JSON lines, JSON, Parquet, plain text; all of it streams.

Invariant: no file is ever held whole in memory, and what cannot be read is an error that names file
and line. Used by ``data/sources.py``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from mlx_slim.errors import SlimError

_CHUNK = 1 << 20  # bytes read at a time


class Counting(Protocol):
    """Counts the blank lines that a reader skips."""

    blank_lines: int


def one_line(error: Exception) -> str:
    """Return an error as one line of at most 300 characters."""
    text = " ".join(str(error).split())
    return text[:300] or type(error).__name__


def _lines(path: Path, source: Counting) -> Iterator[tuple[int, str]]:
    """Yield (line number, text) of the non-blank lines of a UTF-8 file; count the blank ones."""
    start = 0
    with path.open("rb") as handle:
        for number, line in enumerate(handle, 1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            try:
                text = line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise _not_utf8(path, number, start + error.start, line[error.start]) from error
            start += len(line)
            if text.strip():
                yield number, text
            else:
                source.blank_lines += 1


def _not_utf8(path: Path, line: int, offset: int, byte: int) -> SlimError:
    return SlimError(
        f"{path.name}, line {line}: byte 0x{byte:02x} at byte offset {offset} is not UTF-8",
        "save the file as UTF-8, for example: iconv -f latin1 -t utf-8",
    )


def _read_jsonl(path: Path, source: Counting) -> Iterator[tuple[int, Any]]:
    for number, text in _lines(path, source):
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            detail = getattr(error, "msg", "nested too deeply")
            column = getattr(error, "colno", 1)
            raise SlimError(
                f"{path.name}, line {number}, column {column}: malformed JSON: {detail}",
                "every line of a .jsonl file is one JSON object",
            ) from error
        yield number, value


class _JsonStream:
    """A sliding window over a UTF-8 JSON file, decoded value by value."""

    def __init__(self, path: Path, handle: BinaryIO) -> None:
        import codecs

        self.path, self.handle = path, handle
        self.decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self.text, self.at, self.line, self.offset, self.done = "", 0, 1, 0, False

    def more(self) -> bool:
        """Read on, as much again as is waiting (so a huge value costs linear time)."""
        if self.done:
            return False
        block = self.handle.read(max(_CHUNK, len(self.text) - self.at))
        self.done = not block
        try:
            new = self.decoder.decode(block, final=self.done)
        except UnicodeDecodeError as error:
            before = error.object[: error.start]
            line = self.line + self.text.count("\n", self.at) + before.count(b"\n")
            held = len(error.object) - len(block)
            offset = self.offset - held + error.start
            raise _not_utf8(self.path, line, offset, error.object[error.start]) from error
        self.offset += len(block)
        self.text, self.at = self.text[self.at :] + new, 0
        return True

    def peek(self) -> str:
        """Skip white space; return the next character, or "" at the end."""
        while True:
            match = re.compile(r"\s*").match(self.text, self.at)
            end = match.end() if match else self.at
            self.line += self.text.count("\n", self.at, end)
            self.at = end
            if self.at < len(self.text):
                return self.text[self.at]
            if not self.more():
                return ""

    def value(self) -> Any:
        """Decode the value that starts here."""
        decoder = json.JSONDecoder()
        while True:
            try:
                value, end = decoder.raw_decode(self.text, self.at)
                if end < len(self.text) or self.done or not self.more():
                    break
            except RecursionError:
                self.fail("nested too deeply", 0)
            except ValueError as error:
                if not self.more():
                    self.fail(getattr(error, "msg", "?"), getattr(error, "pos", self.at) - self.at)
        self.line += self.text.count("\n", self.at, end)
        self.at = end
        return value

    def fail(self, what: str, ahead: int = 0) -> None:
        line = self.line + self.text.count("\n", self.at, self.at + ahead)
        raise SlimError(
            f"{self.path.name}, line {line}: malformed JSON: {what}",
            "a .json file is an array of objects",
        )


def _read_json(path: Path, source: Counting) -> Iterator[tuple[int, Any]]:
    """Yield the objects of a JSON array (or of a row of objects), one at a time."""
    with path.open("rb") as handle:
        stream = _JsonStream(path, handle)
        array = stream.peek() == "["
        if array:
            stream.at += 1
        number = 0
        while (character := stream.peek()) not in ("", "]"):
            number += 1
            yield number, stream.value()
            if array and (character := stream.peek()) != "]":
                if character != ",":
                    stream.fail(f"expected ',' or ']', found {character or 'the end'!r}")
                stream.at += 1
        if array and character == "":
            stream.fail("the array is not closed")
        if array:
            stream.at += 1
        if stream.peek():
            stream.fail("text after the array")


def _read_parquet(path: Path, source: Counting) -> Iterator[tuple[int, Any]]:
    """Yield rows batch by batch, so that one row group is the most that is held."""
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for value in batch.to_pylist():
                    number += 1
                    yield number, value
    except pyarrow.ArrowException as error:
        raise SlimError(f"{path.name} is no readable Parquet: {one_line(error)}") from error


def _read_text(path: Path, source: Counting) -> Iterator[tuple[int, Any]]:
    """Yield the paragraphs (parted by blank lines) of a text file, numbered by their first line."""
    first, previous, paragraph = 0, 0, []
    for number, text in _lines(path, source):
        if paragraph and number > previous + 1:
            yield first, {"text": "".join(paragraph).strip("\r\n")}
            paragraph = []
        if not paragraph:
            first = number
        paragraph.append(text)
        previous = number
    if paragraph:
        yield first, {"text": "".join(paragraph).strip("\r\n")}


Reader = Callable[[Path, Counting], Iterator[tuple[int, Any]]]
READERS: dict[str, Reader] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".parquet": _read_parquet,
    ".txt": _read_text,
}
