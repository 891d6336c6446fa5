"""The questions of a matrix, stored once for all cells, so that a report needs no data set.

Invariant: a question is stored for reading: without solved examples and without chat
markup; the order is that of the per-question files. With its right answer, its lengths and the
task's definition (``tasks.json``) every score can be counted again. Used by ``compare/runner.py``.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from mlx_slim.artifacts import hash_bytes, hash_json, write_json, write_text
from mlx_slim.compare.matrix_spec import ForgettingEntry, MatrixSpec, TaskEntry
from mlx_slim.compare.records import FORGETTING, ForgettingText
from mlx_slim.config.task import TaskSpec
from mlx_slim.errors import SlimError
from mlx_slim.evaluation.tasks.prompts import Chat, Question, build_questions
from mlx_slim.evaluation.tasks.rows import TaskRows, load_rows, shots_checksum
from mlx_slim.evaluation.tasks.spec import Task, find_task
from mlx_slim.reading import JsonObject, read_object

TASKS_FILE = "tasks.json"


def task_name(task: str) -> str:
    """Return the name under which a task's results are stored."""
    return find_task(task).name


def plain_questions(task: Task, limit: int | None, rows: TaskRows | None = None) -> list[Question]:
    """Return the questions of a task for a reader.

    Args:
        task: The task.
        limit: First rows only, or None.
        rows: Its rows, where they have been read.

    Raises:
        SlimError: If its rows are not available.
    """
    chat = Chat(lambda system, user: f"{system}\n\n{user}".strip()) if task.spec.chat else None
    return build_questions(task, rows or load_rows(task), 0, limit, chat=chat)


@dataclass(frozen=True)
class StoredQuestion:
    """A question for a reader: a line of ``<task>.jsonl``.

    Attributes:
        doc_id: Its row's number.
        subject: Its subtask; None where a task has none.
        prompt: Without solved examples and without chat markup.
        choices: None of them where the answer is a text.
        lengths: Characters of each choice.
        target: Place of the right choice, or the right text; where several are right, a list. None
            in a folder made by version 0.1.
    """

    doc_id: int
    subject: str | None
    prompt: str
    choices: list[str]
    lengths: list[int]
    target: int | str | list[int | str] | None

    @classmethod
    def of(cls, question: Question) -> StoredQuestion:
        """Return the line of a question."""
        several = bool(question.others)
        return cls(
            doc_id=question.doc_id,
            subject=question.subject,
            prompt=question.context,
            choices=list(question.readable),
            lengths=list(question.lengths),
            target=list(question.targets) if several else question.target,
        )

    @classmethod
    def read(cls, row: JsonObject) -> StoredQuestion:
        """Return the record of a line.

        Raises:
            KeyError: If it is none.
        """
        return cls(
            doc_id=row["doc_id"],
            subject=row.get("subject"),
            prompt=row["prompt"],
            choices=row.get("choices", []),
            lengths=row.get("lengths", []),
            target=row.get("target"),
        )

    def question(self) -> Question:
        """Return the question, to be counted again.

        Raises:
            ValueError: If the right answer is not stored.
        """
        if self.target is None:
            raise ValueError("no right answer")
        target, *others = self.target if isinstance(self.target, list) else [self.target]
        return Question(
            self.doc_id,
            self.subject,
            self.prompt,
            tuple(self.choices),
            tuple(self.lengths),
            target,
            tuple(others),
        )


@dataclass(frozen=True)
class _Stored:
    """Lines of one file, and what identifies them for the keys of the cells."""

    lines: list[JsonObject]
    request: JsonObject


@dataclass(frozen=True)
class SavedQuestions:
    """What was written, for ``MatrixRecord``.

    Attributes:
        requests: What identifies each task's questions and the text, by content.
        questions_sha256: Of each file.
        forgetting: The text in words, or None.
    """

    requests: dict[str, JsonObject]
    questions_sha256: dict[str, str]
    forgetting: ForgettingText | None


