"""Prompts: the reference's to the byte, the examples' rules, templates that fail."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlx_slim.errors import SlimError
from mlx_slim.evaluation.tasks.prompts import Chat, build_questions
from mlx_slim.evaluation.tasks.rows import TaskRows, load_rows
from mlx_slim.evaluation.tasks.spec import Selection, Task, expand, find_task, list_tasks
from tests.evaluation.support import CHOICE, GENERATION, mmlu_row, quiz, write_rows, write_task

SIZES = {
    "arc_challenge": 1172, "arc_easy": 2376, "gsm8k": 1319, "hellaswag": 10042, "mmlu": 14042,
    "openbookqa": 500, "pubmedqa": 1000, "demo_exact_match": 100, "boolq": 3270, "piqa": 1838,
    "winogrande": 1267, "wikitext": 62, "wikitext_blocks": 62,
}  # fmt: skip


def _questions(task: Task, rows: Any, shots: Any = (), num_fewshot: Any = 0, **more: Any):
    return build_questions(task, TaskRows(rows, shots, "", ""), num_fewshot, **more)


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("arc_easy_0shot", "arc_easy"),
        ("hellaswag_0shot", "hellaswag"),
        ("mmlu_us_foreign_policy_5shot", "mmlu_us_foreign_policy"),
    ],
)
def test_prompts_are_the_reference_s_to_the_byte(
    data_mirror: Path, references: Path, file: str, name: str
) -> None:
    reference = json.loads((references / f"{file}.json").read_text(encoding="utf-8"))
    task = find_task(name)
    rows = load_rows(task, data_mirror)
    questions = build_questions(task, rows, reference["num_fewshot"], len(reference["samples"]))
    first = questions[0]
    assert reference["first_arguments"] == [[first.context, choice] for choice in first.choices]
    assert [sample["target"] for sample in reference["samples"]] == [q.target for q in questions]


@pytest.mark.parametrize("name", sorted(SIZES))
def test_every_task_renders_every_row_of_the_mirror(data_mirror: Path, name: Any) -> None:
    task = find_task(name)
    chat = Chat(lambda system, user: f"{system}|{user}|") if task.spec.chat else None
    questions = build_questions(task, load_rows(task, data_mirror), chat=chat)
    assert [question.doc_id for question in questions] == list(range(SIZES[name]))
    for question in questions:
        if task.kind == "perplexity":
            assert question.context and question.choices == () and min(question.lengths) > 1
            continue
        assert question.context and "{{" not in question.context
        if task.kind == "generation":
            assert question.choices == question.lengths == () and isinstance(question.target, str)
        else:
            assert question.target in range(len(question.choices))
            assert all(choice[0] == " " for choice in question.choices)
            if question.contexts:
                assert len(set(question.contexts)) > len(set(question.choices)) == 1
                assert question.lengths == tuple(map(len, question.contexts))
                continue
            lengths = tuple(len(choice) - 1 for choice in question.choices)
            assert question.lengths == lengths
            assert question.context == question.context.rstrip(" ")


def test_all_shipped_tasks_are_rendered_above() -> None:
    assert {task.name for task in list_tasks()} - set(SIZES) == {
        "bioasq", "mmlu_pro", "truthfulqa_mc2",  # over rows of our own: test_exam_rows.py
    }  # fmt: skip


def test_suites_say_which_training_rows_the_mirror_lacks(data_mirror: Path) -> None:
    lacking = {}
    for selection in expand(["leaderboard-v1"]):
        rows = load_rows(selection.task, data_mirror)
        try:
            build_questions(selection.task, rows, selection.num_fewshot, 1)
        except SlimError as error:
            lacking[selection.task.name] = str(error)
    for name, message in lacking.items():
        assert f"{name}/train.jsonl does not exist" in message
    assert set(lacking) <= {"arc_challenge", "hellaswag"}


def test_gsm8k_shots_are_the_first_five_training_rows(tmp_path: Path) -> None:
    rows = [{"question": f"q{n}", "answer": f"a{n} #### {n}"} for n in range(8)]
    write_rows(tmp_path / "gsm8k" / "train.jsonl", rows)
    write_rows(tmp_path / "gsm8k" / "test.jsonl", [{"question": "t", "answer": "x #### 1"}])
    task = find_task("gsm8k")
    (question,) = build_questions(task, load_rows(task, tmp_path))
    shots = "".join(f"Question: q{n}\nAnswer: a{n} #### {n}\n\n" for n in range(5))
    assert question.context == f"{shots}Question: t\nAnswer:"
    assert (question.choices, question.target) == ((), "x #### 1")
    with pytest.raises(SlimError, match="9 shots requested, but its split 'train' has 8 rows"):
        build_questions(task, load_rows(task, tmp_path), 9)


def test_mmlu_shots_and_limits_are_per_subject() -> None:
    rows = [mmlu_row(subject, n) for n in range(3) for subject in ("virology", "us_foreign_policy")]
    shots = [mmlu_row(s, n) for n in (7, 8) for s in ("us_foreign_policy", "virology", "anatomy")]
    questions = _questions(find_task("mmlu"), rows, shots, 2, limit=2)
    assert [(q.doc_id, q.subject) for q in questions] == [
        (0, "virology"), (1, "us_foreign_policy"), (2, "virology"), (3, "us_foreign_policy"),
    ]  # fmt: skip
    assert questions[1].context == (
        "The following are multiple choice questions (with answers) about us foreign policy.\n\n"
        "us_foreign_policy question 7\nA. a7\nB. b7\nC. c7\nD. d7\nAnswer: D\n\n"
        "us_foreign_policy question 8\nA. a8\nB. b8\nC. c8\nD. d8\nAnswer: A\n\n"
        "us_foreign_policy question 0\nA. a0\nB. b0\nC. c0\nD. d0\nAnswer:"
    )
    assert questions[0].choices == (" A", " B", " C", " D")
    with pytest.raises(SlimError, match=r"3 shots requested.* has 2 rows of virology"):
        _questions(find_task("mmlu"), rows, shots, 3)


def test_a_question_is_never_among_its_examples() -> None:
    rows = [
        {"question": f"q{n}?", "context": {"contexts": [f"c{n}", "d"]}, "final_decision": "maybe"}
        for n in range(4)
    ]
    rows.append(rows[0])  # the same question once more
    questions = _questions(find_task("pubmedqa"), rows, rows, 2)
    assert questions[2].context.startswith("Abstract: c0\nd\nQuestion: q0?\nAnswer: maybe\n\n")
    for question, row in zip(questions, rows, strict=True):
        assert question.context.count(row["question"]) == 1
        assert question.context.count("Answer:") == 3
    with pytest.raises(SlimError, match="4 shots requested"):
        _questions(find_task("pubmedqa"), rows, rows, 4)


def test_a_question_is_no_example_of_itself_wherever_examples_come_from(tmp_path: Path) -> None:
    rows = [{"prompt": f"p{n}", "completion": f"c{n}"} for n in range(3)]
    task = write_task(tmp_path, GENERATION, rows=rows)  # its data.shots is its data.path
    contexts = [q.context for q in build_questions(task, load_rows(task), 1)]
    assert contexts == ["p1 c1\n\np0", "p0 c0\n\np1", "p0 c0\n\np2"]
    task = write_task(tmp_path, GENERATION.replace("shots: rows", "shots: ./other"), other=rows[:2])
    assert [q.context for q in build_questions(task, load_rows(task), 1)] == contexts
    with pytest.raises(SlimError, match=r"2 shots requested.* has 1 rows"):
        build_questions(task, load_rows(task), 2)


def test_hellaswag_is_cleaned() -> None:
    row = {
        "activity_label": "Cooking", "ctx_a": "[header] How to cook [title] Take a pan. [step] Heat"
        "  it.", "ctx_b": "THEN you", "endings": [" stir [title] well", "a [x] b", "c", "d"],
        "label": "1",
    }  # fmt: skip
    (question,) = _questions(find_task("hellaswag"), [row])
    assert question.context == "Cooking: How to cook. Take a pan. Heat it. Then you"
    assert question.choices == (" stir. well", " a b", " c", " d")
    assert (question.lengths, question.target) == ((10, 3, 1, 1), 1)


@pytest.mark.parametrize(
    ("labels", "key", "place"),
    [("ABCD", "C", 2), ("1234", "3", 2), ("ABCD", "2", 1), ("1234", "D", 3), ("ABCDE", " E", 4)],
)
def test_arc_answer_keys_are_letters_or_numbers(labels: str, key: str, place: int) -> None:
    choices = {"text": [f"t{label}" for label in labels], "label": list(labels)}
    row = {"question": "q", "choices": choices, "answerKey": key}
    (question,) = _questions(find_task("arc_easy"), [row])
    assert question.target == place


def test_a_key_that_is_no_label_is_one_line() -> None:
    row = {"question": "q", "choices": {"text": ["a"], "label": ["A"]}, "answerKey": "E"}
    with pytest.raises(
        SlimError, match="task arc_easy: row 1: target: the answer 'E' is not one of"
    ):
        _questions(find_task("arc_easy"), [row])


@pytest.mark.parametrize("answer", [1, "1", "x"])
def test_a_target_is_a_place_or_a_choice(tmp_path: Path, answer: int | str) -> None:
    task = write_task(tmp_path, CHOICE, rows=[quiz(5, answer)], shots=[quiz(6, answer)])
    (question,) = build_questions(task, load_rows(task), 1)
    assert question.target == 1
    assert question.context == "Q: what is 6?\nA: x\n\nQ: what is 5?\nA:"


@pytest.mark.parametrize("answer", [2, -1, "y", True, None, 0.5, [[0]], [2], {"x": 1}])
def test_any_other_target_is_one_line(tmp_path: Path, answer: Any) -> None:
    task = write_task(tmp_path, CHOICE, rows=[quiz(5), quiz(5, answer)])
    with pytest.raises(SlimError, match=r"line 2: the target is .* from 0 to 1"):
        build_questions(task, load_rows(task))


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("{{ nothing }}", "prompt: 'nothing' is undefined"),
        ("{{ options[7] }}", "prompt: .*no element 7"),
        ("{{ question.__class__.__mro__ }}", "prompt: access to attribute '__class__'"),
        ("{{ options.append(1) }}", "prompt: .*'append' of 'list' object is unsafe"),
        ("{{ 1 // 0 }}", "prompt: .*zero"),
        ("{{ question | regex_replace('(') }}", "prompt: .*unterminated"),
        (
            "{% for n in range(10 ** 7) %}x{% endfor %}",
            "prompt: range of 10000000 numbers: at most",
        ),
    ],
)
def test_a_template_that_fails_names_row_and_field(tmp_path: Path, prompt: str, words: str) -> None:
    text = CHOICE.replace('"Q: {{ question }}\\nA:"', json.dumps(prompt))
    task = write_task(tmp_path, text, rows=[quiz(1)])
    with pytest.raises(SlimError, match=words) as caught:
        build_questions(task, load_rows(task))
    assert "rows.jsonl, line 1" in caught.value.message
    assert "question, options, answer" in caught.value.hint


def test_choices_must_be_a_list_with_text(tmp_path: Path) -> None:
    for bad, words in (("{{ question }}", "choices is 'what is 1"), ("{{ [] }}", "choices is")):
        task = write_task(tmp_path, CHOICE.replace("{{ options }}", bad), rows=[quiz(1)])
        with pytest.raises(SlimError, match=words):
            build_questions(task, load_rows(task))
    task = write_task(tmp_path, CHOICE, rows=[{**quiz(1), "options": ["", "x"]}])
    with pytest.raises(SlimError, match=r"rows.jsonl, line 1: choice 1 of 2 is empty \(''\)"):
        build_questions(task, load_rows(task))
    task = write_task(tmp_path, CHOICE + "metrics: [acc]\ndelimiter: ''\n")
    rows = [{**quiz(1), "options": [1, 2.5]}]
    assert _questions(task, rows)[0].choices == ("1", "2.5")


@pytest.mark.parametrize("empty", ["", " ", "\n\t", "\u200b", "\u00a0"])
@pytest.mark.parametrize(
    "more", ["", "metrics: [acc]\n", "metrics: [acc]\ndelimiter: ''\n", "delimiter: 'A: '\n"]
)
def test_a_choice_of_no_visible_character_is_refused_with_its_row(
    tmp_path: Path, empty: str, more: str
) -> None:
    rows = [quiz(1), {**quiz(2), "options": ["x", empty]}]
    each = CHOICE.replace('"{{ options }}"', '["{{ options[0] }}", "{{ options[1] }}"]')
    for text in (CHOICE, each):
        task = write_task(tmp_path, text + more, rows=rows, shots=rows)
        with pytest.raises(SlimError, match=r"rows.jsonl, line 2: choice 2 of 2 is empty"):
            build_questions(task, load_rows(task))
        with pytest.raises(SlimError, match=r"few-shot row 2 of .*: choice 2 of 2 is empty"):
            build_questions(task, TaskRows([quiz(3)], load_rows(task).shots, "", ""), 2)


def test_a_list_of_right_answers_shows_its_first_in_an_example(tmp_path: Path) -> None:
    task = write_task(tmp_path, CHOICE, rows=[quiz(1, ["x", 0, 1])], shots=[quiz(2, [1, 0])])
    (question,) = build_questions(task, load_rows(task), 1)
    assert (question.target, question.others, question.targets) == (1, (0,), (1, 0))
    assert question.context == "Q: what is 2?\nA: x\n\nQ: what is 1?\nA:"
    rows = [{"prompt": f"p{n}", "completion": [f"c{n}", n, f"c{n}"]} for n in range(2)]
    task = write_task(tmp_path, GENERATION, rows=rows)
    first, second = build_questions(task, load_rows(task), 1)
    assert (first.targets, second.targets) == (("c0", "0"), ("c1", "1"))
    assert second.context == "p0 c0\n\np1"


@pytest.mark.parametrize(
    "target",
    ["'{{ options }}'", "'{{ options | map(\"lower\") }}'", "['{{ options[0] }}', x]"],
)
def test_right_answers_are_a_list_a_filter_or_templates(tmp_path: Path, target: str) -> None:
    text = "kind: generation\ndata: {path: rows.jsonl}\nfields: {question: text}\nprompt: '?'\n"
    task = write_task(tmp_path, f"{text}target: {target}\n", rows=[quiz(1)])
    task_rows = load_rows(task)
    assert build_questions(task, task_rows)[0].targets == ("n1", "x")
    write_rows(tmp_path / "rows.jsonl", [{**quiz(1), "answer": 1}])
    assert load_rows(task).checksum == task_rows.checksum  # no template reads the answer
    write_rows(tmp_path / "rows.jsonl", [{**quiz(1), "options": ["n2", "x"]}])
    assert load_rows(task).checksum != task_rows.checksum


def test_macro_f1_needs_one_right_choice(tmp_path: Path) -> None:
    task = write_task(tmp_path, CHOICE + "metrics: [acc, macro_f1]\n", rows=[quiz(1, [0, 1])])
    with pytest.raises(SlimError, match=r"line 1: the target is \[0, 1\]: macro_f1 needs one"):
        build_questions(task, load_rows(task))


def test_templates_keep_their_last_line_break_and_choices_may_be_templates(tmp_path: Path) -> None:
    text = CHOICE.replace("\\nA:", "\\n").replace('"{{ options }}"', '[1, "{{ options[1] }}!"]')
    (question,) = _questions(write_task(tmp_path, text), [quiz(1)])
    assert question.context == "Q: what is 1?\n"
    assert question.choices == (" 1", " x!")


def test_a_chat_template_goes_around_and_takes_the_delimiter(tmp_path: Path) -> None:
    text = CHOICE + "description: Be {{ question[0] }}.\n"
    task = write_task(tmp_path, text)
    chat = Chat(lambda system, user: f"<s>{system}</s><u>{user}</u>")
    (question,) = _questions(task, [quiz(1)], [quiz(2)], 1, chat=chat)
    assert question.context == "<s>Be w.</s><u>Q: what is 2?\nA: n2\n\nQ: what is 1?\nA:</u>"
    assert question.choices == ("n1", "x")
    (question,) = _questions(task, [quiz(1)])
    assert question.context == "Be w.Q: what is 1?\nA:"


def test_chat_prompts_are_the_training_prompts(tiny: Callable[..., Path], tmp_path: Path) -> None:
    from mlx_slim.data.templates import load_template
    from mlx_slim.models.load import load_tokenizer

    tokenizer = load_tokenizer(tiny())
    task = find_task("demo_exact_match")
    chat = Chat.of(load_template("auto", tokenizer))
    assert chat.renders_bos
    first = build_questions(task, load_rows(task), limit=1, chat=chat)[0]
    messages = [
        {"role": "system", "content": task.spec.description},
        {"role": "user", "content": load_rows(task).rows[0]["prompt"]},
    ]
    expected = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert first.context == expected
    tokenizer._tokenizer.chat_template = None
    plain = Chat.of(load_template("auto", tokenizer))
    first = build_questions(task, load_rows(task), limit=1, chat=plain)[0]
    assert first.context == f"{task.spec.description}\n\n{messages[1]['content']}"
    assert not plain.renders_bos


def test_generation_rows_of_a_users_task(tmp_path: Path) -> None:
    rows = [{"prompt": f"p{n}", "completion": f"c{n}"} for n in range(3)]
    task = write_task(tmp_path, GENERATION, rows=rows)
    contexts = [q.context for q in build_questions(task, load_rows(task), 0)]
    assert contexts == ["p0", "p1", "p2"]
    assert Selection(task, 0).task.name == "mine"


@pytest.mark.parametrize(
    ("key", "text"), [("prompt", "question"), ("target", "answer"), ("choices", "[x, options]")]
)
def test_the_bare_name_of_a_field_is_refused_as_a_text_of_every_row(
    tmp_path: Path, key: str, text: str
) -> None:
    lines = [line for line in CHOICE.splitlines() if not line.startswith(f"{key}:")]
    task = write_task(tmp_path, "\n".join([*lines, f"{key}: {text}"]), rows=[quiz(1)])
    name = {"choices": "options"}.get(key, text)
    with pytest.raises(SlimError, match=f"{key} is the text '{name}' for every row") as refused:
        _questions(task, [quiz(1)])
    assert refused.value.hint.endswith(f'write "{{{{ {name} }}}}"')


def test_a_text_of_every_row_that_is_no_field_stays(tmp_path: Path) -> None:
    text = CHOICE.replace('"{{ options }}"', "[yes, no]").replace('"{{ answer }}"', "yes")
    (question,) = _questions(write_task(tmp_path, text, rows=[quiz(1)]), [quiz(1)])
    assert (question.choices, question.target) == ((" yes", " no"), 0)
