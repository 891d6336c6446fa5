"""Folders of rows: a file a split, what ``datasets`` saved, or LLaMA-Factory's list of data sets.

Invariant: a folder gives the rows of one split, never another split's with them, and what its own
description (``state.json``, ``dataset_info.json``) says of names and columns is followed or
refused. Try it: ``mlx-slim data preview smollm2-lora data.path=FOLDER``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_slim.data.readers import READERS, is_data, stem_of
from mlx_slim.errors import SlimError, did_you_mean
from mlx_slim.reading import JsonObject, read_json, read_object

INFO = "dataset_info.json"
_DICT, _STATE = "dataset_dict.json", "state.json"
_ABOUT = {INFO, "dataset_infos.json", _DICT, _STATE}  # JSON that is about data, and no data
# Names that mean one split: mlx-lm writes ``valid``, others ``dev`` or ``val``.
_SPLITS = (("train", "training"), ("validation", "valid", "val", "dev"), ("test",))
_SHARD = r"(-\d+-of-\d+)?"

Change = Callable[[JsonObject], JsonObject]


@dataclass(frozen=True)
class FolderRows:
    """The rows that a folder gives.

    Attributes:
        files: In reading order.
        ignored: Other files, relative to the folder.
        change: Turns a row of the files into one that a format knows; raises SlimError.
        definition: What ``change`` depends on, as text.
    """

    files: list[Path]
    ignored: list[str]
    change: Change | None = None
    definition: str = ""


def find_in_folder(folder: Path, split: str, name: str | None = None) -> FolderRows:
    """Return the rows of a folder's split, or of the data set ``name`` that its list names.

    Raises:
        SlimError: If there are none, or the folder's description cannot be followed.
    """
    try:
        if (folder / _DICT).is_file():
            return FolderRows(_saved(_saved_split(folder, split)), [])
        if (folder / _STATE).is_file():
            return FolderRows(_saved(folder), [])
        entries = _entries(folder)
        if entries:
            return _listed(folder, entries, name)
        return _by_split(folder, split)
    except OSError as error:
        raise SlimError(f"{folder} cannot be read: {error.strerror or error}") from error


def split_folder(path: str) -> tuple[Path, str] | None:
    """Return folder and name of ``FOLDER:NAME``, a data set of the folder's list."""
    before, mark, name = path.rpartition(":")
    folder = Path(before).expanduser()
    return (folder, name) if mark and name and (folder / INFO).is_file() else None


# ------------------------------------------------------------------------------- plain folders


def _names(split: str) -> tuple[str, ...]:
    """Return the names of a split, the given one first."""
    same = next((names for names in _SPLITS if split in names), ())
    return tuple(dict.fromkeys((split, *same)))


