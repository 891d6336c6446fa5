"""Choices that are contexts of one continuation: scored, shown and trained on as such."""

from __future__ import annotations

from typing import Any

from mlx_slim.evaluation.tasks.prompts import Chat, build_questions
from mlx_slim.evaluation.tasks.rows import TaskRows
from mlx_slim.evaluation.tasks.spec import find_task
from mlx_slim.evaluation.tasks.training_rows import question_key, training_rows


def _questions(rows: Any, shots: Any = (), num_fewshot: int = 0, **more: Any):
    return build_questions(
        find_task("winogrande"), TaskRows(rows, shots, "", ""), num_fewshot, **more
    )


def _blank(answer: str = "1") -> dict[str, Any]:
    sentence = "Ann paid Bea, so _ had less_money."
    return {"sentence": sentence, "option1": "Ann", "option2": "Bea", "answer": answer}


def test_choices_may_be_contexts_of_one_continuation() -> None:
    (question,) = _questions([_blank()], [_blank("2")], 1)
    shot = "Ann paid Bea, so Bea had less_money.\n\n"
    rest = " had less_money."
    assert question.pairs == [
        (f"{shot}Ann paid Bea, so Ann", rest),
        (f"{shot}Ann paid Bea, so Bea", rest),
    ]
    assert question.target == 0 and question.lengths == (20, 20)
    assert question.readable == (f"Ann{rest}", f"Bea{rest}")
    assert question.longest == question.pairs[0]


def test_in_a_chat_template_each_context_is_rendered() -> None:
    chat = Chat(lambda system, user: f"<{user}>")
    (question,) = _questions([_blank()], chat=chat)
    assert question.pairs == [
        ("<Ann paid Bea, so Ann>", "had less_money."),
        ("<Ann paid Bea, so Bea>", "had less_money."),
    ]


def test_options_of_one_sentence_are_different_questions() -> None:
    other = {**_blank(), "option1": "Eve"}
    first, second = _questions([_blank(), other])
    assert question_key(first) != question_key(second)
    (row,) = training_rows(find_task("winogrande"), TaskRows([_blank()], [], "", ""), 0, None)
    assert row["prompt"] + row["completion"] == "Ann paid Bea, so Ann had less_money."
    assert row["answer"] == "had less_money."
