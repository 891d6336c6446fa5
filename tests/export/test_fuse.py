"""Fused models answer as base + adapter do; a fuse that loses the tune is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from mlx_slim.adapters.inject import adapters_of
from mlx_slim.artifacts import load_tensors
from mlx_slim.cli.main import run
from mlx_slim.errors import SlimError
from mlx_slim.export.fuse import FuseOptions, fuse
from mlx_slim.export.fuse_audit import effect
from mlx_slim.models.load import load
from mlx_slim.models.quantized import dequantize_weight
from mlx_slim.runtime import to_float
from tests.adapters.support import IDS
from tests.support.adapters import tuned_logits, write_adapter, write_quantized
from tests.support.stock import stock_load
from tests.support.tiny import tiny_model

OPTIONS = FuseOptions(samples=2, length=32)
CASES = [
    ("llama", {}, False),
    ("phi", {}, True),
    ("llama-tied", {"targets": ["all-linear", "embed_tokens"]}, False),
    ("mistral", {"init": "pissa"}, False),
    ("qwen2", {"init": "pissa"}, True),
]


@pytest.mark.parametrize(("architecture", "settings", "dora"), CASES)
@pytest.mark.parametrize("bits", [None, 4])
def test_fused_is_base_plus_adapter(
    tiny: Callable[..., Path],
    tmp_path: Path,
    architecture: Any,
    settings: Any,
    dora: Any,
    bits: int | None,
) -> None:
    base = tiny(architecture)
    base = write_quantized(tmp_path / "q", base, bits) if bits else base
    adapter = write_adapter(tmp_path / "a", base, dora=dora, **settings)
    result = fuse(base, adapter, tmp_path / "out", OPTIONS)
    assert result.mode == ("dequantize" if bits else "merge")
    expected = tuned_logits(base, adapter)
    model, _ = stock_load(str(tmp_path / "out"))
    assert mx.allclose(
        model(IDS), expected, rtol=1e-3, atol=1e-4 * to_float(mx.abs(expected).max())
    )
    assert result.effect.retained == pytest.approx(1, abs=0.02) and result.effect.top1 > 0.95
    assert result.weights_retained == pytest.approx(1, abs=0.02)
    record = json.loads((tmp_path / "out" / "fuse.json").read_text())
    assert record["effect"]["kl"] == result.effect.kl and record["lost"] == ""
    assert record["base"] == base.name and record["provenance"]["versions"]["mlx"]


def test_requantizing_a_small_tune_is_refused_and_leaves_nothing(
    tiny: Callable[..., Path], tmp_path: Path
) -> None:
    base = write_quantized(tmp_path / "q", tiny("llama"))
    adapter = write_adapter(tmp_path / "a", base, size=0.004)
    before = {path.name for path in tmp_path.iterdir()}
    options = FuseOptions(mode="requantize", samples=2, length=32)
    with pytest.raises(SlimError, match="would lose the fine-tuning") as caught:
        fuse(base, adapter, tmp_path / "out", options)
    assert caught.value.exit_code == 2 and "--force" in caught.value.hint
    assert {path.name for path in tmp_path.iterdir()} == before
    forced = fuse(base, adapter, tmp_path / "out", FuseOptions(**{**vars(options), "force": True}))
    assert forced.lost and forced.weights_retained < 0.5
    assert any("lost" in line for line in forced.lines())
    again = load(tmp_path / "out")
    assert again.config["quantization"] == load(base).config["quantization"]
    assert json.loads((tmp_path / "out" / "fuse.json").read_text())["lost"] == forced.lost


def test_requantizing_a_large_tune_is_allowed(tiny: Callable[..., Path], tmp_path: Path) -> None:
    base = write_quantized(tmp_path / "q", tiny("llama"), 8)
    adapter = write_adapter(tmp_path / "a", base, size=0.3)
    result = fuse(base, adapter, tmp_path / "out", FuseOptions("requantize", samples=2, length=32))
    assert result.lost == "" and result.effect.retained > 0.9 and result.weights_retained > 0.9
    model: Any = load(tmp_path / "out").model
    assert all("scales" in layer.mlp.up_proj for layer in model.layers)


def test_an_adapter_stored_beside_the_base_changes_nothing(
    tiny: Callable[..., Path], tmp_path: Path
) -> None:
    base = write_quantized(tmp_path / "q", tiny("llama"))
    adapter = write_adapter(tmp_path / "a", base)
    result = fuse(base, adapter, tmp_path / "out", FuseOptions("keep", samples=2, length=32))
    assert result.effect.kl == 0 and result.effect.retained == pytest.approx(1, abs=1e-5)
    out = tmp_path / "out"
    assert mx.array_equal(tuned_logits(out, out / "adapters"), tuned_logits(base, adapter))
    assert "--adapter" in result.lines()[-1]


def test_a_delta_that_16_bits_swallow_is_refused(tmp_path: Path) -> None:
    base = tiny_model(tmp_path / "base", dtype=mx.bfloat16)
    adapter = write_adapter(tmp_path / "a", base, size=0.0001)
    with pytest.raises(SlimError, match="would lose the fine-tuning") as caught:
        fuse(base, adapter, tmp_path / "out", OPTIONS)
    assert "--dtype float32" in caught.value.hint
    wide = FuseOptions(dtype="float32", samples=2, length=32)
    assert fuse(base, adapter, tmp_path / "out", wide).effect.retained == pytest.approx(1, abs=0.02)


def test_an_adapter_without_effect_loses_nothing(tiny: Callable[..., Path], tmp_path: Path) -> None:
    base = tiny("llama")
    result = fuse(base, write_adapter(tmp_path / "a", base, size=0.0), tmp_path / "out", OPTIONS)
    assert result.effect.retained == 1 and result.effect.kl == 0 and result.weights_retained == 1


def test_the_retained_fraction_is_a_projection() -> None:
    mx.random.seed(0)
    tokens = mx.zeros((2, 70), dtype=mx.int32)
    base, change, noise = (mx.random.normal((1, 70, 50)) for _ in range(3))

    def model(logits: Any):
        return lambda _: logits

    half = effect(model(base), model(base + 0.1 * change), model(base + 0.05 * change), tokens)
    assert half.retained == pytest.approx(0.5, abs=0.02) and half.tokens == 140
    none = effect(model(base), model(base + 0.1 * change), model(base), tokens)
    assert none.retained == 0 and none.kl == pytest.approx(none.kl_base) and "0%" in none.lost()
    noisy = effect(model(base), model(base + 0.1 * change), model(base + noise), tokens)
    assert abs(noisy.retained) < 0.5 and noisy.lost()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--adapter", "{other}"], "model.layers.0.mlp.down_proj.lora_a is (96, 4), expected"),
        (["--adapter", "{adapter}", "--requantize"], "is not quantized"),
        (["--adapter", "{nothing}"], "is not an adapter folder"),
        (["--adapter", "{adapter}", "--calibration", "{nothing}"], "nothing"),
    ],
)
def test_what_cannot_be_fused_is_one_line(
    tiny: Callable[..., Path],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    words: Any,
    says: str,
) -> None:
    wide = tiny_model(tmp_path / "wide", intermediate_size=96)
    places = {
        "adapter": write_adapter(tmp_path / "a", tiny("llama")),
        "other": write_adapter(tmp_path / "b", wide),
        "nothing": tmp_path / "nothing",
    }
    words = [word.format(**places) for word in words]
    assert run(["fuse", str(tiny("llama")), *words, "-o", str(tmp_path / "out")]) == 2
    error = capfd.readouterr().err
    assert error.count("error: ") == 1 and says in error
    assert not (tmp_path / "out").exists()


def test_the_base_must_be_the_one_it_was_trained_on(
    tiny: Callable[..., Path], tmp_path: Path
) -> None:
    adapter = write_adapter(tmp_path / "a", tiny("llama"))
    other = tiny_model(tmp_path / "other", seed=5)
    with pytest.raises(SlimError, match="another base of the same shape"):
        fuse(other, adapter, tmp_path / "out", OPTIONS)
    assert not adapters_of(load(other).model)


def test_the_command_prints_and_stores_the_audit(
    tiny: Callable[..., Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    adapter = write_adapter(tmp_path / "run" / "adapters", tiny("llama"))
    words = ["fuse", str(tiny("llama")), "--adapter", str(adapter.parent), "--samples", "2"]
    assert run([*words, "--length", "32", "-o", str(tmp_path / "out"), "--json"]) == 0
    record = json.loads(capfd.readouterr().out)
    stored = json.loads((tmp_path / "out" / "fuse.json").read_text())
    assert record["effect"] == stored["effect"] and record["layers"] == 21


def _small(tmp_path: Path, source: Path, dtype: mx.Dtype, size: float, pooled: bool = True) -> Any:
    """Return base and adapter folders: ‖ΔW‖ / ‖W‖ near ``size``, constant inside the groups."""
    base = write_quantized(tmp_path / f"q-{dtype}", source, dtype=dtype)
    adapter = write_adapter(
        tmp_path / f"a-{dtype}", base, size=0.0, stored=dtype, pooled=True, rank=4, alpha=4
    )
    weights = load_tensors(adapter / "adapters.safetensors")
    model: Any = load(base, dtype=mx.float32).model
    modules = dict(model.named_modules())
    for name in [name for name in weights if name.endswith("lora_b")]:
        b_RO = mx.random.normal(weights[name].shape, key=mx.random.key(len(name)))
        path = name.removesuffix(".lora_b")
        update = mx.linalg.norm(weights[f"{path}.lora_a"] @ b_RO)
        weights[name] = b_RO * size * mx.linalg.norm(dequantize_weight(modules[path])) / update
    mx.eval(weights)
    mx.save_safetensors(str(adapter / "adapters.safetensors"), weights)
    if not pooled:  # as if trained elsewhere, without rounding
        file = adapter / "adapter_config.json"
        config = json.loads(file.read_text())
        del config["biases_rounded_to"]
        file.write_text(json.dumps(config))
    return base, adapter


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=str)
def test_a_pooled_adapter_folds_into_biases_without_loss(
    tiny: Callable[..., Path], tmp_path: Path, dtype: mx.Dtype
) -> None:
    base, adapter = _small(tmp_path, tiny("llama"), dtype, 0.005)
    result = fuse(base, adapter, tmp_path / "out", OPTIONS)
    assert result.mode == "biases" and result.effect.logit_fraction > 0.99, result.lines()
    assert any("lossless" in line for line in result.lines())
    assert not any("warning" in line for line in result.lines())
    before, after = (
        dict(tree_flatten(stock_load(str(folder))[0].parameters()))
        for folder in (base, tmp_path / "out")
    )
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert value.dtype == after[name].dtype, name
        changed = not mx.array_equal(value, after[name]).item()
        adapted = name.endswith("_proj.biases")
        assert changed == adapted, name
    stock, _ = stock_load(str(tmp_path / "out"))
    assert stock(IDS).dtype == dtype
    sizes = [
        sum(f.stat().st_size for f in d.glob("*.safetensors")) for d in (base, tmp_path / "out")
    ]
    assert abs(sizes[0] - sizes[1]) < 1000
    assert load(tmp_path / "out").config["quantization"] == load(base).config["quantization"]
    record = json.loads((tmp_path / "out" / "fuse.json").read_text())
    assert (
        record["mode"] == "biases"
        and record["effect"]["logit_fraction"] == result.effect.logit_fraction
    )


def test_biases_that_were_not_rounded_in_training_say_what_they_lose(
    tiny: Callable[..., Path], tmp_path: Path
) -> None:
    base, adapter = _small(tmp_path, tiny("llama"), mx.bfloat16, 0.005, pooled=False)
    result = fuse(base, adapter, tmp_path / "out", OPTIONS)
    assert result.mode == "biases" and 0.2 < result.effect.logit_fraction < 0.95
    (warning,) = [line for line in result.lines() if "warning" in line]
    assert (
        f"loses {1 - result.effect.logit_fraction:.1%}" in warning and "--dtype float32" in warning
    )
    wide = FuseOptions(samples=2, length=32, dtype="float32")
    result = fuse(base, adapter, tmp_path / "wide", wide)
    assert result.mode == "biases" and result.effect.logit_fraction > 0.99
    assert not any("warning" in line for line in result.lines())
    codes = [dict(tree_flatten(load(d).model.parameters())) for d in (base, tmp_path / "wide")]
    for name, value in codes[0].items():
        if value.dtype == mx.uint32:
            assert mx.array_equal(value, codes[1][name]).item()


def test_a_sum_of_pooled_adapters_folds_and_dequantize_is_obeyed(
    tiny: Callable[..., Path], tmp_path: Path
) -> None:
    base, adapter = _small(tmp_path, tiny("llama"), mx.float16, 0.02)
    half = f"{adapter}=0.5"
    result = fuse(base, [half, half], tmp_path / "sum", OPTIONS)
    assert result.mode == "biases" and result.effect.logit_fraction > 0.95
    dense = FuseOptions(mode="dequantize", samples=2, length=32)
    assert fuse(base, adapter, tmp_path / "dense", dense).mode == "dequantize"
    assert "quantization" not in load(tmp_path / "dense").config
