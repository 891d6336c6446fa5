"""Training rows of a task, written into the run folder, and what they mean for its scores.

Invariant: rows of ``task:NAME`` are rendered once, into ``task_rows/``; a resume reads that file,
so it sees the same rows whatever became of the mirror. ``training_rows.json`` declares every row
that was taken, goes along into what is made of the model, and an evaluation counts its questions
among them. The scored split is never taken whole. Try it:
``mlx-slim train smollm2-lora 'data.path=[{path: "task:gsm8k", limit: 50}]' -o runs/try``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from mlx_slim.artifacts import (
    SCHEMA_VERSION,
    hash_file,
    hash_json,
    write_json,
    write_text,
)
from mlx_slim.config.schema import SourceConfig
from mlx_slim.data import sources
from mlx_slim.data.sources import Source
from mlx_slim.errors import SlimError
from mlx_slim.evaluation.tasks.rows import load_rows
from mlx_slim.evaluation.tasks.spec import find_task
from mlx_slim.evaluation.tasks.training_rows import is_scored, training_rows, with_split
from mlx_slim.reading import read_object

FOLDER = "task_rows"
RECORD = "training_rows.json"


def finder(out: Path) -> Callable[[SourceConfig], Source]:
    """Return how sources are found for a run in ``out``: as ever, and tasks besides.

    The function raises SlimError if a source is nowhere, or is a scored split taken whole.
    """

    def find(config: SourceConfig) -> Source:
        if config.task is None:
            return sources.find(config)
        return Source(config.path, "task", [_written(config, out)])

    return find


def _written(config: SourceConfig, out: Path) -> Path:
    """Return the file of a task's rows, written if this run has none yet."""
    task = find_task(config.task or "")
    if is_scored(task, config.split) and not (config.skip or config.limit):
        raise SlimError(
            f"{config.path} would train on split {config.split!r}, whose rows are scored",
            "give it rows that you will not score, as in "
            f"data.path=[{{path: {config.path}, split: {config.split}, skip: 250, limit: 50}}]",
        )
    chosen = with_split(task, config.split)
    wanted = {
        "task": task.name,
        "split": config.split,
        "skip": config.skip,
        "limit": config.limit,
        "definition_sha256": hash_json(chosen.spec.model_dump(exclude_defaults=True)),
    }
    known = _entries(out / RECORD)
    for entry in known:
        file = out / entry["file"]
        if all(entry[key] == value for key, value in wanted.items()) and file.is_file():
            return file
    rows = training_rows(chosen, load_rows(chosen), config.skip, config.limit)
    name = f"{task.name}-{hash_json(wanted)[:8]}.jsonl"
    file = out / FOLDER / name
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_text(file, text)
    entry = {
        **wanted,
        "scored_split": is_scored(task, config.split),
        "file": f"{FOLDER}/{name}",
        "sha256": hash_file(file),
        "rows": [int(row["id"].rsplit("/", 1)[1]) for row in rows],
        "keys": [row["key"] for row in rows],
    }
    write_json(out / RECORD, {"schema_version": SCHEMA_VERSION, "sources": [*known, entry]})
    return file


def _entries(record: Path) -> list[dict[str, Any]]:
    return read_object(record, sources=list)["sources"] if record.is_file() else []


def trained_keys(artifacts: Iterable[Path]) -> dict[str, str]:
    """Return the keys of all task questions that models and adapters were trained on.

    Args:
        artifacts: Folders of models and adapters; the run folder around one declares its rows.

    Returns:
        Key of ``evaluate.training_rows.question_key`` -> the run folder.
    """
    found: dict[str, str] = {}
    for place, entry in _declared(artifacts):
        found.update(dict.fromkeys(entry["keys"], str(place)))
    return found


def carry(folder: Path, artifacts: Iterable[Path]) -> None:
    """Declare in ``folder`` what the models and adapters that it was made from were trained on."""
    entries = [entry for _, entry in _declared(artifacts)]
    if entries:
        write_json(folder / RECORD, {"schema_version": SCHEMA_VERSION, "sources": entries})


def _declared(artifacts: Iterable[Path]) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Yield every entry of the records in and around folders, with the folder that has it."""
    for folder in artifacts:
        path = folder.absolute()
        for place in (path, path.parent):
            for entry in _entries(place / RECORD):
                yield place, entry
