"""Where rows come from: files, folders, data mirrors, hub data sets. Everything streams.

Invariant: a source is found in one order (existing local path, mirror, hub), no file is ever held
whole in memory, and every raw row knows its file and number, so that a complaint can name them.
``HF_HUB_OFFLINE=1`` never touches the network. Try it:
``mlx-slim data preview smollm2-lora data.path=rows.jsonl``.
"""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from mlx_slim.artifacts import hash_bytes, hash_file
from mlx_slim.config.schema import SourceConfig
from mlx_slim.errors import SlimError, did_you_mean
from mlx_slim.runtime import hub_offline, hub_trouble

MIRROR_VARIABLE = "MLX_SLIM_DATA"
_HUB_ID = re.compile(
    r"(?P<id>[\w.-]+(?:/[\w.-]+)?)(?::(?P<config>[\w.-]+))?(?:@(?P<rev>[\w./-]+))?"
)
_CHUNK = 1 << 20  # bytes read at a time


class RawRow(NamedTuple):
    """One row as it stands in its source: ``number`` is a line (JSONL, txt) or a row, from 1."""

    where: str
    number: int
    value: dict[str, Any]

    @property
    def place(self) -> str:
        """``rows.jsonl, line 3``: where the user finds it."""
        unit = "line" if self.where.endswith((".jsonl", ".txt")) else "row"
        return f"{self.where}, {unit} {self.number}"


@dataclass
class Source:
    """One source, found: an iterable of ``RawRow``.

    Attributes:
        name: As the user wrote it.
        kind: ``file``, ``mirror`` or ``hub``.
        files: Its files in reading order (none for a hub data set).
        ignored: Files of its folder that are no data.
        skip: Rows left out at its beginning.
        limit: Rows used after them; None uses all.
        blank_lines: Blank lines skipped so far, counted while iterating.
    """

    name: str
    kind: str
    files: list[Path] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)
    skip: int = 0
    limit: int | None = None
    blank_lines: int = 0
    _hub: Any = None

    def __iter__(self) -> Iterator[RawRow]:
        """Yield the rows; raise SlimError naming file and line for what cannot be read.

        Raises:
            SlimError: On malformed, empty, unreadable or wrongly encoded files, or if ``skip``
                leaves nothing.
        """
        stop = None if self.limit is None else self.skip + self.limit
        nothing = True
        for row in islice(self._rows(), self.skip, stop):
            nothing = False
            yield row
        if nothing and self.skip:
            raise SlimError(
                f"{self.name}: skip={self.skip} leaves no row", "skip fewer rows than there are"
            )

    def _rows(self) -> Iterator[RawRow]:
        self.blank_lines = 0
        if self.kind == "hub":
            for number, value in enumerate(self._hub, 1):
                yield RawRow(self.name, number, value)
            return
        empty = True
        for path in self.files:
            where = path.name if len(self.files) == 1 else str(path)
            try:
                for number, value in READERS[path.suffix.lower()](path, self):
                    empty = False
                    if not isinstance(value, dict):
                        raise SlimError(
                            f"{RawRow(where, number, {}).place}: a row is a JSON object, "
                            f"not {type(value).__name__} {str(value)[:40]!r}"
                        )
                    yield RawRow(where, number, value)
            except OSError as error:
                raise SlimError(f"{path} cannot be read: {error.strerror or error}") from error
        if empty:
            raise SlimError(f"{', '.join(map(str, self.files))}: empty, no row in it")

    def fingerprint(self) -> dict[str, Any]:
        """Return ``{path, sha256}``: equal exactly when the content is equal."""
        if self.kind == "hub":
            return {"path": self.name, "sha256": hash_bytes(str(self._hub._fingerprint).encode())}
        try:
            hashes = [hash_file(path) for path in self.files]
        except OSError as error:
            raise SlimError(f"{error.filename} cannot be read: {error.strerror}") from error
        whole = hashes[0] if len(hashes) == 1 else hash_bytes("".join(hashes).encode())
        return {"path": self.name, "sha256": whole}


# ---------------------------------------------------------------------------- finding


def find(config: SourceConfig) -> Source:
    """Find a source: existing local path, then mirror, then hub.

    Raises:
        SlimError: If it is nowhere, has an unknown extension, or the hub cannot be reached.
    """
    local = find_local(config)
    if local is not None:
        return local
    match = _HUB_ID.fullmatch(config.path)
    assert match is not None  # else find_local has raised
    return _ranged(Source(config.path, "hub", _hub=_load_hub(match, config)), config)


def _ranged(source: Source, config: SourceConfig) -> Source:
    source.skip, source.limit = config.skip, config.limit
    return source


