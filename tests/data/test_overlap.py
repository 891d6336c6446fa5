"""Evaluation questions in training rows are found and counted."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from mlx_slim.data.overlap import Checker, build_index
from mlx_slim.data.sources import RawRow
from tests.data.test_sources import ROWS, jsonl

QUESTION = "How many of the nine brown hens that live in the old red barn lay eggs?"


@pytest.fixture
def mirror(tmp_path: Path) -> Any:
    jsonl(tmp_path / "mirror" / "gsm8k" / "test.jsonl", [
        {"question": QUESTION, "answer": "3"}, {"question": "Too short.", "answer": "1"},
    ])  # fmt: skip
    short = {"question": "Which gas do green plants take from the air?"}
    jsonl(tmp_path / "mirror" / "arc_easy" / "test.jsonl", [short])
    build_index.cache_clear()
    return tmp_path / "mirror"


def test_overlap_is_found_whatever_the_case_and_punctuation(mirror: Any) -> None:
    checker = Checker.from_mirror(mirror)
    rows = [
        f"Please answer: {QUESTION.upper().replace(' ', ', ')} Thanks",
        "which GAS do green plants take from the air",
        QUESTION[:40],
        "Too short.",
        " ".join(reversed(QUESTION.split())),
        *["filler words that mean nothing at all"] * 20_000,
        QUESTION,
    ]
    for number, text in enumerate(rows, 1):
        checker.add(RawRow("a.jsonl", number, {}, "line"), [text])
    report = checker.report()
    assert report["rows_checked"] == len(rows)
    assert report["rows_overlapping"] == 3
    gsm8k = report["datasets"]["gsm8k"]
    assert (gsm8k["questions"], gsm8k["questions_found"], gsm8k["rows_overlapping"]) == (2, 1, 2)
    assert gsm8k["questions_too_short_to_check"] == 1
    assert gsm8k["first"] == ["a.jsonl, line 1", f"a.jsonl, line {len(rows)}"]
    assert report["datasets"]["arc_easy"]["rows_overlapping"] == 1


def test_the_ledger_says_whether_overlap_was_checked(
    make: Any, mirror: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert make(ROWS).ledger["evaluation_overlap"]["checked"] is False
    monkeypatch.setenv("MLX_SLIM_DATA", str(mirror))
    rows = [*ROWS, {"prompt": QUESTION, "completion": "3"}]
    report = make(rows).ledger["evaluation_overlap"]
    assert report["rows_overlapping"] == 1


def test_what_a_question_is_the_task_definitions_say(tmp_path: Path) -> None:
    mirror = tmp_path / "mirror"
    jsonl(mirror / "openbookqa" / "test.jsonl", [{"question_stem": QUESTION}])
    (mirror / "bioasq").mkdir()
    (mirror / "bioasq" / "test.json").write_text(json.dumps({"questions": [{"body": QUESTION}]}))
    jsonl(mirror / "unknown" / "test.jsonl", [{"question": QUESTION}])
    build_index.cache_clear()
    checker = Checker.from_mirror(mirror)
    checker.add(RawRow("a.jsonl", 1, {}), [f"First: {QUESTION}"])
    datasets = checker.report()["datasets"]
    assert {name: entry["rows_overlapping"] for name, entry in datasets.items()} == {
        "bioasq": 1, "openbookqa": 1,
    }  # fmt: skip


def test_every_question_field_of_the_tasks_is_in_the_mirror(data_mirror: Any) -> None:
    build_index.cache_clear()
    index = build_index(data_mirror)
    assert set(index.datasets) >= {"hellaswag", "mmlu", "gsm8k", "openbookqa", "pubmedqa"}
    sizes = [b - a for a, b in pairwise(index.edges.tolist())]
    empty = [name for name, n, short in zip(index.datasets, sizes, index.too_short, strict=True)
             if short == n]  # fmt: skip
    assert not empty
