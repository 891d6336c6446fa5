"""Chat templates that work like those of well-known models, in our own words and in short.

Beside each stands what it must render, written in plain Python: ``PIECES[name](messages)`` gives
(text, turn) pieces, where turn is the number of the answer that a piece belongs to, else None.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

Messages = list[dict[str, Any]]
Pieces = list[tuple[str, int | None]]
EOT = "<|im_end|>"

_PLAIN_TURN = (
    "<|im_start|>{{ message.role }}\n{{ message.content }}" + EOT + "\n"
)  # fmt: skip
_PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"

# A system message of its own, tools in it, calls as JSON between tags, results in a user turn.
_CALL = (
    "{% for call in message.tool_calls %}"
    "{% if not loop.first or message.content %}{{ '\n' }}{% endif %}"
    '<tool_call>\n{"name": "{{ call.function.name }}", "arguments": '
    "{{ call.function.arguments | tojson }}}\n</tool_call>{% endfor %}"
)
_RESULT = (
    "{% if loop.first or messages[loop.index0 - 1].role != 'tool' %}<|im_start|>user{% endif %}"
    "{{ '\n' }}<tool_response>\n{{ message.content }}\n</tool_response>"
    "{% if loop.last or messages[loop.index0 + 1].role != 'tool' %}" + EOT + "\n{% endif %}"
)
TOOLS = (
    "{% if messages[0].role == 'system' %}{% set said = messages[0].content %}"
    "{% else %}{% set said = 'You help.' %}{% endif %}"
    "<|im_start|>system\n{{ said }}{% if tools %}{{ '\n' }}# Tools\n"
    "{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}{% endif %}" + EOT + "\n"
    "{% for message in messages %}"
    "{% if message.role == 'tool' %}" + _RESULT +
    "{% elif message.role == 'assistant' %}<|im_start|>assistant\n{{ message.content }}"
    "{% if message.tool_calls %}" + _CALL + "{% endif %}" + EOT + "\n"
    "{% elif message.role != 'system' or not loop.first %}" + _PLAIN_TURN + "{% endif %}"
    "{% endfor %}" + _PROMPT
)  # fmt: skip

# Thoughts: shown after the last question only, an empty one in front of a last answer without.
_SPLIT = (
    "{% set thought = '' %}{% set content = message.content %}"
    "{% if message.reasoning_content is string %}{% set thought = message.reasoning_content %}"
    "{% elif '</think>' in content %}"
    "{% set thought = content.split('</think>')[0].rstrip('\n') %}"
    "{% set thought = thought.split('<think>')[-1].lstrip('\n') %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
)
THINKING = (
    "{% set ns = namespace(last=-1) %}{% for message in messages %}"
    "{% if message.role == 'user' and not message.content.startswith('<tool_response>') %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for message in messages %}"
    "{% if message.role == 'tool' %}" + _RESULT +
    "{% elif message.role == 'assistant' %}" + _SPLIT +
    "<|im_start|>assistant\n"
    "{% if loop.index0 > ns.last and (loop.last or thought) %}"
    "<think>\n{{ thought.strip('\n') }}\n</think>\n\n{{ content.lstrip('\n') }}"
    "{% else %}{{ content }}{% endif %}"
    "{% if message.tool_calls %}" + _CALL + "{% endif %}" + EOT + "\n"
    "{% else %}" + _PLAIN_TURN + "{% endif %}{% endfor %}" + _PROMPT
)  # fmt: skip
# The same, and the prompt opens the thought already: it is no beginning of an earlier answer.
ALWAYS_THINKING = THINKING.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
assert ALWAYS_THINKING != THINKING
# Earlier thoughts are cut, roles are tokens, no newline between turns.
CUT_THOUGHTS = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role == 'system' %}{{ message.content }}"
    "{% elif message.role == 'user' %}<User>{{ message.content }}"
    "{% else %}{% set content = message.content %}"
    "{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}"
    "<Assistant>{{ content }}" + EOT + "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<Assistant><think>\n{% endif %}"
)
# The system message stands in the last user turn; no generation prompt; a space opens an answer.
FOLDED = (
    "{% if messages[0].role == 'system' %}{% set said = messages[0].content %}"
    "{% set rest = messages[1:] %}{% else %}{% set rest = messages %}{% endif %}"
    "{% set ns = namespace(last=-1) %}{% for message in rest %}"
    "{% if (message.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if message.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{{ bos_token }}{% for message in rest %}"
    "{% if message.role == 'user' %}[INST] "
    "{% if loop.index0 == ns.last and said is defined %}{{ said }}\n\n{% endif %}"
    "{{ message.content }}[/INST]"
    "{% else %} {{ message.content.strip() }}" + EOT + "{% endif %}{% endfor %}"
)
# Headers, everything trimmed.
HEADERS = (
    "{{ bos_token }}{% for message in messages %}"
    "<|start_header_id|>{{ message.role }}<|end_header_id|>\n\n{{ message.content | trim }}" + EOT +
    "{% endfor %}{% if add_generation_prompt %}"
    "<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)  # fmt: skip
# The assistant has another name; the system message stands in the first user turn.
RENAMED = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}"
    "{% set first = messages[0].content + '\n\n' %}{% set rest = messages[1:] %}"
    "{% else %}{% set first = '' %}{% set rest = messages %}{% endif %}"
    "{% for message in rest %}"
    "{% set role = 'model' if message.role == 'assistant' else message.role %}"
    "<start_of_turn>{{ role }}\n{% if loop.first %}{{ first }}{% endif %}"
    "{{ message.content | trim }}" + EOT + "\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
# Calls stand in place of a text, the prompt opens a thought, results name the tool once more.
ACTIONS = (
    "{% set ns = namespace(name='') %}{% for message in messages %}"
    "{% if message.role == 'tool' %}<|result|>{{ ns.name }}: {{ message.content }}<|/result|>"
    "{% elif message.tool_calls %}<|bot|>{% for call in message.tool_calls %}"
    "{% set ns.name = call.function.name %}"
    "<|act|>{{ ns.name }}({{ call.function.arguments | tojson }}){% endfor %}" + EOT +
    "{% else %}<|{{ 'bot' if message.role == 'assistant' else message.role }}|>"
    "{{ message.content }}" + EOT + "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|bot|><|think|>{% endif %}"
)  # fmt: skip
# No token ends a turn but the last.
SCRIPT = (
    "{% for message in messages %}{{ message.role | upper }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT: {% else %}{{ eos_token }}{% endif %}"
)
MARKED = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.role == 'assistant' %}{% generation %}{{ message.content }}"
    "{% endgeneration %}" + EOT + "\n{% else %}{{ message.content }}" + EOT + "\n{% endif %}"
    "{% endfor %}" + _PROMPT
)  # fmt: skip


def _system(messages: Messages) -> tuple[str | None, int]:
    """Return the system message and where the other turns begin."""
    if messages[0]["role"] == "system":
        return messages[0]["content"], 1
    return None, 0


def _call(message: dict[str, Any]) -> str:
    calls = [
        f'<tool_call>\n{{"name": "{call["function"]["name"]}", "arguments": '
        f"{json.dumps(call['function']['arguments'], ensure_ascii=False)}}}\n</tool_call>"
        for call in message.get("tool_calls", ())
    ]
    return ("\n" if calls and message["content"] else "") + "\n".join(calls)


def _result(messages: Messages, i: int) -> str:
    first = i == 0 or messages[i - 1]["role"] != "tool"
    last = i + 1 == len(messages) or messages[i + 1]["role"] != "tool"
    text = f"\n<tool_response>\n{messages[i]['content']}\n</tool_response>"
    return ("<|im_start|>user" if first else "") + text + (f"{EOT}\n" if last else "")


def _chatml(messages: Messages) -> Pieces:
    pieces: Pieces = []
    for i, m in enumerate(messages):
        answer = i if m["role"] == "assistant" else None
        pieces += [(f"<|im_start|>{m['role']}\n", None), (f"{m['content']}{EOT}\n", answer)]
    return pieces


def _tools(messages: Messages) -> Pieces:
    system, first = _system(messages)
    pieces: Pieces = [(f"<|im_start|>system\n{system or 'You help.'}{EOT}\n", None)]
    for i in range(first, len(messages)):
        m = messages[i]
        if m["role"] == "tool":
            pieces.append((_result(messages, i), None))
        elif m["role"] == "assistant":
            pieces.append(("<|im_start|>assistant\n", None))
            pieces.append((f"{m['content']}{_call(m)}{EOT}\n", i))
        else:
            pieces.append((f"<|im_start|>{m['role']}\n{m['content']}{EOT}\n", None))
    return pieces


def _thinking(messages: Messages, opened: bool = False) -> Pieces:
    questions = [
        i for i, m in enumerate(messages)
        if m["role"] == "user" and not m["content"].startswith("<tool_response>")
    ]  # fmt: skip
    last = max(questions, default=-1)
    pieces: Pieces = []
    for i, m in enumerate(messages):
        if m["role"] == "tool":
            pieces.append((_result(messages, i), None))
        elif m["role"] == "assistant":
            thought, content = m.get("reasoning_content", ""), m["content"]
            if "reasoning_content" not in m and "</think>" in content:
                thought = content.split("</think>")[0].rstrip("\n").split("<think>")[-1]
                thought, content = thought.lstrip("\n"), content.split("</think>")[-1].lstrip("\n")
            shown = i > last and (i == len(messages) - 1 or thought)
            head = "<|im_start|>assistant\n"
            text = content + _call(m) + f"{EOT}\n"
            if shown:
                text = f"<think>\n{thought.strip(chr(10))}\n</think>\n\n{content.lstrip(chr(10))}"
                text += _call(m) + f"{EOT}\n"
                if opened and i > 0:  # the prompt has it already
                    head, text = head + "<think>\n", text.removeprefix("<think>\n")
            pieces += [(head, None), (text, i)]
        else:
            pieces.append((f"<|im_start|>{m['role']}\n{m['content']}{EOT}\n", None))
    return pieces


def _cut_thoughts(messages: Messages) -> Pieces:
    pieces: Pieces = [("<|im_start|>", None)]
    for i, m in enumerate(messages):
        if m["role"] == "assistant":
            content = m["content"].split("</think>")[-1]
            pieces += [("<Assistant>", None), (content + EOT, i)]
        else:
            pieces.append((("<User>" if m["role"] == "user" else "") + m["content"], None))
    return pieces


def _folded(messages: Messages) -> Pieces:
    system, first = _system(messages)
    last = max(i for i, m in enumerate(messages) if m["role"] == "user")
    pieces: Pieces = [("<|im_start|>", None)]
    for i in range(first, len(messages)):
        m = messages[i]
        if m["role"] == "user":
            text = f"{system}\n\n" if system is not None and i == last else ""
            pieces.append((f"[INST] {text}{m['content']}[/INST]", None))
        else:
            pieces.append((f" {m['content'].strip()}{EOT}", i))
    return pieces


def _headers(messages: Messages) -> Pieces:
    pieces: Pieces = [("<|im_start|>", None)]
    for i, m in enumerate(messages):
        answer = i if m["role"] == "assistant" else None
        pieces.append((f"<|start_header_id|>{m['role']}<|end_header_id|>\n\n", None))
        pieces.append((m["content"].strip() + EOT, answer))
    return pieces


def _renamed(messages: Messages) -> Pieces:
    system, first = _system(messages)
    pieces: Pieces = [("<|im_start|>", None)]
    for i in range(first, len(messages)):
        m = messages[i]
        answer = i if m["role"] == "assistant" else None
        role = "model" if m["role"] == "assistant" else m["role"]
        lead = f"{system}\n\n" if system is not None and i == first else ""
        pieces.append((f"<start_of_turn>{role}\n{lead}", None))
        pieces.append((f"{m['content'].strip()}{EOT}\n", answer))
    return pieces


def _actions(messages: Messages) -> Pieces:
    pieces: Pieces = []
    for i, m in enumerate(messages):
        if m["role"] == "tool":
            pieces.append((f"<|result|>look: {m['content']}<|/result|>", None))
        elif m["role"] == "assistant":
            calls = "".join(
                f"<|act|>look({json.dumps(call['function']['arguments'], ensure_ascii=False)})"
                for call in m.get("tool_calls", ())
            )
            pieces += [("<|bot|>", None), ((calls or m["content"]) + EOT, i)]
        else:
            pieces.append((f"<|{m['role']}|>{m['content']}{EOT}", None))
    return pieces


def _script(messages: Messages) -> Pieces:
    pieces: Pieces = []
    for i, m in enumerate(messages):
        answer = i if m["role"] == "assistant" else None
        pieces.append((f"{m['role'].upper()}: ", None))
        if answer is None or i == len(messages) - 1:
            pieces.append((m["content"] + "\n" + (EOT if i == len(messages) - 1 else ""), answer))
        else:  # what follows another turn is no end of this one
            pieces += [(m["content"], i), ("\n", None)]
    return pieces


TEMPLATES = {
    "tools": TOOLS, "thinking": THINKING, "always thinking": ALWAYS_THINKING,
    "cut thoughts": CUT_THOUGHTS, "folded": FOLDED, "headers": HEADERS, "renamed": RENAMED,
    "script": SCRIPT, "marked": MARKED, "actions": ACTIONS,
}  # fmt: skip
PIECES: dict[str, Callable[[Messages], Pieces]] = {
    "tools": _tools, "thinking": _thinking,
    "always thinking": lambda messages: _thinking(messages, opened=True),
    "cut thoughts": _cut_thoughts, "folded": _folded, "headers": _headers, "renamed": _renamed,
    "script": _script, "marked": _chatml, "actions": _actions,
}  # fmt: skip