def find_local(config: SourceConfig) -> Source | None:
    """Find a source without touching the network; None for one that only a hub can have.

    Raises:
        SlimError: If it is a path and not there, or has an unknown extension.
    """
    if config.task is not None:
        raise SlimError(
            f"{config.path} is a task, and rows of a file or a data set are wanted here",
            "train and distill read tasks",
        )
    path = Path(config.path).expanduser()
    if path.exists():
        files, ignored = _data_files(path, config.split)
        return _ranged(Source(config.path, "file", files, ignored), config)
    match = _HUB_ID.fullmatch(config.path)
    if match is None or path.suffix.lower() in READERS:
        raise SlimError(f"{config.path} does not exist", _neighbour(path))
    mirror = os.environ.get(MIRROR_VARIABLE)
    if mirror:
        name = match["id"].rsplit("/", 1)[-1]
        folder = Path(mirror).expanduser() / name
        if folder.is_dir():
            file = folder / f"{config.split}.jsonl"
            if not file.is_file():
                splits = [p.stem for p in folder.glob("*.jsonl")]
                raise SlimError(
                    f"the data mirror {folder} has no split {config.split!r}",
                    did_you_mean(config.split, splits),
                )
            return _ranged(Source(config.path, "mirror", [file]), config)
    return None


def _neighbour(path: Path) -> str:
    """Hint for a missing path: the most similar name beside it."""
    if not path.parent.is_dir():
        return f"the folder {path.parent} does not exist either"
    close = difflib.get_close_matches(path.name, [p.name for p in path.parent.iterdir()], n=1)
    return f"did you mean {path.parent / close[0]}?" if close else "check the path"


def _data_files(path: Path, split: str) -> tuple[list[Path], list[str]]:
    """Return a folder's data files (only ``split``'s if any is named so) and the other files."""
    known = ", ".join(sorted(READERS))
    if path.is_file():
        if path.suffix.lower() not in READERS:
            raise SlimError(
                f"{path}: unknown extension {path.suffix or '(none)'!r}", f"data files are {known}"
            )
        return [path], []
    try:
        every = sorted(
            p
            for p in path.rglob("*")
            if p.is_file() and not any(part.startswith(".") for part in p.relative_to(path).parts)
        )
    except OSError as error:
        raise SlimError(f"{path} cannot be read: {error.strerror}") from error
    data = [p for p in every if p.suffix.lower() in READERS]
    named = [p for p in data if re.match(rf"{re.escape(split)}($|[-_.])", p.stem)]
    chosen = named or data
    if not chosen:
        raise SlimError(f"the folder {path} holds no data file", f"data files are {known}")
    return chosen, [str(p.relative_to(path)) for p in every if p not in chosen]


@contextmanager
def _cache_only() -> Iterator[None]:
    """Let ``datasets`` look at its cache only: both libraries read the variable at import."""
    from datasets import config
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE, config.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, config.HF_HUB_OFFLINE = before


def _load_hub(match: re.Match[str], config: SourceConfig) -> Any:
    """Load a hub data set through ``datasets``: downloaded once, then memory-mapped Arrow."""
    import datasets
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    trouble = "HF_HUB_OFFLINE is set" if hub_offline() else hub_trouble()
    hint = f"give a local path, or a mirror through {MIRROR_VARIABLE}=<folder>"
    datasets.disable_progress_bars()
    try:
        with _cache_only() if trouble else nullcontext():
            return datasets.load_dataset(
                match["id"], match["config"], split=config.split, revision=match["rev"]
            )
    except (OfflineModeIsEnabled, ConnectionError, HfHubHTTPError, OSError) as error:
        why = f"it is not in the cache, and {trouble}" if trouble else _one_line(error)
        raise SlimError(
            f"data set {config.path!r} is no local path and cannot be had from the hub: {why}", hint
        ) from error
    except Exception as error:  # datasets raises many kinds: bad config, bad split, bad file
        raise SlimError(f"data set {config.path!r}: {_one_line(error)}", hint) from error


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text[:300] or type(error).__name__


# ---------------------------------------------------------------------------- reading


def _lines(path: Path, source: Source) -> Iterator[tuple[int, str]]:
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


def _read_jsonl(path: Path, source: Source) -> Iterator[tuple[int, Any]]:
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


def _read_json(path: Path, source: Source) -> Iterator[tuple[int, Any]]:
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


def _read_parquet(path: Path, source: Source) -> Iterator[tuple[int, Any]]:
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
        raise SlimError(f"{path.name} is no readable Parquet: {_one_line(error)}") from error


def _read_text(path: Path, source: Source) -> Iterator[tuple[int, Any]]:
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


Reader = Callable[[Path, Source], Iterator[tuple[int, Any]]]
READERS: dict[str, Reader] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".parquet": _read_parquet,
    ".txt": _read_text,
}
