"""Prompts as lm-evaluation-harness builds them, with its own task files over rows written here.

Needs the extra ``bench``; skipped without it. Run: ``python -m pytest tests/parity``.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from mlx_lm.tokenizer_utils import load as load_tokenizer

from mlx_slim.data.tokenize import unwrap
from mlx_slim.evaluation.scoring.requests import RequestEncoder
from mlx_slim.evaluation.tasks.metrics import record_choice, record_generation
from mlx_slim.evaluation.tasks.prompts import Chat, build_questions
from mlx_slim.evaluation.tasks.question import Question
from mlx_slim.evaluation.tasks.rows import TaskRows, load_rows
from mlx_slim.evaluation.tasks.spec import HARNESS, find_task
from tests.evaluation.support import write_task
from tests.support.tiny import CHATML, byte_tokenizer

lm_eval: Any = pytest.importorskip("lm_eval", reason="needs the extra bench")

ROWS = 7


def _gsm8k(number: int) -> dict[str, Any]:
    return {
        "question": f"Ann has {number} coins and finds {number}. How many?",
        "answer": f"{number}+{number}\n#### {2 * number}",
    }


def _arc(number: int) -> dict[str, Any]:
    choices = {"text": [f"a{number}", f"b{number}", "c"], "label": ["A", "B", "C"]}
    return {
        "id": str(number),
        "question": f"Which of {number}?",
        "choices": choices,
        "answerKey": "ABC"[number % 3],
    }


def _hellaswag(number: int) -> dict[str, Any]:
    return {
        "activity_label": f"Task {number}",
        "ctx_a": f"She takes {number} [title] cups.",
        "ctx_b": "then she",
        "ctx": "",
        "endings": [f"pours [x] {number}.", "sleeps.", "runs  away.", "sings."],
        "label": str(number % 4),
    }


def _openbookqa(number: int) -> dict[str, Any]:
    choices = {"text": [f"a {number}", "b", "c c"], "label": ["A", "B", "C"]}
    return {
        "id": str(number),
        "question_stem": f"The sun of {number} is",
        "choices": choices,
        "answerKey": "ABC"[number % 3],
    }


def _mmlu(number: int) -> dict[str, Any]:
    return {
        "question": f" Which bone is {number}? ",
        "subject": "anatomy",
        "choices": [f"the {number}th", "none", "all ", "some"],
        "answer": number % 4,
    }


def _boolq(number: int) -> dict[str, Any]:
    passage = f"The river of {number} flows north. It is long."
    return {"question": f"is {number} north", "passage": passage, "label": number % 2}


def _piqa(number: int) -> dict[str, Any]:
    goal, first = f"To open box {number},", f"pull {number} times"
    return {"goal": goal, "sol1": first, "sol2": "sing", "label": number % 2}


def _winogrande(number: int) -> dict[str, Any]:
    sentence = f"The cup of {number} did not fit into the box because the _ was too large_{number}."
    return {
        "sentence": sentence,
        "option1": "cup",
        "option2": f"box {number}",
        "answer": "12"[number % 2],
    }


TASKS = {
    "gsm8k": ("gsm8k/gsm8k.yaml", _gsm8k, "test", 5),
    "arc_challenge": ("arc/arc_easy.yaml", _arc, "test", 25),
    "hellaswag": ("hellaswag/hellaswag.yaml", _hellaswag, "validation", 10),
    "openbookqa": ("openbookqa/openbookqa.yaml", _openbookqa, "test", 5),
    "boolq": ("super_glue/boolq/default.yaml", _boolq, "validation", 3),
    "piqa": ("piqa/piqa.yaml", _piqa, "validation", 3),
    "winogrande": ("winogrande/default.yaml", _winogrande, "validation", 3),
    "mmlu_anatomy": ("mmlu/default/mmlu_anatomy.yaml", _mmlu, "test", 5),  # it has a description
}


Pairs = list[list[tuple[str, str]]]


def _ours(questions: list[Question]) -> Pairs:
    """Return context and continuation of each choice of each question."""
    return [question.pairs or [(question.context, "")] for question in questions]


def _theirs(name: str, shots: int, rows: dict[str, list[dict]], **chat: Any) -> Pairs:
    """Return the same, built by the harness; a generated answer's continuation is empty."""
    import datasets
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks._yaml_loader import load_yaml

    class Local(ConfigurableTask):
        def download(self, *_: Any, **__: Any) -> None:
            self.dataset = {s: datasets.Dataset.from_list(r) for s, r in rows.items()}

    file = Path(lm_eval.__file__).parent / "tasks" / TASKS[name][0]
    task = Local(config=load_yaml(file))
    task.set_config("num_fewshot", shots)
    task.set_fewshot_seed(1234)
    task.build_all_requests(**chat)
    pairs: dict[int, list[tuple[str, str]]] = {}
    for instance in task.instances:
        before, after = instance.args
        pairs.setdefault(instance.doc_id, []).append(
            (before, after if isinstance(after, str) else "")
        )
    return [pairs[number] for number in range(ROWS)]


