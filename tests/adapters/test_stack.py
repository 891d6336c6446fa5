"""Adapters on top of each other: sums, weights, order, training on a stack."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from mlx_slim.adapters.inject import inject, remove_adapters
from mlx_slim.adapters.merge import merge
from mlx_slim.adapters.stack import combined, load_adapters, parse_adapters
from mlx_slim.adapters.store import load_adapter
from mlx_slim.artifacts import load_tensors
from mlx_slim.config.load import from_values
from mlx_slim.config.schema import AdapterConfig
from mlx_slim.errors import SlimError
from mlx_slim.evaluation.run import EvalOptions, command_words, evaluate
from mlx_slim.export.fuse import FuseOptions, fuse
from mlx_slim.finetuning.run import finetune
from mlx_slim.models.load import load
from mlx_slim.runtime import to_float
from tests.adapters.support import IDS, relative_error, shake
from tests.support.adapters import tuned_logits, write_adapter, write_quantized
from tests.support.runs import Recorder, losses, recipe, talk_command, write_rows
from tests.support.stock import stock_load
from tests.support.tiny import TinyModels

OPTIONS = FuseOptions(samples=2, length=32)


@pytest.fixture
def two(tiny: TinyModels, tmp_path: Path) -> tuple[Path, Path]:
    """Two adapters of other ranks, scales and layers."""
    base = tiny("llama-tied")
    one = write_adapter(
        tmp_path / "one", base, rank=4, targets=["q_proj", "up_proj", "embed_tokens"]
    )
    other = write_adapter(tmp_path / "other", base, rank=3, scale=0.7, layers=[1, 2], init="pissa")
    return one, other


def _logits(base: Path, *adapters: str) -> mx.array:
    model = load(base).model
    load_adapters(model, parse_adapters(adapters))
    return model(IDS)


def _merged(base: Path, adapter: Path) -> dict[str, mx.array]:
    model = load(base).model
    load_adapter(model, adapter)
    merge(model, mx.float32)
    return dict(tree_flatten(model.parameters()))


def test_a_stack_is_the_sum_of_the_merged_deltas(tiny: TinyModels, two: Any) -> None:
    base = tiny("llama-tied")
    plain = dict(tree_flatten(load(base).model.parameters()))
    deltas = [
        {name: value - plain[name] for name, value in _merged(base, adapter).items()}
        for adapter in two
    ]
    model = load(base).model
    load_adapters(model, parse_adapters([f"{two[0]}=0.7", f"{two[1]}=-0.3"]))
    ours = model(IDS)
    summed = load(base).model
    summed.load_weights(
        [(k, v + 0.7 * deltas[0][k] - 0.3 * deltas[1][k]) for k, v in plain.items()]
    )
    assert relative_error(ours, summed(IDS)) < 1e-5
    merge(model, mx.float32)
    assert relative_error(model(IDS), summed(IDS)) < 1e-5


def test_weights_one_and_zero_are_the_first_alone_and_order_does_not_matter(
    tiny: TinyModels, two: Any
) -> None:
    base, (one, other) = tiny("llama-tied"), two
    assert mx.array_equal(_logits(base, f"{one}=1", f"{other}=0"), tuned_logits(base, one))
    assert (
        relative_error(
            _logits(base, str(one), f"{other}=0.5"), _logits(base, f"{other}=0.5", str(one))
        )
        < 1e-6
    )
    half = _logits(base, f"{one}=0.5", f"{one}=0.5")
    assert relative_error(half, tuned_logits(base, one)) < 1e-6


def test_adapters_come_off_as_they_went_on(tiny: TinyModels, two: Any) -> None:
    model = load(tiny("llama-tied")).model
    before = model(IDS)
    load_adapters(model, parse_adapters([two[0], two[1]]))
    remove_adapters(model)
    assert mx.array_equal(model(IDS), before)
    load_adapter(model, two[0])
    assert mx.array_equal(model(IDS), tuned_logits(tiny("llama-tied"), two[0]))


def test_names_and_weights(tmp_path: Path) -> None:
    odd = tmp_path / "lr=0.5"
    odd.mkdir()
    assert parse_adapters(str(odd))[0].weight == 1
    (parsed,) = parse_adapters([f"{odd}=0.25"])
    assert (parsed.folder, parsed.weight, str(parsed)) == (odd, 0.25, f"{odd}=0.25")
    assert parse_adapters(None) == []
    for wrong in ("a=much", "a=nan", "a=inf", "a="):
        with pytest.raises(SlimError, match="is not a number"):
            parse_adapters([wrong])


def test_a_dora_stands_alone(tiny: TinyModels, tmp_path: Path) -> None:
    base = tiny("llama")
    dora, lora = write_adapter(tmp_path / "d", base, dora=True), write_adapter(tmp_path / "l", base)
    assert mx.array_equal(_logits(base, str(dora), f"{lora}=0"), tuned_logits(base, dora))
    for adapters in ([dora, lora], [f"{dora}=0.5"]):
        with pytest.raises(SlimError, match="a DoRA scales the whole weight"):
            load_adapters(load(base).model, parse_adapters(adapters))
    with pytest.raises(SlimError, match="other than 0"):
        load_adapters(load(base).model, parse_adapters([f"{lora}=0"]))


@pytest.mark.parametrize("bits", [None, 4])
def test_fuse_adds_up_and_keeps_the_sum_beside_its_base(
    tiny: TinyModels, tmp_path: Path, bits: int | None
) -> None:
    base = write_quantized(tmp_path / "q", tiny("llama"), bits) if bits else tiny("llama")
    one = write_adapter(tmp_path / "one", base, rank=4)
    other = write_adapter(
        tmp_path / "other", base, rank=2, targets=["v_proj", "down_proj"], size=0.1
    )
    adapters = [f"{one}=0.6", str(other)]
    expected = _logits(base, *adapters)
    result = fuse(base, adapters, tmp_path / "out", OPTIONS)
    fused, _ = stock_load(str(tmp_path / "out"))
    assert mx.allclose(
        fused(IDS), expected, rtol=1e-3, atol=1e-4 * to_float(mx.abs(expected).max())
    )
    record = json.loads((tmp_path / "out" / "fuse.json").read_text())
    assert [each.get("weight", 1) for each in record["adapters"]] == [0.6, 1]
    assert result.layers == 21
    fuse(base, adapters, tmp_path / "kept", FuseOptions("keep", samples=2, length=32))
    unquantized = tmp_path / "kept"
    stock, _ = stock_load(str(unquantized), adapter_path=str(unquantized / "adapters"))
    assert relative_error(stock(IDS), expected) < 1e-3 if bits else 1e-5


@pytest.mark.parametrize("architecture", ["llama", "llama-tied"])
def test_a_new_adapter_is_stacked_on_the_old_ones(
    tiny: TinyModels, tmp_path: Path, architecture: str
) -> None:
    base = tiny(architecture)
    targets = ["q_proj", "embed_tokens"] if architecture == "llama-tied" else ["q_proj", "o_proj"]
    below = write_adapter(tmp_path / "below", base, targets=targets)
    model = load(base).model
    under = combined(model, parse_adapters([f"{below}=0.5"]))
    mx.random.seed(0)
    inject(model, AdapterConfig(rank=2, targets=["q_proj", "v_proj"]), dora=False, below=under)
    assert relative_error(model(IDS), _logits(base, f"{below}=0.5")) < 1e-5
    names = {name for name, _ in tree_flatten(model.trainable_parameters())}
    assert len(names) == 2 * 2 * 3 and not any("under" in name for name in names)
    shake(model)
    moved = model(IDS)
    merge(model, mx.float32)
    assert relative_error(model(IDS), moved) < 1e-5


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_training_one_after_the_other(tiny: TinyModels, tmp_path: Path, method: str) -> None:
    base, data = tiny("llama"), write_rows(tmp_path / "rows.jsonl")
    first = tmp_path / "first"
    finetune(recipe(base, data, method), first, observer=Recorder())
    values = recipe(base, data, method).recipe.model_dump(mode="json", exclude_none=True)
    values["adapter"] |= {"on": [str(first)], "targets": ["q_proj", "v_proj"], "rank": 2}
    small = from_values(values, "second", "test")
    result = finetune(small, tmp_path / "second", observer=Recorder())
    assert losses(tmp_path / "second")[1] < losses(first)[1]
    before = load_tensors(first / "adapters" / "adapters.safetensors")
    second = load_tensors(tmp_path / "second" / "adapters" / "adapters.safetensors")
    assert {name.rsplit(".", 2)[1] for name in second} == {"q_proj", "v_proj"}
    assert len(before) == 42 and len(second) == 12
    assert f"--adapter {first} --adapter {tmp_path / 'second'}" in talk_command(result)


def test_eval_scores_the_sum_and_names_it(tiny: TinyModels, tmp_path: Path) -> None:
    adapter, text = write_adapter(tmp_path / "one", tiny("llama")), tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 9)
    halves = [f"{adapter}=0.5", f"{adapter}=0.5"]
    scored = []
    for name, adapters in (("one", adapter), ("halves", halves)):
        options = EvalOptions(perplexity=text, adapter=adapters)
        (results,) = evaluate(tiny("llama"), [], tmp_path / f"{name}-out", options)
        scored.append(results["perplexity"]["metrics"]["bits_per_byte"]["value"])
        assert command_words(["m"], [], options).count("--adapter") == len(scored)
    assert scored[0] == pytest.approx(scored[1], rel=1e-5)
    assert results["adapter"] == f"{halves[0]} + {halves[1]}"


def test_what_does_not_stack_is_one_error(tiny: TinyModels, tmp_path: Path) -> None:
    base, data = tiny("llama"), write_rows(tmp_path / "rows.jsonl")
    for method, text in (("dora", "a DoRA is not a sum"), ("full", "trains no adapter")):
        values = recipe(base, data, method).recipe.model_dump(mode="json", exclude_none=True)
        values["adapter"] |= {"on": ["somewhere"]}
        with pytest.raises(SlimError, match=text):
            from_values(values, "second", "test")
    values["method"] = "lora"
    with pytest.raises(SlimError, match="somewhere is not an adapter folder"):
        finetune(from_values(values, "second", "test"), tmp_path / "run", observer=Recorder())
    assert not (tmp_path / "run").exists()
