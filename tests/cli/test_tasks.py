"""``mlx-slim tasks``: the list, and a task with its first prompt."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from mlx_slim.cli.main import run
from tests.evaluation.support import CHOICE, GENERATION, mmlu_row, quiz, write_rows, write_task


@pytest.fixture
def mirror(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("MLX_SLIM_DATA", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    rows = [mmlu_row("anatomy", n) for n in range(6)]
    write_rows(tmp_path / "mirror" / "mmlu" / "test.jsonl", rows)
    write_rows(
        tmp_path / "mirror" / "mmlu" / "dev.jsonl", [mmlu_row("anatomy", n) for n in range(6, 11)]
    )
    return tmp_path / "mirror"


def test_the_list_has_every_task_and_suite(
    mirror: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["tasks", "--data-dir", str(mirror)]) == 0
    out = capsys.readouterr().out
    for words in ("arc_challenge", "gsm8k", "strict_match", "CC BY-SA 4.0", "absent",
                  "suite leaderboard-v1: arc_challenge 25-shot, hellaswag 10-shot",
                  "mmlu has 57 subtasks"):  # fmt: skip
        assert words in out
    assert run(["tasks", "--data-dir", str(mirror), "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    tasks = {task["name"]: task for task in listed["tasks"]}
    assert (tasks["mmlu"]["rows"], tasks["hellaswag"]["rows"]) == (6, None)
    assert tasks["mmlu"]["num_fewshot"] == 5 and len(tasks["mmlu"]["parts"]) == 57
    assert listed["suites"]["seed"] == {"hellaswag": 0, "gsm8k": 5, "mmlu": 5}


def test_a_task_shows_its_file_and_its_first_prompt(
    mirror: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["tasks", "mmlu_anatomy", "--data-dir", str(mirror)]
    assert run([*words, "--num-fewshot", "1"]) == 0
    out = capsys.readouterr().out
    assert "subtask anatomy of mmlu" in out and "subgroups:" in out
    assert "first prompt, 1 shots" in out and "* ' A'" in out
    assert out.count("about anatomy.") == 1 and out.count("\nAnswer:") == 2
    assert run([*words, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["rows"] == 6 and len(shown["checksum"]) == 64
    assert shown["first"]["context"].count("\nAnswer:") == 6
    assert (shown["first"]["target"], shown["missing"]) == (0, [])


def test_missing_rows_are_reported(mirror: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["tasks", "arc_easy", "--data-dir", str(mirror)]) == 0
    out = capsys.readouterr().out
    assert f"missing   task arc_easy has no rows: {mirror}/arc_easy/test.jsonl does not" in out
    assert "Question: {{ question }}" in out
    row = {"question": "q", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "B"}
    write_rows(mirror / "arc_easy" / "test.jsonl", [row])
    assert run(["tasks", "arc_easy", "--data-dir", str(mirror), "--num-fewshot", "2"]) == 0
    out = capsys.readouterr().out
    assert "arc_easy/train.jsonl does not exist" in out and "first prompt, 0 shots" in out


def test_the_demo_s_task_shows_system_and_user(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["tasks", "demo-exact-match"]) == 0
    out = capsys.readouterr().out
    assert "<system>\nExpense to JSON" in out and "--- right answer ---" in out


def test_a_users_task_file(
    mirror: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_task(tmp_path, CHOICE, rows=[quiz(1, "x")])
    assert run(["tasks", str(tmp_path / "mine.yaml")]) == 0
    out = capsys.readouterr().out
    assert "Q: what is 1?\nA:" in out and "* ' x'" in out


def test_wrong_names_and_files(mirror: Path, tmp_path: Path, fails: Callable[..., str]) -> None:
    assert "did you mean 'gsm8k'" in fails("tasks", "gsm9k")
    assert "seed is a suite" in fails("tasks", "seed")
    assert "--num-fewshot needs" in fails("tasks", "--num-fewshot", "2")
    (tmp_path / "bad.yaml").write_text(CHOICE + "promt: x\nnum_fewshots: 3\n")
    message = fails("tasks", tmp_path / "bad.yaml")
    assert "2 problems" in message and "did you mean 'prompt'" in message


def test_several_right_answers_are_shown(
    mirror: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task = write_task(tmp_path, CHOICE, rows=[quiz(1, [1, 0])], shots=[])
    assert run(["tasks", str(task.file)]) == 0
    assert "* ' n1'\n* ' x'" in capsys.readouterr().out
    assert run(["tasks", str(task.file), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["first"]["target"] == [1, 0]
    rows = [{"prompt": "p", "completion": ["one", "two"]}]
    task = write_task(tmp_path, GENERATION, rows=rows)
    assert run(["tasks", str(task.file)]) == 0
    assert "--- right answers, any counts ---\none\ntwo\n" in capsys.readouterr().out


def test_a_prompt_that_cannot_be_rendered_is_an_error_as_in_scoring(
    mirror: Path, tmp_path: Path, fails: Callable[..., str]
) -> None:
    """Absent rows are no fault of the task; a template, a target or a row that fails is."""
    named = CHOICE.replace("{{ question }}", "{{ quest }}")
    task = write_task(tmp_path, named, rows=[quiz(1, "x")], shots=[quiz(2, "x")])
    for more in ([], ["--json"], ["--num-fewshot", "0"]):
        message = fails("tasks", task.file, *more)
        assert "prompt:" in message and "quest" in message and "rows.jsonl" in message
    task = write_task(tmp_path, CHOICE, rows=[quiz(1, "nothing of these")], shots=[])
    assert "target" in fails("tasks", task.file)
    task = write_task(tmp_path, CHOICE, rows=[quiz(1, "x")], shots=[quiz(2, "nothing of these")])
    assert "few-shot row 1" in fails("tasks", task.file, "--num-fewshot", "1")
    assert "has 1 rows for them" in fails("tasks", task.file, "--num-fewshot", "3")
    (tmp_path / "rows.jsonl").write_text("{")
    assert "rows.jsonl" in fails("tasks", task.file)
