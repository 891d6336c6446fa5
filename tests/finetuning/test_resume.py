"""A killed run, resumed, repeats the uninterrupted one bit for bit."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlx_slim.artifacts import load_tensors
from mlx_slim.config.load import load_recipe
from mlx_slim.errors import Interrupted, SlimError
from mlx_slim.finetuning.run import finetune
from mlx_slim.finetuning.run_dir import command_words, run_dir
from tests.support.runs import CtrlC, Recorder, losses, recipe, run_and_kill, write_rows
from tests.support.tiny import TinyModels

KILLS = {
    # moment, count: step 10 is in the second epoch; file 6 is the optimizer of the third checkpoint
    "lora": [("step", 3), ("save", 1), ("step", 7), ("save", 2)],
    "qlora": [("save", 4), ("base", 1)],
    "full": [("step", 5)],
    "dora": [("save", 3)],
}


@pytest.mark.parametrize("method", list(KILLS))
def test_killed_and_resumed_equals_uninterrupted(
    tiny: TinyModels, tmp_path: Path, method: str
) -> None:
    model, data = tiny("llama"), write_rows(tmp_path / "rows.jsonl")
    straight = tmp_path / "straight"
    finetune(recipe(model, data, method), straight, observer=Recorder())
    out = tmp_path / "killed"
    for number, (moment, count) in enumerate(KILLS[method]):
        run_and_kill(model, data, out, method, moment, count, resume=number > 0)
        assert not (out / "run.json").exists()
    finetune(recipe(model, data, method), out, observer=Recorder(), resume=True)
    assert losses(out) == losses(straight)
    artifact = "model" if method == "full" else "adapters"
    for file in (straight / artifact).glob("*.safetensors"):
        ours, theirs = load_tensors(file), load_tensors(out / artifact / file.name)
        assert all(mx.array_equal(ours[key], theirs[key]).item() for key in ours)
    assert (straight / "base").is_dir() == (method == "qlora")
    for file in (straight / "base").glob("*"):
        assert file.read_bytes() == (out / "base" / file.name).read_bytes()


def test_ctrl_c_saves_and_prints_the_resume_command(tiny: TinyModels, tmp_path: Path) -> None:
    model, data = tiny("llama"), write_rows(tmp_path / "rows.jsonl")
    out = tmp_path / "run"
    with pytest.raises(Interrupted, match="after step 3 of 10") as caught:
        finetune(recipe(model, data), out, observer=CtrlC())
    assert caught.value.exit_code == 130
    assert f"-o {out} --resume" in caught.value.hint
    assert (out / "checkpoints" / "step-3" / "state.json").exists()
    finetune(recipe(model, data), out, observer=Recorder(), resume=True)
    assert sorted(losses(out)) == list(range(1, 11))


def test_the_printed_resume_command_resumes_as_it_stands(tiny: TinyModels, tmp_path: Path) -> None:
    folder = tmp_path / "my runs"
    folder.mkdir()
    data = write_rows(folder / "rows.jsonl")
    file = folder / "small.yaml"
    file.write_text(f"model: {tiny('llama')}\ndata: {{path: nowhere.jsonl, validation: 0}}\n")
    overrides = [
        f"data.path={data}",
        "adapter.targets=[q_proj, v_proj]",
        "train.steps=6",
        "train.max_length=128",
        "train.learning_rate=1e-3",
    ]
    out = folder / "run"
    with pytest.raises(Interrupted) as caught:
        finetune(load_recipe(str(file), overrides), out, observer=CtrlC())
    program = tmp_path / "bin" / "mlx-slim"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m mlx_slim "$@"\n')
    program.chmod(0o755)
    done = subprocess.run(
        caught.value.hint.removeprefix("resume with: "),
        shell=True,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "PATH": f"{program.parent}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert sorted(losses(out)) == list(range(1, 7))
    assert str(file) in shlex.split(caught.value.hint)


def test_the_resume_command_has_what_was_set_and_no_more() -> None:
    overrides = [
        "data.path=rows.jsonl",
        "data.validation=32",
        "data.columns={prompt: question}",
        "train.learning_rate=1e-5",
        "train.steps=null",
        "distill.teachers=[{model: some/teacher}, {base_url: http://127.0.0.1/v1, model: it}]",
    ]
    resolved = load_recipe("smollm2-lora", overrides)
    words = shlex.split(run_dir(Path("run")).resume_command(command_words(resolved)))
    assert words[:3] == ["mlx-slim", "distill", "smollm2-lora"]
    assert load_recipe("smollm2-lora", words[3:-3]).recipe == resolved.recipe
    assert "data.validation=32" in words
    assert 'distill.teachers=[{"model": "some/teacher"}' in " ".join(words)


def test_another_recipe_or_other_data_is_refused_with_the_difference(
    tiny: TinyModels, tmp_path: Path
) -> None:
    model, data = tiny("llama"), write_rows(tmp_path / "rows.jsonl")
    out = tmp_path / "run"
    with pytest.raises(Interrupted):
        finetune(recipe(model, data), out, observer=CtrlC())
    with pytest.raises(SlimError, match=r"train.learning_rate: 0.001 → 0.002"):
        finetune(recipe(model, data, learning_rate=2e-3), out, observer=Recorder(), resume=True)
    original = data.read_text()
    write_rows(data, 23)
    with pytest.raises(SlimError, match="changed"):
        finetune(recipe(model, data), out, observer=Recorder(), resume=True)
    data.write_text(original)
    finetune(recipe(model, data, save_every=5), out, observer=Recorder(), resume=True)
    assert json.loads((out / "run.json").read_text())["status"] == "complete"


def test_resume_of_nothing_starts_and_says_so(tiny: TinyModels, tmp_path: Path) -> None:
    model, data = tiny("llama"), write_rows(tmp_path / "rows.jsonl")
    recorder = Recorder()
    out = tmp_path / "run"
    finetune(recipe(model, data, steps=2), out, observer=recorder, resume=True)
    assert recorder.events[0].as_record()["message"] == f"{out} holds no run to resume: starting"
    assert (out / "run.json").exists()


def test_an_early_stopped_run_takes_no_step_more_on_a_resume(
    tiny: TinyModels, tmp_path: Path
) -> None:
    model, data = tiny("llama"), write_rows(tmp_path / "rows.jsonl")
    small = recipe(model, data, learning_rate=1.0, early_stopping=1, validate_every=1)
    out = tmp_path / "run"
    first = finetune(small, out, observer=Recorder()).done
    assert (first.reason, first.step < 10) == ("early_stopping", True)
    lines = (out / "metrics.jsonl").read_text().splitlines()
    (out / "run.json").unlink()  # as if killed right after its last checkpoint
    (out / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines[:-2]))
    again = finetune(small, out, observer=Recorder(), resume=True).done
    assert (again.reason, again.step, again.result_step) == (
        *("early_stopping", first.step),
        first.result_step,
    )
    events = [
        json.loads(line)["event"] for line in (out / "metrics.jsonl").read_text().splitlines()
    ]
    events.remove("resumed")
    assert events == [json.loads(line)["event"] for line in lines]


def test_a_finished_run_is_left_alone(tiny: TinyModels, tmp_path: Path) -> None:
    model, data = tiny("llama"), write_rows(tmp_path / "rows.jsonl")
    out = tmp_path / "run"
    first = finetune(recipe(model, data, steps=2), out, observer=Recorder())
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    again = finetune(recipe(model, data, steps=2), out, observer=Recorder(), resume=True)
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*")} == before
    assert again.done == first.done
    with pytest.raises(SlimError, match="holds a run already"):
        finetune(recipe(model, data, steps=2), out, observer=Recorder())


def test_a_run_that_cannot_start_leaves_no_folder(tiny: TinyModels, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl")
    data.write_text(data.read_text() + "{broken\n")
    out = tmp_path / "deep" / "run"
    with pytest.raises(SlimError, match="line 25"):
        finetune(recipe(tiny("llama"), data), out, observer=Recorder())
    assert not out.exists()


@pytest.mark.parametrize(
    ("train", "refused", "same"),
    [
        ({}, None, {}),
        ({"weight_decay": 0.1}, "train.decay_all: True → False", {"decay_all": True}),
        (
            {"optimizer": "muon"},
            "train.fallback_learning_rate: 0.001 → None",
            {"fallback_learning_rate": 1e-3},
        ),
    ],
)
def test_a_run_of_an_older_version_goes_on_as_it_began(
    tiny: TinyModels,
    tmp_path: Path,
    train: dict[str, Any],
    refused: str | None,
    same: dict[str, Any],
) -> None:
    """Its recipe lacks the newer keys: they stand for what that version did."""
    model, data, out = tiny("llama"), write_rows(tmp_path / "rows.jsonl"), tmp_path / "run"
    with pytest.raises(Interrupted):
        finetune(recipe(model, data, **train, **same), out, observer=CtrlC())
    state = out / "recipe.json"
    record = json.loads(state.read_text())
    for key in ("decay_all", "fallback_learning_rate"):
        del record["recipe"]["train"][key]
    state.write_text(json.dumps(record))
    if refused:
        with pytest.raises(SlimError, match="was started with another recipe") as caught:
            finetune(recipe(model, data, **train), out, observer=Recorder(), resume=True)
        assert refused in str(caught.value)
    finetune(recipe(model, data, **train, **same), out, observer=Recorder(), resume=True)
    assert sorted(losses(out)) == list(range(1, 11))
