"""Which bits a size gives each layer: the nearer of two mixes, on text of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from mlx_slim.config.schema import QuantizeConfig
from mlx_slim.quantization import mixes
from mlx_slim.quantization.run import CompressOptions, compress
from mlx_slim.quantization.sensitivity import BITS, Losses
from tests.support.tiny import TinyModels

QUANTIZE = QuantizeConfig(group_size=32)


def _text(folder: Path) -> str:
    file = folder / "text.txt"
    file.write_text("".join(f"{n} times {n} is {n * n}. " for n in range(400)))
    return str(file)


def _options(text: str) -> CompressOptions:
    return CompressOptions(
        QUANTIZE,
        fidelity_samples=1,
        length=32,
        bits_per_weight=5.0,
        sensitivity_samples=1,
        calibration=text,
    )


def test_the_nearer_mix_is_stored(
    tiny: TinyModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Losses that say the opposite of the truth lose against the rules, however small they are."""

    def upside_down(_folder: Path, paths: dict[str, tuple[int, ...]], *_rest: object) -> Losses:
        inner = {path: "layers.1" in path for path in paths}
        return {
            path: {bits: (1.0 if inner[path] else 1e-9) / 2**bits for bits in BITS}
            for path in paths
        }

    text = _text(tmp_path)
    honest = compress(tiny(), tmp_path / "honest", _options(text)).sized
    monkeypatch.setattr(mixes, "measured_losses", upside_down)
    turned = compress(tiny(), tmp_path / "turned", _options(text)).sized
    assert honest is not None and turned is not None
    for sized in (honest, turned):
        assert sized.distances is not None
        assert sized.sensitivity == min(sized.distances, key=lambda name: sized.distances[name])  # type: ignore[index]
    assert honest.distances is not None and turned.distances is not None
    assert turned.sensitivity == "rules"
    assert turned.distances["rules"] == honest.distances["rules"] < turned.distances["measured"]


def test_no_loss_is_measured_on_the_text_that_chooses(
    tiny: TinyModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: dict[str, list[list[int]]] = {}
    measured, distance = mixes.measured_losses, mixes._distance

    def losses(*arguments: object) -> Losses:
        rows["measured"] = arguments[3].tolist()  # type: ignore[attr-defined]
        return measured(*arguments)  # type: ignore[arg-type]

    def distances(*arguments: object) -> float:
        rows["chosen"] = arguments[-1].tolist()  # type: ignore[attr-defined]
        return distance(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(mixes, "measured_losses", losses)
    monkeypatch.setattr(mixes, "_distance", distances)
    compress(tiny(), tmp_path / "out", _options(_text(tmp_path)))
    assert len(rows["measured"]) == 1 and len(rows["chosen"]) == mixes.CHOICE_ROWS
    assert not any(row in rows["chosen"] for row in rows["measured"])
