"""Mixtures of experts on a CPU: mlx-lm's numbers, trained and scored like any other model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.switch_layers import SwiGLU, SwitchGLU

from mlx_slim.config.load import from_values
from mlx_slim.evaluation.run import EvalOptions, evaluate
from mlx_slim.evaluation.scoring.plain import plain_generate
from mlx_slim.finetuning.run import finetune
from mlx_slim.models.activations import use_fast_swiglu
from mlx_slim.models.load import load
from mlx_slim.runtime import on_gpu, to_float
from tests.support.evals import WORDS, differences, samples_of, write_tasks
from tests.support.runs import Recorder, losses, recipe, write_rows
from tests.support.stock import stock_load
from tests.support.tiny import MIXTURES, VOCAB, TinyModels


@pytest.mark.skipif(on_gpu(), reason="a GPU keeps mlx-lm's own forward")
@pytest.mark.parametrize("tokens", [5, 100])  # sorted by expert from 64 choices on
@pytest.mark.parametrize("architecture", list(MIXTURES))
def test_the_cpu_path_gives_the_logits_and_gradients_of_mlx_lm(
    tiny: TinyModels, architecture: str, tokens: int
) -> None:
    model, _ = stock_load(str(tiny(architecture)))
    ids = mx.random.randint(0, VOCAB, (1, tokens), key=mx.random.key(3))

    def loss(model: nn.Module):
        return nn.losses.cross_entropy(model(ids)[:, :-1], ids[:, 1:]).mean()

    logits = np.array(model(ids))
    value, gradients = nn.value_and_grad(model, loss)(model)
    mx.eval(value, gradients)
    assert use_fast_swiglu(model) >= len(model.layers)
    assert use_fast_swiglu(model) == 0
    np.testing.assert_allclose(np.array(model(ids)), logits, atol=1e-5, rtol=1e-4)
    again, fast = nn.value_and_grad(model, loss)(model)
    assert abs(again.item() - value.item()) < 1e-5
    slow, quick = dict(tree_flatten(gradients)), dict(tree_flatten(fast))
    assert slow.keys() == quick.keys()
    for name, one in slow.items():
        scale = to_float(mx.abs(one).max())
        assert to_float(mx.abs(one - quick[name]).max()) <= 1e-4 * scale + 1e-7, name
    assert type(SwitchGLU(8, 8, 2).activation) is SwiGLU  # mlx-lm's shared default is untouched


@pytest.mark.parametrize("architecture", list(MIXTURES))
@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_training(tiny: TinyModels, tmp_path: Path, architecture: str, method: str) -> None:
    rows = write_rows(tmp_path / "rows.jsonl")
    settings = recipe(tiny(architecture), rows, method, steps=4, validate_every=9, save_every=9)
    if method != "full":
        values = settings.recipe.model_dump(exclude_unset=True)
        values["adapter"] = {"rank": 4, "targets": "all-linear"}  # the experts too
        settings = from_values(values, "small", "test")
    finetune(settings, tmp_path / "run", observer=Recorder())
    trained_losses = losses(tmp_path / "run")
    assert trained_losses[4] < trained_losses[1]
    assert (tmp_path / "run" / "run.json").exists()


@pytest.mark.parametrize("architecture", list(MIXTURES))
def test_scoring(tiny: TinyModels, tmp_path: Path, architecture: str) -> None:
    tasks = write_tasks(tmp_path / "tasks")
    names = [str(task) for task in tasks[:2]]
    evaluate(tiny(architecture), names, tmp_path / "out", EvalOptions())
    stock, tokenizer = stock_load(str(tiny(architecture)))
    loaded = replace(load(tiny(architecture)), model=stock)
    assert differences(tmp_path / "out", loaded, tasks) == []
    for sample in samples_of(tmp_path / "out", "toy_answer")[::9]:
        question = f"{sample['doc_id']} " + " ".join(WORDS[: 1 + sample["doc_id"] % 5]) + "?"
        ids = tokenizer.encode(f"Say {question}:")
        text, reason = plain_generate(stock, tokenizer, ids, 12, ("\n", "a"))
        assert (sample["generation"], sample["stop_reason"]) == (text, reason)
