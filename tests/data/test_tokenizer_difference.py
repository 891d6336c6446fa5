"""Tokenizers that agree, and each way in which they do not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlx_slim.data.tokenizer_difference import tokenizer_difference
from mlx_slim.models.load import load_tokenizer
from tests.support.tiny import byte_tokenizer, tiny_model


def _changed(folder: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """A byte tokenizer whose ``tokenizer.json`` was changed."""
    tiny_model(folder)
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    return folder


def _swap(content: dict) -> None:
    vocab = content["model"]["vocab"]
    vocab["A"], vocab["B"] = vocab["B"], vocab["A"]


def _rename(content: dict) -> None:
    vocab = content["model"]["vocab"]
    vocab["AA"] = vocab.pop("A")


def _lowercase(content: dict) -> None:
    content["normalizer"] = {"type": "Lowercase"}


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_tokenizer(tiny_model(tmp_path_factory.mktemp("student")))


def test_a_tokenizer_agrees_with_itself(student: Any, tmp_path: Path) -> None:
    assert tokenizer_difference(student, load_tokenizer(tiny_model(tmp_path / "t"))) is None


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (_swap, "the student has 259 tokens, the teacher 259; 2 have different ids, such as 'A': "),
        (_rename, "2 exist on one side only, such as 'A' ("),
        (_lowercase, "'The quick brown fox jump' is "),
    ],
)
def test_different_vocabularies_of_one_size(
    student: Any, tmp_path: Path, change: Callable[[dict[str, Any]], None], text: str
) -> None:
    difference = tokenizer_difference(student, load_tokenizer(_changed(tmp_path / "t", change)))
    assert difference is not None
    assert difference.encodings
    assert text in difference.text
    assert "\n" not in difference.text


def test_another_eos_differs_in_its_role_only(student: Any, tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "t")
    byte_tokenizer(folder, chat_template=None)
    difference = tokenizer_difference(student, load_tokenizer(folder))
    assert difference is not None
    assert not difference.encodings
    assert difference.text == "eos is '<|im_end|>' for the student, '<|endoftext|>' for the teacher"
