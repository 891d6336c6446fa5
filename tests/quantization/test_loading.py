"""Loading holds no more than what stays and one tensor: MLX's own peak, against what is on disk."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from mlx_slim.artifacts import load_tensors
from mlx_slim.config.schema import QuantizeConfig
from mlx_slim.errors import ResourceError
from mlx_slim.finetuning import build as prepare
from mlx_slim.finetuning.build import prepare_base
from mlx_slim.finetuning.run import finetune
from mlx_slim.models.load import load, read_config
from mlx_slim.models.tensors import folder_tensors
from mlx_slim.planner.memory import predict
from mlx_slim.planner.shapes import leaves
from mlx_slim.quantization.apply import _PIECE, load_quantized, quantize_model
from tests.support.memory import peak_of
from tests.support.runs import Recorder, recipe, write_rows
from tests.support.tiny import tiny_model

# Most of it is the table of 4,096 tokens: 2 MB in float32, the blocks 1.3 MB each.
SHAPE: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 512,
    "vocab_size": 4096,
    "num_hidden_layers": 6,
}
# Allocations are rounded up to pages; nothing else may exist besides.
SLACK = 1 << 16


def held(model: nn.Module) -> int:
    return sum(value.nbytes for _, value in leaves(model))


@pytest.mark.parametrize("compute", [mx.float32, mx.bfloat16], ids=str)
@pytest.mark.parametrize("stored", [mx.float32, mx.bfloat16, mx.float16], ids=str)
@pytest.mark.parametrize("architecture", ["llama", "llama-tied"])
def test_a_base_is_loaded_one_tensor_at_a_time(
    architecture: str, stored: mx.Dtype, compute: mx.Dtype, device: str, tmp_path: Path
) -> None:
    folder = tiny_model(tmp_path / "m", architecture, dtype=stored, shards=3, **SHAPE)
    largest = max(tensor.nbytes for tensor in folder_tensors(folder).values())
    as_computed = largest // stored.size * compute.size
    name = str(compute).removeprefix("mlx.core.")
    run = recipe(folder, write_rows(tmp_path / "rows.jsonl"), "qlora", dtype=name).recipe

    (loaded, _), peak = peak_of(lambda: prepare_base(run))
    base = held(loaded.model)
    assert peak <= base + largest + as_computed + SLACK
    assert base < 0.5 * peak_of(lambda: held(load(folder, dtype=compute).model))[0]
    predicted = predict(read_config(folder), run, suggest=False).loading_peak_bytes
    # Whether a tensor is freed before its codes are allocated is the scheduler's choice.
    assert peak - SLACK <= predicted <= 1.15 * peak

    dense, peak = peak_of(lambda: load(folder, dtype=compute))
    assert peak <= held(dense.model) + largest + SLACK
    quantize_model(dense.model, dense.config, run.quantize)  # the way that holds it all
    one, other = (dict(tree_flatten(each.model.parameters())) for each in (loaded, dense))
    assert one.keys() == other.keys()
    assert all(mx.array_equal(one[key], other[key]).item() for key in one)


def test_a_float_format_is_rounded_in_pieces_and_gives_the_same_codes(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "m", dtype=mx.bfloat16, hidden_size=256, vocab_size=600)
    settings = QuantizeConfig(mode="mxfp4", bits=4, group_size=32)
    (loaded, report), peak = peak_of(lambda: load_quantized(folder, settings))
    # Rounding a piece takes up to 40 times its size on a CPU, as MLX does it.
    assert peak <= report.bytes_after + 2 * 600 * 256 * 2 + 40 * _PIECE
    weight = load(folder).model["model"]["embed_tokens"]["weight"]
    assert weight.nbytes > _PIECE, "more than one piece"
    codes, scales, *_ = mx.quantize(weight, group_size=32, bits=4, mode="mxfp4")
    layer = loaded.model["model"]["embed_tokens"]
    assert mx.array_equal(layer["weight"], codes).item()
    assert mx.array_equal(layer["scales"], scales).item()
    assert loaded.config["quantization"] == {"group_size": 32, "bits": 4, "mode": "mxfp4"}


def test_a_head_that_repeats_the_embedding_is_compared_unread(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "m", "llama", dtype=mx.bfloat16, shards=1, **SHAPE)
    file = next(folder.glob("*.safetensors"))
    weights = load_tensors(file)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    mx.eval(weights)
    mx.save_safetensors(str(file), weights)
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(
        config.replace('"tie_word_embeddings": false', '"tie_word_embeddings": true')
    )
    del weights
    _, peak = peak_of(lambda: read_config(folder))
    assert peak < SLACK
    assert "lm_head" not in load(folder).model


def test_a_base_that_does_not_fit_while_it_loads_is_refused_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_model(tmp_path / "m", dtype=mx.bfloat16, **SHAPE)
    resolved = recipe(folder, write_rows(tmp_path / "rows.jsonl"), batch_tokens=128)
    needed = predict(read_config(folder), resolved.recipe, suggest=False).loading_peak_bytes
    memory = resolved.recipe.memory.model_copy(update={"budget": str(needed - 1)})
    tight = replace(resolved, recipe=resolved.recipe.model_copy(update={"memory": memory}))
    monkeypatch.setattr(prepare, "load", None)  # calling it would be another error
    with pytest.raises(ResourceError, match=r"loading .* needs .* \(predicted\), the budget is"):
        finetune(tight, tmp_path / "run", observer=Recorder())
    assert not (tmp_path / "run").exists()


def test_the_plan_says_which_peak_is_the_larger_one(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "m", "llama", dtype=mx.float32, **SHAPE)
    small = {"batch_tokens": 8, "max_length": 8, "dtype": "bfloat16", "loss_chunk": 8}
    run = recipe(folder, write_rows(tmp_path / "rows.jsonl"), **small).recipe
    config = {**read_config(folder), "num_hidden_layers": 1, "vocab_size": 60_000}
    prediction = predict(config, run, suggest=False, gpu=True)
    assert prediction.breakdown["loading"] > 0
    assert (
        prediction.predicted_peak_bytes
        == prediction.loading_peak_bytes
        == sum(prediction.breakdown.values())
    )
    longer = run.model_copy(
        update={"train": run.train.model_copy(update={"batch_tokens": 4096, "max_length": 4096})}
    )
    prediction = predict(config, longer, suggest=False, gpu=True)
    assert prediction.breakdown["loading"] == 0
    assert (
        prediction.predicted_peak_bytes
        == sum(prediction.breakdown.values())
        > prediction.loading_peak_bytes
    )
