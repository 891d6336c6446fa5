"""Where rows come from: files, folders, data mirrors, hub data sets. Everything streams.

Invariant: a source is found in one order (existing local path, mirror, hub), no file is ever held
whole in memory, and every raw row knows its file and number, so that a complaint can name them.
``HF_HUB_OFFLINE=1`` never touches the network. Try it:
``mlx-slim data preview smollm2-lora data.path=rows.jsonl``.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mlx_slim.artifacts import hash_bytes, hash_file
from mlx_slim.data.folders import INFO, FolderRows, find_in_folder, split_folder
from mlx_slim.data.lines import one_line
from mlx_slim.data.readers import READERS, is_data, suffix_of
from mlx_slim.errors import SlimError, did_you_mean
from mlx_slim.reading import JsonObject, exists

if TYPE_CHECKING:
    from mlx_slim.config.schema import SourceConfig

MIRROR_VARIABLE = "MLX_SLIM_DATA"
_HUB_ID = re.compile(
    r"(?P<id>[\w.-]+(?:/[\w.-]+)?)(?::(?P<config>[\w.-]+))?(?:@(?P<rev>[\w./-]+))?"
)


class RawRow(NamedTuple):
    """One row of a source: ``number`` counts lines or rows (``unit``), from 1."""

    where: str
    number: int
    value: JsonObject
    unit: str = "row"

    @property
    def place(self) -> str:
        """``rows.jsonl, line 3``: where the user finds it."""
        return f"{self.where}, {self.unit} {self.number}"


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
        unit: What the numbers of the rows being read count.
        change: Turns a row of the files into one that a format knows.
        definition: What ``change`` depends on.
    """

    name: str
    kind: str
    files: list[Path] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)
    skip: int = 0
    limit: int | None = None
    blank_lines: int = 0
    unit: str = "row"
    change: Callable[[JsonObject], JsonObject] | None = None
    definition: str = ""
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
            self.unit = "row"
            try:
                for number, value in READERS[suffix_of(path)](path, self):
                    empty = False
                    row = RawRow(where, number, value, self.unit)
                    if not isinstance(value, dict):
                        raise SlimError(
                            f"{row.place}: a row is a JSON object, "
                            f"not {type(value).__name__} {str(value)[:40]!r}"
                        )
                    yield row if self.change is None else self._changed(row)
            except OSError as error:
                raise SlimError(f"{path} cannot be read: {error.strerror or error}") from error
        if empty:
            raise SlimError(f"{', '.join(map(str, self.files))}: empty, no row in it")

    def _changed(self, row: RawRow) -> RawRow:
        assert self.change is not None
        try:
            return row._replace(value=self.change(row.value))
        except SlimError as error:
            raise SlimError(f"{row.place}: {error.message}", error.hint) from error

    def fingerprint(self) -> JsonObject:
        """Return ``{path, sha256}``: equal exactly when the content is equal."""
        if self.kind == "hub":
            return {"path": self.name, "sha256": hash_bytes(str(self._hub._fingerprint).encode())}
        try:
            hashes = [hash_file(path) for path in self.files]
        except OSError as error:
            raise SlimError(f"{error.filename} cannot be read: {error.strerror}") from error
        hashes += [hash_bytes(self.definition.encode())] if self.definition else []
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
            f"{config.path} is a task, but rows of a file or a data set are expected here",
            "only train and distill can read tasks",
        )
    if not config.path.strip():  # an unset variable of a shell: as a path it is the working folder
        raise SlimError(
            "the path of the rows is empty", "name a file, a folder or a data set of the hub"
        )
    path = Path(config.path).expanduser()
    files = _data_files(path, config.split)
    if files is None and (listed := split_folder(config.path)) is not None:
        files = find_in_folder(listed[0], config.split, listed[1])
    if files is not None:
        return _ranged(_of_files(config.path, files), config)
    match = _HUB_ID.fullmatch(config.path)
    if match is None or is_data(path):
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


def find_file(path: Path, split: str) -> Source | None:
    """Return a file or folder as a source; None if there is no such path.

    Raises:
        SlimError: If it has an unknown extension.
    """
    files = _data_files(path, split)
    return None if files is None else _of_files(str(path), files)


def _of_files(name: str, files: FolderRows) -> Source:
    source = Source(name, "file", files.files, files.ignored)
    source.change, source.definition = files.change, files.definition
    return source


def _neighbour(path: Path) -> str:
    """Hint for a missing path: the most similar name beside it."""
    if not path.parent.is_dir():
        return f"the folder {path.parent} does not exist either"
    close = difflib.get_close_matches(path.name, [p.name for p in path.parent.iterdir()], 1, 0.75)
    return f"did you mean {path.parent / close[0]}?" if close else "check the path"


def _data_files(path: Path, split: str) -> FolderRows | None:
    """Return the rows of a file or folder; None if there is no such path."""
    if not exists(path):
        return None
    if path.is_dir():
        return find_in_folder(path, split)
    if path.name == INFO:
        return find_in_folder(path.parent, split)
    if not is_data(path):
        raise SlimError(
            f"{path}: unknown extension {path.suffix or '(none)'!r}",
            f"data files are {', '.join(sorted(READERS))}",
        )
    return FolderRows([path], [])


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

    from mlx_slim.runtime import hub_error, hub_offline

    trouble = "HF_HUB_OFFLINE is set" if hub_offline() else hub_error()
    hint = f"give a local path, or a mirror through {MIRROR_VARIABLE}=<folder>"
    datasets.disable_progress_bars()
    try:
        with _cache_only() if trouble else nullcontext():
            return datasets.load_dataset(
                match["id"], match["config"], split=config.split, revision=match["rev"]
            )
    except (OfflineModeIsEnabled, ConnectionError, HfHubHTTPError, OSError) as error:
        why = f"it is not in the cache, and {trouble}" if trouble else one_line(error)
        raise SlimError(
            f"data set {config.path!r} is neither a local path nor available from the hub: {why}",
            hint,
        ) from error
    except Exception as error:  # datasets raises many kinds: bad config, bad split, bad file
        raise SlimError(f"data set {config.path!r}: {one_line(error)}", hint) from error
