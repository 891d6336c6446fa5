"""What ``mlx-slim prune`` refuses: one line, a hint, nothing left behind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlx_slim.pruning.plan import parse_layers
from mlx_slim.quantization.run import CompressOptions, compress
from tests.support.runs import write_rows


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "no size is set"),
        (["--ratio", "0.5", "--layers", "1"], "--layers and --ratio exclude each other"),
        (["--ratio", "1.5"], "1.5"),
        (["--ratio", "0"], "more than 0"),
        (["--ratio", "nan"], "nan"),
        (["--ratio", "0.01"], "removes nothing"),
        (["--ratio", "0.01", "--axis", "depth"], "less than one layer"),
        (["--ratio", "0.99", "--axis", "depth"], "one must remain"),
        (["--ratio", "0.5", "--method", "tailor"], "did you mean 'taylor'?"),
        (["--ratio", "0.5", "--method", "taylor", "--axis", "depth"], "--axis width"),
        (["--layers", "3"], "layers 0 to 2"),
        (["--layers", "0-2"], "all 3 layers"),
        (["--layers", "2-1"], "is not a list of layers"),
        (["--layers", "1", "--method", "angular"], "--layers lists the layers"),
        (["--ratio", "0.5", "--no-heads", "--no-mlp"], "nothing to prune"),
        (["--ratio", "0.5", "--protect-first", "1"], "--no-uniform"),
        (["--ratio", "0.5", "--ranking", "global"], "--no-uniform"),
        (["--ratio", "0.5", "--axis", "depth", "--no-heads"], "--axis width"),
        (["--ratio", "0.5", "--no-uniform", "--protect-first", "9"], "all 3 layers are protected"),
        (["--ratio", "0.4", "--axis", "depth", "--protect-first", "9"], "are protected"),
        (["--target-params", "lots"], "900M"),
        (["--target-params", "9B"], "already"),
        (["--target-params", "1k"], "cannot be reached"),
        (["--target-params", "1k", "--axis", "depth"], "cannot be reached"),
        (["--target-bytes", "1 pony"], "1 pony"),
        (["--ratio", "0.5", "--calibration", "gone.txt"], "gone.txt"),
        (["--ratio", "0.5", "--resume"], "--recover"),
        (["--ratio", "0.5", "train.steps=3"], "--recover"),
        (["--ratio", "0.5", "--recover", "smolm2-lora"], "smollm2-lora"),
        (["--ratio", "0.5", "--recover", "smollm2-lora", "train.stesp=3"], "train.steps"),
        (["--ratio", "0.5", "--recover", "smollm2-lora", "model=x"], "pruned model"),
        (["--ratio", "0.5", "--recover", "smollm2-lora", "data.path=no.jsonl"], "no.jsonl"),
        (["--ratio", "0.5", "--task", "arc_eazy"], "arc_easy"),
    ],
)
def test_bad_input(
    fails: Callable[..., str], tiny: Callable[..., Path], tmp_path: Path, words: Any, expected: str
) -> None:
    assert expected in fails("prune", tiny("llama"), "-o", tmp_path / "out", *words)


def test_all_problems_at_once(
    fails: Callable[..., str], tiny: Callable[..., Path], tmp_path: Path
) -> None:
    words = ["--ratio", "2", "--layers", "1", "--no-heads"]
    text = fails("prune", tiny("llama"), "-o", tmp_path / "out", *words)
    assert "3 problems" in text and "--ratio is 2" in text and "--no-heads" in text


def test_models_that_cannot_be_pruned(
    fails: Callable[..., str], tiny: Callable[..., Path], tmp_path: Path
) -> None:
    from mlx_slim.config.schema import QuantizeConfig

    bits = tmp_path / "bits"
    compress(tiny(), bits, CompressOptions(QuantizeConfig(group_size=32), fidelity_samples=0))
    assert "--dequantize" in fails("prune", bits, "-o", tmp_path / "out", "--ratio", "0.5")
    for kind in ("qwen2", "phi"):
        words = ["-o", tmp_path / "out", "--ratio", "0.5", "--heads"]
        assert "--no-uniform" in fails("prune", tiny(kind), *words)
        assert "nothing" in fails("prune", tiny(kind), *words[:-1], "--no-mlp")


def test_outputs_that_exist(
    fails: Callable[..., str], tiny: Callable[..., Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("keep me")
    rows = write_rows(tmp_path / "rows.jsonl")
    for more in ([], ["--recover", "smollm2-lora", f"data.path={rows}"]):
        for place in (out, rows, rows / "out"):
            text = fails("prune", tiny("llama"), "-o", place, "--ratio", "0.5", *more)
            assert str(place.name) in text


def test_layer_lists() -> None:
    assert parse_layers("21-29", 32) == list(range(21, 30))
    assert parse_layers("3, 1,5-6,5", 8) == [1, 3, 5, 6]
