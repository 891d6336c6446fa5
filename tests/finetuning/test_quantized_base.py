"""An adapter of a QLoRA run computes over the quantized base that it was trained on."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from click.testing import CliRunner
from mlx.utils import tree_flatten

from mlx_slim.adapters.stack import load_adapters, parse_adapters
from mlx_slim.adapters.store import load_adapter
from mlx_slim.analyze.intruders import adapter_pairs
from mlx_slim.artifacts import load_tensors, read_json, write_json
from mlx_slim.cli.generate import command as generate
from mlx_slim.config.load import Resolved
from mlx_slim.config.schema import QuantizeConfig
from mlx_slim.errors import SlimError
from mlx_slim.evaluation.chat import open_session
from mlx_slim.evaluation.run import EvalOptions, evaluate
from mlx_slim.export.fuse import FuseOptions, fuse
from mlx_slim.export.model import export_hf
from mlx_slim.finetuning.run import finetune
from mlx_slim.finetuning.run_dir import Result
from mlx_slim.models.load import load
from mlx_slim.planner.run import plan
from mlx_slim.planner.shapes import leaves
from mlx_slim.quantization.apply import quantize_model
from mlx_slim.quantization.base import load_base
from mlx_slim.runtime import to_float
from tests.support.runs import Recorder, recipe, talk_command, write_rows
from tests.support.stock import stock_load
from tests.support.tiny import tiny_model

IDS = mx.arange(3, 35)[None]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("place")


@pytest.fixture(scope="module")
def dense(place: Path) -> Path:
    return tiny_model(place / "dense", "llama-tied", dtype=mx.bfloat16)


def trained(
    place: Path, name: str, dense: Path, method: str = "qlora", **changes: Any
) -> tuple[Result, Resolved]:
    resolved = recipe(dense, write_rows(place / f"{name}.jsonl"), method, steps=4)
    sections = {
        key: getattr(resolved.recipe, key).model_copy(update=value)
        for key, value in changes.items()
    }
    small = replace(resolved, recipe=resolved.recipe.model_copy(update=sections))
    return finetune(small, place / name, observer=Recorder()), small


@pytest.fixture(scope="module")
def qlora_run(place: Path, dense: Path) -> tuple[Result, Resolved]:
    """A QLoRA run over a dense model."""
    return trained(place, "run", dense)


@pytest.fixture(scope="module")
def expected(qlora_run: tuple[Result, Resolved], dense: Path) -> mx.array:
    """The trained model's logits, computed without any of the code that looks bases up."""
    loaded = load(dense, dtype=mx.float32)
    quantize_model(loaded.model, loaded.config, QuantizeConfig(group_size=32))
    load_adapter(loaded.model, qlora_run[0].out / "adapters")
    return loaded.model(IDS)


def logits(
    source: str | Path, adapter: Path | list[Path], dtype: mx.Dtype = mx.float32
) -> tuple[mx.array, list[str]]:
    stack = parse_adapters(adapter)
    loaded = load_base(source, [one.folder for one in stack], dtype=dtype)
    if stack:
        load_adapters(loaded.model, stack)
    return loaded.model(IDS).astype(mx.float32), loaded.notes


def test_what_is_advertised_is_what_was_trained(
    qlora_run: tuple[Result, Resolved], dense: Path, expected: mx.array
) -> None:
    out = qlora_run[0].out
    words = talk_command(qlora_run[0]).split()
    assert words == ["mlx-slim", "chat", str(out / "base"), "--adapter", str(out / "adapters")]
    computed, notes = logits(words[2], Path(words[4]))
    assert mx.array_equal(computed, expected).item() and notes == []
    computed, notes = logits(dense, out)
    assert mx.array_equal(computed, expected).item()
    assert len(notes) == 1 and str((out / "base").resolve()) in notes[0]
    other, _ = logits(dense, [])
    assert mx.abs(other - expected).max() > 1e-2 * mx.abs(expected).max()
    model, _ = stock_load(str(out / "base"), adapter_path=str(out / "adapters"))
    assert mx.allclose(
        model(IDS), expected, rtol=1e-3, atol=1e-4 * to_float(mx.abs(expected).max())
    )


def test_a_base_that_is_gone_is_made_again(
    qlora_run: tuple[Result, Resolved], dense: Path, expected: mx.array, tmp_path: Path
) -> None:
    run = shutil.copytree(qlora_run[0].out, tmp_path / "moved")
    shutil.rmtree(run / "base")
    computed, notes = logits(dense, run)
    assert mx.array_equal(computed, expected).item() and "quantized again" in notes[0]
    moved = shutil.copytree(dense, tmp_path / "elsewhere")
    computed, notes = logits(moved, qlora_run[0].out)  # not the folder that the run names
    assert mx.array_equal(computed, expected).item() and "quantized again" in notes[0]


def test_generate_and_eval_compute_with_it(
    qlora_run: tuple[Result, Resolved], dense: Path, tmp_path: Path
) -> None:
    run = qlora_run[0].out
    (tmp_path / "text.txt").write_text("alpha beta gamma delta epsilon " * 8)
    answers, scored = [], []
    for number, source in enumerate([run / "base", dense]):
        words = [str(source), "--adapter", str(run), "--prompt", "alpha", "--max-tokens", "8"]
        result = CliRunner().invoke(generate, words)
        answers.append(result.stdout)
        assert ("was trained on" in result.stderr) == (source == dense)
        options = EvalOptions(adapter=run, perplexity=tmp_path / "text.txt")
        heard = Recorder()
        (computed,) = evaluate(str(source), [], tmp_path / f"e{number}", options, observer=heard)
        scored.append(computed["perplexity"]["metrics"])
        notices = [getattr(event, "message", "") for event in heard.events]
        assert sum("was trained on" in text for text in notices) == (source == dense)
    assert answers[0] == answers[1] and scored[0] == scored[1]


