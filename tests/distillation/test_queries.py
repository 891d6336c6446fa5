"""Rows become questions to teachers, and answers become rows of the same form."""

from __future__ import annotations

from typing import Any

import pytest

from mlx_slim.config.distill import QueryConfig
from mlx_slim.config.expressions import compile_text
from mlx_slim.config.schema import DataConfig, SourceConfig
from mlx_slim.data.ledger import SourceLedger
from mlx_slim.data.sources import RawRow
from mlx_slim.distillation.queries import TeacherQuery, prefix_of, read_queries
from mlx_slim.errors import SlimError

DATA = DataConfig()


def queries(*rows: Any, system: str | None = None, data: DataConfig = DATA) -> list[TeacherQuery]:
    raws = [RawRow("a.jsonl", number, row, "line") for number, row in enumerate(rows, 1)]
    ledger = SourceLedger("a.jsonl", "file", 1.0, [])
    return list(read_queries(raws, 0, SourceConfig(path="x", system=system), data, ledger))


QUESTION = {"id": "q/7", "prompt": "Water is", "completion": " wet", "choices": ["wet", "dry"]}
CHAT = {
    "messages": [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "1"},
        {"role": "user", "content": "Two?"},
        {"role": "assistant", "content": "2"},
    ]
}
ALPACA = {"instruction": "Add.", "input": "1 1", "output": "2", "text": "ignored"}


def test_the_default_request_shows_options_and_the_right_answer() -> None:
    (query,) = queries(QUESTION)
    request = query.rationale(compile_text(QueryConfig().prompt))
    assert request.id == "q/7"
    assert request.messages == [
        {
            "role": "user",
            "content": "Water is\nOptions:\n- wet\n- dry\nCorrect answer: wet\n\n"
            "Explain in two or three sentences why this answer is correct.",
        }
    ]
    (plain,) = queries({"prompt": "Water is", "completion": " wet"})
    assert (
        "Options" not in plain.rationale(compile_text(QueryConfig().prompt)).messages[0]["content"]
    )
    assert plain.id == "a.jsonl:1"


def test_a_field_that_a_row_lacks_is_named() -> None:
    (query,) = queries({"prompt": "Water is", "completion": " wet"})
    with pytest.raises(SlimError, match=r"a\.jsonl, line 1.*'choices' is undefined") as caught:
        query.rationale(compile_text("{{ choices | join(', ') }}"))
    assert "answer, prompt, completion" in caught.value.hint


def test_sequence_asks_what_the_data_ask() -> None:
    chat, alpaca, plain = queries(CHAT, ALPACA, {"prompt": "Water is", "completion": " wet"})
    assert [m["content"] for m in chat.sequence().messages] == ["Be short.", "One?", "1", "Two?"]
    assert alpaca.sequence().messages == [{"role": "user", "content": "Add.\n1 1"}]
    (told,) = queries({"prompt": "Water is", "completion": " wet"}, system="S")
    assert [m["role"] for m in told.sequence().messages] == ["system", "user"]
    assert plain.sequence().answer == " wet"


def test_answers_become_rows_of_the_same_form() -> None:
    chat, alpaca, plain = queries(CHAT, ALPACA, QUESTION)
    assert plain.row() == {"id": "q/7", "prompt": "Water is", "completion": " wet"}
    assert plain.row("dry \n", "[why] ") == {
        "id": "q/7", "prompt": "[why] Water is", "completion": " dry",
    }  # fmt: skip
    assert alpaca.row("two", "[why] ") == {
        "id": "a.jsonl:2", "instruction": "[why] Add.", "input": "1 1", "output": "two",
    }  # fmt: skip
    row = chat.row("two", "[why] ")
    assert [m["content"] for m in row["messages"]] == [
        "Be short.",
        "One?",
        "1",
        "[why] Two?",
        "two",
    ]
    assert chat.row()["messages"] == CHAT["messages"]  # and the example was not changed


def test_plain_text_has_no_question_and_stays() -> None:
    (text,) = queries({"text": "Once upon a time."})
    assert not text.asks
    assert text.row() == {"text": "Once upon a time."}


def test_prefixes_tell_teachers_apart() -> None:
    assert [prefix_of(None, n)({}) for n in (1, 2)] == ["[rationale 1] ", "[rationale 2] "]
    assert prefix_of("{{ choices[0] }}? ", 1)({"choices": ["wet"]}) == "wet? "


def test_weights_of_turns_stay_with_the_row() -> None:
    """Rows that teachers wrote go through the student's template like any others."""
    turns: list[dict[str, Any]] = [dict(turn) for turn in CHAT["messages"]]
    turns[2]["train"], turns[4]["weight"] = False, 0.5
    (query,) = queries({"messages": turns})
    assert all("weight" not in message for message in query.sequence().messages)
    messages = query.row("zwei")["messages"]
    assert [message.get("weight") for message in messages] == [None, None, 0, None, 0.5]
    assert [message["content"] for message in messages][-1] == "zwei"
    (again,) = queries(query.row())
    assert again.example.turn_weights == query.example.turn_weights
    (listed,) = queries({"prompt": turns[1:4], "completion": [CHAT["messages"][4]]})
    (again,) = queries(listed.row())
    assert again.example.turn_weights == [0, 0, 0, 1]
