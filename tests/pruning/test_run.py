"""``mlx-slim prune`` from folder to folder: what loads where, what it says, what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm import load as stock_load

from mlx_slim.adapters.store import load_adapter
from mlx_slim.artifacts import load_tensors, read_json
from mlx_slim.cli.main import run
from mlx_slim.config.schema import QuantizeConfig
from mlx_slim.errors import SlimError
from mlx_slim.evaluation.run import EvalOptions, evaluate
from mlx_slim.export.fuse import fuse
from mlx_slim.export.model import export_gguf, export_hf
from mlx_slim.finetuning.run import finetune
from mlx_slim.models.build import WIDTHS, widths_of
from mlx_slim.models.load import load
from mlx_slim.planner.run import plan as plan_cost
from mlx_slim.planner.shapes import leaves
from mlx_slim.pruning.cutting import ranges
from mlx_slim.pruning.plan import planned_config
from mlx_slim.pruning.run import PruneOptions, prune
from mlx_slim.quantization.run import CompressOptions, compress
from tests.support.prune import relative_gap
from tests.support.runs import Recorder, recipe, write_rows
from tests.support.tiny import ARCHITECTURES, tiny_model

WIDTH_METHODS = ["taylor", "taylor2", "vector", "activation", "l2", "random"]
DEPTH_METHODS = ["block-influence", "angular", "perplexity", "random"]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "notes.txt"
    path.write_text("\n".join(f"{i}: a line of plain words to look at" for i in range(90)))
    return path


@pytest.fixture
def options(text: Path) -> Callable[..., PruneOptions]:
    def make(**changes: Any):
        settings = {"samples": 4, "length": 32, "held_out": 128, "calibration": str(text)}
        return PruneOptions(**{**settings, **changes})

    return make


def test_block_influence_of_one_count_serves_another(
    tiny: Callable[..., Path], tmp_path: Path, options: Callable[..., PruneOptions]
) -> None:
    def layers_left(ratio: float, scores_at: Path | None, name: str) -> list[int]:
        chosen = options(method="block-influence", ratio=ratio, protect_first=0, protect_last=0)
        prune(tiny(), tmp_path / name, chosen, scores_at=scores_at)
        record = read_json(tmp_path / name / "prune.json")
        return [one["layer"] for one in record["layers"] if not one["removed"]]

    measured = tmp_path / "scores.safetensors"
    two = layers_left(0.34, measured, "two")
    before = measured.read_bytes()
    one = layers_left(0.67, measured, "one")
    assert measured.read_bytes() == before
    assert two == layers_left(0.34, None, "two again")
    assert one == layers_left(0.67, None, "one again")
    assert len(one) == 1 and len(two) == 2


@pytest.mark.parametrize("method", WIDTH_METHODS)
def test_every_width_method_gives_what_stock_mlx_lm_reads(
    tiny: Callable[..., Path], tmp_path: Path, options: Callable[..., PruneOptions], method: str
) -> None:
    out = tmp_path / "out"
    result = prune(tiny(), out, options(method=method, ratio=0.5))
    ours = load(out)
    stock, tokenizer = stock_load(str(out))[:2]
    assert tokenizer.encode("hi")
    assert relative_gap(stock, ours.model) < 1e-5
    assert {w["intermediate_size"] for w in widths_of(ours.model)} == {64}
    assert ours.config["num_key_value_heads"] == 1 and ours.config["head_dim"] == 16
    record = read_json(out / "prune.json")
    assert record == json.loads(json.dumps(result.record))
    assert record["method"] == method and record["stock_mlx_lm_reads_it"]
    assert record["parameters_after"] == sum(value.size for _, value in leaves(ours.model))
    scores = load_tensors(out / "prune_scores.safetensors")
    assert {scores[f"{i}.mlp"].shape for i in range(3)} == {(128,)}
    best = np.argsort(-np.array(scores["1.mlp"]), kind="stable")[:64].tolist()
    before = load(tiny()).model.model.layers[1].mlp.up_proj.weight  # pyright: ignore
    after = ours.model.model.layers[1].mlp.up_proj.weight  # pyright: ignore
    assert mx.array_equal(before[mx.array(sorted(best))], after)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["notes.txt", "out"]


@pytest.mark.parametrize("architecture", list(ARCHITECTURES))
def test_every_architecture_by_width(
    tiny: Callable[..., Path],
    tmp_path: Path,
    options: Callable[..., PruneOptions],
    architecture: str,
) -> None:
    result = prune(tiny(architecture), tmp_path / "out", options(ratio=0.5))
    stock: Any = stock_load(str(tmp_path / "out"))[0]
    assert relative_gap(load(tmp_path / "out").model, stock) < 1e-5
    without_heads = architecture in ("qwen2", "phi")
    assert any("heads are not pruned" in note for note in result.record["notes"]) is without_heads
    assert ("heads" in result.record["layers"][0]) is not without_heads


@pytest.mark.parametrize("architecture", list(ARCHITECTURES))
@pytest.mark.parametrize("method", DEPTH_METHODS)
def test_every_architecture_by_depth(
    tiny: Callable[..., Path],
    tmp_path: Path,
    options: Callable[..., PruneOptions],
    architecture: str,
    method: str,
) -> None:
    result = prune(
        tiny(architecture), tmp_path / "out", options(axis="depth", method=method, ratio=0.34)
    )
    stock: Any = stock_load(str(tmp_path / "out"))[0]
    assert len(stock.layers) == 2
    assert relative_gap(load(tmp_path / "out").model, stock) < 1e-5
    gone = [entry["layer"] for entry in result.record["layers"] if entry["removed"]]
    assert len(gone) == 1
    named = prune(tiny(architecture), tmp_path / "named", options(layers=str(gone[0])))
    assert relative_gap(stock, load(tmp_path / "named").model) < 1e-5
    assert named.record["method"] == "named"
    assert named.record["parameters_after"] == result.record["parameters_after"]


@pytest.mark.parametrize("architecture", ["llama", "llama-tied", "qwen2", "phi"])
@pytest.mark.parametrize("ranking", ["layer", "global"])
def test_widths_that_differ_are_ours_alone(
    tiny: Callable[..., Path],
    tmp_path: Path,
    options: Callable[..., PruneOptions],
    architecture: str,
    ranking: str,
) -> None:
    out = tmp_path / "out"
    result = prune(
        tiny(architecture),
        out,
        options(ratio=0.5, uniform=False, protect_first=1, protect_last=1, ranking=ranking),
    )
    ours = load(out)
    widths = widths_of(ours.model)
    assert [w["intermediate_size"] for w in widths] == [128, 64, 128]
    full = ARCHITECTURES[architecture]["num_attention_heads"]
    assert [w["heads"] for w in widths] == [full, full // 2, full]
    assert ours.config[WIDTHS] == widths
    assert not result.record["stock_mlx_lm_reads_it"]
    assert any("only mlx-slim" in note for note in result.record["notes"])
    with pytest.raises(ValueError, match="shape"):
        stock_load(str(out))
    record = result.record["fidelity"]
    assert record["kl"] > 0 and record["tokens"] == 128


def test_what_loads_can_be_tuned_scored_quantized_and_planned(
    tiny: Callable[..., Path], tmp_path: Path, options: Callable[..., PruneOptions], text: Path
) -> None:
    small = tmp_path / "small"
    prune(tiny(), small, options(ratio=0.5, uniform=False, protect_first=1, protect_last=1))
    data = write_rows(tmp_path / "rows.jsonl")
    for method in ("lora", "qlora", "full"):
        resolved = recipe(small, data, method, steps=2)
        finetune(resolved, tmp_path / method, observer=Recorder())
        assert plan_cost(resolved.recipe)[0].predicted_peak_bytes > 0
    tuned = load(small).model
    load_adapter(tuned, tmp_path / "lora" / "adapters")
    assert relative_gap(tuned, load(small).model) > 0
    again = load(tmp_path / "full" / "model")
    assert again.config[WIDTHS] == load(small).config[WIDTHS]
    bits = CompressOptions(QuantizeConfig(bits=8, group_size=32), fidelity_samples=0)
    compress(small, tmp_path / "bits", bits)
    assert relative_gap(load(small).model, load(tmp_path / "bits").model) < 0.1
    (scores,) = evaluate(small, [], tmp_path / "scores", EvalOptions(perplexity=text))
    assert scores["perplexity"]["metrics"]["bits_per_byte"]["value"] > 0
    fuse(small, tmp_path / "lora" / "adapters", tmp_path / "fused")
    assert load(tmp_path / "fused").config[WIDTHS] == load(small).config[WIDTHS]
    deeper = prune(small, tmp_path / "deeper", options(layers="1"))
    assert deeper.record["parameters_after"] < deeper.record["parameters_before"]
    assert [w["heads"] for w in load(tmp_path / "deeper").config[WIDTHS]] == [4, 4]
    for export in (export_hf, export_gguf):
        with pytest.raises(SlimError, match="widths differ per layer"):
            export(small, tmp_path / "exported")
    with pytest.raises(SlimError, match="differ per layer already"):
        prune(small, tmp_path / "again", options(ratio=0.5))


@pytest.mark.parametrize(("architecture", "heads"), [("mistral", 3), ("llama", 4), ("qwen3", 3)])
def test_numbers_of_heads_that_transformers_accepts(
    tmp_path: Path, options: Callable[..., PruneOptions], architecture: str, heads: int
) -> None:
    """Its llama config wants heads that divide hidden_size, whatever head_dim says."""
    changes: dict[str, Any] = {"num_key_value_heads": 4, "head_dim": 64, "intermediate_size": 256}
    source = tiny_model(tmp_path / "source", architecture, **changes)
    result = prune(source, tmp_path / "out", options(ratio=0.25))
    model: Any = stock_load(str(tmp_path / "out"))[0]
    assert model.args.num_attention_heads == heads
    assert any("divide hidden_size=64" in n for n in result.record["notes"]) is (heads == 4)


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_the_stored_dtype_stays(
    tmp_path: Path, options: Callable[..., PruneOptions], dtype: mx.Dtype
) -> None:
    source = tiny_model(tmp_path / "source", dtype=dtype)
    result = prune(source, tmp_path / "out", options(ratio=0.5))
    model: Any = stock_load(str(tmp_path / "out"))[0]
    assert {value.dtype for _, value in leaves(model)} == {dtype}
    size = sum(value.nbytes for _, value in leaves(model))
    assert result.record["bytes_after"] == size


@pytest.mark.parametrize("unit", [1, 4])
def test_targets_hold(
    tiny: Callable[..., Path], tmp_path: Path, options: Callable[..., PruneOptions], unit: int
) -> None:
    whole = 144_832  # parameters of the tiny llama
    name = "target_params" if unit == 1 else "target_bytes"
    result = prune(tiny(), tmp_path / "out", options(**{name: int(0.8 * whole) * unit}))
    assert result.record["parameters_after"] <= 0.8 * whole


def test_taylor_removes_less_that_matters_than_its_opposite(
    tiny: Callable[..., Path], tmp_path: Path, options: Callable[..., PruneOptions]
) -> None:
    """Not a proof of worth (the model is random), but of the right end of the ranking."""
    from mlx_slim.pruning import importance

    result = prune(tiny(), tmp_path / "a", options(ratio=0.5, heads=False))
    honest = importance.group_importance
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            importance,
            "group_importance",
            lambda *a, **k: {name: -value for name, value in honest(*a, **k).items()},
        )
        reversed_ranking = prune(tiny(), tmp_path / "b", options(ratio=0.5, heads=False)).record[
            "fidelity"
        ]
    assert result.record["fidelity"]["kl"] < reversed_ranking["kl"]


def test_the_command_prints_what_went_and_writes_nothing_on_a_dry_run(
    tiny: Callable[..., Path], tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = [str(tiny()), "--calibration", str(text), "--length", "32", "--held-out", "128"]
    assert run(["prune", *common, "-o", str(tmp_path / "a"), "--ratio", "0.5", "--dry-run"]) == 0
    dry = capsys.readouterr().out
    assert not (tmp_path / "a").exists() and "128 -> 64" in dry
    assert run(["prune", *common, "-o", str(tmp_path / "a"), "--ratio", "0.5"]) == 0
    printed = capsys.readouterr().out
    assert "128 -> 64 neurons" in printed and "perplexity" in printed and "KL" in printed
    count = next(line for line in dry.splitlines() if line.startswith("parameters")).split()[3]
    assert count in printed
    words = ["--method", "block-influence", "--ratio", "0.3", "--json"]
    assert run(["prune", *common, "-o", str(tmp_path / "b"), *words]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["score"] == "block influence" and len(record["layers"]) == 3


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma3_text", "qwen2", "phi"])
def test_the_residual_stream_of_every_architecture(
    tmp_path: Path, options: Callable[..., PruneOptions], architecture: str
) -> None:
    derived = architecture in ("qwen2", "phi")
    size_of_head: dict[str, Any] = {} if derived else {"head_dim": 16}
    source = tiny_model(tmp_path / "source", architecture, hidden_size=128, **size_of_head)
    result = prune(source, tmp_path / "out", options(hidden_size=64))
    record, stock = result.details, stock_load(str(tmp_path / "out"))[0]
    ours = load(tmp_path / "out")
    assert ours.config["hidden_size"] == 64
    assert relative_gap(ours.model, stock) < (1e-2 if architecture == "gemma3_text" else 1e-5)
    assert record.method == "activation" and record.stock_mlx_lm_reads_it
    assert record.hidden is not None and (record.hidden.before, record.hidden.after) == (128, 64)
    assert all((layer.groups.keys() == {"heads"}) is derived for layer in record.layers)
    assert record.parameters_after == sum(value.size for _, value in leaves(ours.model))
    assert record.fidelity is not None and record.fidelity.distance.kl > 0
    planned = planned_config(load(source).config, options(hidden_size=64))
    for key in ("hidden_size", "head_dim", "num_attention_heads", "intermediate_size"):
        assert planned.get(key) == ours.config.get(key)
    scores = load_tensors(tmp_path / "out" / "prune_scores.safetensors")["hidden"]
    removed = set(range(128)) - set(np.argsort(-np.array(scores), kind="stable")[:64].tolist())
    assert record.hidden.removed == ranges(sorted(removed))


def test_what_a_residual_stream_cannot_be_is_one_line(
    tiny: Callable[..., Path], tmp_path: Path, options: Callable[..., PruneOptions]
) -> None:
    for architecture, changes, message in (
        ("qwen2", {"hidden": True, "heads": False, "ratio": 0.5}, "with whole heads or not at all"),
        ("qwen2", {"hidden_size": 32}, "--hidden-size 32 is not possible: the model has 64"),
        ("llama", {"hidden": True, "mlp": False, "heads": False, "ratio": 0.5}, "removes nothing"),
        ("llama", {"hidden_size": 64}, "--hidden-size removes nothing"),
        ("llama", {"hidden_size": 64, "method": "taylor"}, "does not score channels"),
    ):
        with pytest.raises(SlimError, match=message):
            prune(tiny(architecture), tmp_path / "out", options(**changes))
    assert not (tmp_path / "out").exists()
    gemma = tiny_model(tmp_path / "gemma", "gemma3_text", num_hidden_layers=4)
    with pytest.raises(SlimError, match="no method may choose the layers") as caught:
        prune(gemma, tmp_path / "out", options(axis="depth", ratio=0.5))
    assert "--layers 0-1" in caught.value.hint
    assert prune(gemma, tmp_path / "out", options(layers="0-1")).details.parameters_after
