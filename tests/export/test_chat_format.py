"""The Go template of a model renders what its Jinja template renders, or is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from mlx_slim.data.chat_render import apply_chat_template
from mlx_slim.errors import SlimError
from mlx_slim.export.chat_format import find_format, go_quoted
from mlx_slim.models.load import load_tokenizer
from tests.support import chat_templates
from tests.support.go_template import render_go
from tests.support.tiny import tiny_model

LLAMA2 = (
    "{% if messages[0].role == 'system' %}{% set rest = messages[1:] %}"
    "{% set said = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' %}"
    "{% else %}{% set rest = messages %}{% set said = '' %}{% endif %}"
    "{% for m in rest %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m.role == 'user' %}{{ bos_token + '[INST] ' + (said if loop.first else '') + "
    "m.content + ' [/INST]' }}{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}"
    "{% endfor %}"
)
ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}"
    "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}{% endfor %}"
)
NO_SYSTEM = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}"
    "{{ raise_exception('no system message') }}{% endif %}{% for m in messages %}"
    "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}"
    "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
INSTRUCTION = (
    "{% if messages[0].role != 'system' %}Below is an instruction.\n\n{% endif %}"
    "{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}\n\n"
    "{% elif m.role == 'user' %}### Instruction:\n{{ m.content }}\n\n"
    "{% else %}### Response:\n{{ m.content }}\n\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}### Response:\n{% endif %}"
)
# The text of a system message stands behind every question; quotes and braces of Go's own.
ODD_MARKS = (
    "{% for m in messages %}{{ '{{ \"' + m.role + '\" }}`\\\\\u200b\U0001f642' + m.content + "
    '\'"""\\n\' }}{% endfor %}{% if add_generation_prompt %}>>{% endif %}'
)
FAMILIES = {
    name: getattr(chat_templates, name)
    for name in (
        *("TOOLS", "THINKING", "ALWAYS_THINKING", "CUT_THOUGHTS", "FOLDED", "HEADERS"),
        *("RENAMED", "SCRIPT", "MARKED"),
    )
} | {
    "llama2": LLAMA2,
    "zephyr": ZEPHYR,
    "no system": NO_SYSTEM,
    "instruction": INSTRUCTION,
    "odd marks": ODD_MARKS,
}
CHATS = (
    ("Hi",),
    ("What is 2 + 2?", "4", "And\n\n{{ .System }} \"'\\n 3?"),
    ("1", "eins", "2", "zwei", "3", "¿drei? 漢字 🙂", "4"),
)


@pytest.fixture(scope="module")
def tokenizer_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """Return a tokenizer with a template; it adds BOS to a text or not."""
    folders = {
        bos: tiny_model(tmp_path_factory.mktemp("m") / "m", hidden_size=32, bos=bos)
        for bos in (False, True)
    }

    def make(template: str, bos: bool = False) -> Any:
        tokenizer: Any = load_tokenizer(folders[bos])
        tokenizer._tokenizer.chat_template = template
        return tokenizer

    return make


def _chat(texts: tuple[str, ...], system: str | None) -> list[dict[str, str]]:
    turns = [
        {"role": "assistant" if index % 2 else "user", "content": text}
        for index, text in enumerate(texts)
    ]
    return [{"role": "system", "content": system}, *turns] if system else turns


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_go_renders_what_jinja_renders(
    tokenizer_of: Callable[..., Any], name: str, bos: bool
) -> None:
    tokenizer = tokenizer_of(FAMILIES[name], bos)
    chat_format, notes = find_format(tokenizer)
    template = chat_format.go()
    begin = tokenizer._tokenizer.bos_token if bos else ""
    for texts in CHATS:
        for system in (None, "Be brief.\nVery."):
            if system and name == "no system":
                continue
            chat = _chat(texts, system)
            expected = apply_chat_template(tokenizer, chat).removeprefix(begin)
            assert render_go(template, chat) == expected == chat_format.render(chat)
    assert any("system message" in note for note in notes) is (name == "no system")
    assert any("space" in note for note in notes) is (name in ("HEADERS", "RENAMED", "no system"))
    assert any("reasoning" in note for note in notes) is ("THOUGHTS" in name or "THINKING" in name)
    assert any("tools" in note for note in notes) is (name == "TOOLS")
    writes = apply_chat_template(tokenizer, _chat(CHATS[0], None)).startswith(begin)
    assert any("before a chat" in note for note in notes) is (bos and not writes)


def test_a_system_message_is_put_before_the_first_text_where_the_template_takes_none(
    tokenizer_of: Callable[..., Any],
) -> None:
    chat_format, _ = find_format(tokenizer_of(NO_SYSTEM))
    chat = _chat(("Hi", "Ho", "Hu"), "Sys")
    plain = render_go(chat_format.go(), chat[1:])
    assert render_go(chat_format.go(), chat) == plain.replace("\nHi", "\nSys\n\nHi")


def test_an_answer_that_is_begun_is_continued(tokenizer_of: Callable[..., Any]) -> None:
    chat_format, _ = find_format(tokenizer_of(chat_templates.MARKED))
    begun = _chat(("Hi", "Well"), None)
    assert render_go(chat_format.go(), begun).endswith("<|im_start|>assistant\nWell")
    later = [*begun, {"role": "system", "content": "now"}, {"role": "user", "content": "x"}]
    expected = apply_chat_template(tokenizer_of(chat_templates.MARKED), later)
    assert render_go(chat_format.go(), later) == expected  # a system message later on, in its place


NUMBERED = "{% for m in messages %}{{ loop.index }}. {{ m.role }}: {{ m.content }}\n{% endfor %}"
LATER = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ '[Q]' if loop.index < 5 else '[LATE]' }}"
    "{% endif %}{{ m.content }}\n{% endfor %}"
)
SHOUTED = "{% for m in messages %}{{ m.role }}: {{ m.content | upper }}\n{% endfor %}"
TWICE = "{% for m in messages %}{{ m.role }}: {{ m.content + m.content }}\n{% endfor %}"
BACKWARDS = "{% for m in messages | reverse %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
LAST_ONLY = "{{ messages[-1].content }}"
NEVER = "{{ raise_exception('no chats') }}"
LONG_WORDS = (
    "{% for m in messages %}{{ m.role }}: {{ m.content | replace('<b>', '*') }}\n{% endfor %}"
)


@pytest.mark.parametrize(
    "template", [NUMBERED, LATER, SHOUTED, TWICE, BACKWARDS, LAST_ONLY, NEVER, LONG_WORDS]
)
def test_another_structure_is_refused(tokenizer_of: Callable[..., Any], template: str) -> None:
    with pytest.raises(SlimError, match="cannot become one of Ollama") as caught:
        find_format(tokenizer_of(template))
    assert "--to gguf" in caught.value.hint and "\n" not in caught.value.message


def test_a_date_is_said(tokenizer_of: Callable[..., Any]) -> None:
    dated = "{{ 'Today: ' + strftime_now('%d %b %Y') + '\n' }}" + chat_templates.MARKED
    chat_format, notes = find_format(tokenizer_of(dated))
    assert chat_format.begin.startswith("Today: ") and any("today's date" in note for note in notes)


def test_strings_of_go() -> None:
    assert go_quoted('a"\\\n\t') == '"a\\"\\\\\\n\\t"'
    assert go_quoted("\u200b\x00é漢") == '"\\u200b\\u0000é漢"'
    assert go_quoted("\U000e0001") == '"\\U000e0001"'
