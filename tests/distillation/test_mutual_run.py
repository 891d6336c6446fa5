"""Two students that learn together: both saved, resumed exactly, refused where they cannot."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm import load as stock_load

from mlx_slim import events
from mlx_slim.artifacts import load_tensors
from mlx_slim.config.load import Resolved
from mlx_slim.distillation.run import distill
from mlx_slim.errors import Interrupted, SlimError
from mlx_slim.events import Event
from tests.distillation.test_run import recipe_with_teachers
from tests.support.runs import Recorder, losses, write_rows
from tests.support.tiny import tiny_model


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl")


def _mutual(first: Path, second: Path, data: Path, method: str, **train: Any) -> Resolved:
    both = {"method": "mutual", "weight": 1.0}
    return recipe_with_teachers(first, data, [{"model": str(second)}], method, train, **both)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_two_students_learn_and_are_both_saved(
    tiny: Callable[..., Path], data: Path, tmp_path: Path, method: str
) -> None:
    second = tiny_model(tmp_path / "second", seed=4, num_hidden_layers=2)
    out = tmp_path / "run"
    recorder = Recorder()
    run = _mutual(tiny("llama"), second, data, method, learning_rate=1e-2)
    distill(run, out, observer=recorder)
    steps = [e.metrics for e in recorder.events if isinstance(e, events.StepDone)]
    for student in ("first", "second"):
        assert steps[-1][student] < steps[0][student]  # type: ignore[index]
    if method == "full":
        stock_load(str(out / "first"))
        stock_load(str(out / "second"))
    else:
        stock_load(str(tiny("llama")), adapter_path=str(out / "first"))
        stock_load(str(second), adapter_path=str(out / "second"))
    record = json.loads((out / "run.json").read_text())
    assert record["distill"] == {
        "method": "mutual",
        "second": "second",
        "folders": ["first", "second"],
    }


def test_two_students_resume_exactly(tiny: Callable[..., Path], data: Path, tmp_path: Path) -> None:
    run = _mutual(tiny("llama"), tiny("llama"), data, "lora")  # apart by their adapters' start
    straight, out = tmp_path / "straight", tmp_path / "stopped"
    distill(run, straight, observer=Recorder())

    class Stop(Recorder):
        def notify(self, event: Event) -> None:
            if isinstance(event, events.StepDone) and event.step == 3:
                os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted):
        distill(run, out, observer=Stop())
    distill(run, out, observer=Recorder(), resume=True)
    assert losses(out) == losses(straight)
    for name in ("first", "second"):
        ours, theirs = (
            load_tensors(folder / name / "adapters.safetensors") for folder in (out, straight)
        )
        assert all(mx.array_equal(ours[key], theirs[key]).item() for key in ours)


def test_students_that_cannot_learn_from_each_other_are_refused(
    tiny: Callable[..., Path], data: Path, tmp_path: Path
) -> None:
    wider = tiny_model(tmp_path / "wider", vocab_size=300)
    out = tmp_path / "run"
    with pytest.raises(SlimError, match="264 and 300 tokens"):
        distill(_mutual(tiny("llama"), wider, data, "lora"), out, observer=Recorder())
    with pytest.raises(SlimError, match="they would stay identical"):
        distill(_mutual(tiny("llama"), tiny("llama"), data, "full"), out, observer=Recorder())
    assert not out.exists()
