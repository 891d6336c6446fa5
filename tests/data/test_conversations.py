"""Rows of every dialect of conversations: turns, tools, calls, weights; and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mlx_slim.data.formats import Dropped, Example, read_example
from mlx_slim.data.sources import RawRow
from mlx_slim.errors import SlimError
from tests.data.conftest import learned, load_bytes
from tests.support.chat_templates import TEMPLATES

SCHEMA: dict[str, Any] = {
    "name": "look",
    "description": "looks",
    "parameters": {"type": "object", "properties": {"at": {"type": "string"}, "n": {}}},
}
TOOL = {"type": "function", "function": SCHEMA}
USER = {"role": "user", "content": "Look."}
DONE = {"role": "assistant", "content": "Dry."}


def read(value: dict[str, Any], where: str = "rows.jsonl", **settings: Any) -> Example:
    options = {"columns": {}, "system": None, **settings}
    return read_example(RawRow(where, 1, value), "auto", **options)


def call(arguments: Any) -> dict[str, Any]:
    function = {"name": "look", "arguments": arguments}
    calls = [{"id": "1", "type": "function", "function": function}]
    return {"role": "assistant", "content": None, "tool_calls": calls}


def arguments_of(example: Example) -> Any:
    (message,) = [m for m in example.messages if "tool_calls" in m]
    return message["tool_calls"][0]["function"]["arguments"]


@pytest.mark.parametrize(
    "columns",
    [
        {"tools": [TOOL]},
        {"tools": TOOL},
        {"tools": json.dumps([TOOL])},
        {"tools": json.dumps(TOOL)},
        {"tools": [json.dumps(TOOL)]},
        {"tools": [SCHEMA]},
        {"tools": json.dumps([SCHEMA])},
        {"functions": [SCHEMA]},
        {"functions": [TOOL]},
        {"functions": json.dumps([SCHEMA])},
    ],
)
def test_tools_are_a_list_of_schemas(columns: dict[str, Any]) -> None:
    assert read({"messages": [USER, DONE], **columns}).extras == {"tools": [TOOL]}


@pytest.mark.parametrize("inputs", ["", "[]", [], "null"])
def test_no_tools_are_none(inputs: Any) -> None:
    assert read({"messages": [USER, DONE], "tools": inputs}).extras == {}


@pytest.mark.parametrize(
    "inputs",
    [{"at": "Ulm", "n": 3}, '{"at": "Ulm", "n": 3}', '"{\\"at\\": \\"Ulm\\", \\"n\\": 3}"'],
)
def test_arguments_are_an_object(inputs: dict[str, Any] | str) -> None:
    assert arguments_of(read({"messages": [USER, call(inputs), DONE]})) == {"at": "Ulm", "n": 3}


@pytest.mark.parametrize("inputs", ["", "{}", {}, None])
def test_no_arguments_are_an_empty_object(inputs: dict[str, Any] | str | None) -> None:
    assert arguments_of(read({"messages": [USER, call(inputs), DONE]})) == {}


@pytest.mark.parametrize(
    "turn",
    [
        {"from": "function_call", "value": '{"name": "look", "arguments": {"at": "Ulm"}}'},
        {
            "from": "function_call",
            "value": '{"name": "look", "arguments": "{\\"at\\": \\"Ulm\\"}"}',
        },
        {"from": "function_call", "value": '[{"name": "look", "arguments": {"at": "Ulm"}}]'},
        {"role": "function_call", "content": '{"name": "look", "parameters": {"at": "Ulm"}}'},
        {"role": "assistant", "function_call": {"name": "look", "arguments": '{"at": "Ulm"}'}},
        {"role": "assistant", "tool_calls": '[{"name": "look", "arguments": {"at": "Ulm"}}]'},
        {"role": "model", "tool_calls": [{"name": "look", "arguments": {"at": "Ulm"}}]},
    ],
)
def test_calls_of_every_dialect(turn: dict[str, Any]) -> None:
    messages = read({"messages": [USER, turn, DONE]}).messages
    function = {"name": "look", "arguments": {"at": "Ulm"}}
    assert messages[1] == {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": function}],
    }


def test_roles_of_sharegpt() -> None:
    turns = [
        *({"from": "system", "value": "s"}, {"from": "human", "value": "h"}),
        *({"from": "model", "value": "m"}, {"from": "observation", "value": "o"}),
        *({"from": "tool", "value": "t"}, {"from": "gpt", "value": "g"}),
    ]
    example = read({"conversations": turns})
    roles = ["system", "user", "assistant", "tool", "tool", "assistant"]
    assert [m["role"] for m in example.messages] == roles
    assert [m["content"] for m in example.messages] == list("shmotg")
    assert example.turn_weights == [0, 0, 1, 0, 0, 1]


def test_what_a_tool_gave_may_be_an_object() -> None:
    result = {"role": "function", "name": "look", "content": {"rain": False, "wo": "Köln"}}
    message = read({"messages": [USER, call({}), result, DONE]}).messages[2]
    assert message == {"role": "tool", "name": "look", "content": '{"rain": false, "wo": "Köln"}'}


def test_lists_of_messages_as_prompt_and_completion() -> None:
    earlier = [USER, {"role": "assistant", "content": "Where?"}, {"role": "user", "content": "Ulm"}]
    example = read({"prompt": earlier, "completion": [DONE], "tools": [TOOL]})
    assert example.kind == "chat"
    assert example.messages == [*earlier, DONE]
    assert example.turn_weights == [0, 0, 0, 1]  # an answer in the prompt is not learned
    assert example.extras == {"tools": [TOOL]}
    assert read({"prompt": [USER], "completion": "Dry."}).messages == [USER, DONE]
    assert read({"prompt": "Look.", "completion": [DONE]}).messages == [USER, DONE]
    assert read({"messages": json.dumps([USER, DONE])}).messages == [USER, DONE]


# ------------------------------------------------------------------------------- padding


PADDED = {"type": "function", "function": {"name": "look", "strict": None, "parameters": {
    "type": "object", "properties": {"at": {"type": "string", "enum": ["a", None]}, "zone": None,
                                     "n": {"default": None}}}}}  # fmt: skip


@pytest.mark.parametrize("where", ["rows.parquet", "data-0.arrow", "owner/name"])
def test_nulls_that_a_table_pads_with_are_removed(where: str) -> None:
    inputs = {"at": "Ulm", "n": None, "deep": {"a": None, "b": [None, {"c": None}]}}
    example = read({"messages": [USER, call(inputs), DONE], "tools": [PADDED]}, where)
    assert arguments_of(example) == {"at": "Ulm", "deep": {"b": [None, {}]}}
    parameters = example.extras["tools"][0]["function"]["parameters"]
    assert parameters["properties"] == {"at": {"type": "string", "enum": ["a", None]}, "n": {}}
    assert "strict" not in example.extras["tools"][0]["function"]


def test_nulls_that_someone_wrote_are_kept() -> None:
    inputs = {"at": "Ulm", "n": None, "zone": None}
    text = json.dumps(inputs)
    for where in ("rows.parquet", "rows.jsonl", "rows.json", "rows.jsonl.gz"):
        assert arguments_of(read({"messages": [USER, call(text), DONE]}, where)) == inputs
    assert arguments_of(read({"messages": [USER, call(inputs), DONE]})) == inputs
    # No tool has a parameter of that name: another row of the table, exported as JSON, does.
    example = read({"messages": [USER, call(inputs), DONE], "tools": [TOOL]})
    assert arguments_of(example) == {"at": "Ulm", "n": None}
    schemas = read({"messages": [USER, DONE], "tools": [PADDED]}).extras["tools"]
    properties = schemas[0]["function"]["parameters"]["properties"]
    assert properties == {"at": {"type": "string", "enum": ["a", None]}, "n": {"default": None}}
    schemas = read({"messages": [USER, DONE], "tools": json.dumps([PADDED])}, "rows.parquet")
    assert schemas.extras["tools"] == [PADDED]


def test_a_parquet_file_of_two_tools(make: Any, tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow.parquet")
    import pyarrow as pa

    rows = [
        {"messages": [USER, {**call({"at": "Ulm"}), "content": ""}], "tools": [TOOL]},
        {"messages": [USER, {**call({"zone": "Rome"}), "content": ""}], "tools": [
            {"type": "function", "function": {"name": "clock", "parameters": {
                "type": "object", "properties": {"zone": {"type": "string"}}}}}]},
    ]  # fmt: skip
    path = tmp_path / "rows.parquet"
    # An empty schema cannot be written as a table.
    rows[0] = json.loads(json.dumps(rows[0]).replace(', "n": {}', ""))
    pyarrow.write_table(pa.Table.from_pylist(rows), path)
    tokenizer = load_bytes(tmp_path / "t", chat_template=TEMPLATES["tools"])
    prepared = make(path, tokenizer=tokenizer)
    for number, arguments in enumerate(('{"at": "Ulm"}', '{"zone": "Rome"}')):
        text, answer = learned(prepared, tokenizer, number)
        assert "null" not in text
        assert f'"arguments": {arguments}}}' in answer


# ------------------------------------------------------------------------------- weights


def weighted(*answers: dict[str, Any]) -> dict[str, Any]:
    turns = []
    for number, answer in enumerate(answers):
        turns += [USER, {"role": "assistant", "content": f"answer {number}", **answer}]
    return {"messages": turns}


@pytest.mark.parametrize(
    ("keys", "weight"),
    [
        ({}, 1),
        ({"weight": 0}, 0),
        ({"weight": 0.25}, 0.25),
        ({"weight": 3}, 3),
        ({"weight": None}, 1),
        ({"weight": True}, 1),
        ({"train": False}, 0),
        ({"train": True}, 1),
        ({"training": False}, 0),
        ({"loss": False}, 0),
        ({"loss": 0.7}, 1),  # a loss that someone measured
        ({"train": True, "weight": 0.5}, 0.5),
        ({"train": False, "weight": 1}, 0),
        ({"masked": True}, 0),
        ({"masked": 0, "mask": None}, 1),
    ],
)
def test_weights_of_turns(keys: dict[str, Any], weight: float) -> None:
    example = read(weighted(keys, {}))
    assert example.turn_weights == [0, weight, 0, 1]
    assert not {"weight", "train", "training", "loss"} & example.messages[1].keys()


def test_only_the_last_answer_is_learned() -> None:
    assert read(weighted({}, {}, {}), learn="last").turn_weights == [0, 0, 0, 0, 0, 1]
    assert read(weighted({}, {"weight": 0.5}), learn="last").turn_weights == [0, 0, 0, 0.5]
    row = {"instruction": "a", "output": "b", "history": [["c", "d"]]}
    assert read(row).turn_weights == [0, 1, 0, 1]
    assert read(row, learn="last").turn_weights == [0, 0, 0, 1]
    assert read({"prompt": "a", "completion": "b"}, learn="last").turn_weights == [0, 1]


def test_rows_without_an_answer_to_learn_are_dropped() -> None:
    with pytest.raises(Dropped, match="weight 0"):
        read(weighted({"weight": 0}, {"train": False}))
    with pytest.raises(Dropped, match="weight 0"):
        read(weighted({}, {"weight": 0}), learn="last")
    with pytest.raises(Dropped, match="empty answer"):
        read(weighted({"content": ""}, {}))
    assert read(weighted({"content": "", "weight": 0}, {})).turn_weights == [0, 0, 0, 1]


def test_a_turn_that_asks_to_be_learned_and_is_no_answer_is_noted() -> None:
    example = read({"messages": [{**USER, "train": True}, DONE]})
    assert example.turn_weights == [0, 1]
    assert example.notes == ("turns marked to be learned that are no assistant's (not learned)",)
    assert not read({"messages": [{**USER, "weight": 1}, DONE]}).notes


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (weighted({"weight": -1}), "turn 2: weight is -1, expected a number from 0"),
        (weighted({"weight": "1"}), "turn 2: weight is '1'"),
        (weighted({"masked": "yes"}), "turn 2: masked is 'yes', expected true or false"),
        (weighted({"mask": True}), "turn 2: mask is True, which has opposite meanings"),
        (weighted({}, {"mask": 0}), "turn 4: mask is 0, which has opposite meanings"),
        (weighted({"weight": float("nan")}), "turn 2: weight is nan"),
        (weighted({"weight": 1e9}), "turn 2: weight is 1000000000.0"),
        (weighted({"train": "no"}), "turn 2: train is 'no', expected true or false"),
        ({"messages": [USER, DONE], "tools": "hammer"}, "tools: 'hammer', expected JSON"),
        ({"messages": [USER, DONE], "tools": [3]}, "'3' is not a tool"),
        ({"messages": [USER, call("{at: Ulm}"), DONE]}, "turn 2: arguments of 'look' is not JSON"),
        ({"messages": [USER, call("[1]"), DONE]}, "turn 2: arguments of 'look' are list"),
        ({"messages": [USER, call("9" * 5000), DONE]}, "turn 2: arguments of 'look' is not JSON"),
        ({"messages": [USER, {**DONE, "tool_calls": [3]}]}, "turn 2: a tool call is"),
        ({"messages": [USER, {**DONE, "tool_calls": [{"id": "1"}]}]}, "turn 2: a tool call is"),
        ({"conversations": [{"from": "function_call", "value": "look"}]}, "turn 1: the call is no"),
        ({"conversations": [{"from": "narrator", "value": "a"}]}, "turn 1: role 'narrator'"),
        ({"messages": "[{"}, "the list of turns: '\\[{', expected JSON"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_one_line(value: Any, message: str) -> None:
    with pytest.raises(SlimError, match=f"rows.jsonl, line 1.*{message}") as error:
        read_example(RawRow("rows.jsonl", 1, value, "line"), "auto", columns={}, system=None)
    assert "\n" not in str(error.value)


def test_tools_that_are_quoted_twice_or_flat_are_read_and_what_is_no_schema_is_refused() -> None:
    inputs = json.dumps(json.dumps([TOOL]))
    assert read({"messages": [USER, DONE], "tools": inputs}).extras == {"tools": [TOOL]}
    flat = {"type": "function", **SCHEMA}
    assert read({"messages": [USER, DONE], "tools": [flat]}).extras == {"tools": [TOOL]}
    for wrong in ({"look": SCHEMA}, [{"function": "look"}], [{"type": "function"}], '{"look": 1}'):
        with pytest.raises(SlimError, match=r"row 1: .* is not a tool"):
            read({"messages": [USER, DONE], "tools": wrong})


@pytest.mark.parametrize("name", ["train_on_turn", "trainable", "loss"])
@pytest.mark.parametrize("flag", [False, 0])
def test_flags_of_a_turn_by_other_names(name: str, flag: int | bool) -> None:
    turns = [USER, {**DONE, name: flag}, USER, DONE]
    assert read({"messages": turns}).turn_weights == [0.0, 0.0, 0.0, 1.0]


def test_lists_of_turns_that_a_table_holds_as_json_text_are_turns() -> None:
    prompt, completion = json.dumps([USER]), json.dumps([DONE])
    for row in (
        {"prompt": prompt, "completion": completion},
        {"prompt": prompt, "completion": "Dry."},
    ):
        example = read(row, "rows.csv")
        assert [m["content"] for m in example.messages] == ["Look.", "Dry."]
        assert example.kind == "chat"
    for text in ("[1, 2]", "[]", '[{"a": 1}]', "[not JSON"):
        assert read({"prompt": text, "completion": "x"}).fields["prompt"] == text
