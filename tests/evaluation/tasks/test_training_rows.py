"""A task's rows as training rows: byte for byte what the scorer asks and wants."""

from __future__ import annotations

from pathlib import Path

import pytest

from mlx_slim.errors import SlimError
from mlx_slim.evaluation.tasks.prompts import Chat, build_questions
from mlx_slim.evaluation.tasks.rows import TaskRows, load_rows
from mlx_slim.evaluation.tasks.spec import find_task
from mlx_slim.evaluation.tasks.training_rows import (
    is_scored,
    question_key,
    question_keys,
    training_rows,
    with_split,
)
from tests.support.evals import write_tasks


def test_choices_are_asked_and_answered_as_they_are_scored(tmp_path: Path) -> None:
    choice, _, _ = write_tasks(tmp_path)
    task = find_task(str(choice))
    task_rows = load_rows(task)
    rows = training_rows(task, task_rows, 3, 4)
    questions = build_questions(task, task_rows, 0)[3:7]
    assert [row["id"] for row in rows] == [f"toy_choice/test/{n}" for n in (3, 4, 5, 6)]
    for row, question in zip(rows, questions, strict=True):
        assert row["prompt"] == question.context
        assert isinstance(question.target, int)
        assert row["completion"] == question.choices[question.target]
        assert row["answer"] == row["completion"][1:]
        assert [" " + text for text in row["choices"]] == list(question.choices)
    assert len(training_rows(task, task_rows, 20, None)) == 4
    with pytest.raises(SlimError, match="skip=99 leaves none of the 24 rows"):
        training_rows(task, task_rows, 99, None)


def test_generation_gives_the_whole_worked_answer(tmp_path: Path) -> None:
    _, answer, _ = write_tasks(tmp_path)
    task = find_task(str(answer))
    (row,) = training_rows(task, load_rows(task), 2, 1)
    assert (row["prompt"], row["completion"]) == ("Say 2 alpha beta gamma?:", " gamma")
    assert "choices" not in row


def test_a_task_that_is_asked_as_a_chat_gives_the_messages() -> None:
    task = find_task("demo_exact_match")
    task_rows = load_rows(task)
    row = training_rows(task, task_rows, 0, 1)[0]
    question = build_questions(task, task_rows, 0, 1, chat=Chat(lambda s, u: f"<{s}|{u}>"))[0]
    system, user, answer = [message["content"] for message in row["messages"]]
    assert question.context == f"<{system}|{user}>"
    assert answer == question.target
    assert "prompt" in row and "completion" not in row


@pytest.mark.parametrize(
    "name", ["arc_easy", "arc_challenge", "openbookqa", "pubmedqa", "gsm8k", "hellaswag"]
)
def test_real_rows_are_the_scorer_s_to_the_byte(data_mirror: Path, name: str) -> None:
    task = find_task(name)
    task_rows = load_rows(task, data_mirror)
    questions = build_questions(task, task_rows, 0, 80)
    for row, question in zip(training_rows(task, task_rows, 0, 80), questions, strict=True):
        assert row["prompt"] == question.context
        if task.kind == "multiple_choice":
            assert isinstance(question.target, int)
            assert row["completion"] == question.choices[question.target]
        else:
            assert row["completion"] == " " + task_rows.rows[question.doc_id]["answer"]


def test_keys_follow_what_is_asked_not_where_it_stands(tmp_path: Path) -> None:
    choice, _, _ = write_tasks(tmp_path)
    task = find_task(str(choice))
    task_rows = load_rows(task)
    keys = question_keys(task, task_rows)
    assert len(set(keys)) == 24
    backwards = TaskRows(task_rows.rows[::-1], [], "", "")
    assert question_keys(task, backwards) == keys[::-1]
    assert [row["key"] for row in training_rows(task, task_rows, 5, 3)] == keys[5:8]
    shouted = {**task_rows.rows[0], "question": task_rows.rows[0]["question"].upper() + "!"}
    other = {**task_rows.rows[0], "choices": ["something", "else"]}
    for row, same in ((shouted, True), (other, False)):
        (question,) = build_questions(task, TaskRows([row], [], "", ""), 0)
        assert (question_key(question) == keys[0]) is same


def test_which_splits_are_scored(tmp_path: Path) -> None:
    choice, _, _ = write_tasks(tmp_path)
    task = find_task(str(choice))
    assert is_scored(task, "train") and is_scored(task, "test") and is_scored(task, "rows.jsonl")
    assert not is_scored(task, "more.jsonl")
    assert is_scored(find_task("openbookqa"), "test")
    assert not is_scored(find_task("openbookqa"), "train")
    assert is_scored(find_task("pubmedqa"), "train")  # the hub's name of its only split
    assert with_split(task, "more.jsonl").spec.data.split == "more.jsonl"
    assert task.spec.data.split == "test"
