"""``mlx-slim data preview`` and ``data overlap``."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlx_slim.cli.main import run


@pytest.fixture
def recipe(tiny: Callable[..., Path], tmp_path: Path) -> Path:
    rows = tmp_path / "rows.jsonl"
    lines = [{"prompt": f"question {n}", "completion": f"answer [b]{n}[/b]"} for n in range(4)]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    path = tmp_path / "r.yaml"
    path.write_text(
        f"model: {tiny('llama')}\ndata: {{path: {rows}, template: auto}}\n"
        "train: {max_length: 512, batch_tokens: 512}\n"
    )
    return path


def test_preview_marks_what_is_learned(recipe: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["data", "preview", str(recipe), "--rows", "2"]) == 0
    out = capsys.readouterr().out
    assert "⟦answer [b]0[/b]<|im_end|>" in out
    assert "question 1" in out
    assert "question 2" not in out
    assert "supervised" in out


def test_preview_shows_what_is_cut_and_dropped(
    recipe: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["data", "preview", str(recipe), "train.max_length=40"]
    assert run([*words, "data.truncation=left"]) == 0
    assert "TRUNCATED from" in capsys.readouterr().out
    assert run([*words, "data.truncation=drop"]) == 0
    assert "4 longer than 40 tokens" in capsys.readouterr().out


def test_preview_of_missing_data_is_one_line(
    recipe: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["data", "preview", str(recipe), "data.path=./nothing.jsonl"]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" or "Traceback" not in captured.out
    assert "nothing.jsonl does not exist" in captured.err


def test_overlap_of_a_file_and_of_a_recipe(
    recipe: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLX_SLIM_DATA", raising=False)
    rows = tmp_path / "rows.jsonl"
    assert run(["data", "overlap", str(rows)]) == 2
    assert "MLX_SLIM_DATA" in capsys.readouterr().err
    mirror = tmp_path / "mirror"
    (mirror / "gsm8k").mkdir(parents=True)
    question = "one two three four five six seven eight nine ten eleven twelve thirteen"
    (mirror / "gsm8k" / "test.jsonl").write_text(json.dumps({"question": question}) + "\n")
    with rows.open("a") as file:
        file.write(json.dumps({"prompt": question, "completion": "x"}) + "\n")
    for source in (rows, recipe):
        words = ["data", "overlap", str(source), "--data-dir", str(mirror), "--json"]
        assert run(words) == 0
        report = json.loads(capsys.readouterr().out)
        assert (report["rows_checked"], report["rows_overlapping"]) == (5, 1)
    assert run(["data", "overlap", str(rows), "--data-dir", str(mirror)]) == 0
    assert "gsm8k" in capsys.readouterr().out
