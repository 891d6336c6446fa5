"""Learning rates by depth: what each parameter's is, with every optimizer, full and LoRA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlx_slim.adapters.inject import inject
from mlx_slim.config.schema import AdapterConfig
from mlx_slim.config.train import TrainConfig
from mlx_slim.errors import Interrupted
from mlx_slim.events import Notice
from mlx_slim.finetuning.run import finetune
from mlx_slim.runtime import to_float
from mlx_slim.training.layer_rates import described, layer_multiples
from mlx_slim.training.optim import Optimizer, trainable
from tests.support.runs import CtrlC, Recorder, losses, recipe, write_rows
from tests.support.stock import stock_load
from tests.support.tiny import TinyModels

DECAY = 0.5
OPTIMIZERS = ["adamw", "adam", "adafactor", "lion", "muon", "sgd"]


def model_of(folder: Path, lora: bool) -> Any:
    model, _ = stock_load(str(folder))
    if lora:
        config = AdapterConfig(rank=4, targets=["all-linear", "embed_tokens", "lm_head"])
        inject(model, config, dora=False)
    else:
        model.unfreeze()
    return model


@pytest.mark.parametrize("lora", [False, True])
def test_each_layer_has_the_rate_of_its_depth(tiny: TinyModels, lora: bool) -> None:
    model = model_of(tiny("llama"), lora)
    multiples = layer_multiples(model, trainable(model), DECAY)
    assert len(model.layers) == 3
    for path, multiple in multiples.items():
        if "layers." in path:
            block = int(path.split("layers.")[1].split(".")[0])
            assert multiple == [0.25, 0.5, 1.0][block]
        else:
            assert multiple == (0.125 if "embed_tokens" in path else 1.0)
    places = described(model, trainable(model), DECAY)
    expected = {"embedding": 0.125, "block 1": 0.25, "block 2": 0.5, "block 3": 1.0, "top": 1.0}
    assert list(places.items()) == list(expected.items())
    assert set(layer_multiples(model, trainable(model), 1.0).values()) == {1.0}


def test_a_tied_matrix_has_the_rate_of_the_embedding(tiny: TinyModels) -> None:
    model = model_of(tiny("llama-tied"), False)
    assert layer_multiples(model, trainable(model), DECAY)["model.embed_tokens.weight"] == 0.125


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("lora", [False, True])
def test_every_optimizer_moves_a_layer_by_its_rate(tiny: TinyModels, name: Any, lora: bool) -> None:
    """The update of each parameter is that of a run without decay, times its multiple."""
    moved = []
    for decay in (1.0, DECAY):
        model = model_of(tiny("llama"), lora)
        before = dict(trainable(model))
        multiples = layer_multiples(model, before, decay)
        optimizer = Optimizer(model, TrainConfig(optimizer=name), multiples.__getitem__)
        mx.random.seed(1)
        optimizer.update({path: mx.random.normal(v.shape) for path, v in before.items()}, 1e-2)
        after = trainable(model)
        moved.append({path: after[path] - value for path, value in before.items()})
    for path, plain in moved[0].items():
        expected = multiples[path] * plain
        gap = to_float(mx.abs(moved[1][path] - expected).max())
        assert gap < 1e-3 * to_float(mx.abs(expected).max()) + 1e-7, path


def test_a_run_says_its_rates_and_resumes_bit_for_bit(tiny: TinyModels, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl")
    resolved = recipe(tiny("llama"), data, steps=6, layer_decay=DECAY)
    seen, straight, out = Recorder(), tmp_path / "straight", tmp_path / "killed"
    finetune(resolved, straight, observer=seen)
    (told,) = [e for e in seen.events if isinstance(e, Notice) and "by depth" in e.message]
    assert told.message.endswith("of the run's: block 1 0.25, block 2 0.5, block 3 1")
    with pytest.raises(Interrupted):
        finetune(resolved, out, observer=CtrlC())
    finetune(resolved, out, observer=Recorder(), resume=True)
    assert losses(out) == losses(straight)