def test_fuse_starts_from_it_and_stores_what_the_dense_model_is_stored_in(
    qlora_run: tuple[Result, Resolved], dense: Path, expected: mx.array, tmp_path: Path
) -> None:
    options = FuseOptions(samples=2, length=32)
    both = []
    for name, source in (("a", dense), ("b", qlora_run[0].out / "base")):
        result = fuse(source, qlora_run[0].out / "adapters", tmp_path / name, options)
        assert (result.mode, result.dtype) == ("dequantize", "bfloat16")
        both.append(load(tmp_path / name))
    one, other = (dict(tree_flatten(each.model.parameters())) for each in both)
    assert all(mx.array_equal(one[key], other[key]).item() for key in one)
    gap = mx.abs(both[0].model(IDS).astype(mx.float32) - expected).max()
    assert gap < 3e-2 * mx.abs(expected).max()
    assert export_hf(qlora_run[0].out / "base", tmp_path / "hf").facts


def test_intruders_are_counted_against_it(qlora_run: tuple[Result, Resolved], dense: Path) -> None:
    kind, pairs = adapter_pairs(str(dense), qlora_run[0].out / "adapters")
    path, base = next((pair.path, pair.base_OI) for pair in pairs)
    model = load(qlora_run[0].out / "base").model
    module = dict(model.named_modules())[path]
    dequantized = mx.dequantize(module.weight, module.scales, module.biases, group_size=32, bits=4)
    assert kind == "lora" and mx.allclose(dequantized, mx.array(base), atol=1e-6).item()


def test_it_is_trained_on_and_counted_on_disk(
    qlora_run: tuple[Result, Resolved], dense: Path, place: Path, tmp_path: Path
) -> None:
    # An adapter on top of it, by another method, lies over the same base.
    below = qlora_run[0].out / "adapters"
    result, _ = trained(tmp_path, "above", dense, "lora", adapter={"on": [str(below)]})
    top = result.out / "adapters"
    computed, _ = logits(dense, [below, top])
    again, _ = logits(result.out / "base", [below, top])
    assert mx.array_equal(computed, again).item()
    stored = load_tensors(result.out / "base" / "model.safetensors")
    first = load_tensors(qlora_run[0].out / "base" / "model.safetensors")
    assert all(mx.array_equal(stored[key], first[key]).item() for key in first)
    with pytest.raises(SlimError, match="4-bit affine, group 32 in float32, this recipe quantizes"):
        trained(tmp_path, "no", dense, adapter={"on": [str(below)]}, quantize={"bits": 8})
    # What a plan says of the disk holds the base.
    out, resolved = qlora_run[0].out, qlora_run[1]
    model = load(out / "base").model
    size = sum(value.nbytes for _, value in leaves(model))
    lora = resolved.recipe.model_copy(update={"method": "lora"})
    more = plan(resolved.recipe)[0].disk_bytes - plan(lora)[0].disk_bytes
    assert more == size


def test_adapters_over_different_bases_are_not_mixed(
    qlora_run: tuple[Result, Resolved], dense: Path, tmp_path: Path
) -> None:
    other, _ = trained(tmp_path, "eight", dense, quantize={"bits": 8})
    with pytest.raises(SlimError, match="summed only on the same base"):
        logits(dense, [qlora_run[0].out, other.out])
    session = open_session(dense, qlora_run[0].out)
    assert len(session.notes) == 1
    session.use(None)
    with pytest.raises(SlimError, match=r"8-bit .* but .*4-bit.* is loaded"):
        session.use(other.out)
    with pytest.raises(SlimError, match="but the unquantized model is loaded"):
        open_session(dense).use(qlora_run[0].out)
    open_session(qlora_run[0].out / "base").use(
        qlora_run[0].out
    )  # given as it is: any adapter goes


def test_computing_in_bfloat16_keeps_the_base_in_it(dense: Path, tmp_path: Path) -> None:
    result, _ = trained(tmp_path, "half", dense, train={"dtype": "bfloat16", "steps": 2})
    loaded = load(result.out / "base")
    assert loaded.model["model"]["embed_tokens"]["scales"].dtype == mx.bfloat16
    at_it, _ = logits(result.out / "base", result.out, mx.bfloat16)
    rounded, _ = logits(dense, result.out, mx.bfloat16)
    assert mx.array_equal(at_it, rounded).item()


def test_a_run_of_an_earlier_version_still_loads_and_reports(
    qlora_run: tuple[Result, Resolved], dense: Path, tmp_path: Path
) -> None:
    out = shutil.copytree(qlora_run[0].out, tmp_path / "old")
    shutil.rmtree(out / "base")
    config = read_json(out / "adapters" / "adapter_config.json")
    del config["quantized_base"]
    write_json(out / "adapters" / "adapter_config.json", config)
    record = read_json(out / "run.json")
    del record["result"]["base"]
    write_json(out / "run.json", record)
    again = finetune(qlora_run[1], out, observer=Recorder(), resume=True)
    assert talk_command(again).startswith(f"mlx-slim chat {dense}")
    assert logits(dense, out)[1] == []
    assert adapter_pairs(str(dense), out / "adapters")[0] == "lora"


def test_a_quantized_model_is_its_own_base(
    qlora_run: tuple[Result, Resolved], tmp_path: Path
) -> None:
    result, _ = trained(tmp_path, "over", qlora_run[0].out / "base")
    assert not (result.out / "base").exists() and result.base is None
    config = json.loads((result.out / "adapters" / "adapter_config.json").read_text())
    assert "quantized_base" not in config
    assert str(qlora_run[0].out / "base") in talk_command(result)
