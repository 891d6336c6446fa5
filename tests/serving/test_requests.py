"""Bodies of requests: what passes, and what each hostile one is told."""

from __future__ import annotations

import json
from typing import Any

import pytest

from mlx_slim.errors import SlimError
from mlx_slim.serving.names import ServedNames
from mlx_slim.serving.requests import CHAT, TEXT, read_request

SERVED = ServedNames("m", {}, None)
BROKEN = {"function": {"name": "f", "arguments": "["}}
CALL = {"function": {"name": "f", "arguments": '{"a": 1}'}, "id": "1", "type": "function"}


def read(path: str = CHAT[0], **body: Any) -> dict[str, Any]:
    return read_request(json.dumps({"model": "m", **body}).encode(), path, SERVED, 100)


def chat(**body: Any) -> dict[str, Any]:
    return read(**{"messages": [{"role": "user", "content": "hi"}], **body})


def test_what_passes_has_the_types_of_mlx_lm_and_nothing_else() -> None:
    body = chat(
        temperature=1,
        xtc_probability=0,
        stop="\n",
        top_k=99,
        seed=5,
        max_tokens=None,
        n=1,
        stream_options={},
        logit_bias={"7": 2},
        user="someone",
        adapters=None,
        tool_choice="auto",
        chat_template_kwargs={"enable_thinking": False},
    )
    assert body == {
        "model": "m",
        "messages": [{"role": "user", "content": "hi"}],
        "temperature": 1.0,
        "xtc_probability": 0.0,
        "stop": ["\n"],
        "top_k": 99,
        "seed": 5,
        "stream_options": {"include_usage": False},
        "logit_bias": {"7": 2},
        "chat_template_kwargs": {"enable_thinking": False},
    }
    assert type(body["temperature"]) is float
    assert read(TEXT, prompt="once", model=None) == {"model": "m", "prompt": "once"}


def test_content_is_one_text() -> None:
    content = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    answer = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    messages = chat(messages=[{"role": "user", "content": content}, answer])["messages"]
    assert [message["content"] for message in messages] == ["ab", ""]
    assert messages[1]["tool_calls"] == [CALL]


def test_tools_are_left_out_where_the_request_wants_none() -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    assert chat(tools=tools)["tools"] == tools
    assert "tools" not in chat(tools=tools, tool_choice="none")


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ({"messages": []}, "messages is"),
        ({"messages": "hi"}, "expected a list"),
        ({"messages": ["hi"]}, "expected an object"),
        ({"messages": [{"content": "hi"}]}, "has no 'role'"),
        ({"messages": [{"role": 1, "content": "hi"}]}, "expected a string"),
        ({"messages": [{"role": "user", "content": {"a": 1}}]}, "expected a string"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]},
            "'image_url', expected text",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "has no 'text'"),
        ({"messages": [{"role": "a", "tool_calls": [{}]}]}, "has no 'function'"),
        ({"messages": [{"role": "a", "tool_calls": [BROKEN]}]}, "cannot be read as JSON"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"temperature": True}, "temperature is True"),
        ({"top_p": 2}, "from 0 to 1"),
        ({"top_k": 100}, "from 0 to 99"),
        ({"xtc_threshold": 0.6}, "from 0 to 0.5"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"max_tokens": 10**12}, "max_tokens"),
        ({"max_tokens": "9"}, "a whole number"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**64}, "seed"),
        ({"logprobs": True, "stream": True}, "logprobs of a stream are not supported"),
        ({"top_logprobs": 2, "stream": True}, "logprobs of a stream are not supported"),
        ({"logit_bias": {"5": 1e39}}, "expected a number from -100 to 100"),
        ({"chat_template_kwargs": {"self": 1}}, "may not hold 'self'"),
        ({"chat_template_kwargs": {"tokenizer": 1}}, "may not hold 'tokenizer'"),
        ({"stop": [1]}, "stop"),
        ({"stop": [""]}, "a stop of 0 characters"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"stop": {"a": 1}}, "stop"),
        ({"stream": "yes"}, "true or false"),
        ({"stream_options": {"include_usage": 1}}, "include_usage"),
        ({"logit_bias": {"100": 1}}, "names the token '100'"),
        ({"logit_bias": {"-1": 1}}, "names the token '-1'"),
        ({"logit_bias": {"1": "x"}}, "logit_bias"),
        ({"n": 2}, "n = 2 is not supported"),
        ({"response_format": {"type": "json_object"}}, "not supported"),
        ({"tool_choice": "required"}, "not supported"),
        ({"tools": [1]}, "tools"),
        ({"chat_template_kwargs": {"chat_template": "{{ x }}"}}, "may not hold"),
        ({"chat_template_kwargs": {"tokenize": False}}, "may not hold"),
        ({"model": 3}, "model is 3"),
        ({"model": "x" * 5000}, "model"),
        ({"model": ["m"]}, "model"),
        ({"draft_model": {}}, "draft_model"),
        ({"num_draft_tokens": 99}, "from 1 to 16"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_one_line(body: dict[str, Any], text: str) -> None:
    with pytest.raises(SlimError) as caught:
        chat(**body)
    assert text in caught.value.message
    assert "\n" not in caught.value.message
    assert caught.value.hint == ""


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"", "cannot be read as JSON"),
        (b"\xff\xfe", "cannot be read as JSON"),
        (b"[" * 100_000, "nested deeper"),
        (b"[]", "expected a JSON object"),
        (b'{"model": "m", "prompt": "\\ud800"}', "half of a character"),
        (b'{"model": "m", "prompt": ["a"]}', "expected a string"),
        (b'{"model": "m"}', "has no 'prompt'"),
        (b'{"model": "m", "prompt": ""}', "prompt is ''"),
        (b'{"max_tokens": 1' + b"0" * 100 + b"}", "digits"),
    ],
)
def test_bytes_that_are_no_request(data: bytes, text: str) -> None:
    with pytest.raises(SlimError, match=text):
        read_request(data, TEXT, SERVED, 100)
