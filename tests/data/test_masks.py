"""Masks of conversations under templates of every kind, against a plain slow reference."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from mlx_slim.data.formats import Example
from mlx_slim.data.templates import load_template
from mlx_slim.data.tokenize import RowEncoder
from mlx_slim.errors import SlimError
from tests.data.conftest import learned, load_bytes
from tests.support.chat_templates import EOT, PIECES, TEMPLATES, TOOLS
from tests.support.tiny import CHATML

WORDS = ["AI", "Yes", "You help.", "Hi", "I am a bot: assistant", "<b>x</b>", "a\n\nb", "4", "日本",
         "assistant\n", "user", "<|im_start|>assistant\n", " spaced ", "{{ x }}", "."]  # fmt: skip
NO_TOOLS = ("cut thoughts", "folded", "headers", "renamed", "script", "marked")


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("templates")
    return {
        name: load_bytes(folder / name.replace(" ", "-"), chat_template=source)
        for name, source in TEMPLATES.items()
    }


def conversation(rng: random.Random, name: str) -> list[dict[str, Any]]:
    """Return random turns; answers repeat what other turns say."""
    notes = [rng.choice(WORDS) for _ in range(3)]

    def text() -> str:
        return rng.choice([*notes, rng.choice(WORDS)])

    messages: list[dict[str, Any]] = []
    if rng.random() < 0.5:
        messages.append({"role": "system", "content": f"Say {text()} or {text()}, no {text()}"})
    if name != "folded" and rng.random() < 0.3:
        messages.append({"role": "assistant", "content": text()})
    for _ in range(rng.randint(1, 3)):
        messages.append({"role": "user", "content": text()})
        answer: dict[str, Any] = {"role": "assistant", "content": text()}
        thinks = rng.random()
        if "think" in name and thinks < 0.3:
            answer["content"] = f"<think>\n{text()}\n</think>\n\n{answer['content']}"
        elif "thinking" in name and thinks < 0.5:
            answer["reasoning_content"] = text()
        if name not in NO_TOOLS and rng.random() < 0.4:
            count = rng.randint(1, 2)
            answer["content"] = rng.choice(["", answer["content"]])
            answer["tool_calls"] = [
                {"type": "function", "function": {"name": "look", "arguments": arguments}}
                for arguments in rng.sample([{}, {"at": text()}, {"n": 3, "q": text()}], count)
            ]
            messages += [answer, *({"role": "tool", "content": text()} for _ in range(count))]
            answer = {"role": "assistant", "content": text()}
        messages.append(answer)
    return messages


@pytest.mark.parametrize("name", TEMPLATES)
def test_ids_and_weights_are_those_of_a_plain_reference(tokenizers: Any, name: Any) -> None:
    """The reference tokenizes piece by piece, which bytes allow, and never renders a template."""
    tokenizer = tokenizers[name]
    template, encoder = load_template("model", tokenizer), RowEncoder(tokenizer, mask_prompt=True)
    for seed in range(100):
        rng = random.Random(seed)
        messages = conversation(rng, name)
        weights = [
            rng.choice([0.0, 0.5, 1.0, 1.0]) if m["role"] == "assistant" else 0.0 for m in messages
        ]
        ids, expected = [], []
        for piece, turn in PIECES[name](messages):
            separate = tokenizer(piece, add_special_tokens=False).input_ids
            ids += separate
            expected += [0.0 if turn is None else weights[turn]] * len(separate)
        rendered = template.render(Example("chat", messages, weights=weights))
        (tokens,) = encoder.encode([rendered])
        assert tokenizer.decode(tokens.ids_T) == tokenizer.decode(ids), (seed, messages)
        assert tokens.ids_T.tolist() == ids
        actual = tokens.supervised_T if tokens.weights_T is None else tokens.weights_T
        assert actual.tolist() == expected, (seed, messages, tokenizer.decode(ids))
        assert tokens.supervised_T.tolist() == [weight > 0 for weight in expected]
        text = "".join(
            p for p, turn in PIECES[name](messages) if turn is not None and weights[turn]
        )
        assert tokenizer.decode(tokens.ids_T[tokens.supervised_T]) == text


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_span_but_those_of_weight_0_without_masking(tokenizers: Any, name: Any) -> None:
    messages = [
        *({"role": "user", "content": "a"}, {"role": "assistant", "content": "wrong"}),
        *({"role": "user", "content": "b"}, {"role": "assistant", "content": "right"}),
    ]
    template = load_template("model", tokenizers[name])
    rendered = template.render(Example("chat", messages, weights=[0, 0, 0, 1]))
    (tokens,) = RowEncoder(tokenizers[name], mask_prompt=False).encode([rendered])
    text = tokenizers[name].decode(tokens.ids_T)
    left = tokenizers[name].decode(tokens.ids_T[1:][~tokens.supervised_T[1:]])
    assert left.strip().removesuffix(EOT).strip() == "wrong", text
    assert tokens.weights_T is None


# ------------------------------------------------------------------------------- tools


def row(*turns: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"messages": list(turns), **more}


USER = {"role": "user", "content": "Look."}
CALL = {"role": "assistant", "content": "", "tool_calls": [
    {"type": "function", "function": {"name": "look", "arguments": {"at": "Köln", "n": None}}}
]}  # fmt: skip
DONE = {"role": "assistant", "content": "Dry."}
GENERATION_MARKS = {
    "tools": [{"type": "function", "function": {"name": "look", "parameters": {"x": 1}}}]
}
CALLED = '<tool_call>\n{"name": "look", "arguments": {"at": "Köln"}}\n</tool_call>'


@pytest.mark.parametrize(
    ("printed", "expected"),
    [
        ("{{ f.arguments | tojson }}", '{"at": "Köln", "n": null}'),
        ("{% for k, v in f.arguments.items() %}{{ k }}={{ v }};{% endfor %}", "at=Köln;n=None;"),
        ("{{ f.arguments }}", '{"at": "Köln", "n": null}'),  # made for text: no Python in it
        ("{{ 'json: ' + f.arguments }}", 'json: {"at": "Köln", "n": null}'),
        (
            "{% if f.arguments is string %}{{ f.arguments }}{% else %}{{ f.arguments | tojson }}"
            "{% endif %}",
            '{"at": "Köln", "n": null}',
        ),
    ],
)
def test_arguments_are_what_the_template_wants(
    make: Any, tmp_path: Path, printed: str, expected: str
) -> None:
    template = CHATML.replace(
        "<|im_end|>",
        "{% for call in message.tool_calls %}{% set f = call.function %}<call>{{ f.name }} "
        + printed
        + "</call>{% endfor %}<|im_end|>",
    )
    tokenizer = load_bytes(tmp_path / "t", chat_template=template)
    _, answers = learned(make([row(USER, CALL)], tokenizer=tokenizer), tokenizer)
    assert answers == f"<call>look {expected}</call>{EOT}\n"


def test_several_named_templates(make: Any, tmp_path: Path) -> None:
    named = {"default": CHATML, "tool_use": TOOLS, "rag": "{{ raise_exception('no') }}"}
    tokenizer = load_bytes(tmp_path / "t")
    tokenizer.chat_template = named
    prepared = make([row(USER, DONE), row(USER, CALL, **GENERATION_MARKS), row(USER, CALL)],
                    tokenizer=tokenizer)  # fmt: skip
    assert "You help." not in learned(prepared, tokenizer, 0)[0]
    assert '"parameters": {"x": 1}' in learned(prepared, tokenizer, 1)[0]
    assert "<tool_call>" in learned(prepared, tokenizer, 2)[1]
    assert prepared.ledger["template"] == "model (default, tool_use)"
    tokenizer.chat_template = {"default": CHATML, "rag": CHATML}
    with pytest.raises(SlimError, match=r"rows.jsonl, line 2: turn 2: .* tool 'look'"):
        make([row(USER, DONE), row(USER, CALL, **GENERATION_MARKS)], tokenizer=tokenizer)
    tokenizer.chat_template = {"rag": CHATML, "tool_use": TOOLS}
    with pytest.raises(SlimError, match=r"several chat templates \(rag, tool_use\), none"):
        make([row(USER, DONE)], tokenizer=tokenizer)


def test_a_template_that_asks_for_no_text_beside_calls(make: Any, tmp_path: Path) -> None:
    """Some look for a null text, where the call is written; an empty one would be the answer."""
    silent = CHATML.replace(
        "{{ message['content'] }}<|im_end|>",
        "{% if message.content is none %}{% for call in message.tool_calls %}"
        "<call>{{ call.function.name }}</call>{% endfor %}{% else %}{{ message.content }}"
        "{% endif %}<|im_end|>",
    )
    assert silent != CHATML
    tokenizer = load_bytes(tmp_path / "t", chat_template=silent)
    turns = row(USER, CALL, {"role": "tool", "content": "dry"}, DONE)
    _, answers = learned(make([turns], tokenizer=tokenizer), tokenizer)
    assert answers == f"<call>look</call>{EOT}\nDry.{EOT}\n"
    with pytest.raises(SlimError, match=r"turn 2: .*'look'"):
        make([row(USER, {**CALL, "content": "I look."})], tokenizer=tokenizer)


def test_a_call_in_python_is_refused(make: Any, tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ m.content }}{% for c in m.tool_calls %}"
    template += (
        "{{ c.function.arguments.items() }}{{ c.function.arguments }}{% endfor %}{% endfor %}"
    )
    tokenizer = load_bytes(tmp_path / "t", chat_template=template)
    with pytest.raises(SlimError, match=r"line 1: .* as Python, not as JSON"):
        make([row(USER, CALL)], tokenizer=tokenizer)


def test_text_beside_calls_that_is_left_out_is_counted(make: Any, tmp_path: Path) -> None:
    tokenizer = load_bytes(tmp_path / "t", chat_template=TEMPLATES["actions"])
    prepared = make([row(USER, {**CALL, "content": "I look."})], tokenizer=tokenizer)
    assert learned(prepared, tokenizer)[1] == f'<|act|>look({{"at": "Köln", "n": null}}){EOT}'
    noted = prepared.ledger["sources"][0]["rows_noted"]
    assert list(noted) == ["text beside tool calls that the template leaves out"]


@pytest.mark.parametrize("setting", ["model", "chatml", "alpaca", "plain"])
@pytest.mark.parametrize("content", ["", "I look."])
def test_a_template_that_drops_calls_is_refused(make: Any, setting: str, content: str) -> None:
    """A plain ChatML template ignores ``tool_calls``: the answer would be empty, or half of it."""
    turns = row(USER, {**CALL, "content": content}, {"role": "tool", "content": "dry"}, DONE)
    with pytest.raises(SlimError, match=r"rows.jsonl, line 1: turn 2: .*does not write") as error:
        make([turns], template=setting)
    assert "'look'" in error.value.message
    assert "tool calls" in error.value.hint


def test_one_call_of_several_that_is_dropped_is_refused(make: Any, tmp_path: Path) -> None:
    first = TOOLS.replace(" in message.tool_calls %}", " in message.tool_calls[:1] %}")
    assert first != TOOLS
    tokenizer = load_bytes(tmp_path / "t", chat_template=first)
    other = {"type": "function", "function": {"name": "listen", "arguments": {}}}
    two = {**CALL, "tool_calls": [*CALL["tool_calls"], other]}
    with pytest.raises(SlimError, match=r"turn 2: .*'listen'"):
        make([row(USER, two)], tokenizer=tokenizer)


def test_jinja_file_over_fields_refuses_calls(make: Any, tmp_path: Path) -> None:
    path = tmp_path / "t.jinja"
    path.write_text("{{ prompt }}: {{ completion }}")
    with pytest.raises(SlimError, match=r"line 1: turn 2: .*'look'"):
        make([row(USER, CALL)], template=str(path))


def test_what_a_template_leaves_out_is_counted(make: Any, tmp_path: Path) -> None:
    rows = [row(USER, DONE, **GENERATION_MARKS), row(USER, DONE)]
    notes = "tools that the template leaves out"
    noted = {notes: {"count": 1, "first": ["rows.jsonl, line 1"]}}
    for setting in ("model", "chatml", "plain"):
        assert make(rows, template=setting).ledger["sources"][0]["rows_noted"] == noted
    mute = "{% for m in messages if m.role != 'system' %}{{ m.content }}<|im_end|>{% endfor %}"
    tokenizer = load_bytes(tmp_path / "t", chat_template=mute)
    system = {"role": "system", "content": "Be kind."}
    record = make([row(system, USER, DONE)], tokenizer=tokenizer).ledger["sources"][0]
    assert list(record["rows_noted"]) == ["system messages that the template leaves out"]
    assert record["rows_used"] == 1
    thought = {**DONE, "reasoning_content": "Let me see."}
    rows = [row(USER, DONE), row(USER, thought)]
    notes = "reasoning that the template leaves out"
    for setting in ("model", "chatml", "plain"):
        noted = make(rows, template=setting).ledger["sources"][0]["rows_noted"]
        assert noted == {notes: {"count": 1, "first": ["rows.jsonl, line 2"]}}
    thinks = "{% for m in messages %}{{ m.reasoning_content or '' }}{{ m.content }}<|im_end|>"
    tokenizer = load_bytes(tmp_path / "u", chat_template=thinks + "{% endfor %}")
    record = make(rows, tokenizer=tokenizer).ledger["sources"][0]
    assert "rows_noted" not in record or not record["rows_noted"]


# ------------------------------------------------------------------------------- the rest


def test_an_answer_that_does_not_come_out_is_refused(make: Any, tmp_path: Path) -> None:
    last = "{% for m in messages %}{% if not loop.first %}{{ messages[0].content }}{% endif %}"
    tokenizer = load_bytes(tmp_path / "t", chat_template=last + f"{EOT}{{% endfor %}}")
    with pytest.raises(SlimError, match="line 1: turn 2: the chat template leaves out the answer"):
        make([row(USER, DONE)], tokenizer=tokenizer)


def test_a_prompt_that_always_stands_at_the_end_is_not_learned(make: Any, tmp_path: Path) -> None:
    always = CHATML.replace("{% if add_generation_prompt %}", "{% if true %}")
    tokenizer = load_bytes(tmp_path / "t", chat_template=always)
    text, answers = learned(make([row(USER, DONE)], tokenizer=tokenizer), tokenizer)
    assert answers == f"Dry.{EOT}\n"
    assert text.endswith(answers)


def test_a_system_message_in_the_first_answer_is_not_learned(make: Any, tmp_path: Path) -> None:
    tokenizer = load_bytes(tmp_path / "t", chat_template=TEMPLATES["renamed"])
    system = {"role": "system", "content": "Say AI."}
    turns = row(system, {"role": "assistant", "content": "AI"}, USER, DONE)
    text, answers = learned(make([turns], tokenizer=tokenizer), tokenizer)
    assert "model\nSay AI.\n\nAI" in text
    assert answers == f"AI{EOT}\nDry.{EOT}\n"


def test_weights_by_generation_marks(make: Any, tmp_path: Path) -> None:
    """Marks that leave out an answer: it is not learned, and that is counted."""
    some = TEMPLATES["marked"].replace("== 'assistant' %}", "== 'assistant' and loop.last %}", 1)
    turns = [USER, {**DONE, "content": "Wet."}, USER, {**DONE, "weight": 0.5}]
    tokenizer = load_bytes(tmp_path / "t", chat_template=some)
    prepared = make([row(*turns)], tokenizer=tokenizer)
    assert learned(prepared, tokenizer)[1] == f"Dry.{EOT}\n"
    weights = prepared.train.weights(0)
    assert weights is not None
    assert set(weights.tolist()) == {0.0, 0.5}
    assert any("without generation marks" in n for n in prepared.ledger["sources"][0]["rows_noted"])


def test_answers_that_marks_would_change(make: Any, tmp_path: Path) -> None:
    """A template that counts characters: prompt and end are prefixes, so spans are certain."""
    counts = CHATML.replace("\n{{ message['content'] }}", "\n{{ message['content'] }}"
                            "({{ message['content'] | length }})")  # fmt: skip
    tokenizer = load_bytes(tmp_path / "t", chat_template=counts)
    turns = [USER, DONE, USER, {**DONE, "content": "Look."}]
    _, answers = learned(make([row(*turns)], tokenizer=tokenizer), tokenizer)
    assert answers == f"Dry.(4){EOT}\nLook.(5){EOT}\n"


def test_two_answers_in_a_row_and_empty_turns(make: Any, tokens: Any) -> None:
    turns = [{"role": "user", "content": ""}, DONE, {**DONE, "content": "Wet."},
             {"role": "user", "content": " "}, DONE]  # fmt: skip
    _, answers = learned(make([row(*turns)]), tokens)
    assert answers == f"Dry.{EOT}\nWet.{EOT}\nDry.{EOT}\n"


def test_alpaca_template_where_the_assistant_begins(make: Any, base_tokens: Any) -> None:
    system = {"role": "system", "content": "Be kind."}
    text, answers = learned(
        make([row(system, DONE, USER, DONE)], tokenizer=base_tokens, template="alpaca"), base_tokens
    )
    assert "Be kind." in text
    assert answers == "Dry.<|endoftext|>Dry.<|endoftext|>"
