"""Held-out text: every token once, as much context as the model reads, clear errors."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlx_slim.errors import SlimError
from mlx_slim.evaluation.scoring.perplexity import TextJob, read_texts, windows
from mlx_slim.evaluation.scoring.requests import RequestEncoder
from mlx_slim.models.load import load_tokenizer


def test_the_windows_are_those_of_the_harness() -> None:
    requests = windows(range(10), 99, 4)
    assert [(request.inputs, request.ids[request.start :]) for request in requests] == [
        ((99, 0, 1, 2), (0, 1, 2, 3)),
        ((3, 4, 5, 6), (4, 5, 6, 7)),
        ((5, 6, 7, 8), (8, 9)),
    ]


@pytest.mark.parametrize("count", [1, 3, 4, 5, 8, 9, 23])
@pytest.mark.parametrize("longest", [1, 2, 4, 30])
def test_every_token_is_predicted_once_with_full_windows(count: int, longest: int) -> None:
    requests = windows(range(count), 99, longest)
    targets = [token for request in requests for token in request.ids[request.start :]]
    assert targets == list(range(count))
    assert all(len(request.inputs) <= longest for request in requests)
    assert all(request.start >= 1 for request in requests)
    full = min(longest, count)
    assert all(len(request.inputs) >= full for request in requests)


def test_each_row_is_a_document(tiny: Callable[..., Path], tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "one two"}\n\n{"text": " "}\n{"text": "drei\\u2028vier", "id": 3}\n')
    texts = read_texts(path)
    assert texts.documents == ["one two", "drei\u2028vier"]
    assert texts.size == sum(len(text.encode()) for text in texts.documents)
    job = TextJob(texts, RequestEncoder(load_tokenizer(tiny("llama")), 512))
    assert job.chunks == [range(2)]
    records = [
        {"doc_id": 0, "window": 0, "tokens": 7, "loglikelihood": -8.0},
        {"doc_id": 1, "window": 1, "tokens": 11, "loglikelihood": -10.0},
    ]
    summary = job.summarize(records)
    assert (summary.n, summary.documents, summary.tokens) == (2, 2, 18)
    assert summary.as_json()["metrics"]["perplexity"] == {"value": summary.perplexity}
    assert summary.bits_per_byte == pytest.approx(18 / math.log(2) / texts.size)
    assert summary.bits_per_token == pytest.approx(1 / math.log(2))
    assert summary.perplexity == pytest.approx(math.e)


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("empty.txt", b"", "holds no text"),
        ("blank.txt", b" \n\n", "holds no text"),
        ("latin.txt", "größer".encode("latin-1"), "not UTF-8: byte 2 is 0xf6"),
        ("rows.jsonl", b'{"text": "a"}\n{"body": "b"}\n', "line 2 has body"),
        ("rows.jsonl", b'{"text": 3}\n', "line 1 has text"),
        ("rows.jsonl", b"[1]\n", "row 1: a row is a JSON object, not int"),
        ("rows.jsonl", b'{"text": \n', "line 2: malformed JSON"),
        ("rows.jsonl", b'{"text": "a\\ud83d"}\n', "line 1: 'text' holds"),
        ("wide.txt", "a".encode("utf-16"), "wide.txt is UTF-16"),
        ("rows.csv", b"body\na\n", "line 2 has body"),
    ],
)
def test_a_file_that_cannot_be_used_is_one_line(
    tmp_path: Path, name: str, content: Any, text: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SlimError, match=text):
        read_texts(tmp_path / name)


def test_a_missing_file_and_a_folder(tmp_path: Path) -> None:
    with pytest.raises(SlimError, match="does not exist"):
        read_texts(tmp_path / "none.txt")
    with pytest.raises(SlimError, match="is a folder"):
        read_texts(tmp_path)
