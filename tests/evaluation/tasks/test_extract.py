"""Answers out of generated text: golden strings for GSM8K's two filters, exact and JSON match."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mlx_slim.config.task import Filter
from mlx_slim.evaluation.figures import Figure
from mlx_slim.evaluation.tasks.extract import NO_ANSWER, extract, normalize, same_json
from mlx_slim.evaluation.tasks.metrics import record_generation, summarize
from mlx_slim.evaluation.tasks.prompts import Question
from mlx_slim.evaluation.tasks.spec import find_task
from tests.evaluation.support import GENERATION, write_task

GSM8K = find_task("gsm8k")

# text, what the strict filter reads, what the flexible filter reads; both as compared
GOLDEN = [
    ("She makes 9 * 2 = $18.\n#### 18", "18", "18"),
    ("#### 1,234", "1234", "1234"),
    ("#### -5", "-5", "-5"),
    ("#### $18", NO_ANSWER, "18"),
    ("####18", NO_ANSWER, "18"),
    ("#### 18.", "18", "18"),
    ("#### 18.00", "18.00", "18.00"),
    ("#### 18\n#### 20", "18", "20"),
    ("The answer is 18", NO_ANSWER, "18"),
    ("The answer is $1,800.50.", NO_ANSWER, "1800.50"),
    ("It costs 5 dollars, or 6", NO_ANSWER, "6"),
    ("from 10 to 2.", NO_ANSWER, "2"),  # "2." is one match, its stop is ignored
    ("x = -3", NO_ANSWER, "-3"),
    ("no number", NO_ANSWER, NO_ANSWER),
    ("that is all...", NO_ANSWER, ".."),
    ("", NO_ANSWER, NO_ANSWER),
]


@pytest.mark.parametrize(("text", "strict", "flexible"), GOLDEN)
def test_gsm8k_golden_strings(text: Any, strict: Any, flexible: Any) -> None:
    filters = GSM8K.spec.filters
    assert normalize(GSM8K.spec, extract(filters["strict"], text)) == strict
    assert normalize(GSM8K.spec, extract(filters["flexible"], text)) == flexible


@pytest.mark.parametrize(
    ("target", "compared"),
    [
        ("Janet sells 16 - 3 = <<16-3=13>>13.\nShe makes $18.\n#### 18", "18"),
        ("long\n#### 1,234", "1234"),
        ("#### 2.50", "2.50"),
        ("a #### 1\n#### 7.", "7"),
    ],
)
def test_gsm8k_targets_lose_their_working(target: str, compared: str) -> None:
    assert normalize(GSM8K.spec, target) == compared


def test_a_gsm8k_record_has_the_agreed_shape() -> None:
    question = Question(0, None, "Question: …\nAnswer:", (), (), "So\n#### 18")
    record = record_generation(GSM8K, question, "It is $18\n#### 17", "until")
    assert record == {
        "doc_id": 0, "generation": "It is $18\n#### 17", "stop_reason": "until",
        "strict": "17", "flexible": "17", "target": "18", "strict_match": 0, "flexible_match": 0,
    }  # fmt: skip
    right = record_generation(GSM8K, question, "It is 18.", "eos")
    assert (right["strict"], right["strict_match"], right["flexible_match"]) == (NO_ANSWER, 0, 1)
    summary = summarize(GSM8K, [record, right])
    assert summary.n == 2
    assert summary.metrics["flexible_match"] == Figure(0.5, 0.5, 1)
    assert summary.metrics["strict_match"].k == 0


def test_a_filter_takes_the_first_or_last_match_and_its_first_group() -> None:
    assert extract(Filter(pattern=r"\d"), "a1b2") == "1"
    assert extract(Filter(pattern=r"\d", take="last"), "a1b2") == "2"
    assert extract(Filter(pattern=r"x(a)?(b)?", take="last"), "xa xb") == "b"
    assert extract(Filter(pattern=r"x(a)?"), "x") == NO_ANSWER


def _record(task: Any, text: Any, target: Any):
    return record_generation(task, Question(0, None, "p", (), (), target), text, "eos")


def test_exact_and_json_match() -> None:
    task = find_task("demo_exact_match")
    target = '{"a":"1","b":null}'
    texts = (target, f" {target}\n", '{"b": null, "a": "1"}', '{"a":1,"b":null}', "sorry", "")
    records = [_record(task, text, target) for text in texts]
    assert [record["exact_match"] for record in records] == [1, 1, 0, 0, 0, 0]
    assert [record["json_match"] for record in records] == [1, 1, 1, 0, 0, 0]
    assert list(records[0]) == ["doc_id", "generation", "stop_reason", "target", "exact_match",
                                "json_match"]  # fmt: skip


def test_text_that_is_no_json_never_matches_as_json() -> None:
    assert not same_json("yes", "yes")
    assert not same_json("[" * 100_000, "[]")
    assert same_json('{"a": 1, "b": 2}', '{"b":2,"a":1}')
    assert not same_json('"1"', "1")


def test_case_and_patterns_are_ignored_on_both_sides(tmp_path: Path) -> None:
    task = write_task(tmp_path, GENERATION + "ignore_case: true\nignore: ['[.!]']\n")
    assert _record(task, "Paris!", "paris.")["exact_match"] == 1
    assert _record(task, "Paris?", "paris.")["exact_match"] == 0
