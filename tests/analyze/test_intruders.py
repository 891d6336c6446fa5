"""Intruder dimensions: planted ones are counted, absent ones are not, dense SVD agrees."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner
from mlx.utils import tree_flatten

from mlx_slim.adapters.inject import adapters_of, inject
from mlx_slim.adapters.store import save_adapter
from mlx_slim.analyze.intruders import Pair, examine, find_intruders
from mlx_slim.cli import analyze
from mlx_slim.config.schema import AdapterConfig, QuantizeConfig
from mlx_slim.errors import SlimError
from mlx_slim.models.load import load
from mlx_slim.models.quantized import dequantize_weight
from mlx_slim.models.save import save_model
from mlx_slim.quantization.apply import quantize_model
from tests.support.tiny import TinyModels


def base_of(shape: tuple[int, int], seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal(shape) / np.sqrt(1 + np.arange(shape[1]))
    return weight.astype(np.float32)


def low_rank(shape: tuple[int, int], strength: float, rank: int = 4) -> Pair:
    rng = np.random.default_rng(7)
    one = (rng.standard_normal((shape[0], rank)) * strength / 10).astype(np.float32)
    other = (rng.standard_normal((rank, shape[1])) / 3).astype(np.float32)
    base = base_of(shape)
    return Pair("layer", base, base + one @ other, (one, other))


@pytest.mark.parametrize("shape", [(96, 64), (64, 96), (80, 80), (300, 60)])
@pytest.mark.parametrize("strength", [0.01, 1, 3, 30])
def test_the_cheap_way_agrees_with_dense_svd(shape: tuple[int, int], strength: float) -> None:
    pair = low_rank(shape, strength)
    before = np.linalg.svd(pair.base_OI.astype(np.float64), full_matrices=False)[0]
    left, sigma, _ = np.linalg.svd(pair.tuned_OI.astype(np.float64), full_matrices=False)
    cosine = np.abs(before.T @ left[:, :10]).max(axis=0)
    examined = examine(pair, 10, 0.5)
    assert examined.cosine == pytest.approx(cosine, abs=2e-3)
    assert examined.sigma == pytest.approx(sigma[:10], rel=1e-4)
    assert examined.intruders == (cosine < 0.5).sum()
    fraction = (sigma[:10][cosine < 0.5] ** 2).sum() / (sigma**2).sum()
    assert examined.energy == pytest.approx(fraction, abs=1e-4)
    norm = np.linalg.norm(pair.tuned_OI - pair.base_OI) / np.linalg.norm(pair.base_OI)
    assert examined.delta_norm == pytest.approx(norm, rel=1e-4)
    without = examine(Pair("layer", pair.base_OI, pair.tuned_OI), 10, 0.5)
    assert without.effective_rank == pytest.approx(examined.effective_rank, rel=0.02)


def test_a_planted_direction_is_found_and_no_change_has_none() -> None:
    base = base_of((120, 40))
    left = np.linalg.svd(base, full_matrices=True)[0]
    planted = left[:, -1:] * 3 * np.linalg.norm(base, 2)  # outside all that the base can say
    row = np.ones((1, 40), np.float32) / np.sqrt(40)
    examined = examine(Pair("layer", base, base + planted @ row, (planted, row)), 10, 0.5)
    assert examined.intruders == 1
    assert examined.cosine[0] < 0.3
    assert examined.effective_rank == pytest.approx(1)
    assert 0.5 < examined.energy < 1
    same = examine(Pair("layer", base, base), 10, 0.5)
    assert (same.intruders, same.energy, same.delta_norm, same.effective_rank) == (0, 0, 0, 0)


def adapter_of(model_folder: Path, out: Path, *, dora: bool = False, strength: float = 0.0) -> Path:
    model = load(model_folder).model
    config = AdapterConfig(rank=2)
    injected = inject(model, config, dora=dora)
    for index, (_, adapter) in enumerate(adapters_of(model)):
        shape = adapter.lora_b.shape
        adapter.lora_b = strength * mx.random.normal(shape, key=mx.random.key(index))
    save_adapter(out, model, config, injected, dora=dora, base=str(model_folder))
    return out


@pytest.mark.parametrize("dora", [False, True])
def test_adapters(tiny: TinyModels, tmp_path: Path, dora: bool) -> None:
    folder = tiny("llama")
    zero = adapter_of(folder, tmp_path / "zero", dora=dora)
    examined = find_intruders(str(folder), adapter=zero)
    assert examined.kind == ("dora" if dora else "lora")
    assert examined.overall()["intruders"] == 0
    assert examined.overall()["delta_norm"] < 1e-6
    loud = adapter_of(folder, tmp_path / "loud", dora=dora, strength=1.0)
    examined = find_intruders(str(folder), adapter=loud, k=5, cache=tmp_path / "cache")
    assert len(examined.matrices) == 21
    assert examined.overall()["intruders"] > 0
    assert examined.overall()["effective_rank"] <= (64 if dora else 2)
    counts = {(s["k"], s["epsilon"]): s["intruders"] for s in examined.sweep()}
    assert counts[5, 0.5] == examined.overall()["intruders"]
    assert counts[1, 0.3] <= counts[5, 0.3] <= counts[5, 0.9] <= counts[20, 0.9]
    again = find_intruders(str(folder), adapter=loud, k=5, cache=tmp_path / "cache")
    assert again.overall() == pytest.approx(examined.overall(), rel=1e-3)


def test_qlora_starts_from_the_dequantized_base(tiny: TinyModels, tmp_path: Path) -> None:
    loaded = load(tiny("llama"))
    settings = QuantizeConfig(group_size=32)
    config = quantize_model(loaded.model, loaded.config, settings).config
    four_bit = tmp_path / "four-bit"
    save_model(four_bit, loaded.model, loaded.tokenizer, config)
    adapter = adapter_of(four_bit, tmp_path / "run" / "adapters", strength=1e-3)
    direct = find_intruders(str(four_bit), adapter=adapter)
    recipe = {"method": "qlora", "quantize": settings.model_dump()}
    (tmp_path / "run" / "run.json").write_text(json.dumps({"recipe": recipe}))
    through = find_intruders(str(tiny("llama")), adapter=adapter)  # quantized as its run did
    assert through.overall() == pytest.approx(direct.overall())
    model: Any = load(four_bit).model
    weight = dequantize_weight(model.layers[0].self_attn.q_proj)
    assert direct.matrices[0].sigma[0] == pytest.approx(
        float(np.linalg.norm(np.array(weight), 2)), rel=0.01
    )


def test_whole_models(tiny: TinyModels, tmp_path: Path) -> None:
    loaded = load(tiny("llama"))
    changed = dict(tree_flatten(loaded.model.parameters()))
    name = "model.layers.1.mlp.up_proj.weight"
    one, other = mx.ones((128, 1)), mx.random.normal((1, 64), key=mx.random.key(0))
    loaded.model.load_weights([(name, changed[name] + one @ other)], strict=False)
    tuned = tmp_path / "tuned"
    save_model(tuned, loaded.model, loaded.tokenizer, loaded.config)
    examined = find_intruders(str(tiny("llama")), tuned=str(tuned))
    assert {m.path: m.intruders for m in examined.matrices if m.delta_norm} == {
        "model.layers.1.mlp.up_proj": 1
    }
    with pytest.raises(SlimError, match="other layers"):
        find_intruders(str(tiny("llama")), tuned=str(tiny("phi")))
    with pytest.raises(SlimError, match="either an adapter or a tuned model"):
        find_intruders(str(tiny("llama")))


def test_the_command_writes_json_and_a_plot(
    tiny: TinyModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLX_SLIM_CACHE", str(tmp_path / "cache"))
    adapter = adapter_of(tiny("llama"), tmp_path / "adapter", strength=1.0)
    out = tmp_path / "out"
    run = CliRunner().invoke
    words = ["intruders", str(tiny("llama")), "--adapter", str(adapter), "-o", str(out)]
    result = run(analyze.command, words)
    assert result.exit_code == 0, result.output
    record = json.loads((out / "intruders.json").read_text())
    assert record["overall"]["matrices"] == len(record["matrices"]) == 21
    assert record["sweep"] and record["provenance"]["versions"]
    svg = (out / "intruders.svg").read_text()
    assert svg.count("<svg") == 1 and "intruder dimensions in 21 matrices" in svg
    assert len(list((tmp_path / "cache" / "svd").iterdir())) == 21
    assert "is complete: nothing to do" in str(run(analyze.command, words).exception)
    other = [*words, "--k", "3"]
    assert "exists already" in str(run(analyze.command, other).exception)
    again = run(analyze.command, [*words[:-1], str(tmp_path / "two"), "--json", "--no-cache"])
    assert json.loads(again.stdout)["overall"]["matrices"] == 21
    assert (tmp_path / "two" / "intruders.svg").read_text() == svg
    assert run(analyze.command, [*words, "--tuned", "x"]).exit_code == 2


def test_memory_of_a_recipe_and_of_a_model(tiny: TinyModels) -> None:
    run = CliRunner().invoke
    examined = json.loads(run(analyze.command, ["memory", "smollm2-lora", "--json"]).output)
    assert examined["total_bytes"] == sum(examined["parts"].values())
    folder = str(tiny("llama"))
    examined = json.loads(run(analyze.command, ["memory", folder, "--json"]).output)
    parameters = dict(tree_flatten(load(folder).model.parameters()))
    assert examined["total_bytes"] == sum(value.nbytes for value in parameters.values())
    assert {"embedding", "head", "attention", "mlp", "norms"} == set(examined["parts"])
    assert "attention" in run(analyze.command, ["memory", folder]).output
