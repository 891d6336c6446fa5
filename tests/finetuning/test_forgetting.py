"""A run that watches a general text: the figure is that of ``eval``, and the rule holds."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_slim import events
from mlx_slim.artifacts import load_tensors
from mlx_slim.config.load import from_values
from mlx_slim.config.schema import ForgettingConfig
from mlx_slim.errors import Interrupted, SlimError
from mlx_slim.evaluation.run import EvalOptions, evaluate
from mlx_slim.finetuning.forgetting import read_texts_of
from mlx_slim.finetuning.run import finetune
from tests.support.evals import write_tasks
from tests.support.runs import CtrlC, Recorder, losses, recipe, write_rows
from tests.support.tiny import TinyModels


def _watched(model: Path, data: Path, text: Path | str, method: str = "lora", **forgetting: object):
    values = recipe(model, data, method).recipe.model_dump(mode="json", exclude_none=True)
    values["forgetting"] = {"path": str(text), "every": 2, "max_rise": 9.0, **forgetting}
    if method == "full":
        values["train"] |= {"learning_rate": 0.02, "warmup": 0, "schedule": "constant"}
    return from_values(values, "watched", "test")


def _measured(run: Path) -> dict[int, float]:
    measured = {}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        if record["event"] == "forgetting":
            assert record["step"] not in measured
            measured[record["step"]] = record["bits_per_byte"]
    return measured


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "general.txt"
    path.write_text("The quick brown fox jumps over the lazy dog. " * 12)
    return path


def test_the_figure_is_that_of_eval(tiny: TinyModels, tmp_path: Path, text: Path) -> None:
    data, out = write_rows(tmp_path / "rows.jsonl"), tmp_path / "run"
    result = finetune(_watched(tiny("llama"), data, text), out, observer=Recorder())
    measured = _measured(out)
    assert list(measured) == [0, 2, 4, 6, 8, 10]
    assert result.done.reason == "complete" and measured[10]
    for name, step in (("base", 0), ("tuned", 10)):
        options = EvalOptions(perplexity=text, max_length=128)
        if name == "tuned":
            if result.done.result_step != 10:
                continue
            options = EvalOptions(perplexity=text, max_length=128, adapter=out / "adapters")
        (scored,) = evaluate(tiny("llama"), [], tmp_path / name, options)
        value = scored["perplexity"]["metrics"]["bits_per_byte"]["value"]
        assert measured[step] == pytest.approx(value, rel=1e-5)


def test_a_run_that_forgets_stops_and_keeps_what_was_within(
    tiny: TinyModels, tmp_path: Path, text: Path
) -> None:
    data, out = write_rows(tmp_path / "rows.jsonl"), tmp_path / "run"
    text.write_text("@#$%ZXQ~{}" * 40)  # nothing of it in the rows
    free = _watched(tiny("llama"), data, text, "full")
    finetune(free, tmp_path / "free", observer=Recorder())
    bits = _measured(tmp_path / "free")
    rises = {step: value / bits[0] - 1 for step, value in bits.items()}
    limit = (rises[2] + max(rises.values())) / 2  # step 2 is within, a later one is not
    assert limit > rises[2] > 0
    over = min(step for step, rise in rises.items() if rise > limit)
    strict = _watched(tiny("llama"), data, text, "full", max_rise=limit)
    recorder = Recorder()
    result = finetune(strict, out, observer=recorder)
    assert result.done.reason == "forgetting" and result.done.step == over
    result_step = result.done.result_step
    assert result_step is not None and result_step < over and rises[result_step] <= limit
    saved = load_tensors(out / "model" / "model.safetensors")
    expected = load_tensors(out / "checkpoints" / f"step-{result_step}" / "weights.safetensors")
    assert all(mx.array_equal(saved[name], expected[name]) for name in expected)
    assert any(isinstance(e, events.ForgettingMeasured) and not e.within for e in recorder.events)


def test_resumed_equals_uninterrupted(tiny: TinyModels, tmp_path: Path, text: Path) -> None:
    data, out = write_rows(tmp_path / "rows.jsonl"), tmp_path / "run"
    small = _watched(tiny("llama"), data, text)
    finetune(small, tmp_path / "straight", observer=Recorder())
    with pytest.raises(Interrupted):
        finetune(small, out, observer=CtrlC())
    before = text.read_text()
    text.write_text("something else")
    with pytest.raises(SlimError, match="another text"):
        finetune(small, out, observer=Recorder(), resume=True)
    text.write_text(before)
    finetune(small, out, observer=Recorder(), resume=True)
    assert losses(out) == losses(tmp_path / "straight")
    assert _measured(out) == _measured(tmp_path / "straight")


def test_texts_come_from_tasks_rows_and_files(tmp_path: Path) -> None:
    choice, generation, text = write_tasks(tmp_path / "tasks", 8)
    measured = read_texts_of(ForgettingConfig(path=f"task:{choice}", rows=2))
    assert (
        measured.documents[0].startswith("Questions and answers") and len(measured.documents) == 4
    )
    assert "Answer:" in measured.documents[0]
    assert read_texts_of(ForgettingConfig(path=f"task:{generation}", rows=3)).documents[0] == (
        "Say 0 alpha?: alpha"
    )
    assert len(read_texts_of(ForgettingConfig(path=str(text))).documents) == 1
    rows = write_rows(tmp_path / "rows.jsonl")
    assert read_texts_of(ForgettingConfig(path=str(rows), rows=2)).documents[1] == (
        "1: alpha beta\n\nbetabeta"
    )
    with pytest.raises(SlimError, match="does not exist"):
        read_texts_of(ForgettingConfig(path=str(tmp_path / "none.jsonl")))
