"""Bad rows, recipes, adapters and resumes: one clear line, and nothing left behind."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlx_slim.cli.main import run
from tests.support.runs import write_rows
from tests.support.tiny import tiny_model

# ------------------------------ rows


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b'{"prompt": "a", "completion": "b"}\n{"prompt": "a", \n', ["rows.jsonl", "line 2"]),
        (b"", ["rows.jsonl", "empty"]),
        (b"\n\n", ["rows.jsonl"]),
        (b'{"question": "a", "reply": "b"}\n', ["question", "reply"]),
        (b'["a", "b"]\n', ["row 1", "a JSON object, not str 'a'"]),
        (b'{"prompt": "caf\xe9", "completion": "b"}\n', ["line 1", "UTF-8"]),
        (b'{"prompt": 3, "completion": ["b"]}\n', ["line 1"]),
        (b"\x00\x01\x02\xff" * 100, ["rows.jsonl", "binary, expected UTF-8"]),
    ],
    ids=["json", "empty", "blank", "columns", "list", "latin-1", "types", "binary"],
)
def test_rows_that_cannot_be_read(
    fails: Callable[..., str], small: Path, rows: Path, tmp_path: Path, content: Any, expected: Any
) -> None:
    rows.write_bytes(content)
    for words in (["train", small, "-o", tmp_path / "run"], ["plan", small]):
        text = fails(*words)
        assert all(word in text for word in expected), text


def test_a_line_of_ten_megabytes_is_dropped_and_then_nothing_is_left(
    fails: Callable[..., str], small: Path, rows: Path, tmp_path: Path
) -> None:
    rows.write_text(json.dumps({"prompt": "a", "completion": "word " * 2_000_000}) + "\n")
    began = time.perf_counter()
    text = fails("train", small, "-o", tmp_path / "run")
    assert "longer than 128 tokens" in text
    assert len(text) < 500
    assert time.perf_counter() - began < 20
    text = fails("train", small, "data.truncation=error", "-o", tmp_path / "run")
    assert "line 1" in text


def test_a_malformed_line_of_ten_megabytes_is_not_printed(
    fails: Callable[..., str], small: Path, rows: Path, tmp_path: Path
) -> None:
    rows.write_text('{"prompt": "a", "completion": "' + "word " * 2_000_000)
    text = fails("train", small, "-o", tmp_path / "run")
    assert "line 1" in text
    assert len(text) < 500


def test_rows_that_are_not_there(
    fails: Callable[..., str], small: Path, rows: Path, tmp_path: Path
) -> None:
    for words in (["train", small, "-o", tmp_path / "run"], ["plan", small]):
        for key in ("data.path", "data.validation"):
            text = fails(*words, f"{key}={tmp_path}/rovs.jsonl")
            assert "rovs.jsonl" in text
            assert "rows.jsonl" in text  # did you mean
    missing = f"data.path={tmp_path}/rovs.jsonl"
    assert run(["analyze", "memory", str(small), missing]) == 0  # rows are no matter to it


# ------------------------------ recipes


def test_an_unknown_recipe(fails: Callable[..., str], tmp_path: Path) -> None:
    text = fails("train", "smolm2-lora", "-o", tmp_path / "run")
    assert "smollm2-lora" in text


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.learning_rat=1e-4", "did you mean"),
        ("adapter.rnak=8", "rank"),
        ("trian.steps=3", "train"),
        ("train.learning_rate=-1", "learning_rate"),
        ("train.learning_rate=fast", "learning_rate"),
        ("train.learning_rate=nan", "learning_rate"),
        ("train.steps=2.5", "steps"),
        ("train.steps=0", "steps"),
        ("adapter.rank=0", "rank"),
        ("adapter.rank=9999999", "rank"),
        ("adapter.dropout=1.5", "dropout"),
        ("adapter.targets=[nothing_proj]", "nothing_proj"),
        ("quantize.bits=7", "bits"),
        ("train.batch_tokens=16", "max_length"),
        ("train.max_length=100000", "max_length"),
        ("method=lroa", "lora"),
        ("memory.budget=lots", "lots"),
        ("data.validation=1000", "validation"),
        ("data.template=no.jinja", "no.jinja"),
        ("train.steps", "key=value"),
        ("=3", "key=value"),
        ("train=3", "train"),
        ("train.steps.more=3", "steps"),
        ("report_to=[tensorbord]", "tensorboard"),
    ],
)
def test_overrides_that_make_no_sense(
    fails: Callable[..., str], small: Path, tmp_path: Path, override: str, expected: str
) -> None:
    text = fails("train", small, override, "-o", tmp_path / "run")
    assert expected in text, text


def test_a_recipe_that_is_no_yaml(fails: Callable[..., str], tmp_path: Path) -> None:
    recipe = tmp_path / "bad.yaml"
    for content in (b"model: [a\ntrain: }", b"- a\n- b\n", b"model: caf\xe9\n", b""):
        recipe.write_bytes(content)
        assert "bad.yaml" in fails("train", recipe, "-o", tmp_path / "run")


# ------------------------------ adapters, resume


@pytest.fixture(scope="module")
def finished(
    tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path, Path]:
    """A run that is complete: its recipe, its rows and its folder."""
    folder = tmp_path_factory.mktemp("finished")
    rows = write_rows(folder / "rows.jsonl", 6)
    recipe = folder / "small.yaml"
    recipe.write_text(
        f"model: {tiny('llama')}\ndata: {{path: {rows}, validation: 0}}\n"
        "train: {steps: 2, max_length: 128, batch_tokens: 256}\n"
    )
    assert run(["train", str(recipe), "--quiet", "-o", str(folder / "run")]) == 0
    return recipe, rows, folder / "run"


def test_an_adapter_of_another_base(
    fails: Callable[..., str], finished: Any, tmp_path: Path
) -> None:
    other = tiny_model(tmp_path / "other", "llama", hidden_size=32)
    text = fails("generate", other, "--adapter", finished[2] / "adapters", "--prompt", "a")
    assert "adapters" in text


def test_an_adapter_that_is_not_there(
    fails: Callable[..., str], tiny: Callable[..., Path], tmp_path: Path
) -> None:
    assert "no-such" in fails(
        "generate", tiny("llama"), "--adapter", tmp_path / "no-such", "--prompt", "a"
    )
    assert "adapter" in fails("generate", tiny("llama"), "--adapter", tmp_path, "--prompt", "a")


def test_resume_of_a_changed_recipe(fails: Callable[..., str], finished: Any) -> None:
    recipe, _, out = finished
    text = fails("train", recipe, "train.learning_rate=0.5", "-o", out, "--resume")
    assert "train.learning_rate: 0.0002 → 0.5" in text
    assert "holds a run already" in fails("train", recipe, "-o", out)


def test_resume_of_changed_rows(fails: Callable[..., str], finished: Any, tmp_path: Path) -> None:
    recipe, rows, out = finished
    copy = tmp_path / "run"
    shutil.copytree(out, copy)
    (copy / "run.json").unlink()  # as if it had been killed
    content = rows.read_bytes()
    try:
        rows.write_bytes(content + content)
        assert "changed" in fails("train", recipe, "-o", copy, "--resume")
    finally:
        rows.write_bytes(content)


def test_resume_of_a_damaged_checkpoint(
    fails: Callable[..., str], finished: Any, tmp_path: Path
) -> None:
    recipe, _, out = finished
    copy = tmp_path / "run"
    shutil.copytree(out, copy)
    (copy / "run.json").unlink()
    os.truncate(copy / "checkpoints" / "step-2" / "weights.safetensors", 50)
    assert "weights.safetensors" in fails("train", recipe, "-o", copy, "--resume", keeps=True)


# ------------------------------ memory, Ctrl-C


def test_over_the_memory_budget_names_what_fits(
    fails: Callable[..., str], small: Path, tmp_path: Path
) -> None:
    text = fails("train", small, "memory.budget=600kB", "-o", tmp_path / "run", code=3)
    assert "budget is 600 kB" in text
    assert "hint: " in text


@pytest.mark.parametrize("where", ["load_base", "prepare"])
def test_interrupt_before_training(
    fails: Callable[..., str],
    small: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    where: str,
) -> None:
    from mlx_slim.finetuning import build as prepare

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare, where, interrupt)
    assert fails("train", small, "-o", tmp_path / "run", code=130) == "error: interrupted"


# ------------------------------ odd strings


@pytest.mark.parametrize(
    "name", ["ｆｕｌｌ　ｗｉｄｔｈ", "🦙 run", "two\nlines", "[bold]x[/bold]", "a'b\"c"]
)
def test_odd_names_are_names(
    small: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], name: str
) -> None:
    out = tmp_path / name / "run"
    assert run(["train", str(small), "--quiet", "-o", str(out)]) == 0
    assert (out / "run.json").is_file()
    capfd.readouterr()
    assert run(["train", str(small), "-o", str(out)]) == 2
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 2
    assert " ".join(name.split()) in lines[0]


@pytest.mark.parametrize(
    "prompt", ["🦙🎉", "ｆｕｌｌ", "a\nb\n", "", "\ud800", "<|im_end|>", "x" * 3000]
)
def test_odd_prompts(
    tiny: Callable[..., Path], capfd: pytest.CaptureFixture[str], prompt: Any
) -> None:
    words = ["generate", str(tiny("llama")), "--prompt", prompt, "--max-tokens", "2"]
    code = run(words)
    lines = capfd.readouterr().err.splitlines()
    assert code in (0, 2)
    if code == 2:
        assert lines[0].startswith("error: ")
    assert not any("Traceback" in line for line in lines)


@pytest.mark.parametrize("name", ["x" * 5000, "x" * 300])
def test_a_name_that_no_file_can_have(
    fails: Callable[..., str], tiny: Callable[..., Path], tmp_path: Path, name: Any
) -> None:
    model = tiny("llama")
    for words in (
        ["generate", name, "--prompt", "a"],
        ["generate", model, "--adapter", name, "--prompt", "a"],
        ["import", name, "-o", tmp_path / "out"],
        ["export", name, "--to", "hf", "-o", tmp_path / "out"],
        ["upload", name, "--repo", "a/b"],
        ["report", name],
        ["eval", "--compare", name, name],
    ):
        text = fails(*words)
        assert "name of" in text or "too long" in text, words
        assert len(text) < 1500
