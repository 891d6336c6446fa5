"""The whole fine-tune on tiny models: what it writes, and when it refuses."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlx_slim import events
from mlx_slim.artifacts import load_tensors
from mlx_slim.errors import ResourceError, SlimError
from mlx_slim.finetuning.run import finetune
from mlx_slim.training.loop import Loop
from tests.support.memory import reset_peak
from tests.support.runs import Recorder, losses, recipe, write_rows
from tests.support.stock import stock_load
from tests.support.tiny import TinyModels


@pytest.mark.parametrize("architecture", ["llama", "llama-tied", "phi", "mistral", "qwen2"])
@pytest.mark.parametrize("method", ["lora", "qlora", "dora", "full"])
def test_every_method_learns_and_loads_in_stock_mlx_lm(
    tiny: TinyModels, tmp_path: Path, architecture: str, method: str
) -> None:
    data, out = write_rows(tmp_path / "rows.jsonl"), tmp_path / "run"
    result = finetune(recipe(tiny(architecture), data, method, steps=6), out, observer=Recorder())
    step_losses = losses(out)
    assert step_losses[6] < step_losses[1]
    assert result.done.reason == "complete"
    if method == "full":
        model, _ = stock_load(str(out / "model"))
    else:
        model, _ = stock_load(str(tiny(architecture)), adapter_path=str(out / "adapters"))
    assert mx.isfinite(model(mx.array([[1, 2, 3]]))).all().item()
    record = json.loads((out / "run.json").read_text())
    assert record["status"] == "complete"
    assert record["result"]["trainable"] == result.trainable > 0
    assert (out / "data_ledger.json").exists()


def test_the_best_validation_step_is_what_is_saved(tiny: TinyModels, tmp_path: Path) -> None:
    data, out = write_rows(tmp_path / "rows.jsonl"), tmp_path / "run"
    wild = recipe(
        tiny("llama"),
        data,
        "full",
        learning_rate=0.5,
        schedule="constant",
        warmup=0,
        validate_every=1,
        steps=5,
        early_stopping=2,
    )
    recorder = Recorder()
    result = finetune(wild, out, observer=recorder)
    scored = {e.step: e.loss for e in recorder.events if isinstance(e, events.ValidationDone)}
    assert result.done.best_step == min(scored, key=lambda step: scored[step])
    if result.done.reason == "early_stopping":
        assert result.done.best_step is not None
        assert result.done.step == result.done.best_step + 2


def test_a_loss_that_is_not_finite_stops_before_the_update(
    tiny: TinyModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, out = write_rows(tmp_path / "rows.jsonl"), tmp_path / "run"
    original = Loop._step

    def poisoned(self: Loop, *args: Any) -> None:
        if self.state.step == 4:
            objective: Any = self.stepper.objective
            head = objective.split.head.module
            head.weight = head.weight * float("nan")
        original(self, *args)

    monkeypatch.setattr(Loop, "_step", poisoned)
    with pytest.raises(SlimError, match="step 5: loss nan") as caught:
        finetune(recipe(tiny("llama"), data), out, observer=Recorder())
    assert "step-4" in caught.value.hint
    saved = load_tensors(out / "checkpoints" / "step-4" / "weights.safetensors")
    assert all(mx.isfinite(value).all().item() for value in saved.values())
    assert max(losses(out)) == 4


def test_over_budget_is_refused_before_training_with_what_fits(
    tiny: TinyModels, tmp_path: Path
) -> None:
    data, out = write_rows(tmp_path / "rows.jsonl"), tmp_path / "run"
    small = recipe(tiny("llama"), data)
    memory = small.recipe.memory.model_copy(update={"budget": "300kB"})
    tight = replace(small, recipe=small.recipe.model_copy(update={"memory": memory}))
    with pytest.raises(ResourceError, match="budget is 300 kB") as caught:
        finetune(tight, out, observer=Recorder())
    assert caught.value.exit_code == 3
    assert caught.value.hint
    assert not out.exists()


def test_halving_batch_tokens_halves_activation_memory(tiny: TinyModels, tmp_path: Path) -> None:
    from mlx_slim.data.batches import Batcher
    from mlx_slim.training.cross_entropy import CrossEntropy
    from mlx_slim.training.step import Stepper
    from tests.support.rows import MemoryRows

    model, _ = stock_load(str(tiny("llama")))
    model.freeze()
    model.model.layers[0].self_attn.q_proj.unfreeze()
    rows = MemoryRows([65] * 64)
    peaks = []
    for budget in (2048, 1024):
        batch = Batcher(rows, budget, 65, "grouped", 0).largest_batch()
        before = reset_peak()
        Stepper(model, CrossEntropy(model, chunk=64)).micro(batch)
        peaks.append(mx.get_peak_memory() - before)
    assert 0.4 < peaks[1] / peaks[0] < 0.65  # beside other work the CPU frees some arrays late
