"""Records of an evaluation: what is written is read, what is damaged is named, 0.1 is read."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mlx_slim.errors import SlimError
from mlx_slim.evaluation.figures import Figure, GroupFigures, Groups, SubtaskFigures, TaskSummary
from mlx_slim.evaluation.records import EvalResults, QuestionSet, TaskSection

V0_1 = Path(__file__).parents[1] / "fixtures" / "v0_1"
QUESTIONS: dict[str, Any] = {
    "task_version": 1,
    "num_fewshot": 5,
    "limit": None,
    "rows_sha256": "a",
    "shots_sha256": "b",
    "fewshot_sampling": "first",
    "definition_sha256": "c",
    "n": 4,
}
ONE = Figure(0.5, 0.25, 2)
GROUPS = Groups(
    GroupFigures(4, {"acc": ONE}, {"acc": Figure(0.5)}),
    {"stem": GroupFigures(4, {"acc": ONE}, {"acc": Figure(0.5, 0.25)})},
    {"anatomy": SubtaskFigures(4, {"acc": ONE}, "stem")},
)


def test_a_section_is_read_as_it_is_written() -> None:
    summary = TaskSummary(4, {"acc": ONE}, GROUPS)
    section = json.loads(json.dumps({**QUESTIONS, **summary.as_json(), "truncated": 3}))
    assert list(summary.as_json()) == [
        "n", "metrics", "micro", "macro", "categories", "subtasks"
    ]  # fmt: skip
    read = TaskSection.read(section, "results.json: mmlu")
    assert read.questions.as_json() == QUESTIONS
    assert (read.metrics, read.micro, read.truncated) == ({"acc": ONE}, {"acc": ONE}, 3)
    assert read.macro == {"acc": Figure(0.5)}
    assert read.categories == GROUPS.categories
    plain = TaskSection.read({**QUESTIONS, "metrics": {}}, "results.json: toy")
    assert (plain.micro, plain.macro, plain.categories) == (None, None, {})


def test_two_sets_of_questions_name_what_differs() -> None:
    one = QuestionSet.read(QUESTIONS, "a")
    assert one.differing(one) == []
    assert one.differing(replace(one, limit=3, rows_sha256="z")) == ["limit", "rows_sha256"]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"n": 0}, "n is 0, expected a whole number from 1"),
        ({"rows_sha256": 3}, "rows_sha256 is 3, expected a string"),
        ({"metrics": {"acc": {"value": "x"}}}, "metrics.acc: value is 'x', expected a number"),
        ({"metrics": {"acc": {}}}, "metrics.acc has no 'value'"),
        ({"metrics": [1]}, r"metrics is \[1\], expected an object"),
        ({"categories": {"stem": {"micro": {}}}}, "stem has no 'n'"),
    ],
)
def test_a_wrong_value_is_named_with_file_and_task(change: dict[str, Any], text: str) -> None:
    results = {"model": "m", "tasks": {"toy": {**QUESTIONS, "metrics": {}, **change}}}
    with pytest.raises(SlimError, match=f"results.json: 'toy'.*{text}"):
        EvalResults.read(results, "results.json")


def test_results_of_0_1_are_read() -> None:
    folder = V0_1 / "matrix" / "cells" / "toy-base" / "eval"
    values = json.loads((folder / "toytask" / "results.json").read_text())
    results = EvalResults.read(values, "results.json")
    section = results.tasks["toytask"]
    assert section.questions.fewshot_sampling is None
    assert {name: figure.value for name, figure in section.metrics.items()} == {
        name: figure["value"] for name, figure in values["tasks"]["toytask"]["metrics"].items()
    }
    assert results.text is None
    text = json.loads((folder / "held_out" / "results.json").read_text())
    scored = EvalResults.read(text, "results.json").text
    assert scored is not None
    bits = text["perplexity"]["metrics"]["bits_per_byte"]["value"]
    assert scored.metrics["bits_per_byte"] == Figure(bits)
