"""The rows whose answers are scored: their questions, right answers and fields, as in the file.

Invariant: row i here is row i of the token store that a run trains on; a row without a question,
or whose question is one that a task is scored on, is refused by name before anything is drawn. A
question is compared by the hash of its words, as ``evaluation/tasks/training_rows.py`` does.
Try it: ``mlx-slim train smollm2-grpo -o runs/grpo``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlx_slim.config.schema import DataConfig, SourceConfig
from mlx_slim.data.ledger import SourceLedger
from mlx_slim.data.overlap import words
from mlx_slim.data.pipeline import Pipeline, PreparedRow
from mlx_slim.data.prepare import sources_of
from mlx_slim.data.sources import Source
from mlx_slim.data.store import TokenStore
from mlx_slim.errors import RowLimit, SlimError
from mlx_slim.evaluation.tasks.prompts import Chat, build_questions
from mlx_slim.evaluation.tasks.rows import RowsAbsent, TaskRows, load_rows
from mlx_slim.evaluation.tasks.spec import Task
from mlx_slim.evaluation.tasks.training_rows import question_keys
from mlx_slim.hashing import hash_bytes
from mlx_slim.reading import ChatMessage, JsonObject


@dataclass(frozen=True)
class ScoredRow:
    """A row of the data.

    Attributes:
        place: File and line.
        messages: What the model reads, as a chat; the last one asks.
        answer: The right answer of the data, ends stripped.
        fields: The row as it was read.
        chat: Whether it is a list of messages there.
    """

    place: str
    messages: list[ChatMessage]
    answer: str
    fields: JsonObject
    chat: bool

    @property
    def prompt(self) -> str:
        """The question."""
        return self.messages[-1]["content"]


def read_scored_rows(
    store: TokenStore,
    config: DataConfig,
    tokenizer: Any,
    find: Callable[[SourceConfig], Source],
    *,
    max_length: int,
    limit: RowLimit | None,
) -> list[ScoredRow]:
    """Return the rows of ``store``, read once more as ``data/prepare.py`` read them.

    Args:
        store: Of the same settings.
        config: The ``data`` section.
        tokenizer: The model's.
        find: Finds a source.
        max_length: Longest row, tokens.
        limit: The longest row that the model computes right.

    Raises:
        SlimError: A row without a question and its answer, or rows that changed meanwhile.
    """
    pipeline = Pipeline(config, tokenizer, max_length=max_length, limit=limit)
    read: list[ScoredRow] = []
    for source, quota in sources_of(config, store):
        ledger = SourceLedger("", "", 1.0, [])
        rows = pipeline.rows(find(source), source, ledger, quota)
        read += [_scored(row, config.truncation) for row in rows]
    if len(store) and int(store.index.max()) >= len(read):
        raise SlimError(
            f"the data has {len(read):,} rows now, fewer than when they were tokenised",
            "start a new run, or give the data back as it was",
        )
    return [read[number] for number in store.index]


def _scored(row: PreparedRow, truncation: str) -> ScoredRow:
    place, example = row.raw.place, row.example
    turn = _answered(row, truncation)
    prompt, answer = example.messages[:turn], example.messages[turn:]
    if not any(message["role"] == "user" for message in prompt):
        raise SlimError(
            f"{place}: a row of format {example.kind} asks nothing: expected a question and its "
            "answer",
            "rewards score answers to questions: give rows with prompt and completion, or messages",
        )
    text = answer[0]["content"].strip()
    return ScoredRow(place, prompt, text, row.raw.value, example.kind == "chat")


def _answered(row: PreparedRow, truncation: str) -> int:
    """Return the last turn that is learned, the one that ``finetuning/prompts.py`` splits off."""
    turns = [number for number, weight in enumerate(row.example.turn_weights) if weight]
    if truncation == "right" and row.length > len(row.tokens.ids_T):
        begun = np.count_nonzero(np.diff(row.tokens.supervised_T.astype(np.int8)) == 1)
        turns = turns[:begun]  # the answers behind are cut off
    return turns[-1] if turns else 0


def _key(text: str) -> str:
    return hash_bytes(" ".join(words(text)).encode())


_USER = Chat(lambda system, user: user)


def _question_hashes(task: Task, rows: TaskRows) -> set[str]:
    """Return the hashes of a task's questions: as posed, without description, and as in its rows.

    The last by the columns that the task calls its question (``overlap``).
    """
    tested = set(question_keys(task, rows))
    for chat in (None, _USER):
        tested.update(_key(one.context) for one in build_questions(task, rows, 0, chat=chat))
    if columns := task.spec.overlap:
        tested.update(_key(" ".join(str(row.get(c, "")) for c in columns)) for row in rows.rows)
    return tested


def refuse_test_questions(
    rows: Sequence[ScoredRow], tasks: Iterable[Task], say: Callable[[str], None]
) -> None:
    """Refuse rows whose question one of ``tasks`` is scored on.

    Args:
        rows: Training and validation rows.
        tasks: Whose scored split is compared.
        say: Hears of a task whose scored rows are not on this machine.

    Raises:
        SlimError: Names the first such row and counts all.
    """
    for task in tasks:
        try:
            tested = _question_hashes(task, load_rows(task))
        except RowsAbsent as error:
            say(f"rows were not compared with the test questions of {task.name}: {error.message}")
            continue
        same = [
            row.place
            for row in rows
            if not tested.isdisjoint(
                (
                    row.fields.get("key"),
                    _key(row.prompt),
                    _key(" ".join(message["content"] for message in row.messages)),
                )
            )
        ]
        if same:
            raise SlimError(
                f"{same[0]}: its question is one that {task.name} is scored on "
                f"({len(same):,} of {len(rows):,} rows are)",
                "leave these rows out: a model that learned or was chosen by them cannot be scored",
            )