def _by_split(folder: Path, split: str) -> FolderRows:
    every = sorted(
        path
        for path in folder.rglob("*")
        if path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
    data = [path for path in every if is_data(path) and path.name not in _ABOUT]
    if not data:
        extensions = ", ".join(sorted(READERS))
        raise SlimError(f"the folder {folder} holds no data file", f"data files are {extensions}")
    chosen = next((named for name in _names(split) if (named := _named(folder, data, name))), [])
    if not chosen:
        splits = [name for names in _SPLITS for name in names]
        others = [name for name in splits if any(_exactly(folder, path, name) for path in data)]
        if others:
            raise SlimError(
                f"the folder {folder} has no split {split!r}, only {', '.join(others)}",
                "name the file itself, or another split: "
                f"data.path=[{{path: {folder}, split: {others[0]}}}]",
            )
        chosen = data
    return FolderRows(chosen, [str(p.relative_to(folder)) for p in every if p not in chosen])


def _named(folder: Path, data: list[Path], split: str) -> list[Path]:
    """Return the files whose name has a split's at an end, or that lie in a folder of its name."""
    begins = re.compile(rf"{re.escape(split)}[-_.]", re.IGNORECASE)
    return [path for path in data if begins.match(stem_of(path)) or _exactly(folder, path, split)]


def _exactly(folder: Path, path: Path, split: str) -> bool:
    """Whether a file is of a split: ``test.jsonl``, ``my-test-00000-of-00001.arrow``, in test/."""
    ends = re.compile(rf"(.*[-_.])?{re.escape(split)}{_SHARD}", re.IGNORECASE)
    return bool(ends.fullmatch(stem_of(path))) or split in path.relative_to(folder).parts[:-1]


# ------------------------------------------------------------------- datasets' ``save_to_disk``


def _saved_split(folder: Path, split: str) -> Path:
    splits = read_object(folder / _DICT).get("splits")
    if not isinstance(splits, list) or not all(isinstance(name, str) for name in splits):
        raise SlimError(f"{folder / _DICT}: 'splits' is not a list of names", "save the data again")
    name = next((name for name in _names(split) if name in splits), None)
    if name is None:
        raise SlimError(
            f"{folder} has no split {split!r}, only {', '.join(splits) or 'none'}",
            did_you_mean(split, splits),
        )
    return folder / _within(folder, name)


def _saved(folder: Path) -> list[Path]:
    """Return the Arrow files of a saved data set, in its order."""
    state = read_object(folder / _STATE)
    if state.get("_indices_data_files"):
        raise SlimError(
            f"{folder} stores the order of its rows in an indices file, which is not supported",
            "load it with datasets, call flatten_indices() and save it again",
        )
    listed = state.get("_data_files")
    names = [entry.get("filename") for entry in listed or [] if isinstance(entry, dict)]
    if not isinstance(listed, list) or not names or not all(isinstance(n, str) for n in names):
        raise SlimError(
            f"{folder / _STATE}: '_data_files' names no files",
            "save the data again with datasets' save_to_disk",
        )
    files = [folder / _within(folder, str(name)) for name in names]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise SlimError(
            f"{folder} lacks {', '.join(missing[:3])}, {len(missing)} of the {len(files)} files "
            f"that {_STATE} names",
            "copy the whole folder",
        )
    return files


def _within(folder: Path, name: str) -> str:
    """Return a file name of a description; refuse one that leads out of its folder."""
    path = Path(name)
    if path.is_absolute() or ".." in path.parts or not path.parts:
        raise SlimError(f"{folder}: the file name {name!r} is outside the folder")
    return name


# ----------------------------------------------------------------------------- LLaMA-Factory

_PLACES = ("file_name", "hf_hub_url", "ms_hub_url", "om_hub_url", "script_url", "cloud_file_name")
_KEYS = {*_PLACES, "formatting", "columns", "tags", "split", "subset", "folder", "ranking"}
# What each column is called here, and how LLaMA-Factory calls it where the entry does not say.
_ALPACA = {
    "prompt": ("instruction", "instruction"),
    "query": ("input", "input"),
    "response": ("output", "output"),
    "history": ("history", None),
    "system": ("system", None),
}
_SHAREGPT = {
    "messages": ("conversations", "conversations"),
    "system": ("system", None),
    "tools": ("tools", None),
}
_ROLES = {
    "user_tag": "human",
    "assistant_tag": "gpt",
    "observation_tag": "observation",
    "function_tag": "function_call",
    "system_tag": "system",
}
_TAGS = {"role_tag": "from", "content_tag": "value", **_ROLES}


def _entries(folder: Path) -> JsonObject:
    """Return LLaMA-Factory's list of data sets; empty if the folder has none."""
    if not (folder / INFO).is_file():
        return {}
    listing = read_json(folder / INFO)
    if not isinstance(listing, dict):
        return {}
    return {
        name: entry
        for name, entry in listing.items()
        if isinstance(entry, dict) and any(place in entry for place in _PLACES)
    }


def _listed(folder: Path, entries: JsonObject, name: str | None) -> FolderRows:
    if name is None and len(entries) > 1:
        first = next(iter(entries))
        raise SlimError(
            f"{folder / INFO} names {len(entries)} data sets: {', '.join(list(entries)[:8])}",
            f"name one: data.path={folder}:{first}",
        )
    name = next(iter(entries)) if name is None else name
    if name not in entries:
        raise SlimError(f"{folder / INFO} names no {name!r}", did_you_mean(name, entries))
    entry, where = entries[name], f"{folder / INFO}, {name}"
    _check_entry(entry, where)
    target = folder / _within(folder, entry["file_name"])
    if target.is_dir():
        files = _by_split(target, entry.get("split", "train")).files
    elif target.is_file() and is_data(target):
        files = [target]
    else:
        what = "is not a data file" if target.is_file() else "does not exist"
        raise SlimError(f"{where}: file_name {entry['file_name']!r} {what}", "check the name")
    change = _sharegpt(entry) if entry.get("formatting") == "sharegpt" else _alpaca(entry)
    return FolderRows(files, [], change, json.dumps(entry, sort_keys=True))


def _check_entry(entry: Mapping[str, Any], where: str) -> None:
    """Refuse what would be learned otherwise than LLaMA-Factory learns it."""
    if "file_name" not in entry:
        place = next(place for place in _PLACES if place in entry)
        raise SlimError(
            f"{where}: the rows are not in this folder ({place}: {entry[place]})",
            f"give the data set itself: data.path={entry[place]}",
        )
    if not isinstance(entry["file_name"], str):
        raise SlimError(f"{where}: file_name is {entry['file_name']!r}, expected a name")
    unknown = sorted(entry.keys() - _KEYS)
    if unknown or entry.get("ranking"):
        what = "ranking (pairs of answers)" if entry.get("ranking") else unknown[0]
        raise SlimError(f"{where}: {what} is not supported", "remove it from the entry")
    formatting = entry.get("formatting", "alpaca")
    if formatting not in ("alpaca", "sharegpt"):
        raise SlimError(f"{where}: unknown formatting {formatting!r}", "known: alpaca, sharegpt")
    columns = _SHAREGPT if formatting == "sharegpt" else _ALPACA
    for key, choices in (("columns", columns), ("tags", _TAGS)):
        names = entry.get(key, {})
        if not isinstance(names, dict) or not all(isinstance(v, str) for v in names.values()):
            raise SlimError(f"{where}: {key} is {str(names)[:60]!r}, expected names")
        for name in names:
            if name not in choices:
                raise SlimError(
                    f"{where}: {key}.{name} is not supported", did_you_mean(name, choices)
                )


def _renamed(
    row: JsonObject, columns: Mapping[str, str], ours_of: Mapping[str, tuple[str, str | None]]
) -> JsonObject:
    renamed: JsonObject = {}
    for key, (ours, default) in ours_of.items():
        theirs = columns.get(key, default)
        if theirs in row:
            renamed[ours] = row[theirs]
        elif key in columns:
            raise SlimError(
                f"{INFO} takes the {key} from column {theirs!r}, "
                f"the row has {', '.join(row) or 'none'}",
                "fix the entry's columns",
            )
    return renamed


def _alpaca(entry: Mapping[str, Any]) -> Change:
    columns = entry.get("columns", {})

    def change(row: JsonObject) -> JsonObject:
        renamed = _renamed(row, columns, _ALPACA)
        if set(columns) == {"prompt"} and "output" not in renamed:
            return {"text": renamed["instruction"]}  # a prompt alone is text to continue
        return renamed

    return change


def _sharegpt(entry: Mapping[str, Any]) -> Change:
    columns, tags = entry.get("columns", {}), {**_TAGS, **entry.get("tags", {})}
    role_tag, content_tag = tags["role_tag"], tags["content_tag"]
    roles = {tags[tag]: ours for tag, ours in _ROLES.items()}

    def turn(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        standard = {"from", "value", role_tag, content_tag}
        rest = {key: item for key, item in value.items() if key not in standard}
        role = value.get(role_tag)
        role = roles.get(role, role) if isinstance(role, str) else role
        return {**rest, "from": role, "value": value.get(content_tag)}

    def change(row: JsonObject) -> JsonObject:
        renamed = _renamed(row, columns, _SHAREGPT)
        turns = renamed.get("conversations")
        if isinstance(turns, list):
            renamed["conversations"] = [turn(each) for each in turns]
        return renamed

    return change
