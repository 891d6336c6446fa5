"""The demo's rows: made by the committed script, and nothing of the test in the training rows."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "evals" / "demo"
KEYS = ["item", "amount", "currency", "category", "with", "day"]


def _read(name: str) -> list[dict[str, str]]:
    lines = (FOLDER / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def make() -> Any:
    spec = importlib.util.spec_from_file_location("make_demo", FOLDER / "make.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_files_are_what_the_script_makes(make: Any) -> None:
    train, test = make.make()
    assert train == _read("train")
    assert test == _read("test")


def test_enough_rows_and_no_overlap(make: Any) -> None:
    train, test = _read("train"), _read("test")
    assert len(train) >= 600
    assert len(test) >= 100
    for column in ("prompt", "completion"):
        texts = [row[column].lower() for row in [*train, *test]]
        assert len(set(texts)) == len(texts)
    assert not set(make.TRAIN_NAMES) & set(make.TEST_NAMES)
    assert not set(make.TRAIN_PATTERNS) & set(make.TEST_PATTERNS)


def test_answers_are_canonical_and_learnable(make: Any) -> None:
    train, test = _read("train"), _read("test")
    for row in [*train, *test]:
        answer = json.loads(row["completion"])
        assert list(answer) == KEYS
        assert json.dumps(answer, separators=(",", ":")) == row["completion"]
        assert answer["item"] in make.ITEMS[answer["category"]]
        whole, cents = answer["amount"].split(".")
        assert whole.isdigit() and len(cents) == 2
    for key in ("item", "currency", "category", "day"):
        seen = {json.loads(row["completion"])[key] for row in train}
        assert {json.loads(row["completion"])[key] for row in test} <= seen


def test_the_readme_shows_a_held_out_row() -> None:
    readme = (FOLDER.parents[1] / "README.md").read_text(encoding="utf-8")
    assert any(
        f"`{row['prompt']}`" in readme and row["completion"] in readme for row in _read("test")
    )
