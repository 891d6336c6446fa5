"""Prompts through the model's own chat template: turns, system messages, one BOS."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mlx_lm.tokenizer_utils import load as load_tokenizer

from mlx_slim.errors import SlimError
from mlx_slim.evaluation.run import EvalOptions, evaluate
from mlx_slim.evaluation.scoring.requests import RequestEncoder
from mlx_slim.evaluation.tasks.prompts import Chat, build_questions
from mlx_slim.evaluation.tasks.rows import load_rows
from tests.evaluation.support import CHOICE, quiz, write_task
from tests.support.evals import write_tasks
from tests.support.tiny import CHATML, byte_tokenizer

NO_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
    + CHATML
)


def _questions(folder: Path, chat: Any):
    text = CHOICE + "description: Choose well.\n"
    rows, shots = [quiz(i) for i in range(3)], [quiz(100 + i) for i in range(4)]
    task = write_task(folder, text, rows=rows, shots=shots)
    return build_questions(task, load_rows(task), 2, chat=chat)


def _chat(folder: Path, template: str, multiturn: Any = True, notes: Any = None, bos: Any = False):
    byte_tokenizer(folder / "tokenizer", chat_template=template, bos=bos)
    tokenizer = load_tokenizer(folder / "tokenizer")
    return tokenizer, Chat.of_model(tokenizer._tokenizer, multiturn, [] if notes is None else notes)


def _turn(role: str, text: str) -> str:
    return f"<|im_start|>{role}\n{text}<|im_end|>\n"


def test_examples_are_turns_or_lie_in_the_question(tmp_path: Path) -> None:
    _, chat = _chat(tmp_path, CHATML)
    question = _questions(tmp_path, chat)[1]
    shots = [
        _turn("user", f"Q: what is {n}?\nA:") + _turn("assistant", f"n{n}") for n in (100, 101)
    ]
    system, user_turn = _turn("system", "Choose well."), _turn("user", "Q: what is 1?\nA:")
    assert question.context == system + "".join(shots) + user_turn + "<|im_start|>assistant\n"
    assert question.choices == ("n1", "x")
    _, chat = _chat(tmp_path, CHATML, multiturn=False)
    joined = "Q: what is 100?\nA: n100\n\nQ: what is 101?\nA: n101\n\nQ: what is 1?\nA:"
    question = _questions(tmp_path, chat)[1]
    assert question.context == system + _turn("user", joined) + "<|im_start|>assistant\n"


def test_a_template_that_refuses_a_system_message_gets_none_with_one_notice(
    tmp_path: Path,
) -> None:
    notes: list[str] = []
    _, chat = _chat(tmp_path, NO_SYSTEM, notes=notes)
    questions = _questions(tmp_path, chat)
    assert all("Choose well" not in question.context for question in questions)
    assert len(notes) == 1
    assert "system message" in notes[0]


@pytest.mark.parametrize(
    ("system", "expected"),
    [("Be brief.", "Be brief.\n\nChoose well."), ("Be brief.\n", "Be brief.\nChoose well.")],
)
def test_a_system_message_comes_before_the_description(
    tmp_path: Path, system: str, expected: str
) -> None:
    _, chat = _chat(tmp_path, CHATML)
    question = _questions(tmp_path, chat.with_system(system))[1]
    assert question.context.startswith(_turn("system", expected))


@pytest.mark.parametrize("template", [NO_SYSTEM, "{{ messages[-1]['content'] }}"])
def test_a_template_without_a_system_message_refuses_one(tmp_path: Path, template: Any) -> None:
    _, chat = _chat(tmp_path, template)
    with pytest.raises(SlimError, match=r"takes no system message, and --system is .Be brief\."):
        chat.with_system("Be brief.")


def test_a_template_that_refuses_everything_is_one_line(tmp_path: Path) -> None:
    _, chat = _chat(tmp_path, "{{ raise_exception('never') }}")
    with pytest.raises(SlimError, match="refuses the questions: never"):
        _questions(tmp_path, chat)


@pytest.mark.parametrize("template", ["{{ bos_token }}", ""])
def test_bos_comes_once_whoever_writes_it(tmp_path: Path, template: str) -> None:
    tokenizer, chat = _chat(tmp_path, template + "{{ messages[-1]['content'] }}", bos=True)
    question = _questions(tmp_path, chat)[0]
    ids = RequestEncoder(tokenizer, 500).request(question.context, question.choices[0]).ids
    assert ids.count(tokenizer.bos_token_id) == 1
    assert ids[0] == tokenizer.bos_token_id


def test_a_system_message_changes_the_scores_and_is_recorded(
    tiny: Callable[..., Path], tmp_path: Path
) -> None:
    task = str(write_tasks(tmp_path)[0])

    def scored(name: str, system: str | None) -> tuple[object, bytes]:
        options = EvalOptions(apply_chat_template=True, system=system, limit=3)
        (result,) = evaluate(tiny("llama"), task, tmp_path / name, options)
        samples = (tmp_path / name / "samples_toy_choice.jsonl").read_bytes()
        return result["system_instruction"], samples

    plain, spoken = scored("plain", None), scored("spoken", "Be brief.")
    assert (plain[0], spoken[0]) == (None, "Be brief.")
    assert plain[1] != spoken[1]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"system": "Be brief."}, "toy_choice does not use one"),
        ({"system": " ", "apply_chat_template": True}, "the system message ' ' is empty"),
        ({"system": "Be brief.", "tasks": []}, "no task is named"),
    ],
)
def test_a_system_message_without_effect_is_refused(
    tiny: Callable[..., Path], tmp_path: Path, options: Any, text: str
) -> None:
    choice, _, prose = write_tasks(tmp_path)
    tasks = options.get("tasks", [str(choice)])
    chosen = {key: value for key, value in options.items() if key != "tasks"}
    with pytest.raises(SlimError, match=text):
        evaluate(tiny("llama"), tasks, tmp_path / "out", EvalOptions(perplexity=prose, **chosen))
    assert not (tmp_path / "out").exists()