def write_questions(matrix: MatrixSpec, folder: Path) -> SavedQuestions:
    """Write ``<task>.jsonl`` for each task, the forgetting text, and ``tasks.json``.

    Raises:
        SlimError: If rows are not available, or ``forgetting`` names no text.
    """
    files: dict[str, _Stored] = {}  # all of them, before anything is written
    tasks: JsonObject = {}
    for entry in matrix.tasks:
        task = find_task(entry.task)
        tasks[task.name] = {
            "part": task.part,
            "definition": task.spec.model_dump(mode="json", exclude_defaults=True),
        }
        files[task.name] = _of_task(task, entry)
    described = None
    if matrix.forgetting is not None:
        files[FORGETTING], described = _forgetting(matrix.forgetting)
    hashes = {}
    for name, stored in files.items():
        lines = [json.dumps(row, ensure_ascii=False) for row in stored.lines]
        text = "".join(line + "\n" for line in lines)
        write_text(folder / f"{name}.jsonl", text)
        hashes[name] = hash_bytes(text.encode())
    write_json(folder / TASKS_FILE, tasks)
    requests = {name: stored.request for name, stored in files.items()}
    return SavedQuestions(requests, hashes, described)


def _of_task(task: Task, entry: TaskEntry) -> _Stored:
    if not task.spec.counts_answers:
        raise SlimError(
            f"{task.name} counts no right answers ({', '.join(task.metrics)}): a matrix compares "
            "tasks that do",
            "score it with mlx-slim eval, or predict its texts: forgetting: {task: wikitext}",
        )
    from mlx_slim.evaluation.jobs import definition_record  # what scores: no page of a matrix does

    rows = load_rows(task)
    shots = task.num_fewshot if entry.num_fewshot is None else entry.num_fewshot
    lines = [
        asdict(StoredQuestion.of(question)) for question in plain_questions(task, entry.limit, rows)
    ]
    shots_sha256 = shots_checksum(task, rows, shots)
    return _Stored(lines, definition_record(task, shots, entry.limit, rows.checksum, shots_sha256))


def _forgetting(entry: ForgettingEntry) -> tuple[_Stored, ForgettingText]:
    """Return the forgetting texts, and their description."""
    from mlx_slim.evaluation.scoring.perplexity import read_texts

    if entry.path is not None:
        texts, name = read_texts(Path(entry.path)).documents[: entry.rows], Path(entry.path).name
    elif entry.task is not None:
        task = find_task(entry.task)
        texts = [question.context for question in plain_questions(task, entry.rows)]
        name = f"the prompts of {task.name}"
    else:
        raise SlimError(
            "forgetting has no text to measure", "give forgetting.path or forgetting.task"
        )
    texts = [text for text in texts if text.strip()]  # as the scorer reads them
    size = sum(len(text.encode()) for text in texts)
    stored = _Stored([{"text": text} for text in texts], {"text_sha256": hash_json(texts)})
    return stored, ForgettingText(f"{name}, {len(texts)} texts", size)


def stored_task(folder: Path, name: str, definition_sha256: str | None) -> Task:
    """Return a task as it was scored, from ``tasks.json`` in ``folder``.

    Raises:
        SlimError: If the definition is not stored, or is not the one with that hash.
    """
    entry = read_object(folder / TASKS_FILE).get(name)
    if entry is None or hash_json(entry["definition"]) != definition_sha256:
        raise SlimError(f"{folder / TASKS_FILE} does not define {name} as it was scored")
    return Task(TaskSpec.model_validate(entry["definition"]), folder / TASKS_FILE, entry["part"])


def stored_questions(folder: Path, name: str) -> list[Question]:
    """Return the questions of ``<name>.jsonl`` in ``folder``, in row order.

    Raises:
        SlimError: If the file is missing, damaged, or lacks the right answers.
    """
    path = folder / f"{name}.jsonl"
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
        return [StoredQuestion.read(row).question() for row in rows]
    except FileNotFoundError as error:
        raise SlimError(f"{path} does not exist") from error
    except (ValueError, KeyError, TypeError) as error:
        raise SlimError(f"{path} is damaged, or of another version: {error!r}") from error
