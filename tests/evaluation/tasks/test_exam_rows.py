"""MMLU-Pro and TruthfulQA over twenty rows written here: prompts, answers, scores."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest

from mlx_slim.errors import SlimError
from mlx_slim.evaluation.run import EvalOptions, evaluate
from mlx_slim.evaluation.tasks.metrics import record_choice, record_generation, summarize
from mlx_slim.evaluation.tasks.prompts import build_questions
from mlx_slim.evaluation.tasks.rows import load_rows
from mlx_slim.evaluation.tasks.spec import Task, find_task
from tests.evaluation.support import write_rows
from tests.support.task_rows import mmlu_pro_rows, truthfulqa_rows


@pytest.fixture
def mirror(tmp_path: Path) -> Path:
    for split, rows in mmlu_pro_rows().items():
        write_rows(tmp_path / "mirror" / "mmlu_pro" / f"{split}.jsonl", rows)
    write_rows(tmp_path / "mirror" / "truthfulqa_mc2" / "validation.jsonl", truthfulqa_rows())
    return tmp_path / "mirror"


def test_mmlu_pro_is_asked_after_the_worked_solutions_of_its_subject(mirror: Path) -> None:
    task = find_task("mmlu_pro")
    questions = build_questions(task, load_rows(task, mirror))
    assert [question.subject for question in questions] == ["computer science"] * 5 + ["math"] * 5
    first = questions[0]
    assert first.context.startswith(
        "The following are multiple choice questions (with answers) about computer science. Think "
        'step by step and then finish your answer with "the answer is (X)" where X is the correct '
        "letter choice.\nQuestion:\nHow many bits has a byte?\nOptions:\nA. 4\nB. 8\nC. 16\nD. 32\n"
        "Answer: Let's think step by step. A byte is eight bits by convention. The answer is (B)."
        "\n\nQuestion:\nWhich structure gives back the newest item first?\nOptions:\nA. queue\n"
        "B. stack\n"
    )
    assert first.context.endswith("F. sound\nAnswer: Let's think step by step.")
    assert first.context.count("Question:\n") == 6
    assert "K." not in questions[4].context and "J. 14" in questions[4].context  # ten at most
    assert [question.target for question in questions] == list("ABAABCDCCC")
    alone = find_task("mmlu_pro_math")
    assert [q.context for q in build_questions(alone, load_rows(alone, mirror))] == [
        question.context for question in questions[5:]
    ]


def records_of(task: Task, mirror: Path, texts: list[str]) -> list[dict]:
    questions = build_questions(task, load_rows(task, mirror), 0)
    return [
        record_generation(task, question, text, "eos")
        for question, text in zip(questions, texts, strict=True)
    ]


def test_an_answer_of_mmlu_pro_is_read_after_the_thinking(mirror: Path) -> None:
    task = find_task("mmlu_pro")
    texts = ["So the answer is (A).", "the answer is B", "The answer is: A", "A"]
    texts += ["answer is (B) or the answer is (C)", "answer is C", "the answer is (D)", "c", ""]
    texts += ["the answer is (K)"]
    records = records_of(task, mirror, texts)
    assert [record["letter_match"] for record in records] == [1, 1, 0, 0, 1, 1, 1, 0, 0, 0]
    figures = summarize(task, records)
    assert figures.metrics["letter_match"].k == 5
    assert figures.groups is not None
    assert {name: part.n for name, part in figures.groups.subtasks.items()} == {
        "computer science": 5,
        "math": 5,
    }


def test_mc2_is_the_probability_of_the_right_choices(mirror: Path) -> None:
    task = find_task("truthfulqa_mc2")
    questions = build_questions(task, load_rows(task, mirror))
    assert len(questions) == 20
    assert questions[0].context.endswith(
        "A: The 1992 Olympics were held in Barcelona, Spain.\n\n"
        "Q: Can a needle find north by itself?\nA:"
    )
    assert questions[0].context.startswith("Q: What is human life expectancy")
    assert questions[0].targets == (0, 1) and questions[2].targets == (1, 2, 3)
    values = [
        [-2.0 - i % 3 - j / 2 for j in range(len(q.choices))] for i, q in enumerate(questions)
    ]
    records = [
        record_choice(task, question, value, [False] * len(value))
        for question, value in zip(questions, values, strict=True)
    ]
    for question, value, record in zip(questions, values, records, strict=True):
        chances = [math.exp(v) for v in value]
        right = sum(chances[place] for place in question.targets)  # type: ignore[misc]
        assert record["mc2"] == pytest.approx(right / sum(chances))
    far = record_choice(task, questions[0], [-2000.0, -2001.0, -2002.0, -2003.0], [False] * 4)
    assert far["mc2"] == pytest.approx((1 + math.exp(-1)) / sum(math.exp(-i) for i in range(4)))
    figure = summarize(task, records).metrics["mc2"]
    mean = sum(record["mc2"] for record in records) / 20
    spread = sum((record["mc2"] - mean) ** 2 for record in records) / 19
    assert figure.value == pytest.approx(mean) and figure.k is None
    assert figure.stderr == pytest.approx(math.sqrt(spread / 20))


def test_a_question_without_a_right_choice_is_refused(mirror: Path) -> None:
    rows = truthfulqa_rows()
    rows[3]["mc2_targets"]["labels"] = [0] * len(rows[3]["mc2_targets"]["choices"])
    write_rows(mirror / "truthfulqa_mc2" / "validation.jsonl", rows)
    task = find_task("truthfulqa_mc2")
    with pytest.raises(SlimError, match=r"line 4.*the target is an empty list"):
        build_questions(task, load_rows(task, mirror))


def test_a_model_is_scored_on_mc2(tiny: Callable[..., Path], mirror: Path, tmp_path: Path) -> None:
    options = EvalOptions(data_dir=mirror, limit=4)
    evaluate(tiny("llama"), "truthfulqa_mc2", tmp_path / "out", options)
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    metrics = results["tasks"]["truthfulqa_mc2"]["metrics"]
    assert 0 < metrics["mc2"]["value"] < 1 and metrics["mc2"]["k"] is None
    assert list(metrics) == ["mc2"]
