"""Questions as a matrix stores them: with all that is right, so that answers are judged again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mlx_slim.compare.evidence import _shown
from mlx_slim.compare.matrix import MatrixSpec
from mlx_slim.compare.questions import (
    StoredQuestion,
    stored_questions,
    stored_task,
    write_questions,
)
from mlx_slim.compare.recount import Ledger, _record
from mlx_slim.evaluation.tasks.metrics import record_choice, record_generation
from mlx_slim.evaluation.tasks.prompts import build_questions
from mlx_slim.evaluation.tasks.rows import load_rows
from tests.evaluation.support import CHOICE, GENERATION, quiz, write_task


@pytest.mark.parametrize("text", [CHOICE, GENERATION])
def test_several_right_answers_are_stored_and_judged_again(tmp_path: Path, text: Any) -> None:
    rows = [
        {**quiz(1, [1, 0]), "prompt": "p", "completion": ["Paris", "Lyon"]},
        {**quiz(2, 1), "prompt": "p", "completion": "Nice"},
    ]
    task = write_task(tmp_path, text, rows=rows)
    matrix = MatrixSpec.model_validate(
        {
            "title": "t",
            "models": {"m": {"source": "m"}},
            "methods": {"base": {"kind": "base"}},
            "tasks": [{"task": str(task.file)}],
        }
    )
    request = write_questions(matrix, tmp_path / "questions").requests["mine"]
    again = stored_task(tmp_path / "questions", "mine", request["definition_sha256"])
    questions = stored_questions(tmp_path / "questions", "mine")
    assert questions == build_questions(task, load_rows(task))
    assert [len(question.targets) for question in questions] == [2, 1]
    for question in questions:
        if text == CHOICE:
            record = record_choice(task, question, [-1.0, -2.0], [True, False])
            mark = "acc"
        else:
            record = record_generation(task, question, "Lyon", "eos")
            mark = "exact_match"
        record = json.loads(json.dumps(record))
        assert record[mark] == len(question.others)  # right only where it is one of two
        ledger = Ledger()
        ledger.compare("same", record, _record(again, question, record))
        assert ledger.problems == []
        for key, value in ((mark, 1 - record[mark]), ("target", [0])):
            ledger.compare("changed", record | {key: value}, _record(again, question, record))
            assert ledger.problems and ledger.problems.pop().startswith(f"changed.{key}")
            ledger.problems.clear()


def test_a_reader_sees_all_that_is_right() -> None:
    question = StoredQuestion(0, None, "c", [" a", " b"], [1, 1], [1, 0])
    assert _shown([1, 0], question) == "b or a"
    assert _shown(["x", "y"], None) == "x or y"
