"""A task's rows: located, checked, and identified by a checksum.

Invariant: rows come from one place, in one order: the task's own file, the data mirror
(``<mirror>/<task>/<split>.jsonl``), the hub at the pinned revision. A mirror that has the task's
folder is never completed from the hub. Every row is checked against the task's ``fields`` before
the first question is scored. The checksum covers the fields that the task names or its templates
read, so that a mirror and the hub agree. Few-shot rows are read when they are first needed. Try it:
``mlx-slim tasks gsm8k --data-dir DIR``.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from mlx_slim.config.values import MOST_SHOTS
from mlx_slim.data import sources
from mlx_slim.data.mirror import SUFFIXES, records, split_file
from mlx_slim.data.readers import count_lines, is_data
from mlx_slim.data.sources import MIRROR_VARIABLE, RawRow, Source
from mlx_slim.errors import SlimError, did_you_mean
from mlx_slim.evaluation.tasks.spec import FIRST, Task
from mlx_slim.reading import JsonObject


class RowsAbsent(SlimError):
    """A split of a task is not on this machine and cannot be fetched."""


@dataclass(frozen=True)
class TaskRows:
    """The rows of one task.

    Attributes:
        rows: The scored rows, in order.
        shots: Rows for few-shot examples; may be read at first use, and raise SlimError then.
        checksum: sha256 of the scored rows' fields.
        source: Their location.
        places: File and line of each row, for error messages.
    """

    rows: Sequence[JsonObject]
    shots: Sequence[JsonObject]
    checksum: str
    source: str
    places: Sequence[str] = ()

    def place(self, index: int) -> str:
        """Return the file and line of row ``index``."""
        return self.places[index] if index < len(self.places) else f"row {index + 1}"


class _Shots(Sequence[JsonObject]):
    """Few-shot rows that are read at first access."""

    def __init__(self, read: Callable[[], list[JsonObject]]) -> None:
        self._read = read
        self._rows: list[JsonObject] | None = None

    def _loaded(self) -> list[JsonObject]:
        if self._rows is None:
            self._rows = self._read()
        return self._rows

    def __len__(self) -> int:
        return len(self._loaded())

    def __getitem__(self, index: Any) -> Any:
        return self._loaded()[index]


def count_rows(task: Task, data_dir: str | Path | None = None) -> int | None:
    """Return the number of scored rows on this machine; None if only the hub can have them.

    Raises:
        SlimError: If they should be here and are not, or cannot be read.
    """
    source = local_rows(task, data_dir)
    if source is None:
        return None
    lines = None
    if not (task.part or task.spec.data.where):
        lines = count_lines(source.files[0])
    return sum(1 for _ in _read(task, source)) if lines is None else lines


def local_rows(task: Task, data_dir: str | Path | None = None) -> Source | None:
    """Return the scored rows' location on this machine; None if only the hub can have them.

    Raises:
        SlimError: If they should be here and are not.
    """
    return _local(task, task.spec.data.split, _mirror(data_dir))[0]


def load_rows(task: Task, data_dir: str | Path | None = None, sampling: str = FIRST) -> TaskRows:
    """Find, read and check the rows of a task.

    Args:
        task: From ``find_task``.
        data_dir: The data mirror; None takes ``MLX_SLIM_DATA``.
        sampling: How examples will be chosen: draws are made from all rows of their split.

    Raises:
        RowsAbsent: If they exist nowhere.
        SlimError: If they cannot be read, or are not as the task says: one line with file, line,
            field and what is expected.
    """
    mirror = _mirror(data_dir)
    source = _find(task, task.spec.data.split, mirror)
    raws = list(_read(task, source))
    if not raws:
        part = f" of {task.part}" if task.part else ""
        raise SlimError(
            f"task {task.name}: no row{part} in {source.name}",
            "check data.where and the rows" if task.spec.data.where else "check the file",
        )
    rows = [raw.value for raw in raws]

    def shots() -> list[JsonObject]:
        return _shots(task, mirror, raws, sampling)

    return TaskRows(
        rows, _Shots(shots), _checksum(task, rows), source.name, [raw.place for raw in raws]
    )


def shots_checksum(task: Task, task_rows: TaskRows, num_fewshot: int) -> str | None:
    """Return the sha256 of the rows that examples are taken from; None without examples."""
    return _checksum(task, task_rows.shots) if num_fewshot else None


def _shots(
    task: Task, mirror: Path | None, scored: list[RawRow], sampling: str
) -> list[JsonObject]:
    data = task.spec.data
    if data.shots is None:
        raise SlimError(
            f"task {task.name} has no few-shot examples: its data.shots names no split",
            "score it with 0 shots, or name a split or a file as data.shots in a copy of the task",
        )
    if data.shots == data.split:
        return [raw.value for raw in scored]
    try:
        source = _find(task, data.shots, mirror)
    except RowsAbsent as error:
        raise RowsAbsent(
            f"few-shot examples of {task.name} are rows of its split {data.shots!r}: "
            f"{error.message}",
            error.hint,
        ) from error
    # The examples are the first rows, of each subtask where there are any.
    most = MOST_SHOTS if sampling == FIRST and not task.spec.subgroups else None
    return [raw.value for raw in islice(_read(task, source), most)]


# ------------------------------------------------------------------------------------- finding


def _mirror(data_dir: str | Path | None) -> Path | None:
    setting = data_dir or os.environ.get(MIRROR_VARIABLE)
    if not setting:
        return None
    path = Path(setting).expanduser()
    if data_dir and not path.is_dir():
        raise SlimError(f"the data folder {path} does not exist", "check --data-dir")
    return path


def _find(task: Task, split: str, mirror: Path | None) -> Source:
    """Find a split: the task's own file, then the mirror, then the hub.

    Raises:
        RowsAbsent: If it exists nowhere.
    """
    try:
        source, looked = _local(task, split, mirror)
        return source or _on_hub(task, split, looked)
    except SlimError as error:
        raise RowsAbsent(error.message, error.hint) from error


def _local(task: Task, split: str, mirror: Path | None) -> tuple[Source | None, list[Path]]:
    """Return the split's source on this machine, else the paths that were tried."""
    data = task.spec.data
    file_name = split if is_data(split) else data.path
    if file_name and is_data(file_name):
        return _task_file(task, file_name, split), []
    looked: list[Path] = []
    if mirror:
        names = [data.mirror or task.spec.name]
        if data.path:
            names.append(data.path.rsplit("/", 1)[-1])
        for name in dict.fromkeys(names):
            folder = mirror / name
            if file := split_file(folder, split):
                return Source(str(file), "mirror", [file]), []
            looked.append(folder / f"{split}{SUFFIXES[0]}")
            if folder.is_dir():
                there = sorted(path.name for path in folder.iterdir() if is_data(path))
                raise SlimError(
                    f"{looked[-1]} does not exist",
                    data.missing or f"put the rows there; the folder has {', '.join(there) or '-'}",
                )
    return None, looked


