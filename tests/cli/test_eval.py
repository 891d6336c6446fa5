"""``mlx-slim eval``: a run from end to end, Ctrl-C, and every way to ask for what cannot be."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlx_slim.cli.main import run
from mlx_slim.evaluation import results
from tests.support.evals import result_files, write_tasks


@pytest.fixture
def task(tmp_path: Path) -> Path:
    return write_tasks(tmp_path / "tasks", 6)[0]


@pytest.fixture
def text(task: Path) -> Path:
    return task.parent / "text.txt"


def test_score_and_compare(
    tiny: Callable[..., Path],
    task: Any,
    text: Any,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    for name, shots in (("a", 0), ("b", 0), ("c", 1)):
        words = ["eval", tiny("llama" if name == "a" else "mistral"), "--task", task]
        if name != "c":
            words += ["--perplexity", text]
        assert run([*map(str, words), "--num-fewshot", str(shots), "-o", str(tmp_path / name)]) == 0
    shown = capfd.readouterr().out
    assert "toy_choice 6/6 acc_norm" in shown
    assert "bits_per_byte" in shown
    assert "±" in shown
    pair = [str(tmp_path / "a"), str(tmp_path / "b")]
    assert run(["eval", "--compare", *pair]) == 0
    assert "toy_choice: " in capfd.readouterr().out
    assert run(["eval", "--compare", *pair, "--json", "-o", str(tmp_path / "c2")]) == 0
    record = json.loads(capfd.readouterr().out)
    assert json.loads((tmp_path / "c2" / "comparison.json").read_text()) == record
    assert {row["task"] for row in record["rows"]} == {"toy_choice", "perplexity"}
    assert run(["eval", "--compare", pair[0], str(tmp_path / "c")]) == 2
    assert "num_fewshot: 0 → 1" in capfd.readouterr().err


def test_json_lines(
    tiny: Callable[..., Path], task: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = ["eval", tiny("llama"), "--task", task, "--limit", "2", "--json", "-o", tmp_path / "x"]
    assert run(list(map(str, words))) == 0
    records = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert records[-1]["event"] == "results"
    assert records[-1]["results"][0]["tasks"]["toy_choice"]["n"] == 4
    assert {record["event"] for record in records} >= {"eval_started", "eval_progress", "task"}


def test_ctrl_c_keeps_what_is_computed_and_says_how_to_go_on(
    tiny: Callable[..., Path],
    task: Any,
    text: Any,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    append, calls = results.Folder.append, []

    def interrupted(self: Any, name: str, data: Any, **measured: Any):
        calls.append(name)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return append(self, name, data, **measured)

    monkeypatch.setattr(results.Folder, "append", interrupted)
    words = ["eval", tiny("llama"), "--task", task, "--perplexity", text, "--limit", "3", "--quiet"]
    out = tmp_path / "an out"
    assert run([*map(str, words), "-o", str(out)]) == 130
    hint = capfd.readouterr().err.splitlines()[-1]
    command = shlex.split(hint.removeprefix("hint: resume with: "))
    assert command[:2] == ["mlx-slim", "eval"]
    assert command[-1] == "--resume"
    monkeypatch.undo()
    assert run(command[1:]) == 0
    words[-1] = "--json"
    assert run([*map(str, words), "-o", str(tmp_path / "whole")]) == 0
    assert result_files(out) == result_files(tmp_path / "whole")
    capfd.readouterr()


def test_bad_input_is_one_line_and_nothing_is_written(
    fails: Callable[..., str], tiny: Callable[..., Path], task: Any, text: Any, tmp_path: Path
) -> None:
    model, out = tiny("llama"), tmp_path / "out"
    start = ["eval", model, "--task", task]
    cases = [
        (["eval", model, "-o", out], "nothing to score"),
        (["eval", "--task", task, "-o", out], "no model"),
        (start, "-o OUT is missing"),
        (["eval", tmp_path / "none", "--task", task, "-o", out], "does not exist"),
        (["eval", model, model, "--task", task, "-o", out], "given twice"),
        (["eval", model, "--task", "hellaswog", "-o", out], "did you mean 'hellaswag'"),
        (["eval", model, "--task", tmp_path / "no.yaml", "-o", out], "no.yaml"),
        ([*start, "--limit", "0", "-o", out], "limit"),
        ([*start, "--num-fewshot", "-1", "-o", out], "-1 is not in the range"),
        ([*start, "--data-dir", tmp_path / "no", "--task", "hellaswag", "-o", out], "--data-dir"),
        ([*start, "--dtype", "float31", "-o", out], "did you mean 'float32'"),
        ([*start, "--max-length", "9999", "-o", out], "reads 512 tokens"),
        ([*start, "--batch-tokens", "x", "-o", out], "batch-tokens"),
        ([*start, "--adapter", tmp_path / "no", "-o", out], "not an adapter folder"),
        ([*start, "--perplexity", tmp_path / "no.txt", "-o", out], "no.txt does not exist"),
        ([*start, "--json", "--quiet", "-o", out], "not both"),
        ([*start, "-o", text], "is a file"),
        ([*start, "-o", text / "out"], "text.txt is a file"),
        (["eval", "--compare", tmp_path, tmp_path], "holds no results.json"),
        (["eval", "--compare", tmp_path, tmp_path, "--limit", "3"], "no scoring option: limit"),
        (["eval", model, "--compare", tmp_path, tmp_path], "no scoring option: MODEL"),
    ]
    for words, expected in cases:
        assert expected in fails(*words), words


def test_an_adapter_that_does_not_fit(
    fails: Callable[..., str], tiny: Callable[..., Path], task: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "adapters"
    folder.mkdir()
    words = ["eval", tiny("llama"), "--task", task, "--adapter", folder, "-o", tmp_path / "out"]
    assert "adapter_config.json" in fails(*words)
    (folder / "adapter_config.json").write_text('{"fine_tune_type": "full"}')
    (folder / "adapters.safetensors").write_bytes(b"x")
    assert "safetensors" in fails(*words)


def test_rows_that_do_not_fit_the_task(
    fails: Callable[..., str], tiny: Callable[..., Path], task: Any, tmp_path: Path
) -> None:
    rows = task.parent / "rows.jsonl"
    rows.write_text(rows.read_text().replace('"question"', '"query"'))
    text = fails("eval", tiny("llama"), "--task", task, "-o", tmp_path / "out")
    assert "question" in text
    assert "rows.jsonl" in text


def test_the_output_of_several_models(
    fails: Callable[..., str],
    tiny: Callable[..., Path],
    task: Any,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    words = ["eval", tiny("llama"), tiny("phi"), "--task", task, "--limit", "1", "-o", out]
    assert run(list(map(str, words))) == 0
    shown = capfd.readouterr().out
    assert shown.count("toy_choice ") >= 2
    assert (out / "phi" / "results.json").is_file()
    assert "holds no results.json" in fails("eval", "--compare", out, out / "phi")
