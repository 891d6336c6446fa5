"""A mix of few bits: how many rows train its blocks, and that they bring it nearer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from mlx_slim.artifacts import weight_sizes
from mlx_slim.models.fidelity import compare
from mlx_slim.models.load import load, load_tokenizer
from mlx_slim.planner.time import Machine
from mlx_slim.quantization import blockwise
from mlx_slim.quantization.block_rows import Training
from mlx_slim.quantization.calibration import read_calibration
from mlx_slim.quantization.run import compress
from mlx_slim.slimming import block_training, build
from mlx_slim.slimming.block_training import (
    LENGTH,
    ROWS_FILE,
    passes,
    rows_of,
    rows_within,
    trains_blocks,
    write_rows,
)
from mlx_slim.slimming.candidate import Cut
from mlx_slim.slimming.material import Material
from mlx_slim.slimming.request import space_of
from tests.slimming.conftest import Setting
from tests.support.runs import Recorder


def test_whose_blocks_are_trained(setting: Setting) -> None:
    mix = replace(space_of(*setting).candidate(4, ()), bits_per_weight=3.5)
    assert trains_blocks(mix)
    assert not trains_blocks(replace(mix, bits_per_weight=5.0))
    assert not trains_blocks(replace(mix, bits_per_weight=None))
    assert not trains_blocks(replace(mix, cuts=(Cut("depth", layers=1),)))


def test_rows_are_as_many_as_the_time_is_enough_for(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine("slow", (1e9, 1e9), (0.25, 0.5), 0, None, "")
    monkeypatch.setattr(block_training, "this_machine", lambda _: machine)
    assert passes(Training(epochs=4, end_epochs=2)) == 22
    each = 2 * 1e6 * 22 * LENGTH / (0.25 * 1e9)  # seconds of a row of a model of a million
    assert rows_within(10**6, 100.5 * each) == 100
    assert rows_within(10**6, 0.0) == 8 and rows_within(10**6, 1e9) == 512
    assert rows_within(10**6, None) == rows_within(10**9, None) == 64


def test_trained_blocks_are_nearer_in_as_many_bytes(setting: Setting, tmp_path: Path) -> None:
    model, options = setting
    mix = replace(space_of(model, options).candidate(4, ()), bits_per_weight=4.5)
    material = Material(str(model), None, options.data, tmp_path, tmp_path / "targets")
    trained, rounded = tmp_path / "trained", tmp_path / "rounded"
    trained.mkdir()
    assert not write_rows(material, mix, trained, [0.0]) and rows_of(trained) == 8
    (trained / ROWS_FILE).write_text('{"rows": 12}')
    build.make(material, mix, trained, Recorder())
    assert build.recovered(mix, trained) == "blocks"
    compress(model, rounded / "model", build.compress_options(material, mix))
    sizes = [sum(weight_sizes(folder / "model").values()) for folder in (trained, rounded)]
    assert sizes[0] == sizes[1]
    tokens_NT = read_calibration(
        str(options.data), load_tokenizer(model), length=32, seen=0, validation=4
    ).validation_NT
    original = load(model).model
    near, far = (
        compare(original, load(folder / "model").model, tokens_NT).kl
        for folder in (trained, rounded)
    )
    assert near < far


def test_blocks_that_cannot_be_trained_are_rounded(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, options = setting
    mix = replace(space_of(model, options).candidate(4, ()), bits_per_weight=4.5)
    material = Material(str(model), None, options.data, tmp_path, tmp_path / "targets")
    assert rows_of(tmp_path) == 0, "of a search of an earlier version"
    monkeypatch.setattr(blockwise, "device_memory", lambda: 1000)
    assert "training one block takes" in write_rows(material, mix, tmp_path, [])
    assert rows_of(tmp_path) == 0 and build.recovered(mix, tmp_path) == ""
    assert build.compress_options(material, mix, rows_of(tmp_path)).method == "rtn"