def write_task_rows(folder: Path, name: str) -> dict[str, list[dict[str, Any]]]:
    """Write rows of a task as a data mirror holds them; return them by split."""
    _, make, split, _ = TASKS[name]
    task = find_task(name)
    rows = {split: [make(i) for i in range(ROWS)]}
    rows[str(task.spec.data.shots)] = [make(100 + i) for i in range(140)]
    for part, records in rows.items():
        file = folder / task.spec.name / f"{part}.jsonl"
        file.parent.mkdir(exist_ok=True)
        file.write_text("".join(json.dumps(row) + "\n" for row in records))
    return rows


@pytest.mark.parametrize("name", list(TASKS))
def test_examples_and_prompts(tmp_path: Path, name: str) -> None:
    shots = TASKS[name][3]
    rows = write_task_rows(tmp_path, name)
    task = find_task(name)
    ours = build_questions(task, load_rows(task, tmp_path, HARNESS), shots, sampling=HARNESS)
    assert _ours(ours) == _theirs(name, shots, rows)


TEMPLATES = {
    "chatml": CHATML,
    "no-system": "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}"
    + CHATML,
    "bos": "{{ bos_token }}" + CHATML,
    "gemma": "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no') }}"
    "{% endif %}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('no') }}{% endif %}<s>{{ m['role'] }}\n{{ m['content'] | trim }}</s>\n"
    "{% endfor %}{% if add_generation_prompt %}<s>model\n{% endif %}",
    "mistral": "{{ bos_token }}{% set rest = messages %}{% set system = '' %}"
    "{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}"
    "{% set system = messages[0]['content'] %}{% endif %}{% for m in rest %}"
    "{% if m['role'] == 'user' %}[INST] {{ system if loop.first else '' }}{{ m['content'] }}"
    " [/INST]{% else %}{{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}",
}


def _tokenizer(folder: Path, template: str) -> Any:
    byte_tokenizer(folder / "t", chat_template=TEMPLATES[template], bos=True)
    return load_tokenizer(folder / "t")


def _harness_model(tokenizer: Any) -> Any:
    """Return the harness's own model around ``tokenizer``, without weights."""
    from lm_eval.models.huggingface import HFLM

    model = HFLM.__new__(HFLM)
    model.tokenizer, model.chat_template_args = tokenizer, {}
    model.add_bos_token, model.custom_prefix_token_id = None, None
    return model


@pytest.mark.parametrize("multiturn", [True, False])
@pytest.mark.parametrize("template", list(TEMPLATES))
@pytest.mark.parametrize("name", list(TASKS))
def test_chat_prompts(tmp_path: Path, name: str, template: str, multiturn: bool) -> None:
    tokenizer = _tokenizer(tmp_path, template)
    hf = unwrap(tokenizer)
    theirs = _harness_model(hf)
    rows = write_task_rows(tmp_path, name)
    spec = find_task(name)
    chat = Chat.of_model(hf, multiturn, [])
    ours = build_questions(spec, load_rows(spec, tmp_path, HARNESS), 2, chat=chat, sampling=HARNESS)
    expected = _theirs(
        name,
        2,
        rows,
        apply_chat_template=True,
        fewshot_as_multiturn=multiturn,
        chat_template=theirs.apply_chat_template,
    )
    assert _ours(ours) == expected
    encoder = RequestEncoder(tokenizer, 10_000)
    for question in ours[:2]:
        assert list(encoder.encode(question.context)) == theirs.tok_encode(question.context)


