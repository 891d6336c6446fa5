"""Rows as they are scored: in the order of the store, with their fields, none of a test split."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mlx_slim.config.schema import DataConfig, SourceConfig
from mlx_slim.data import sources
from mlx_slim.data.prepare import prepare
from mlx_slim.errors import SlimError
from mlx_slim.evaluation.tasks.rows import load_rows
from mlx_slim.evaluation.tasks.spec import find_task
from mlx_slim.evaluation.tasks.training_rows import question_keys
from mlx_slim.finetuning.prompts import split
from mlx_slim.models.load import load_tokenizer
from mlx_slim.rewards.scored_rows import ScoredRow, read_scored_rows, refuse_test_questions
from tests.support.tiny import TinyModels

TASK = """\
kind: generation
data: {path: test.jsonl}
fields: {prompt: text, completion: text}
overlap: [prompt]
description: "Answer briefly."
prompt: "Q: {{ prompt }}"
target: "{{ completion }}"
"""


def rows_file(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def scored(tmp_path: Path, folder: Path, config: DataConfig) -> tuple[Any, list[ScoredRow]]:
    tokenizer = load_tokenizer(folder)
    data = prepare(config, tokenizer, max_length=64, seed=0, folder=tmp_path / "run", processes=0)
    rows = read_scored_rows(data.train, config, tokenizer, sources.find, max_length=64, limit=None)
    return data.train, rows


def test_row_i_is_row_i_of_the_store(tiny: TinyModels, tmp_path: Path) -> None:
    rows = [{"prompt": f"what is {i}", "completion": f" it {i}", "level": i} for i in range(12)]
    rows[3]["prompt"] = "x" * 100  # too long: dropped
    chats: list[dict[str, Any]] = [
        {
            "messages": [
                {"role": "user", "content": f"say {i}"},
                {"role": "assistant", "content": f"{i}"},
            ]
        }
        for i in range(5)
    ]
    config = DataConfig(
        path=[
            SourceConfig(path=str(rows_file(tmp_path / "a.jsonl", rows)), weight=2),
            SourceConfig(path=str(rows_file(tmp_path / "b.jsonl", chats)), system="be short"),
        ],
        validation=3,
        template="chatml",
    )
    store, read = scored(tmp_path, tiny(), config)
    tokenizer = load_tokenizer(tiny())
    assert len(read) == len(store) and any(row.chat for row in read)
    for number, row in enumerate(read):
        text = tokenizer.decode(store.row(number)[0].tolist())
        assert row.prompt in text and row.answer in text
        if row.chat:
            assert row.messages[0] == {"role": "system", "content": "be short"}
        else:
            assert row.fields["level"] == int(row.answer.split()[-1])


def test_the_question_is_the_one_that_is_answered(tiny: TinyModels, tmp_path: Path) -> None:
    """The last turn that is learned: others may be marked, or cut off."""

    def chat(*weights: int, last: str = "2") -> dict[str, Any]:
        turns = [
            {"role": role, "content": f"{text} {number}" if number < 3 else last, "weight": weight}
            for number, weight in enumerate(weights, 1)
            for role, text in (("user", "ask"), ("assistant", "say"))
        ]
        return {"messages": turns}

    rows = [chat(1, 1), chat(1, 0), chat(0, 1), chat(1, 1, 1, last="x" * 200)]
    config = DataConfig(
        path=str(rows_file(tmp_path / "a.jsonl", rows)),
        validation=0,
        template="chatml",
        truncation="right",
    )
    tokenizer = load_tokenizer(tiny())
    data = prepare(config, tokenizer, max_length=190, seed=0, folder=tmp_path / "run", processes=0)
    read = read_scored_rows(data.train, config, tokenizer, sources.find, max_length=190, limit=None)
    assert [row.prompt for row in read] == ["ask 2", "ask 1", "ask 2", "ask 2"]
    for number, row in enumerate(read):
        prompt, answer = split(*data.train.row(number))
        question = f"{row.prompt}<|im_end|>\n<|im_start|>assistant"
        assert tokenizer.decode(prompt).rstrip().endswith(question)
        assert row.answer in tokenizer.decode(answer)


@pytest.mark.parametrize("count", [4, 20])
def test_rows_of_a_file_of_their_own_are_validated_as_themselves(
    tiny: TinyModels, tmp_path: Path, count: int
) -> None:
    files = [
        rows_file(
            tmp_path / name, [{"prompt": f"{name} {i}", "completion": f"{i}"} for i in range(n)]
        )
        for name, n in (("a.jsonl", 12), ("b.jsonl", count))
    ]
    config = DataConfig(path=str(files[0]), validation=str(files[1]))
    tokenizer = load_tokenizer(tiny())
    data = prepare(config, tokenizer, max_length=64, seed=0, folder=tmp_path / "run", processes=0)
    assert data.validation is not None
    rows = read_scored_rows(
        data.validation, config, tokenizer, sources.find, max_length=64, limit=None
    )
    assert [row.prompt for row in rows] == [f"b.jsonl {i}" for i in range(count)]


def test_a_row_that_asks_nothing_is_refused(tiny: TinyModels, tmp_path: Path) -> None:
    file = rows_file(tmp_path / "a.jsonl", [{"text": "once upon a time"}])
    with pytest.raises(SlimError, match=r"a.jsonl, line 1: a row of format text asks nothing"):
        scored(tmp_path, tiny(), DataConfig(path=str(file), validation=0))


@pytest.mark.parametrize("form", ["raw", "bare", "rendered", "chat", "key"])
def test_questions_of_a_test_split_are_refused(tiny: TinyModels, tmp_path: Path, form: str) -> None:
    rows_file(tmp_path / "test.jsonl", [{"prompt": "How many?", "completion": "4"}])
    (tmp_path / "mine.yaml").write_text(TASK)
    task = find_task(tmp_path / "mine.yaml")
    row: dict[str, Any] = {
        "raw": {"prompt": "how, many", "completion": " 4"},
        "bare": {"prompt": "q: HOW many", "completion": " 4"},
        "rendered": {"prompt": "Answer briefly. Q: How many?", "completion": " 4"},
        "chat": {
            "messages": [
                {"role": "system", "content": "Answer briefly."},
                {"role": "user", "content": "Q: How many?"},
                {"role": "assistant", "content": "4"},
            ]
        },
        "key": {"prompt": "other words", "completion": " 4", "key": None},
    }[form]
    if form == "key":
        row["key"] = question_keys(task, load_rows(task))[0]
    other = {"prompt": "How few?", "completion": " 2"}
    config = DataConfig(
        path=str(rows_file(tmp_path / "a.jsonl", [other, row])), validation=0, template="plain"
    )
    if form == "chat":
        config = config.model_copy(update={"template": "chatml"})
    rows = scored(tmp_path, tiny(), config)[1]
    with pytest.raises(SlimError, match=r"a.jsonl, line 2: its question is one that mine"):
        refuse_test_questions(rows, [task], print)
    refuse_test_questions(rows[:1], [task], print)


def test_a_task_without_its_test_rows_is_said(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(TASK)
    notices: list[str] = []
    refuse_test_questions([], [find_task(tmp_path / "mine.yaml")], notices.append)
    assert "rows were not compared with the test questions of mine" in notices[0]
