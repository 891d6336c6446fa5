"""Preference recipes and rows that cannot work: one clear line, and nothing left behind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.preferences import labelled, pairs, write

PLAIN = [{"prompt": "a", "completion": "b"}]
SAME = [{"prompt": "a", "chosen": "b", "rejected": "b"}]
NO_FIELD = [*pairs(2), {"prompt": "a", "chosen": "b"}]
ODD_LABEL = [*labelled(2), {"prompt": "a", "completion": "b", "label": "yes"}]
LIKED = [{**row, "label": True} for row in labelled(4)]


@pytest.mark.parametrize(
    ("loss", "content", "expected"),
    [
        ("sigmoid", PLAIN, ["columns seen: prompt, completion", "preference=null"]),
        ("sigmoid", labelled(4), ["expected: prompt, chosen, rejected", "preference.loss=kto"]),
        ("sigmoid", NO_FIELD, ["line 3", "columns seen: prompt, chosen"]),
        ("orpo", SAME, ["no row can be used", "chosen and rejected are the same answer"]),
        ("kto", pairs(4), ["expected: prompt, completion, label", "sigmoid (DPO)"]),
        ("kto", ODD_LABEL, ["line 3", "'label' is 'yes', expected true"]),
        ("kto", LIKED, ["all 4 training rows have label true", "both labels"]),
    ],
)
def test_rows(
    fails: Callable[..., str],
    small: Path,
    rows: Path,
    tmp_path: Path,
    loss: str,
    content: list[dict[str, Any]],
    expected: list[str],
) -> None:
    write(rows, content)
    text = fails("train", small, f"preference.loss={loss}", "-o", tmp_path / "run")
    assert all(word in text for word in expected), text


def test_plan_refuses_what_train_refuses(
    fails: Callable[..., str], small: Path, rows: Path
) -> None:
    write(rows, NO_FIELD)
    assert "line 3" in fails("plan", small, "preference.loss=sigmoid")


def test_pairs_without_the_section(
    fails: Callable[..., str], small: Path, rows: Path, tmp_path: Path
) -> None:
    write(rows, pairs(4))
    text = fails("train", small, "-o", tmp_path / "run")
    assert "columns seen: prompt, chosen, rejected" in text
    assert "preference.loss=sigmoid" in text


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["preference.loss=dpo"], "preference.loss"),
        (["train.batching=packed"], "train.batching=packed is set"),
        (["distill={}"], "distill is set"),
        (["data.split=true"], "data.split=true is set"),
        (["preference.loss=robust"], "label_smoothing"),
    ],
)
def test_recipes(
    fails: Callable[..., str], small: Path, rows: Path, tmp_path: Path, words: Any, expected: str
) -> None:
    write(rows, pairs(4))
    text = fails("train", small, "preference.beta=0.1", *words, "-o", tmp_path / "run")
    assert expected in text


def test_distill_of_a_recipe_without_teachers(
    fails: Callable[..., str], small: Path, tmp_path: Path
) -> None:
    text = fails("distill", small, "preference.beta=0.1", "-o", tmp_path / "run")
    assert "has no teachers" in text
