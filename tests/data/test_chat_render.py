"""Chat templates: the text of transformers, within bounds.

The templates here use what those of known models use: namespaces, macros that call themselves over
JSON schemas, reversed messages, splits at ``</think>``, ``loop``'s neighbours, ``raise_exception``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from mlx_slim.data.chat_render import apply_chat_template, render_chat
from mlx_slim.models.load import load_tokenizer

LLAMA3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    "+ message['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}"
    "{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}"
    "{% endfor %}"
)
QWEN = """
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}
    {{- "# Tools\\n<tools>" }}
    {%- for tool in tools %}{{- "\\n" }}{{- tool | tojson }}{%- endfor %}
    {{- "\\n</tools><|im_end|>\\n" }}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string
        and not(message.content.startswith('<tool_response>')) %}
        {%- set ns.multi_step_tool = false %}{%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if message.role == "assistant" %}
        {%- set reasoning = '' %}
        {%- if message.reasoning_content is string %}
            {%- set reasoning = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set reasoning = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1] %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|im_start|>' + message.role }}
        {% generation %}
        {%- if loop.index0 > ns.last_query_index and reasoning -%}
            {{ '<think>\\n' + reasoning.strip('\\n') + '\\n</think>\\n\\n' }}
        {%- endif %}
        {{- content }}
        {%- for call in message.tool_calls or [] %}
            {%- if call.function %}{%- set call = call.function %}{%- endif %}
            {{- '<tool_call>{"name": "' ~ call.name ~ '", "arguments": ' }}
            {{- call.arguments if call.arguments is string else call.arguments | tojson }}
            {{- '}</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>' }}
        {% endgeneration %}
    {%- elif message.role == "tool" %}
        {%- if loop.first or (messages[loop.index0 - 1].role != "tool") %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '<tool_response>' + content + '</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") -%}
            {{- '<|im_end|>' }}
        {%- endif %}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
"""
MACROS = """
{%- macro render(spec, depth=0) -%}
  {%- if spec.type == "object" -%}
    {{- "{\\n" -}}
    {%- for name, inner in spec.properties.items() -%}
      {{- "  " * (depth + 1) }}{{ name }}{{ "?" if name not in (spec.required or []) -}}
      : {{ render(inner, depth + 1) }}{{ ",\\n" if not loop.last -}}
    {%- endfor -%}
    {{- "\\n" ~ "  " * depth ~ "}" -}}
  {%- elif spec.type == "array" -%}{{ render(spec["items"], depth) }}[]
  {%- elif spec.enum -%}{{ spec.enum | map("tojson") | join(" | ") }}
  {%- else -%}{{ spec.type | default("any") | upper }}{%- endif -%}
{%- endmacro -%}
{%- for tool in tools or [] if tool.function is defined -%}
  {{ tool.function.name | title }}({{ render(tool.function.parameters) }})
  {{- tool.function | tojson(indent=2) }}{{ "%s-%03d" | format(tool.function.name, loop.index) }}
{%- endfor -%}
{%- for message in messages -%}
  {%- if message.role == "tool" -%}{%- continue -%}{%- endif -%}
  {{- loop.cycle("a", "b") ~ message.content.replace("\\t", " ").center(12) | indent(2) -}}
  {{- loop.previtem.role if loop.previtem is defined -}}
{%- endfor -%}
{%- set roles = messages | selectattr("role", "equalto", "user") | map(attribute="role") | list -%}
{{- roles | unique | join(",") }}{{ dict(a=1, b=roles) | dictsort }}{{ strftime_now("%Y") -}}
{%- filter upper %}{{ "{:>5}|{}".format(messages | length, "é" | e) }}{% endfilter %}
"""
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Wetter für „Zürich“ <b>&</b>",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "enum": ["Zürich", "東京"]},
                    "days": {"type": "array", "items": {"type": "integer"}},
                    "more": {"type": "object", "properties": {"x": {"type": None}}},
                },
                "required": ["city"],
            },
        },
    }
]
CALL = {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "東京"}}}
TURNS = [
    {"role": "user", "content": "Wie wird's? 🙂\t "},
    {"role": "assistant", "content": "<think>\nhm\n</think>\n\nKalt.", "tool_calls": [CALL]},
]
CHATS = [
    TURNS,
    TURNS[:1],
    [{"role": "system", "content": "Be brief."}, *TURNS],
    [*TURNS, {"role": "tool", "content": "3 °C"}, {"role": "tool", "content": "{}"}, TURNS[1]],
    [*TURNS, TURNS[0], {"role": "assistant", "content": "Nein.", "thinking": "old\nname"}],
    TURNS * 20,
]


@pytest.mark.parametrize("prompt", [False, True])
@pytest.mark.parametrize("chat", range(len(CHATS)))
@pytest.mark.parametrize("source", [LLAMA3, MISTRAL, QWEN, MACROS], ids=list("lmqx"))
def test_the_text_and_the_marks_are_those_of_transformers(
    source: Any, chat: Any, prompt: bool
) -> None:
    marked = "{% generation %}" in source
    for tools in (None, TOOLS):
        names = {"tools": tools, "bos_token": "<s>", "eos_token": "</s>"}
        names["add_generation_prompt"] = prompt
        try:
            texts, spans = render_jinja_template(
                [CHATS[chat]],
                chat_template=source,
                return_assistant_tokens_mask=marked,
                **names,
            )
        except TemplateError as error:
            with pytest.raises(TemplateError) as caught:
                render_chat(source, CHATS[chat], **names)
            assert str(caught.value) == str(error)
            continue
        text, actual = render_chat(source, CHATS[chat], **names)
        assert text == texts[0]
        assert actual == (list(spans[0]) if marked else [])


def test_a_real_tokenizer_s_prompt_is_the_one_that_it_makes_itself(smollm2: Path) -> None:
    tokenizer = load_tokenizer(str(smollm2))
    chats = [chat for chat in CHATS if all(isinstance(turn["content"], str) for turn in chat)]
    for one in (tokenizer, tokenizer._tokenizer):  # mlx-lm's wrapper, and transformers' own
        for chat in chats:
            theirs = one.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
            assert apply_chat_template(one, chat) == theirs


def test_values_that_are_no_json_reach_no_template() -> None:
    class Sneaky(str):
        def write(self) -> str:
            return "written"

    chat = [{"role": "user", "content": Sneaky("x"), "other": object()}]
    assert render_chat("{{ messages[0].content.write is defined }}", chat)[0] == "False"
    assert render_chat("{{ messages[0].other }}", chat)[0] == "<object>"


def test_a_long_chat_stays_within_the_bounds() -> None:
    chat = [{"role": "user", "content": "word " * 2000}, {"role": "assistant", "content": "x"}]
    text, spans = render_chat(QWEN, chat * 1000)
    assert len(text) > 10_000_000
    assert len(spans) == 1000
