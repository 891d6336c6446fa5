"""Rows out of JSON: a line each, an array, objects one after another, or a list under a key.

Invariant: values are decoded one at a time; no file is held whole. A key that stands twice in an
object, half of a surrogate pair and whatever else is no JSON are errors that name the place.
Used by ``data/readers.py``; try it: ``mlx-slim data preview smollm2-lora data.path=rows.json``.
"""

from __future__ import annotations

import codecs
import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from mlx_slim.data.lines import CHUNK, LONGEST, ReadStatus, lines, not_utf8, one_line, open_data
from mlx_slim.errors import SlimError
from mlx_slim.reading import MAX_DEPTH, MAX_DIGITS, JsonObject, check_depth, shown

# Keys under which files keep their list of rows: {"version": "1", "data": [...]}.
WRAPPERS = {
    *("data", "rows", "records", "examples", "instances", "items", "samples", "entries"),
    *("dataset", "questions", "train", "training", "validation", "valid", "dev", "test"),
}
_SPACE = re.compile(r"[ \t\r\n]*")
_HINT = "a JSON file must hold an array of objects, or one object after another"
_UNFINISHED = 16  # characters: a fault this near to the end may be a value that goes on


def _object(pairs: list[tuple[str, Any]]) -> JsonObject:
    """Return an object; refuse a key that stands twice, of which one would be lost."""
    token = dict(pairs)
    if len(token) != len(pairs):
        counts = Counter(name for name, _ in pairs)
        twice = next(name for name in counts if counts[name] > 1)
        raise ValueError(f"the key {shown(twice)} stands twice in one object")
    return token


def _whole(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"an integer of {len(digits):,} digits, expected at most {MAX_DIGITS}")
    return int(digits)


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_int=_whole)


def _check(value: Any, text: str, place: str) -> None:
    """Refuse what is too deep, and half characters; ``text`` says whether it can have any."""
    if text.count("[") + text.count("{") > MAX_DEPTH:
        check_depth(value, place)
    if "\\ud" in text or "\\uD" in text:  # escaped surrogates: pairs, too
        refuse_halves(value, place)


