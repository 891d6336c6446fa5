"""A task's own rows as training rows: asked as the scorer asks, answered as it wants.

Invariant: ``prompt`` + ``completion`` is, byte for byte, the bare prompt and the right continuation
that the scorer reads with no examples; a task that is asked through a chat template gives the
messages that it puts in. So what was tuned is what is asked. Try it:
``mlx-slim data preview smollm2-lora 'data.path=[{path: "task:gsm8k", limit: 3}]'``.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mlx_slim.artifacts import hash_bytes
from mlx_slim.data.overlap import words
from mlx_slim.data.readers import is_data
from mlx_slim.errors import SlimError
from mlx_slim.evaluation.tasks.prompts import Chat, Question, build_questions
from mlx_slim.evaluation.tasks.rows import TaskRows
from mlx_slim.evaluation.tasks.spec import Task

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
    """Return a hash of what a bare question says: its words, case and punctuation aside."""
    text = " ".join([question.context, *question.choices])
    return hash_bytes(" ".join(words(text)).encode())


def question_keys(task: Task, found: TaskRows, limit: int | None = None) -> list[str]:
    """Return the key of every question of a task, whatever examples it is scored with.

    Args:
        task: The task.
        found: Its rows.
        limit: As for ``build_questions``.
    """
    return [question_key(question) for question in build_questions(task, found, 0, limit)]


def training_rows(
    task: Task, found: TaskRows, skip: int, limit: int | None
) -> list[dict[str, Any]]:
    """Return rows [skip, skip + limit) of a task as completions, or as chats.

    Args:
        task: The task, over the split that the rows are of.
        found: Its rows, all of them.
        skip: Rows left out at the beginning.
        limit: Rows after them; None takes all.

    Returns:
        A row each: ``id`` (``task/split/number``), ``prompt``, ``completion`` (``messages`` instead
        for a task that is asked through a chat template), ``answer`` without its delimiter,
        ``choices`` (multiple choice) and ``key`` (``question_key``).

    Raises:
        SlimError: As ``build_questions``, and if ``skip`` leaves nothing.
    """
    numbers = range(len(found.rows))[skip : None if limit is None else skip + limit]
    if not numbers:
        raise SlimError(
            f"task:{task.name}: skip={skip} leaves none of the {len(found.rows)} rows of split "
            f"{task.spec.data.split!r}",
            "skip fewer rows than there are",
        )
    chosen = TaskRows(
        [found.rows[number] for number in numbers],
        [],
        found.checksum,
        found.source,
        [found.place(number) for number in numbers],
    )
    bare = build_questions(task, chosen, 0)
    systems = build_questions(task, chosen, 0, chat=_SYSTEM) if task.spec.chat else bare
    users = build_questions(task, chosen, 0, chat=_USER) if task.spec.chat else bare
    rows = []
    for number, question, system, user in zip(numbers, bare, systems, users, strict=True):
        answer = _answer(user, "" if task.spec.chat else task.spec.delimiter)
        row: dict[str, Any] = {
            "id": f"{task.name}/{task.spec.data.split}/{number}",
            "prompt": user.context,
        }
        if task.spec.chat:
            first = [{"role": "system", "content": system.context}] if system.context else []
            row["messages"] = [
                *first,
                {"role": "user", "content": user.context},
                {"role": "assistant", "content": answer},
            ]
        else:
            row["completion"] = answer
        row["answer"] = answer.removeprefix("" if task.spec.chat else task.spec.delimiter)
        if question.choices:
            row["choices"] = [
                choice.removeprefix(task.spec.delimiter) for choice in question.choices
            ]
        rows.append({**row, "key": question_key(question)})
    return rows


def _answer(question: Question, delimiter: str) -> str:
    if isinstance(question.target, int):
        return question.choices[question.target]
    return delimiter + question.target