def _task_file(task: Task, name: str, split: str) -> Source:
    """Find a file beside the task's own file, else from the current directory."""
    for path in (task.file.parent / Path(name).expanduser(), Path(name).expanduser()):
        if path.is_file():
            source = sources.find_file(path, split)
            assert source is not None  # it exists
            return source
    raise SlimError(
        f"task {task.name}: {task.file.parent / name} does not exist",
        task.spec.data.missing or "data.path is looked for beside the task's file",
    )


def _on_hub(task: Task, split: str, looked: list[Path]) -> Source:
    data = task.spec.data
    place = looked[0] if looked else f"<mirror>/{data.mirror or task.spec.name}/{split}.jsonl"
    nowhere = f"{place} does not exist"
    if not looked:
        nowhere = f"neither --data-dir nor {MIRROR_VARIABLE} names a data mirror ({place})"
    hint = data.missing or f"put the rows into {place}"
    if not data.path:
        raise SlimError(f"task {task.name} has no rows: {nowhere}", hint)
    from mlx_slim.config.schema import SourceConfig

    name = data.path + (f":{data.config}" if data.config else "")
    name += f"@{data.revision}" if data.revision else ""
    try:
        return sources.find(SourceConfig(path=name, split=data.hub_splits.get(split, split)))
    except SlimError as error:
        raise SlimError(
            f"task {task.name} has no rows: {nowhere}, and {error.message}", hint
        ) from error


# ------------------------------------------------------------------------------------- reading


