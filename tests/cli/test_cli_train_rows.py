"""``mlx-slim train MODEL --data ROWS``: what is printed, its file, its resume, what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mlx_slim.cli.main import run
from tests.cli.conftest import Fails
from tests.support.runs import losses, write_rows
from tests.support.tiny import TinyModels


@pytest.fixture
def words(tiny: TinyModels, tmp_path: Path) -> list[str]:
    data = write_rows(tmp_path / "own.jsonl", 40)
    return ["train", str(tiny("llama")), "--data", str(data), "report_answers=0"]


def test_a_run_its_file_and_a_second_run_are_the_same(
    words: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out, again = tmp_path / "run", tmp_path / "again"
    assert run([*words, "train.epochs=1", "-o", str(out)]) == 0
    text = capfd.readouterr().out
    assert "⟦alpha" in text  # one row, with what is learned
    assert "train.learning_rate=" in text and "LoRA Without Regret" in text
    assert "predicted: " in text
    assert run(["train", str(out / "recipe.yaml"), "-o", str(again), "--quiet"]) == 0
    assert losses(out) == losses(again) and len(losses(out)) > 5
    assert not (again / "recipe.yaml").exists()
    origins = json.loads((out / "run.json").read_text())["origins"]
    assert origins["train.learning_rate"].startswith("10 x 5e-05")
    capfd.readouterr()
    assert run([*words, "train.epochs=1", "-o", str(out), "--resume"]) == 0  # complete
    assert "resuming with the settings in" in capfd.readouterr().out


def test_an_interrupted_run_resumes_with_its_choices(words: list[str], tmp_path: Path) -> None:
    out, whole = tmp_path / "run", tmp_path / "whole"
    assert run([*words, "train.steps=6", "-o", str(whole), "--quiet"]) == 0
    assert run([*words, "train.steps=3", "train.schedule=constant", "-o", str(out), "--quiet"]) == 0
    longer = [*words, "train.steps=6", "train.schedule=constant", "-o", str(out), "--quiet"]
    assert run([*longer, "--resume"]) == 0
    assert len(losses(out)) == 6
    assert losses(out).keys() == losses(whole).keys()


def test_a_dry_run_writes_nothing_and_json_is_lines(
    words: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = {*tmp_path.rglob("*")}
    assert run([*words, "-o", str(tmp_path / "run"), "--dry-run", "--json"]) == 0
    records = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    kinds = [record["event"] for record in records]
    assert kinds[0] == "example" and kinds[-1] == "cost" and kinds.count("choice") > 10
    assert any(piece["learned"] for piece in records[0]["segments"])
    assert all(record["reason"] for record in records if record["event"] == "choice")
    assert {*tmp_path.rglob("*")} == before


def test_what_is_refused(words: list[str], tmp_path: Path, fails: Fails) -> None:
    out = tmp_path / "run"
    text = fails("train", "smollm2-lora", *words[2:], "-o", out)
    assert "smollm2-lora is a recipe, and --data trains a model without one" in text
    assert "can be given only with --data" in fails("train", "smollm2-lora", "--time", "2h")
    text = fails("train", words[1], "-o", out)
    assert "is a model, not a recipe" in text and "--data ROWS" in text
    assert "is a model, not a recipe" in fails("train", "owner/name", "-o", out)
    assert "is a model, not a recipe" in fails("plan", words[1])
    (tmp_path / "smollm2-lora").mkdir()  # called like a recipe
    assert run(["train", "smollm2-lora", "--dry-run"]) == 0
    text = fails(*words, "--data", "more.jsonl", "-o", out)
    assert "--data is given 2 times" in text and "name a folder" in text
    assert "the path of the rows is empty" in fails(*words[:3], "", "-o", out)
    assert "the name of the model is empty" in fails("train", "", *words[2:], "-o", out)
    assert "nothing.jsonl does not exist" in fails(*words[:3], "nothing.jsonl", "-o", out)
    assert "needs at least" in fails(*words, "--budget", "1MB", "-o", out, code=3)
    assert run([*words, "train.steps=1", "-o", str(out), "--quiet"]) == 0
    assert "holds a run already" in fails(*words, "-o", out)
    other = write_rows(tmp_path / "other.jsonl", 40)
    text = fails(*words[:3], other, "-o", out, "--resume", keeps=True)
    assert "was started with data.path=" in text
    assert run(["train", str(out / "recipe.yaml"), "-o", str(tmp_path / "b"), "--quiet"]) == 0
    text = fails(*words, "-o", tmp_path / "b", "--resume", keeps=True)
    assert "was not started with --data" in text
