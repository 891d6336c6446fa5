"""What a matrix asks, stored once for all cells, so that a report needs no data set.

Invariant: a question is shown as a reader would want it: without solved examples and without chat
markup; the order is that of the per-question files. Used by ``compare/runner.py``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mlx_slim.artifacts import write_text
from mlx_slim.compare.matrix import HeldOutEntry, Matrix
from mlx_slim.errors import SlimError
from mlx_slim.evaluate.perplexity import read_texts
from mlx_slim.evaluate.prompts import Chat, Question, build_questions
from mlx_slim.evaluate.rows import load_rows
from mlx_slim.evaluate.spec import Task, find_task

HELD_OUT = "held_out"


def task_name(task: str) -> str:
    """Return the name under which a task's results are stored."""
    return find_task(task).name


def plain_questions(task: Task, limit: int | None) -> list[Question]:
    """Return the questions of a task for a reader.

    Raises:
        SlimError: If its rows are not to be had.
    """
    chat = Chat(lambda system, user: f"{system}\n\n{user}".strip()) if task.spec.chat else None
    return build_questions(task, load_rows(task), 0, limit, chat=chat)


def write_questions(matrix: Matrix, folder: Path) -> dict[str, Any] | None:
    """Write ``questions/<task>.jsonl`` for each task, and the held-out text; describe the text.

    Raises:
        SlimError: If rows are not to be had, or ``held_out`` names no text.
    """
    files: dict[str, list[dict[str, Any]]] = {}  # all of them, before anything is written
    for entry in matrix.tasks:
        task = find_task(entry.task)
        files[task.name] = [
            {
                "doc_id": question.doc_id,
                "prompt": question.context,
                "choices": list(question.choices),
                "lengths": list(question.lengths),
            }
            for question in plain_questions(task, entry.limit)
        ]
    held, described = matrix.held_out, None
    if held is not None:
        files[HELD_OUT], described = _held_out(held)
    for name, rows in files.items():
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        write_text(folder / f"{name}.jsonl", "".join(line + "\n" for line in lines))
    return described


def _held_out(held: HeldOutEntry) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return the held-out texts, and what they are in words."""
    if held.path is not None:
        texts, name = read_texts(Path(held.path)).documents[: held.rows], Path(held.path).name
    elif held.task is not None:
        task = find_task(held.task)
        texts = [question.context for question in plain_questions(task, held.rows)]
        name = f"the prompts of {task.name}"
    else:
        raise SlimError("held_out names no text", "give held_out.path or held_out.task")
    size = sum(len(text.encode()) for text in texts)
    rows = [{"text": text} for text in texts]
    return rows, {"name": f"{name}, {len(texts)} texts", "bytes": size}