def _what(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "nested too deeply"
    return getattr(error, "msg", None) or one_line(error)


def refuse_halves(value: Any, place: str, key: str = "") -> None:
    """Refuse text with half of a surrogate pair: no tokenizer and no file takes it.

    Raises:
        SlimError: Names the place and the key.
    """
    if isinstance(value, str):
        if value.isascii():
            return
        try:
            value.encode()
        except UnicodeEncodeError as error:
            half = ascii(value[error.start])
            raise SlimError(
                f"{place}: {key or 'the value'} holds {half} at character {error.start + 1}, half "
                "of a character (a lone surrogate)",
                "replace it with the whole character, or remove it",
            ) from error
    elif isinstance(value, dict):
        for name, item in value.items():
            refuse_halves(name, place, "a key")
            refuse_halves(item, place, f"{key}.{name}" if key else repr(name))
    elif isinstance(value, list):
        for item in value:
            refuse_halves(item, place, key)


def read_jsonl(path: Path, progress: ReadStatus) -> Iterator[tuple[int, Any]]:
    """Yield (line number, value) of each line.

    A file that begins like another kind of JSON (an array, or an object over several lines) is
    read as that, by row numbers.
    """
    if _begins_with(path, "["):
        yield from read_json(path, progress)
        return
    progress.unit = "line"
    first = True
    for number, text in lines(path, progress):
        try:
            value = _DECODER.decode(text)
            _check(value, text, f"{path.name}, line {number}")
        except (ValueError, RecursionError) as error:
            if first and getattr(error, "pos", 0) >= len(text.rstrip()):
                progress.blank_lines = 0
                yield from read_json(path, progress)
                return
            column = getattr(error, "colno", None)
            at = f", column {column}" if column else ""
            what = _what(error)
            comma = what == "Extra data" and text[error.pos :].strip() == ","  # type: ignore[union-attr]
            raise SlimError(
                f"{path.name}, line {number}{at}: malformed JSON: "
                + ("a comma after the object" if comma else what),
                "remove the commas at the ends of the lines"
                if comma
                else "every line of a .jsonl file is one JSON object",
            ) from error
        first = False
        yield number, value


def _begins_with(path: Path, character: str) -> bool:
    with open_data(path) as handle:
        head = handle.read(4096).removeprefix(codecs.BOM_UTF8).lstrip(b" \t\r\n")
    return head.startswith(character.encode())


def read_json(path: Path, progress: ReadStatus) -> Iterator[tuple[int, Any]]:
    """Yield (row number, value) of an array, of values one after another, or of a wrapped list."""
    progress.unit = "row"
    with open_data(path) as handle:
        stream = _JsonStream(path, handle, progress)
        character = stream.peek()
        number = 0
        if character == "[":
            yield from stream.array()
        elif character == "{":
            yield from stream.first_object()
            number = 1
        while character != "[" and not stream.wrapped and stream.peek():
            number += 1
            yield number, stream.value(number)
        if stream.peek():
            stream.fail(f"text after the {'array' if character == '[' else 'object'}")


class _JsonStream:
    """A sliding window over a UTF-8 JSON file, decoded value by value."""

    def __init__(self, path: Path, handle: BinaryIO, progress: ReadStatus) -> None:
        self.path, self.handle, self.progress = path, handle, progress
        self.decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self.text, self.at, self.line, self.offset, self.done = "", 0, 1, 0, False
        self.wrapped = ""  # the key whose list holds the rows

    def more(self) -> bool:
        """Read on, as much again as is waiting (so a huge value costs linear time)."""
        if self.done:
            return False
        if len(self.text) - self.at > LONGEST:
            self.fail(f"a value of more than {LONGEST >> 20} MB")
        block = self.handle.read(max(CHUNK, len(self.text) - self.at))
        self.done = not block
        try:
            new = self.decoder.decode(block, final=self.done)
        except UnicodeDecodeError as error:
            before = error.object[: error.start]
            line = self.line + self.text.count("\n", self.at) + before.count(b"\n")
            held = len(error.object) - len(block)
            offset = self.offset - held + error.start
            raise not_utf8(self.path, line, offset, error.object[error.start]) from error
        self.offset += len(block)
        self.text, self.at = self.text[self.at :] + new, 0
        return True

    def peek(self) -> str:
        """Skip white space; return the next character, or "" at the end."""
        while True:
            match = _SPACE.match(self.text, self.at)
            end = match.end() if match else self.at
            self.line += self.text.count("\n", self.at, end)
            self.at = end
            if self.at < len(self.text):
                return self.text[self.at]
            if not self.more():
                return ""

    def take(self, expected: str) -> None:
        """Step over the next character, which must be one of ``expected``."""
        token = self.peek()
        if not token or token not in expected:
            names = " or ".join(f"{character!r}" for character in expected)
            self.fail(f"expected {names}, found {token or 'the end'!r}")
        self.at += 1

    def value(self, row: int) -> Any:
        """Decode the next value."""
        self.peek()
        while True:
            try:
                value, end = _DECODER.raw_decode(self.text, self.at)
                if end < len(self.text) or self.done or not self.more():
                    place = f"{self.path.name}, {self.progress.unit} {row}"
                    _check(value, self.text[self.at : end], place)
                    break
            except RecursionError:
                self.fail("nested too deeply", 0)
            except ValueError as error:
                at = getattr(error, "pos", None)
                continues = at is not None and (
                    len(self.text) - at < _UNFINISHED or _what(error).startswith("Unterminated")
                )
                if not continues or not self.more():
                    self.fail(_what(error), (self.at if at is None else at) - self.at)
        self.line += self.text.count("\n", self.at, end)
        self.at = end
        return value

    def array(self) -> Iterator[tuple[int, Any]]:
        """Yield the values of the array that starts here, numbered from 1."""
        self.take("[")
        number = 1
        if self.peek() == "]":
            self.at += 1
            return
        while True:
            yield number, self.value(number)
            number += 1
            if self.peek() == "]":
                self.at += 1
                return
            self.take(",]")
            if self.peek() == "]":
                self.fail("a comma before the ']'")

    def first_object(self) -> Iterator[tuple[int, Any]]:
        """Yield the object that starts here, or the rows that it keeps under a known key."""
        row: JsonObject = {}
        self.take("{")
        while self.peek() != "}":
            line = self.line
            name = self.value(1)
            if not isinstance(name, str):
                self.fail("Expecting property name enclosed in double quotes")
            if name in row or name == self.wrapped:
                self.line = line
                self.fail(f"the key {name!r} stands twice in one object")
            self.take(":")
            if name in WRAPPERS and self._lists_objects():
                if self.wrapped:
                    self.fail(
                        f"two lists of rows, {self.wrapped!r} and {name!r}: put each into a file "
                        "of its own"
                    )
                self.wrapped = name
                self.progress.unit = f"{name}, row"
                yield from self.array()
            else:
                row[name] = self.value(1)
            if self.peek() == ",":
                self.at += 1
                if self.peek() == "}":
                    self.fail("a comma before the '}'")
            elif self.peek() != "}":
                self.take(",}")
        self.at += 1
        if not self.wrapped:
            yield 1, row

    def _lists_objects(self) -> bool:
        """Whether an array begins here whose first value is an object."""
        if self.peek() != "[":
            return False
        while True:
            match = _SPACE.match(self.text, self.at + 1)
            end = match.end() if match else self.at
            if end < len(self.text):
                return self.text[end] == "{"
            if not self.more():
                return False

    def fail(self, what: str, ahead: int = 0) -> NoReturn:
        """Raise an error about what stands ``ahead`` characters from here."""
        line = self.line + self.text.count("\n", self.at, self.at + ahead)
        raise SlimError(f"{self.path.name}, line {line}: malformed JSON: {what}", _HINT)
