"""Columns with other names: read where they say what answers, else the hint's option works."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest

from mlx_slim.config.load import load_recipe
from mlx_slim.data.columns import recognised
from mlx_slim.data.formats import Dropped, read_example
from mlx_slim.data.prepare import prepare
from mlx_slim.data.sources import RawRow
from mlx_slim.errors import SlimError
from tests.data.conftest import learned

DOLLY = {"instruction": "When?", "context": "It was 1912.", "response": "In 1912.", "category": "q"}


@pytest.mark.parametrize(
    "row",
    [
        DOLLY,
        {
            "category": "q",
            "response": "In 1912.",
            "context": "It was 1912.",
            "instruction": "When?",
        },
        {"question": "When?", "context": "It was 1912.", "answer": "In 1912."},
        {"query": "When?", "context": "It was 1912.", "response": "In 1912.", "id": 7},
        {"instruction": "When?", "input": "It was 1912.", "response": "In 1912."},
        {"question": "When?\nIt was 1912.", "answer": "In 1912."},
        {"input": "When?\nIt was 1912.", "output": "In 1912."},
        {"query": "When?\nIt was 1912.", "response": "In 1912."},
        {"prompt": "When?\nIt was 1912.", "response": "In 1912.", "context": None},
    ],
)
def test_the_answer_is_learned(make: Any, tokens: Any, row: Any) -> None:
    text, answer = learned(make([row]), tokens)
    assert "<|im_start|>user\nWhen?\nIt was 1912.<|im_end|>" in text
    assert answer == "In 1912.<|im_end|>\n"


def test_a_context_stands_where_alpaca_has_its_input(make: Any, tokens: Any) -> None:
    text, _ = learned(make([DOLLY], template="alpaca"), tokens)
    assert "### Instruction:\nWhen?\n\n### Input:\nIt was 1912.\n\n### Response:" in text


def test_a_row_without_its_answer_is_dropped_and_a_system_prompt_is_one(
    make: Any, tokens: Any
) -> None:
    rows = [{**DOLLY, "response": None}, {**DOLLY, "response": ""}]
    rows += [{"system_prompt": "Be short.", "question": "Hi?", "response": "Yes."}]
    prepared = make(rows)
    dropped = prepared.ledger["sources"][0]["rows_dropped"]
    assert dropped["empty answer"]["count"] == 2
    assert learned(prepared, tokens)[0].startswith("<|im_start|>system\nBe short.")


def test_names_that_were_read_stay_what_they_were() -> None:
    columns = recognised(["instruction", "input", "response"])
    assert columns is not None and columns["input"] == "input"
    for names in (
        ["question", "choices", "answer"],
        ["question", "answer", "response"],
        ["question", "query", "answer"],
        ["input", "context", "instruction", "answer"],
        ["prompt", "chosen", "rejected"],
        ["question", "score"],
    ):
        assert recognised(names) is None, names


@pytest.mark.parametrize(
    ("row", "answer"),
    [
        ({"Question": "Why?", "Final Answer": "So.", "final_answer": "So."}, "So."),
        ({"id": 3, "article": "Long.", "highlights": "Short.", "source": "news"}, "Short."),
        ({"a: b": "Why?", "it's": "So."}, "So."),
        ({"prompt": "Why?", "chosen": "So.", "rejected": "No."}, "So."),
        ({"question": "Why?", "context": "It.", "answer": "So.", "response": "Well."}, "Well."),
        ({"label": "So.", "sentence": "Why?"}, "So."),
        (
            {"dialog": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]},
            "!",
        ),
        ({"body": "So.", "n": 3}, "o."),
    ],
)
def test_the_hinted_option_works(
    make: Any, tokens: Any, row: dict[str, Any], answer: str, tmp_path: Path
) -> None:
    with pytest.raises(SlimError, match="columns seen") as error:
        make([row])
    assert _learned_as_typed(error.value.hint, tokens, tmp_path).startswith(answer)


def _learned_as_typed(hint: str, tokens: Any, folder: Any) -> str:
    """Add the option of a hint to a shipped recipe; return what the first row teaches."""
    overrides = [f"data.path={folder / 'rows.jsonl'}", "data.template=auto", "data.validation=0"]
    recipe = load_recipe("smollm2-lora", [*overrides, shlex.split(hint)[-1]]).recipe
    prepared = prepare(recipe.data, tokens, max_length=512, seed=0, folder=folder / "again")
    return learned(prepared, tokens)[1]


@pytest.mark.parametrize(
    ("row", "format"),
    [
        (DOLLY, "alpaca"),
        (
            {
                "messages": [
                    {"role": "user", "content": "?"},
                    {"role": "assistant", "content": "In 1912."},
                ]
            },
            "alpaca",
        ),
        ({"question": "When?", "solution": "In 1912."}, "completions"),
        ({"question": "When?", "solution": "In 1912."}, "alpaca"),
    ],
)
def test_the_hint_of_a_row_in_another_format_works(
    make: Any, tokens: Any, row: Any, format: str, tmp_path: Path
) -> None:
    with pytest.raises(SlimError, match="columns seen") as error:
        make([row], format=format)
    assert _learned_as_typed(error.value.hint, tokens, tmp_path) == "In 1912.<|im_end|>\n"


def test_no_option_is_proposed_where_columns_do_not_say_it(make: Any) -> None:
    for row in (
        {"question": "a", "choices": ["b"], "answer": "b"},
        {"x": 1},
        {"a": "", "b": "", "c": ""},
    ):
        with pytest.raises(SlimError, match="columns seen") as error:
            make([row])
        assert "data.columns={prompt: QUESTION, completion: ANSWER}" in error.value.hint


@pytest.mark.parametrize("history", ["x", [["a"]], [["a", 3]], [3]])
def test_a_history_is_pairs(make: Any, history: Any) -> None:
    with pytest.raises(SlimError, match="'history' holds"):
        make([{"instruction": "a", "output": "b", "history": history}])


def read(value: Any, **settings: Any) -> Any:
    options = {"columns": {}, "system": None, **settings}
    return read_example(RawRow("rows.jsonl", 1, value), settings.pop("format", "auto"), **options)


def test_a_passage_beside_question_and_answer_is_neither_learned_alone_nor_left_out() -> None:
    row = {"question": "When?", "answer": "In 1912."}
    with pytest.raises(SlimError, match="has both 'text' and question, answer") as refused:
        read({**row, "text": "The ship was built in 1912."})
    assert "data.columns={prompt: question, completion: answer}" in refused.value.hint
    renamed = read({**row, "text": "x"}, columns={"prompt": "question", "completion": "answer"})
    assert renamed.fields["completion"] == "In 1912."
    # The text that was made of both, as the hub's Alpaca has it.
    assert read({**row, "text": "Q: When?\nA: In 1912."}).fields["completion"] == "In 1912."
    for name in ("contexts", "passages", "story", "evidence"):
        with pytest.raises(SlimError, match="the whole question in one"):
            read({**row, name: ["The ship was built in 1912."]})


def test_pairs_of_answers_are_read_as_the_chosen_one_where_the_hint_is_followed() -> None:
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes."}]
    with pytest.raises(SlimError) as refused:
        read({"prompt": "Hi", "chosen": turns, "rejected": turns})
    assert refused.value.hint == (
        "compare the answers with preference.loss=sigmoid (DPO), or name the columns: "
        "'data.columns={messages: chosen}'"
    )
    with pytest.raises(SlimError) as refused:
        read({"prompt": "Hi", "answers": ["Yes."]})  # a question alone is not text to learn
    assert "text:" not in refused.value.hint


def test_a_value_of_another_type_is_named_as_the_row_names_it() -> None:
    with pytest.raises(SlimError, match="'answer' is int 4, expected a string"):
        read({"question": "2+2?", "answer": 4})
    with pytest.raises(SlimError, match="'sum' is int 4"):
        read({"q": "2+2?", "sum": 4}, columns={"prompt": "q", "completion": "sum"})


def test_what_was_asked_about_is_not_proposed_as_the_answer() -> None:
    squad = {"question": "When?", "context": "In 1912.", "answers": {"text": ["1912"]}}
    with pytest.raises(SlimError, match="the whole question in one"):
        read(squad)


def test_the_way_out_fits_why_no_row_can_be_used(make: Any) -> None:
    turns = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "No.", "weight": 0},
    ]
    with pytest.raises(SlimError, match="no answer to learn: weight 0") as refused:
        make([{"messages": turns}])
    assert refused.value.hint == "see them with: mlx-slim data preview"


@pytest.mark.parametrize(
    ("beside", "name"),
    [
        ({"label": 0}, "label"),  # imdb
        ({"label": "positive"}, "label"),
        ({"title": "An act", "summary": "It amends."}, "summary"),  # billsum
        ({"Target": True, "id": 7}, "Target"),
    ],
)
def test_a_text_beside_its_label_is_not_trained_on_alone(beside: dict[str, Any], name: str) -> None:
    row = RawRow("rows.jsonl", 1, {"text": "Too slow.", **beside})
    with pytest.raises(SlimError, match=f"has both 'text' and {name}") as refused:
        read_example(row, "auto", columns={}, system=None)
    assert f"data.columns={{prompt: text, completion: {name}}}" in refused.value.hint
    example = read_example(row, "text", columns={}, system=None)
    assert example.kind == "text" and example.fields == {"text": "Too slow."}


@pytest.mark.parametrize(
    "beside",
    [{"label": "slow"}, {"label": None}, {"source": "web"}, {"answers": ["a"]}, {"meta": {"a": 1}}],
)
def test_a_text_that_holds_its_answer_or_has_none_is_a_text(beside: dict[str, Any]) -> None:
    row = RawRow("rows.jsonl", 1, {"text": "Too slow.", **beside})
    assert read_example(row, "auto", columns={}, system=None).kind == "text"


@pytest.mark.parametrize("names", [("prompt", "completion"), ("instruction", "output")])
def test_an_answer_that_is_not_wanted_is_dropped(names: tuple[str, str]) -> None:
    """TRL's unpaired preferences: training on a rejected answer would teach it."""
    row = dict.fromkeys(names, "text")
    for label in (True, None, 0, "false"):
        read_example(RawRow("f", 1, {**row, "label": label}), "auto", columns={}, system=None)
    with pytest.raises(Dropped, match="label false"):
        read_example(RawRow("f", 1, {**row, "label": False}), "auto", columns={}, system=None)
