"""``mlx-slim quantize`` from folder to folder: what it prints, what loads, what it refuses."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlx_slim.cli.main import run
from mlx_slim.config.schema import QuantizeConfig
from mlx_slim.errors import SlimError
from mlx_slim.events import Event, Notice
from mlx_slim.models import quantized, verified_save
from mlx_slim.planner.shapes import leaves
from mlx_slim.quantization import run as module
from mlx_slim.quantization.policy import quantize_config
from mlx_slim.quantization.run import CompressOptions, compress
from mlx_slim.runtime import to_float
from tests.support.stock import stock_load
from tests.support.tiny import TinyModels, tiny_model

FORMATS = [("affine", bits, 32) for bits in (2, 3, 4, 5, 6, 8)]
FORMATS += [("affine", 4, 64), ("affine", 4, 128), ("mxfp4", 4, 32)]
FORMATS += [("mxfp8", 8, 32), ("nvfp4", 4, 16)]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "notes.txt"
    path.write_text("\n".join(f"{i}: a line of plain words to look at" for i in range(60)))
    return path


def _options(text: Path, quantize: QuantizeConfig | None = None, **changes: Any) -> CompressOptions:
    settings = {"length": 32, "samples": 3, "fidelity_samples": 3, **changes}
    config = quantize or QuantizeConfig(group_size=32)
    return CompressOptions(config, calibration=str(text), **settings)


@pytest.mark.parametrize(("mode", "bits", "group"), FORMATS)
def test_stock_mlx_lm_loads_every_format(
    tiny: TinyModels, tmp_path: Path, text: Path, mode: str, bits: int, group: int
) -> None:
    options = _options(
        text, QuantizeConfig.model_validate({"mode": mode, "bits": bits, "group_size": group})
    )
    result = compress(tiny(), tmp_path / "out", options)
    model, tokenizer = stock_load(str(tmp_path / "out"))
    dense, _ = stock_load(str(tiny()))
    assert tokenizer.encode("hi")
    tokens = mx.array([[5, 6, 7, 8]])
    gap = mx.abs(model(tokens) - dense(tokens)).max() / mx.abs(dense(tokens)).max()
    assert to_float(gap) < {2: 1.5, 3: 0.6}.get(bits, 0.4)
    assert result.fidelity is not None and result.fidelity.tokens == 96
    assert 0 < result.fidelity.kl < 1 and 0 < result.fidelity.top1 <= 1
    assert result.report.bytes_after < result.report.bytes_before


@pytest.mark.parametrize("method", ["awq", "gptq", "dwq", "dynamic", "blockwise", "mixed_3_6"])
def test_methods_and_recipes_load_too(
    tiny: TinyModels, tmp_path: Path, text: Path, method: str
) -> None:
    changes: dict[str, Any] = (
        {"recipe": method} if method.startswith("mixed") else {"method": method}
    )
    out = tmp_path / "out"
    compress(tiny(), out, _options(text, **changes))
    model, _ = stock_load(str(out))
    quantized.densify(model)
    assert mx.isfinite(model(mx.array([[1, 2, 3]]))).all()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.txt", "out"]


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_the_stored_dtype_stays(tmp_path: Path, text: Path, dtype: mx.Dtype) -> None:
    source = tiny_model(tmp_path / "source", dtype=dtype)
    result = compress(source, tmp_path / "out", _options(text))
    model, _ = stock_load(str(tmp_path / "out"))
    floating = {
        value.dtype for _, value in leaves(model) if mx.issubdtype(value.dtype, mx.floating)
    }
    assert floating == {dtype}
    assert 5 <= result.report.bits_per_weight < 5.2
    size = sum(value.nbytes for _, value in leaves(model))
    assert result.report.bytes_after == size


def test_more_bits_are_nearer(tiny: TinyModels, tmp_path: Path, text: Path) -> None:
    kl = []
    for bits in (2, 4, 8):
        options = _options(text, QuantizeConfig(bits=bits, group_size=32))
        fidelity = compress(tiny(), tmp_path / str(bits), options).fidelity
        assert fidelity is not None
        kl.append(fidelity.kl)
    assert kl[0] > kl[1] > kl[2]


def test_refusals_leave_nothing_behind(tiny: TinyModels, tmp_path: Path, text: Path) -> None:
    out = tmp_path / "out"
    exists = tmp_path / "exists"
    exists.mkdir()
    for source, target, options, message in [
        (tiny(), exists, _options(text), "exists already"),
        (tmp_path / "no", out, _options(text), "no"),
        (tiny(), out, _options(text, method="best"), "unknown method"),
        (tiny(), out, _options(text, recipe="mixed"), "unknown recipe"),
        (tiny("phi"), out, _options(text, method="awq"), "does not support phi"),
        (tiny("phi"), out, _options(text, recipe="mixed_3_6"), "does not fit phi"),
        (tiny(), out, _options(tmp_path / "gone.txt"), "does not exist"),
    ]:
        with pytest.raises(SlimError, match=message):
            compress(source, target, options)
    assert not out.exists() and not list(exists.iterdir())
    compress(tiny(), out, _options(text))
    with pytest.raises(SlimError, match="quantized already") as caught:
        compress(out, tmp_path / "again", _options(text))
    assert "--dequantize" in caught.value.hint
    assert {path.name for path in tmp_path.iterdir()} == {"notes.txt", "exists", "out"}


def test_a_saved_model_that_differs_is_not_kept(
    tiny: TinyModels, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = verified_save.unread

    def damaged(source: Path, **options: Any):
        def open_model():
            model: Any = read.open()
            norm = model.model.norm
            norm.weight = norm.weight * 1.5
            return model

        read = honest(source, **options)
        return replace(read, open=open_model)

    monkeypatch.setattr(verified_save, "unread", damaged)
    with pytest.raises(SlimError, match="not the one that was measured"):
        compress(tiny(), tmp_path / "out", _options(text))
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_without_text_rounding_goes_on_and_says_so(
    tiny: TinyModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLX_SLIM_DATA", str(tmp_path))
    monkeypatch.setattr(module, "DEFAULT_SOURCE", str(tmp_path / "none.jsonl"))
    heard: list[Event] = []

    class Listener:
        def notify(self, event: Event) -> None:
            heard.append(event)

    options = CompressOptions(QuantizeConfig(group_size=32))
    assert compress(tiny(), tmp_path / "out", options, Listener()).fidelity is None
    warnings = [event for event in heard if isinstance(event, Notice) and event.level == "warning"]
    assert len(warnings) == 1 and "--calibration" in warnings[0].message
    with pytest.raises(SlimError, match="does not exist"):
        compress(
            tiny(), tmp_path / "b", CompressOptions(QuantizeConfig(group_size=32), method="gptq")
        )


def test_command_line(
    tiny: TinyModels, tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["--calibration", str(text), "--calibration-length", "32"]
    arguments = [str(tiny()), "-o", str(tmp_path / "a"), "--group-size", "128", *common]
    assert run(["quantize", *arguments]) == 0
    printed = capsys.readouterr().out
    assert "bits per weight" in printed and "4-bit affine, group 128" in printed
    assert "input width 64 is not divisible by group_size=128" in printed
    assert "model.layers.*.mlp.up_proj" in printed and "a norm (RMSNorm)" in printed
    arguments = [str(tiny()), "-o", str(tmp_path / "b"), "--mode", "mxfp4", "--json", *common]
    assert run(["quantize", *arguments]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["schema_version"] == 1 and record["quantized"] == {"4-bit mxfp4, group 32": 23}
    assert record["fidelity"]["kl"] > 0
    for wrong, message in [
        (["--bits", "7"], "bits=7"),
        (["--group-size", "48"], "group_size=48"),
        (["--mode", "nf4"], "unknown mode 'nf4'"),
        (["--mode", "mxfp4", "--bits", "8"], "mode mxfp4 requires bits=4"),
        (["--method", "magic"], "unknown method"),
    ]:
        assert run(["quantize", str(tiny()), "-o", str(tmp_path / "c"), *wrong]) == 2
        captured = capsys.readouterr()
        assert message in captured.err and "hint:" in captured.err
        assert captured.err.count("\n") == 2
    assert not (tmp_path / "c").exists()


def test_defaults_of_the_modes() -> None:
    assert quantize_config() == QuantizeConfig()
    assert quantize_config(mode="nvfp4").group_size == 16
    assert quantize_config(mode="mxfp8").bits == 8