def _read(task: Task, source: Source) -> Iterator[RawRow]:
    """Yield the rows of ``source`` that belong to the task, checked."""
    from mlx_slim.config.expressions import compile_value

    spec = task.spec
    where = compile_value(spec.data.where) if spec.data.where else None
    checks = [_Check(path, kind) for path, kind in spec.fields.items()]
    groups = spec.subgroups
    subtasks = groups.subtasks if groups else {}
    file = source.files[0] if len(source.files) == 1 else None
    for raw in records(source, spec.data.records):
        row = raw._replace(where=raw.where.replace(file.name, str(file), 1)) if file else raw
        if where is not None and not _holds(where, row):
            continue
        for check in checks:
            if problem := check.problem(row.value):
                raise SlimError(
                    f"task {task.name}: {row.place}: {problem}",
                    f"the row has {', '.join(row.value) or 'no field'}",
                )
        if groups:
            part = row.value.get(groups.field)
            if part not in subtasks:
                raise SlimError(
                    f"task {task.name}: {row.place}: {groups.field} is {part!r}, "
                    f"none of the {len(subtasks)} subtasks of {spec.name}",
                    did_you_mean(str(part), subtasks) if len(str(part)) > 2 else "",
                )
            if task.part not in (None, part):
                continue
        yield row


def _holds(where: Callable[[Mapping[str, Any]], Any], row: RawRow) -> bool:
    try:
        return bool(where(row.value))
    except Exception as error:  # a user's template can raise anything
        raise SlimError(
            f"{row.place}: data.where: {error}", f"the row has {', '.join(row.value)}"
        ) from error


_MISSING = object()
_WORDS = {
    "text": "text",
    "texts": "a list of texts",
    "integer": "a whole number",
    "number": "a number",
    "list": "a list",
    "object": "an object",
}
_CLASSES: dict[str, type | tuple[type, ...]] = {
    "text": str,
    "texts": list,
    "integer": int,
    "number": (int, float),
    "list": list,
    "object": dict,
}


class _Check:
    """What one field of a row must be."""

    def __init__(self, path: str, kind: str | list[str]) -> None:
        self._path, self._keys, self._kind = path, path.split("."), kind
        self._values = set(kind) if isinstance(kind, list) else None
        self._expected = _WORDS[kind] if isinstance(kind, str) else f"one of {', '.join(kind)}"

    def problem(self, row: Mapping[str, Any]) -> str:
        """Return what is wrong with the row's field; empty if nothing is."""
        value: Any = row
        for key in self._keys:
            value = value.get(key, _MISSING) if isinstance(value, Mapping) else _MISSING
        if value is _MISSING:
            return f"no field {self._path!r}: expected {self._expected}"
        if self._values is not None:
            good = isinstance(value, str) and value in self._values
        else:
            good = isinstance(value, _CLASSES[str(self._kind)]) and not isinstance(value, bool)
            if self._kind == "texts" and isinstance(value, list):
                good = bool(value) and all(isinstance(item, str) for item in value)
        if good:
            return ""
        seen = json.dumps(value, ensure_ascii=False, default=str)
        seen = seen if len(seen) <= 60 else f"{seen[:57]}…"
        return f"{self._path} is {seen}: expected {self._expected}"


def _checksum(task: Task, rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the sha256 of the rows' fields that the task names or its templates read.

    Of a task that names no fields, all of them count.
    """
    from mlx_slim.config.expressions import names_in  # Jinja: listing tasks needs none

    spec = task.spec
    names = sorted({path.split(".")[0] for path in spec.fields})
    if names:
        optional = (spec.continuation, spec.example, spec.raw)
        templates = [spec.description, spec.prompt, *(text or "" for text in optional)]
        for one in (spec.target, spec.choices or []):
            templates += [one] if isinstance(one, str) else one
        read = [names_in(text) for text in templates]
        groups = {spec.subgroups.field} if spec.subgroups else set()
        names = sorted(groups.union(names, *read))
    digest = hashlib.sha256()
    for row in rows:
        hashed = {name: row.get(name) for name in names} if names else row
        text = json.dumps(hashed, sort_keys=True, ensure_ascii=False, default=str)
        digest.update(text.encode("utf-8", "surrogatepass") + b"\n")
    return digest.hexdigest()
