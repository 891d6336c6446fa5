"""A task's rows as training rows, in the format that the scorer reads.

Invariant: ``prompt`` + ``completion`` is, byte for byte, the bare prompt and the right continuation
that the scorer reads with no examples; a task that uses a chat template gives the
same messages. So training and evaluation use the same prompts. Rows of ``task:NAME`` are rendered
once, into ``task_rows/`` of the run folder; a resume reads that file, so it sees the same rows
even if the mirror has changed. The scored split is never used whole. Try it: ``mlx-slim data
preview smollm2-lora 'data.path=[{path: "task:gsm8k", limit: 3}]'``.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from mlx_slim.artifacts import (
    SCHEMA_VERSION,
    hash_bytes,
    hash_file,
    hash_json,
    write_json,
    write_text,
)
from mlx_slim.config.schema import SourceConfig
from mlx_slim.data import sources
from mlx_slim.data.overlap import words
from mlx_slim.data.readers import is_data
from mlx_slim.data.sources import Source
from mlx_slim.errors import SlimError
from mlx_slim.evaluation.tasks.prompts import Chat, Question, build_questions
from mlx_slim.evaluation.tasks.rows import TaskRows, load_rows
from mlx_slim.evaluation.tasks.spec import Task, find_task
from mlx_slim.models.lineage import RECORD, entries_of
from mlx_slim.reading import JsonObject

_SYSTEM = Chat(lambda system, user: system)
_USER = Chat(lambda system, user: user)


def with_split(task: Task, split: str) -> Task:
    """Return the task over another split of its data (or a file of that name)."""
    data = task.spec.data.model_copy(update={"split": split})
    return replace(task, spec=task.spec.model_copy(update={"data": data}))


def is_scored(task: Task, split: str) -> bool:
    """Return whether a split holds the rows that the task is scored on.

    Two names may mean one split on the hub, and a task of one file has no other rows.
    """
    data = task.spec.data
    if split == data.split or (data.path and split == data.path):
        return True
    if data.path and is_data(data.path):
        return not is_data(split)
    return data.hub_splits.get(split, split) == data.hub_splits.get(data.split, data.split)


def question_key(question: Question) -> str:
    """Return a hash of a bare question's words, without case and punctuation."""
    text = " ".join([question.context, *question.readable])
    return hash_bytes(" ".join(words(text)).encode())


def question_keys(task: Task, task_rows: TaskRows, limit: int | None = None) -> list[str]:
    """Return the key of every question of a task, independent of its examples.

    Args:
        task: The task.
        task_rows: Its rows.
        limit: As for ``build_questions``.
    """
    return [question_key(question) for question in build_questions(task, task_rows, 0, limit)]


def training_rows(
    task: Task, task_rows: TaskRows, skip: int, limit: int | None
) -> list[JsonObject]:
    """Return rows [skip, skip + limit) of a task as completions, or as chats.

    Args:
        task: The task, over the split that the rows are of.
        task_rows: Its rows, all of them.
        skip: Rows left out at the beginning.
        limit: Rows after them; None takes all.

    Returns:
        A row each: ``id`` (``task/split/number``), ``prompt``, ``completion`` (``messages`` instead
        for a task that uses a chat template), ``answer`` without its delimiter,
        ``choices`` (multiple choice) and ``key`` (``question_key``).

    Raises:
        SlimError: As ``build_questions``, and if ``skip`` leaves nothing.
    """
    if task.kind == "perplexity":
        raise SlimError(
            f"task:{task.name} has texts, no questions to learn the answers of",
            "give its rows as a file with a text column",
        )
    numbers = range(len(task_rows.rows))[skip : None if limit is None else skip + limit]
    if not numbers:
        raise SlimError(
            f"task:{task.name}: skip={skip} leaves none of the {len(task_rows.rows)} rows of split "
            f"{task.spec.data.split!r}",
            "skip fewer rows than there are",
        )
    chosen = TaskRows(
        [task_rows.rows[number] for number in numbers],
        [],
        task_rows.checksum,
        task_rows.source,
        [task_rows.place(number) for number in numbers],
    )
    bare = build_questions(task, chosen, 0)
    systems = build_questions(task, chosen, 0, chat=_SYSTEM) if task.spec.chat else bare
    users = build_questions(task, chosen, 0, chat=_USER) if task.spec.chat else bare
    rows = []
    for number, question, system, user in zip(numbers, bare, systems, users, strict=True):
        answer = _answer(user, "" if task.spec.chat else task.spec.delimiter)
        row: JsonObject = {
            "id": f"{task.name}/{task.spec.data.split}/{number}",
            "prompt": _prompt(user),
        }
        if task.spec.chat:
            first = [{"role": "system", "content": system.context}] if system.context else []
            row["messages"] = [
                *first,
                {"role": "user", "content": _prompt(user)},
                {"role": "assistant", "content": answer},
            ]
        else:
            row["completion"] = answer
        row["answer"] = answer.removeprefix("" if task.spec.chat else task.spec.delimiter)
        if question.choices:
            row["choices"] = [
                choice.removeprefix(task.spec.delimiter) for choice in question.readable
            ]
        rows.append({**row, "key": question_key(question)})
    return rows


def _prompt(question: Question) -> str:
    """Return what the model reads before the right answer."""
    if question.contexts and isinstance(question.target, int):
        return question.contexts[question.target]
    return question.context


def _answer(question: Question, delimiter: str) -> str:
    if isinstance(question.target, int):
        return question.choices[question.target]
    return delimiter + question.target


FOLDER = "task_rows"


def finder(out: Path) -> Callable[[SourceConfig], Source]:
    """Return the function that finds sources for a run in ``out``: as ``sources.find``, and tasks.

    The function raises SlimError if a source does not exist, or is a whole scored split.
    """

    def find(config: SourceConfig) -> Source:
        if config.task is None:
            return sources.find(config)
        return Source(config.path, "task", [_rows_file(config, out)])

    return find


def _rows_file(config: SourceConfig, out: Path) -> Path:
    """Return the file of a task's rows, written if this run has none yet."""
    task = find_task(config.task or "")
    if is_scored(task, config.split) and not (config.skip or config.limit):
        raise SlimError(
            f"{config.path} would train on split {config.split!r}, whose rows are scored",
            "give it rows that you will not score, as in "
            f"data.path=[{{path: {config.path}, split: {config.split}, skip: 250, limit: 50}}]",
        )
    chosen = with_split(task, config.split)
    request = {
        "task": task.name,
        "split": config.split,
        "skip": config.skip,
        "limit": config.limit,
        "definition_sha256": hash_json(chosen.spec.model_dump(exclude_defaults=True)),
    }
    entries = entries_of(out / RECORD)
    for entry in entries:
        file = out / entry["file"]
        if all(entry[key] == value for key, value in request.items()) and file.is_file():
            return file
    rows = training_rows(chosen, load_rows(chosen), config.skip, config.limit)
    name = f"{task.name}-{hash_json(request)[:8]}.jsonl"
    file = out / FOLDER / name
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_text(file, text)
    entry = {
        **request,
        "scored_split": is_scored(task, config.split),
        "file": f"{FOLDER}/{name}",
        "sha256": hash_file(file),
        "rows": [int(row["id"].rsplit("/", 1)[1]) for row in rows],
        "keys": [row["key"] for row in rows],
    }
    write_json(out / RECORD, {"schema_version": SCHEMA_VERSION, "sources": [*entries, entry]})
    return file
