"""Records and figures: acc_norm by characters, ties, standard errors, pooling, macro F1."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mlx_slim.errors import SlimError
from mlx_slim.evaluation.figures import Figure
from mlx_slim.evaluation.tasks.metrics import (
    pooled_stderr,
    record_choice,
    record_generation,
    stderr,
    summarize,
)
from mlx_slim.evaluation.tasks.prompts import Question
from mlx_slim.evaluation.tasks.spec import find_task
from tests.evaluation.support import GENERATION, write_task


def _question(texts: Any, target: Any = 0, subject: Any = None, doc_id: Any = 0):
    choices = tuple(f" {text}" for text in texts)
    return Question(doc_id, subject, "c", choices, tuple(map(len, texts)), target)


def test_a_record_has_the_agreed_shape() -> None:
    question = _question(["a" * 10, "b" * 40, "cc"], target=1)
    record = record_choice(
        find_task("hellaswag"), question, [-10.0, -20.0, -9.0], [False, False, True]
    )
    assert record == {
        "doc_id": 0, "loglikelihoods": [-10.0, -20.0, -9.0], "greedy": [False, False, True],
        "prediction": 2, "target": 1, "acc": 0, "acc_norm": 1,
    }  # fmt: skip
    record = record_choice(
        find_task("mmlu"), _question("ab", 0, "anatomy", 3), [-1, -2], [True, False]
    )
    assert (record["doc_id"], record["subject"], record["acc"]) == (3, "anatomy", 1)
    assert "acc_norm" not in record


def test_acc_norm_divides_by_characters_not_bytes() -> None:
    question = _question(["éé", "abc"], target=0)  # 2 and 3 characters, 4 and 3 bytes
    record = record_choice(find_task("arc_easy"), question, [-3.0, -4.0], [False, False])
    assert (record["acc"], record["acc_norm"]) == (1, 0)  # -1.5 against -1.33
    record = record_choice(find_task("arc_easy"), question, [-3.0, -5.0], [False, False])
    assert record["acc_norm"] == 1  # by bytes it would be wrong: -0.75 against -1.67 either way
    record = record_choice(
        find_task("arc_easy"), _question(["éé", "abc"], 1), [-3.0, -4.0], [False, False]
    )
    assert record["acc_norm"] == 1  # by bytes -0.75 would win


def test_the_first_of_equals_wins() -> None:
    record = record_choice(find_task("mmlu"), _question("abcd", 1), [-2, -1, -1, -1], [False] * 4)
    assert (record["prediction"], record["acc"]) == (1, 1)
    infinite = [float("-inf")] * 2
    assert (
        record_choice(find_task("mmlu"), _question("ab"), infinite, [False, False])["prediction"]
        == 0
    )


def test_any_of_several_right_choices_counts() -> None:
    question = replace(_question(["a" * 10, "b" * 40, "cc"], target=1), others=(2,))
    record = record_choice(
        find_task("hellaswag"), question, [-10.0, -20.0, -9.0], [False, False, True]
    )
    assert (record["prediction"], record["acc"], record["acc_norm"]) == (2, 1, 1)
    assert json.loads(json.dumps(record)) == record and record["target"] == [1, 2]
    record = record_choice(
        find_task("hellaswag"), question, [-1.0, -20.0, -9.0], [True, False, False]
    )
    assert (record["acc"], record["acc_norm"]) == (0, 0)


@pytest.mark.parametrize(("text", "right"), [(" paris.", 1), ("PARIS, France", 1), ("Lyon", 0)])
def test_any_of_several_right_texts_counts(tmp_path: Path, text: str, right: int) -> None:
    settings = "ignore_case: true\nignore: ['\\.']\nmetrics: [exact_match, word_match]\n"
    settings += "filters: {word: {pattern: '(\\w+)'}}\n"
    task = write_task(tmp_path, GENERATION + settings)
    question = Question(0, None, "c", (), (), "Paris", ("Paris, France.",))
    record = record_generation(task, question, text, "eos")
    assert record["target"] == ["paris", "paris, france"]
    assert (record["exact_match"], record["word_match"]) == (right, right)


def test_any_of_several_right_values_counts(tmp_path: Path) -> None:
    task = write_task(tmp_path, GENERATION + "metrics: [json_match]\n")
    question = Question(0, None, "c", (), (), '{"a": 1, "b": 2}', ("[1]",))
    answers = ('{"b":2,"a":1}', "[ 1 ]", "[2]", "null", "no")
    records = [record_generation(task, question, text, "eos") for text in answers]
    assert [record["json_match"] for record in records] == [1, 1, 0, 0, 0]


def test_nan_is_refused() -> None:
    with pytest.raises(SlimError, match="question 7: a log-likelihood is not a number"):
        record_choice(
            find_task("mmlu"), _question("ab", doc_id=7), [-1, float("nan")], [False, False]
        )
    with pytest.raises(ValueError, match="1 log-likelihoods for 2"):
        record_choice(find_task("mmlu"), _question("ab"), [-1], [False])


def test_stderr_is_the_sample_s() -> None:
    values = [1] * 46 + [0] * 54
    mean = sum(values) / 100
    sample = math.sqrt(sum((v - mean) ** 2 for v in values) / 99) / math.sqrt(100)
    assert stderr(46, 100) == pytest.approx(sample, abs=1e-15)
    assert stderr(46, 100) == pytest.approx(0.0500908, abs=1e-7)
    assert stderr(0, 10) == stderr(10, 10) == 0.0
    assert stderr(1, 1) is None and stderr(0, 0) is None


def test_pooled_stderr_is_that_of_the_pooled_variance() -> None:
    # parts of 3 and 5 questions, 2 and 1 right
    variances = [1 / 3, 0.2]  # sample variances: p(1-p)·n/(n-1)
    errors = [math.sqrt(v / n) for v, n in zip(variances, (3, 5), strict=True)]
    pooled = (2 * variances[0] + 4 * variances[1]) / 6
    assert pooled_stderr(errors, [3, 5]) == pytest.approx(math.sqrt(pooled / 8), abs=1e-15)
    assert pooled_stderr([None, 0.1], [1, 5]) == pytest.approx(
        math.sqrt(4 * 5 * 0.01 / 4 / 6), abs=1e-15
    )
    assert pooled_stderr([None, None], [1, 1]) is None
    assert pooled_stderr([errors[0]], [3]) == pytest.approx(errors[0], abs=1e-15)


def _mmlu(**rights: list[int]):
    return [
        {"doc_id": n, "subject": subject, "prediction": 0, "target": 1 - right, "acc": right}
        for subject, answers in rights.items()
        for n, right in enumerate(answers)
    ]


def test_mmlu_is_pooled_by_subject_category_and_over_all() -> None:
    records = _mmlu(
        anatomy=[1, 1, 0, 1], astronomy=[0, 1], philosophy=[0, 0, 0], virology=[1, 0, 1, 0, 1]
    )
    summary = summarize(find_task("mmlu"), records)
    assert summary.n == 14
    assert summary.groups is not None
    subtasks, whole = summary.groups.subtasks, summary.groups.whole
    assert list(subtasks) == ["anatomy", "astronomy", "philosophy", "virology"]
    anatomy = subtasks["anatomy"]
    assert (anatomy.n, anatomy.category, anatomy.metrics["acc"].k) == (4, "stem", 3)
    assert anatomy.metrics["acc"].stderr == pytest.approx(0.25, abs=1e-15)
    micro, macro = whole.micro["acc"], whole.macro["acc"]
    assert (micro.k, micro.value) == (7, 0.5)
    assert summary.metrics == whole.micro
    assert macro.value == pytest.approx((0.75 + 0.5 + 0 + 0.6) / 4, abs=1e-15)
    errors = [part.metrics["acc"].stderr or 0.0 for part in subtasks.values()]
    assert micro.stderr == pooled_stderr(errors, [4, 2, 3, 5])
    assert macro.stderr == pytest.approx(math.hypot(*errors) / 4, abs=1e-15)
    stem = summary.groups.categories["stem"]
    assert (stem.n, stem.micro["acc"].k) == (6, 4)
    assert stem.macro["acc"].value == pytest.approx(0.625, abs=1e-15)
    assert set(summary.groups.categories) == {"stem", "humanities", "other"}


def test_one_question_a_subject_has_no_standard_error() -> None:
    summary = summarize(find_task("mmlu"), _mmlu(anatomy=[1], virology=[0]))
    assert summary.groups is not None
    assert summary.groups.whole.micro["acc"] == Figure(0.5, None, 1)
    assert summary.groups.whole.macro["acc"].stderr is None
    assert summarize(find_task("mmlu"), []).n == 0


def test_a_subject_alone_is_a_plain_task() -> None:
    summary = summarize(find_task("mmlu_anatomy"), _mmlu(anatomy=[1, 0]))
    assert summary.as_json() == {
        "n": 2,
        "metrics": {"acc": {"value": 0.5, "stderr": 0.5, "k": 1}},
    }


def _pairs(pairs: Any):
    return [{"target": t, "prediction": p, "acc": int(t == p)} for t, p in pairs]


def _slow_f1(pairs: Any):
    classes = {value for pair in pairs for value in pair}
    scores = []
    for c in classes:
        hit = sum(t == c and p == c for t, p in pairs)
        precision = hit / max(1, sum(p == c for _, p in pairs))
        recall = hit / max(1, sum(t == c for t, _ in pairs))
        scores.append(2 * precision * recall / (precision + recall) if hit else 0.0)
    return sum(scores) / len(scores)


@pytest.mark.parametrize("seed", range(5))
def test_macro_f1_and_its_jackknife(seed: Any) -> None:
    rng = random.Random(seed)
    pairs = [(rng.choice([0, 0, 0, 1, 2]), rng.choice([0, 0, 1])) for _ in range(20)]
    figure = summarize(find_task("pubmedqa"), _pairs(pairs)).metrics["macro_f1"]
    assert figure.value == pytest.approx(_slow_f1(pairs), abs=1e-12)
    without = [_slow_f1(pairs[:i] + pairs[i + 1 :]) for i in range(20)]
    mean = sum(without) / 20
    spread = math.sqrt(19 / 20 * sum((value - mean) ** 2 for value in without))
    assert figure.stderr == pytest.approx(spread, abs=1e-12)
    assert figure.k is None


def test_macro_f1_of_reference_cases() -> None:
    def value(pairs: Any):
        return summarize(find_task("pubmedqa"), _pairs(pairs)).metrics["macro_f1"].value

    assert value([(0, 0), (1, 1), (2, 2)]) == 1.0
    assert value([(0, 0), (1, 1)]) == 1.0  # a class that never occurs does not count
    assert value([(0, 0), (0, 0), (1, 0)]) == pytest.approx(0.4, abs=1e-15)
    assert value([]) == 0.0