@pytest.mark.parametrize("system", ["Be brief.", "Be brief.\n"])
@pytest.mark.parametrize("multiturn", [True, False])
@pytest.mark.parametrize("template", ["chatml", "bos", "mistral"])
@pytest.mark.parametrize("name", ["openbookqa", "mmlu_anatomy"])  # without and with a description
def test_system_messages(
    tmp_path: Path, name: str, template: str, multiturn: bool, system: str
) -> None:
    hf = unwrap(_tokenizer(tmp_path, template))
    rows = write_task_rows(tmp_path, name)
    task = find_task(name)
    chat = Chat.of_model(hf, multiturn, []).with_system(system)
    ours = build_questions(task, load_rows(task, tmp_path, HARNESS), 2, chat=chat, sampling=HARNESS)
    expected = _theirs(
        name,
        2,
        rows,
        system_instruction=system,
        apply_chat_template=True,
        fewshot_as_multiturn=multiturn,
        chat_template=_harness_model(hf).apply_chat_template,
    )
    assert _ours(ours) == expected


def _harness_task(rows: list[dict[str, Any]], **keys: Any) -> Any:
    import datasets
    from lm_eval.api.task import ConfigurableTask

    class Local(ConfigurableTask):
        def download(self, *_: Any, **__: Any) -> None:
            self.dataset = {"test": datasets.Dataset.from_list(rows)}

    common = {"task": "mine", "test_split": "test", "dataset_path": "x", "doc_to_text": "{{q}}"}
    return Local(config={**common, **keys})


LISTED = [
    {"q": "a", "options": ["r", "gg", "bbb"], "places": [0, 2], "texts": ["Paris", "paris."]},
    {"q": "b", "options": ["r", "gg", "bbb"], "places": [1], "texts": ["Lyon"]},
]


@pytest.mark.parametrize("number", [0, 1])
def test_lists_of_right_choices(tmp_path: Path, number: int) -> None:
    theirs = _harness_task(
        LISTED,
        output_type="multiple_choice",
        doc_to_choice="{{options}}",
        doc_to_target="{{places}}",
        metric_list=[{"metric": "acc"}, {"metric": "acc_norm"}],
    )
    keys = "kind: multiple_choice\nprompt: '{{ q }}'\nchoices: '{{ options }}'\n"
    task = write_task(tmp_path, keys + "target: '{{ places }}'\n")
    question = build_questions(task, TaskRows(LISTED, [], "", ""))[number]
    for values in ([-1.0, -9.0, -9.0], [-9.0, -1.0, -9.0], [-9.0, -9.0, -1.0], [-2.0, -2.0, -2.0]):
        actual = record_choice(task, question, values, [False] * 3)
        expected = theirs.process_results(LISTED[number], [(value, False) for value in values])
        assert {key: actual[key] for key in ("acc", "acc_norm")} == expected


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("ignore_case", [True, False])
def test_lists_of_right_texts(tmp_path: Path, number: int, ignore_case: bool) -> None:
    metric = {"metric": "exact_match", "ignore_case": ignore_case, "regexes_to_ignore": [r"\."]}
    theirs = _harness_task(
        LISTED,
        output_type="generate_until",
        doc_to_target="{{texts}}",
        metric_list=[metric],
        generation_kwargs={"until": ["\n"]},
    )
    keys = "kind: generation\nprompt: '{{ q }}'\ntarget: '{{ texts }}'\nignore: ['\\.']\n"
    task = write_task(tmp_path, f"{keys}ignore_case: {str(ignore_case).lower()}\n")
    question = build_questions(task, TaskRows(LISTED, [], "", ""))[number]
    for text in ("Paris", "paris", "PARIS.", "Lyon", "lyon", ""):
        actual = record_generation(task, question, text, "eos")
        assert (
            actual["exact_match"] == theirs.process_results(LISTED[number], [text])["exact_match"]
        )
