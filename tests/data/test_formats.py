"""Rows of every format, under every template: what is learned, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlx_slim.errors import SlimError
from mlx_slim.models.gguf.file import read_gguf
from mlx_slim.models.gguf.tokenizer import build_tokenizer
from tests.data.conftest import learned, load_bytes
from tests.support.tiny import CHATML

ALPACA = {"instruction": "Add.", "input": "1 + 1", "output": "2"}
CHAT = {
    "messages": [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "Bye"},
        {"role": "assistant", "content": "Ciao"},
    ]
}
SHAREGPT = {
    "conversations": [
        {"from": "system", "value": "Be short."},
        {"from": "human", "value": "Hi"},
        {"from": "gpt", "value": "Hello"},
        {"from": "human", "value": "Bye"},
        {"from": "gpt", "value": "Ciao"},
    ]
}
CHAT_TEXT = (
    "<|im_start|>system\nBe short.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
    "<|im_start|>assistant\nHello<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n"
    "<|im_start|>assistant\nCiao<|im_end|>\n"
)


@pytest.mark.parametrize("row", [CHAT, SHAREGPT])
def test_every_assistant_turn_is_supervised(make: Any, tokens: Any, row: Any) -> None:
    text, answers = learned(make([row]), tokens)
    assert text == CHAT_TEXT
    assert answers == "Hello<|im_end|>\nCiao<|im_end|>\n"


def test_ids_are_the_plain_tokenization_of_the_text(make: Any, tokens: Any) -> None:
    prepared = make([ALPACA, CHAT, {"prompt": "Größe 😀?", "completion": " naïve 日本"}])
    for number in range(3):
        ids, supervised = prepared.train.row(number)
        assert ids.tolist() == tokens(tokens.decode(ids), add_special_tokens=False).input_ids
        assert not supervised[0]
    assert learned(prepared, tokens, 2)[1] == " naïve 日本<|im_end|>\n"


def test_generation_marks_of_the_template_are_used(make: Any, tmp_path: Path) -> None:
    marked = CHATML.replace(
        "{{ message['content'] }}<|im_end|>\n",
        "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}"
        "{% endgeneration %}{% else %}{{ message['content'] }}{% endif %}<|im_end|>\n",
    )
    assert "endgeneration" in marked
    tokenizer = load_bytes(tmp_path / "marked", chat_template=marked)
    text, answers = learned(make([CHAT], tokenizer=tokenizer), tokenizer)
    assert text == CHAT_TEXT
    assert answers == "Hello<|im_end|>\nCiao<|im_end|>\n"  # what closes the turn is learned too


def test_a_template_that_rewrites_earlier_turns(make: Any, tmp_path: Path) -> None:
    """The last answer gets an empty thought, earlier ones lose it: ends are found by EOS."""
    thinking = CHATML.replace(
        "{{ message['content'] }}<|im_end|>",
        "{% if loop.last and message['role'] == 'assistant' %}<think></think>{% endif %}"
        "{{ message['content'] }}<|im_end|>",
    )
    tokenizer = load_bytes(tmp_path / "thinking", chat_template=thinking)
    _, answers = learned(make([CHAT], tokenizer=tokenizer), tokenizer)
    assert answers == "Hello<|im_end|>\n<think></think>Ciao<|im_end|>\n"


def test_a_template_that_hides_its_prompt_is_refused(make: Any, tmp_path: Path) -> None:
    template = "{{ messages|length }}{% for m in messages %}{{ m.content|length }}{{ m.content }}"
    template += "|{% endfor %}"
    tokenizer = load_bytes(tmp_path / "hides", chat_template=template)
    with pytest.raises(SlimError, match=r"rows.jsonl, line 1: the chat template changes") as error:
        make([CHAT], tokenizer=tokenizer)
    assert "chatml" in error.value.hint


def test_a_template_that_refuses_the_row(make: Any, tmp_path: Path) -> None:
    template = "{{ raise_exception('roles must alternate') }}"
    tokenizer = load_bytes(tmp_path / "refuses", chat_template=template)
    with pytest.raises(SlimError, match=r"rows.jsonl, line 1: .*roles must alternate"):
        make([CHAT], tokenizer=tokenizer)


def test_alpaca_prompt_is_stanfords(make: Any, base_tokens: Any) -> None:
    prepared = make([ALPACA, {**ALPACA, "input": ""}], tokenizer=base_tokens)
    text, answer = learned(prepared, base_tokens)
    assert text == (
        "<|im_start|>Below is an instruction that describes a task, paired with an input that "
        "provides further context. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd.\n\n### Input:\n1 + 1\n\n### Response:\n2<|endoftext|>"
    )
    assert answer == "2<|endoftext|>"
    assert learned(prepared, base_tokens, 1)[0] == (
        "<|im_start|>Below is an instruction that describes a task. Write a response that "
        "appropriately completes the request.\n\n### Instruction:\nAdd.\n\n### Response:\n"
        "2<|endoftext|>"
    )


@pytest.mark.parametrize(
    ("row", "template", "text", "answer"),
    [
        (CHAT, "auto", CHAT_TEXT, "Hello<|im_end|>\nCiao<|im_end|>\n"),
        (CHAT, "plain", "Be short.\n\nHi\nHello<|endoftext|>\nBye\nCiao", "Hello<|endoftext|>Ciao"),
        (ALPACA, "plain", "Add.\n1 + 1\n2", "2"),
        ({"prompt": "Q: a A:", "completion": " b"}, "auto", "Q: a A: b", " b"),
        ({"text": "Once upon"}, "auto", "Once upon", "Once upon"),
        ({"text": "Once upon"}, "alpaca", "Once upon", "Once upon"),
    ],
)
def test_a_base_model_trains(
    make: Any, base_tokens: Any, row: Any, template: str, text: Any, answer: str
) -> None:
    whole, supervised = learned(make([row], tokenizer=base_tokens, template=template), base_tokens)
    bos = "" if text.startswith("<|im_start|>") else "<|im_start|>"
    assert whole == f"{bos}{text}<|endoftext|>"  # BOS once, EOS once
    assert supervised == f"{answer}<|endoftext|>"


def test_alpaca_template_with_many_turns(make: Any, base_tokens: Any) -> None:
    text, answers = learned(make([CHAT], tokenizer=base_tokens, template="alpaca"), base_tokens)
    assert text.count("### Instruction:") == text.count("### Response:") == 2
    assert answers == "Hello<|endoftext|>Ciao<|endoftext|>"


def test_without_masking_every_token_but_the_first_is_supervised(make: Any) -> None:
    _, supervised = make([CHAT], mask_prompt=False).train.row(0)
    assert not supervised[0]
    assert supervised[1:].all()


def test_system_message_where_the_row_has_none(make: Any, tokens: Any) -> None:
    prepared = make([ALPACA, CHAT], system="Be kind.")
    assert learned(prepared, tokens)[0].startswith("<|im_start|>system\nBe kind.<|im_end|>")
    assert "Be kind" not in learned(prepared, tokens, 1)[0]


def test_formats_are_decided_per_row(make: Any) -> None:
    rows = [ALPACA, CHAT, {"prompt": "a", "completion": "b"}, {"text": "c"}]
    assert make(rows).ledger["sources"][0]["formats"] == {
        **{"alpaca": 1, "chat": 1},
        **{"completions": 1, "text": 1},
    }


def test_columns_are_renamed(make: Any, tokens: Any) -> None:
    rows = [{"question": "a", "answer": "b"}]
    prepared = make(rows, columns={"prompt": "question", "completion": "answer"})
    assert learned(prepared, tokens)[1] == "b<|im_end|>\n"
    with pytest.raises(SlimError, match="promt") as error:
        make(rows, columns={"promt": "question"})
    assert "prompt" in error.value.hint


def test_columns_change_places(make: Any, tokens: Any) -> None:
    rows = [{"prompt": "b", "completion": "a"}]
    prepared = make(rows, columns={"prompt": "completion", "completion": "prompt"})
    assert learned(prepared, tokens)[1] == "b<|im_end|>\n"


def test_a_rename_that_no_row_has_is_refused(make: Any) -> None:
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d", "role": "x"}]
    make(rows, columns={"system": "role"})  # one row has it
    with pytest.raises(SlimError, match="no row has the column 'rolle'") as error:
        make(rows, columns={"system": "rolle"})
    assert error.value.hint == "did you mean 'role'?"
    with pytest.raises(SlimError, match="prompt and completion both map to 'prompt'"):
        make(rows, columns={"prompt": "prompt", "completion": "prompt"})


def test_jinja_file_over_fields_and_over_messages(
    make: Any, tmp_path: Path, base_tokens: Any
) -> None:
    fields = tmp_path / "fields.jinja"
    fields.write_text("Q: {{ instruction }} {{ input }}\nA: {{ output }}\n###")
    text, answer = learned(make([ALPACA], tokenizer=base_tokens, template=str(fields)), base_tokens)
    assert text == "<|im_start|>Q: Add. 1 + 1\nA: 2\n###<|endoftext|>"
    assert answer == "2\n###<|endoftext|>"
    loop = tmp_path / "loop.jinja"
    loop.write_text(
        "{% for m in messages %}[{{ m.role }}] {{ m.content }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant] {% endif %}"
    )
    text, answer = learned(make([CHAT], tokenizer=base_tokens, template=str(loop)), base_tokens)
    assert answer == "Hello<|endoftext|>Ciao<|endoftext|>"
    assert text.count("<|endoftext|>") == 5


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("a\n{% if %}", "t.jinja, line 2"),
        ("a\n{{ instructoin }}", "t.jinja, line 2: undefined variable 'instructoin'"),
        ("{% for m in messages %}{{ m.contents }}{% endfor %}", "contents"),
        ("nothing", "does not write the answer"),
    ],
)
def test_bad_jinja(make: Any, tmp_path: Path, source: str, message: str) -> None:
    path = tmp_path / "t.jinja"
    path.write_text(source)
    with pytest.raises(SlimError, match=message):
        make([ALPACA], template=str(path))


def test_jinja_is_sandboxed(make: Any, tmp_path: Path) -> None:
    path = tmp_path / "t.jinja"
    path.write_text("{{ output.__class__.__mro__ }}{{ output }}")
    with pytest.raises(SlimError):
        make([ALPACA], template=str(path))


def test_unknown_and_missing_templates(make: Any, base_tokens: Any) -> None:
    with pytest.raises(SlimError, match="chatmll") as error:
        make([ALPACA], template="chatmll")
    assert "chatml" in error.value.hint
    with pytest.raises(SlimError, match="no chat template"):
        make([ALPACA], tokenizer=base_tokens, template="model")


@pytest.mark.parametrize(
    ("row", "settings", "message"),
    [
        ({"question": "a", "score": "b"}, {}, "line 2: columns seen: question, score; expected"),
        ({"prompt": "a"}, {"format": "alpaca"}, "columns seen: prompt; expected: instruction"),
        ({"prompt": "a"}, {}, "columns seen: prompt; expected"),
        ({"instruction": "a"}, {}, "columns seen: instruction; expected"),
        ({"instruction": 3, "output": "b"}, {}, "'instruction' is int 3, expected a string"),
        ({"text": ["a"]}, {}, "'text' is list"),
        ({"messages": "a"}, {}, "turns is str"),
        ({"messages": [3]}, {}, "turn 1: int"),
        ({"messages": [{"role": "usr", "content": "a"}]}, {}, "turn 1: role 'usr'"),
        ({"messages": [{"content": "a"}]}, {}, "turn 1: keys content"),
        ({"messages": [{"role": "user", "content": 3}]}, {}, "turn 1: content is int"),
        (
            {"messages": [{"role": "user", "content": [{"text": "a"}, {"type": "image_url"}]}]},
            {},
            "turn 1: content is not text alone: image_url .only text is trained on",
        ),
    ],
)
def test_wrong_rows_are_named(
    make: Any, row: dict[str, Any], settings: dict[str, Any], message: str
) -> None:
    good = ALPACA if settings.get("format") == "alpaca" else {"text": "a"}
    with pytest.raises(SlimError, match=f"rows.jsonl, line 2.*{message}" if "line" not in message
                       else message) as error:  # fmt: skip
        make([good, row], **settings)
    assert "\n" not in str(error.value)


def test_unlearnable_rows_are_dropped_and_counted(make: Any) -> None:
    rows = [
        ALPACA,
        {**ALPACA, "output": " "},
        {**ALPACA, "output": None},
        {"prompt": "a", "completion": ""},
        {"messages": [{"role": "user", "content": "a"}]},
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": ""}]},
        {"text": ""},
        {"messages": [*CHAT["messages"], {"role": "user", "content": "more"}]},
    ]
    record = make(rows).ledger["sources"][0]
    assert record["rows_given"] == 8
    assert record["rows_used"] == 2
    assert record["turns_cut_after_last_answer"] == 1
    assert {reason: entry["count"] for reason, entry in record["rows_dropped"].items()} == {
        "empty answer": 4,
        "no assistant turn": 1,
        "empty text": 1,
    }
    assert record["rows_dropped"]["no assistant turn"]["first"] == ["rows.jsonl, line 5"]


def test_reference_ids_and_spans(
    make: Any, data_mirror: Any, references: Any, smollm2_gguf: Any
) -> None:
    """Token ids and supervised spans of 16 Alpaca rows, as the PyTorch reference has them."""
    tokenizer = build_tokenizer(read_gguf(smollm2_gguf).metadata, [])
    rows = data_mirror / "alpaca" / "train.jsonl"
    prepared = make(rows, tokenizer=tokenizer)
    expected = json.loads((references / "alpaca_loss_and_gradients.json").read_text())
    assert len(prepared.train) == 999
    for row in expected["rows"]:
        ids, supervised = prepared.train.row(row["row"])
        assert ids.tolist() == row["ids"]
        assert np.flatnonzero(supervised)[0] == row["first_supervised"]
        assert supervised.sum() == row["supervised"]
