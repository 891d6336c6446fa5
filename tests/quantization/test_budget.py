"""A model in a given number of bytes: counted before, met after, refused where it cannot be."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_slim.artifacts import weight_sizes
from mlx_slim.cli.main import run
from mlx_slim.config.schema import QuantizeConfig
from mlx_slim.errors import SlimError
from mlx_slim.models.opening import open_weights
from mlx_slim.models.quantized import format_of
from mlx_slim.quantization.budget import LayerSizes, space_of
from mlx_slim.quantization.heuristics import heuristic_losses
from mlx_slim.quantization.policy import leaves
from mlx_slim.quantization.run import Compressed, CompressOptions, compress
from mlx_slim.quantization.sensitivity import BITS
from tests.support.stock import stock_load
from tests.support.tiny import TinyModels, tiny_model

QUANTIZE = QuantizeConfig(group_size=32)


def _space(folder: Path, stored: mx.Dtype = mx.float32) -> LayerSizes:
    return space_of(open_weights(folder)[0], QUANTIZE, stored)


def _heuristic(source: Path, out: Path, bits_per_weight: float) -> Compressed:
    options = CompressOptions(
        QUANTIZE, fidelity_samples=0, bits_per_weight=bits_per_weight, sensitivity="rules"
    )
    return compress(source, out, options)


@pytest.mark.parametrize("architecture", ["llama", "llama-tied", "phi", "qwen3_moe"])
def test_what_is_counted_is_what_is_stored(tmp_path: Path, architecture: str) -> None:
    source = tiny_model(tmp_path / "source", architecture, dtype=mx.bfloat16)
    space = _space(source, mx.bfloat16)
    result = _heuristic(source, tmp_path / "out", 5.5)
    losses = heuristic_losses(space.shapes, space.blocks)
    assert result.sized is not None
    choices = space.choose(losses, result.sized.limit_bytes)
    formats = {path: choice.format for path, choice in choices.items()}
    assert result.report.bytes_after == space.nbytes(formats) <= result.sized.limit_bytes
    assert 5.2 < result.report.bits_per_weight <= 5.5
    model, _ = stock_load(str(tmp_path / "out"))
    stored = {path: format_of(layer) for path, layer in leaves(model) if "scales" in layer}
    assert {path: stored[path] for path in formats} == formats
    assert len(set(formats.values())) > 1
    assert mx.isfinite(model(mx.array([[1, 2, 3]]))).all()
    # A class that gives a layer bits of its own (the router of a mixture) keeps them.
    assert {str(stored[path]) for path in stored.keys() - formats.keys()} <= {
        "8-bit affine, group 64"
    }
    assert (architecture == "qwen3_moe") == (stored.keys() != formats.keys())


def test_files_are_within_the_bytes(tiny: TinyModels, tmp_path: Path) -> None:
    sizes = []
    for kilobytes in (100, 130, 200):
        options = CompressOptions(
            QUANTIZE, fidelity_samples=0, target_bytes=kilobytes * 1000, sensitivity="rules"
        )
        out = tmp_path / str(kilobytes)
        result = compress(tiny(), out, options)
        sizes.append(sum(weight_sizes(out).values()))
        assert 0.9 * kilobytes * 1000 < sizes[-1] <= kilobytes * 1000
        assert result.sized is not None and result.sized.loss is None
    assert sizes == sorted(sizes)


def test_a_size_met_by_training_blocks_has_the_bytes_of_rounding_and_loses_less(
    tiny: TinyModels, tmp_path: Path
) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("Kites rise against the wind, and fall with it. " * 200)
    results, formats, sizes = [], [], []
    for method in ("rtn", "blockwise"):
        options = CompressOptions(
            QUANTIZE,
            method=method,
            calibration=str(text),
            samples=16,
            length=32,
            bits_per_weight=5,
            sensitivity="rules",
        )
        results.append(compress(tiny(), tmp_path / method, options))
        sizes.append(sum(weight_sizes(tmp_path / method).values()))
        model, _ = stock_load(str(tmp_path / method))
        formats.append(
            {path: format_of(one) for path, one in leaves(model) if hasattr(one, "group_size")}
        )
    assert len(set(formats[0].values())) > 1, "layers differ in bits"
    assert formats[0] == formats[1] and sizes[0] == sizes[1]
    rounded, trained = (one.fidelity.kl for one in results if one.fidelity)
    assert trained < 0.8 * rounded


def test_a_size_between_eight_bits_and_dense_leaves_layers_dense(
    tiny: TinyModels, tmp_path: Path
) -> None:
    result = _heuristic(tiny(), tmp_path / "out", 20)
    reasons = {skip.reason for skip in result.report.skipped}
    assert "the size allows full precision" in reasons
    assert 12 < result.report.bits_per_weight <= 20
    stock_load(str(tmp_path / "out"))


def test_blocks_that_a_size_leaves_dense_are_passed(tiny: TinyModels, tmp_path: Path) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("Kites rise against the wind, and fall with it. " * 40)
    options = CompressOptions(
        QUANTIZE,
        method="blockwise",
        calibration=str(text),
        samples=4,
        length=32,
        bits_per_weight=31.9,
        sensitivity="rules",
    )
    result = compress(tiny(), tmp_path / "out", options)
    assert result.report.quantized == {"8-bit affine, group 32": 1}
    assert result.fidelity is not None and result.fidelity.kl < 1e-3


def test_rules_give_more_to_what_loses_more(tiny: TinyModels) -> None:
    space = _space(tiny())
    losses = heuristic_losses(space.shapes, space.blocks)
    for path, by_bits in losses.items():
        assert [by_bits[bits] for bits in BITS] == sorted(by_bits.values(), reverse=True), path
    inner = losses["model.layers.1.mlp.up_proj"][4]
    more = ["layers.1.mlp.down_proj", "layers.1.self_attn.v_proj", "layers.0.mlp.up_proj"]
    for path in (*more, "layers.2.mlp.up_proj", "embed_tokens"):
        assert losses[f"model.{path}"][4] > inner
    assert losses["model.layers.1.self_attn.k_proj"][4] < inner
    assert losses["lm_head"][4] > losses["model.embed_tokens"][4]
    tied = _space(tiny("llama-tied"))
    both = heuristic_losses(tied.shapes, tied.blocks)["model.embed_tokens"][4]
    assert both > losses["lm_head"][4], "an embedding that is the head, too"


def test_a_size_that_nothing_meets_is_refused_before_weights_are_read(
    tiny: TinyModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unread(*_args: object, **_kwargs: object) -> None:
        raise AssertionError("weights are read")

    monkeypatch.setattr("mlx_slim.quantization.run.load", unread)
    monkeypatch.setattr("mlx_slim.quantization.run.load_quantized", unread)
    smallest = _space(tiny()).uniform(2) * 8 / _space(tiny()).numbers
    with pytest.raises(SlimError, match="2 bits in every layer") as caught:
        _heuristic(tiny(), tmp_path / "out", 3)
    assert f"{smallest:.2f} bits per weight" in caught.value.message
    with pytest.raises(SlimError, match=r"32\.00 bits per weight\) already"):
        _heuristic(tiny(), tmp_path / "out", 32)
    assert not list(tmp_path.iterdir())


def test_what_excludes_a_size(
    tiny: TinyModels, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    size = ["--bits-per-weight", "5"]
    for words, message in [
        ([*size, "--bits", "4"], "bits=4 and a size exclude each other"),
        ([*size, "--target-bytes", "1MB"], "--target-bytes and --bits-per-weight exclude"),
        ([*size, "--method", "awq"], "--method awq: a size is met in mode affine"),
        ([*size, "--method", "blockwis"], "unknown method 'blockwis'"),
        ([*size, "--recipe", "mixed_3_4"], "--recipe mixed_3_4: a size"),
        ([*size, "--mode", "mxfp4"], "--mode mxfp4: a size"),
        (["--sensitivity", "rules"], "none is set"),
        (["--bits-per-weight", "0"], "not in the range"),
        (["--target-bytes", "much"], "'much' is not a memory size"),
    ]:
        assert run(["quantize", str(tiny()), "-o", str(tmp_path / "out"), *words]) == 2
        captured = capsys.readouterr()
        assert message in captured.err and captured.err.count("\n") == 2
    assert not list(tmp_path.iterdir())


def test_files_of_adapters_count_in_the_target(tmp_path: Path) -> None:
    source = tiny_model(tmp_path / "source", dtype=mx.bfloat16)
    text = tmp_path / "text.txt"
    text.write_text("Adapters that correct the error take bytes as well. " * 100)
    target = sum(weight_sizes(source).values()) * 45 // 100
    options = CompressOptions(
        QUANTIZE,
        target_bytes=target,
        sensitivity="rules",
        compensate=4,
        calibration=str(text),
        fidelity_samples=0,
    )
    out = tmp_path / "out"
    compress(source, out, options)
    files = [file.stat().st_size for file in out.rglob("*.safetensors")]
    assert len(files) == 2 and 0.9 * target < sum(files) <= target
    with pytest.raises(SlimError, match="cannot be reached"):
        compress(source, tmp_path / "no", replace(options, compensate=64))
