"""What a model or adapter was trained on, declared in its folder, carried on.

Invariant: ``training_rows.json`` of a folder, or of the run folder around it, lists every task row
that was trained on; an evaluation counts its questions among them. Try it:
``mlx-slim eval runs/try/model --task gsm8k -o out``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from mlx_slim.artifacts import (
    SCHEMA_VERSION,
    write_json,
)
from mlx_slim.reading import JsonObject, read_object

RECORD = "training_rows.json"


def entries_of(record: Path) -> list[JsonObject]:
    """Return the sources that a ``training_rows.json`` lists; none where there is no such file."""
    return read_object(record, sources=list)["sources"] if record.is_file() else []


def trained_keys(artifacts: Iterable[Path]) -> dict[str, str]:
    """Return the keys of all task questions that models and adapters were trained on.

    Args:
        artifacts: Folders of models and adapters; the run folder around one declares its rows.

    Returns:
        Key of ``evaluate.training_rows.question_key`` -> the run folder.
    """
    keys: dict[str, str] = {}
    for place, entry in _declared(artifacts):
        keys.update(dict.fromkeys(entry["keys"], str(place)))
    return keys


def carry(folder: Path, artifacts: Iterable[Path]) -> None:
    """Declare in ``folder`` what the models and adapters that it was made from were trained on."""
    entries = [entry for _, entry in _declared(artifacts)]
    if entries:
        write_json(folder / RECORD, {"schema_version": SCHEMA_VERSION, "sources": entries})


def _declared(artifacts: Iterable[Path]) -> Iterator[tuple[Path, JsonObject]]:
    """Yield every entry of the records in and around folders, with the folder that has it."""
    for folder in artifacts:
        path = folder.absolute()
        for place in (path, path.parent):
            for entry in entries_of(place / RECORD):
                yield place, entry
