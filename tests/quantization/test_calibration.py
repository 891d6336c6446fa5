"""Calibration rows: disjoint, cut to length, bounded."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import pytest
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import load_tokenizer

from mlx_slim.errors import SlimError
from mlx_slim.quantization.calibration import read_calibration
from tests.support.tiny import TinyModels


@pytest.fixture
def tokenizer(tiny: TinyModels) -> TokenizerWrapper:
    return load_tokenizer(tiny())


def test_text_and_jsonl(tokenizer: TokenizerWrapper, tmp_path: Path) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("\n".join(f"line {i}: some words to read" for i in range(40)))
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        "".join(
            json.dumps({"instruction": f"say {i}", "output": f"here is {i}"}) + "\n"
            for i in range(40)
        )
    )
    for source in (text, rows):
        calibration = read_calibration(str(source), tokenizer, length=16, seen=5, validation=3)
        assert calibration.seen_NT.shape == (5, 16) and calibration.validation_NT.shape == (3, 16)
        assert calibration.seen_NT.dtype == mx.int32
        again = read_calibration(str(source), tokenizer, length=16, seen=2, validation=3)
        assert mx.array_equal(calibration.validation_NT, again.validation_NT)
        first = tokenizer.decode(calibration.validation_NT[0].tolist())
        assert first not in tokenizer.decode(calibration.seen_NT.flatten().tolist())


def test_short_text_is_shared_out(tokenizer: TokenizerWrapper, tmp_path: Path) -> None:
    text = tmp_path / "short.txt"
    text.write_text("x" * 16 * 4)
    calibration = read_calibration(str(text), tokenizer, length=16, seen=64, validation=64)
    assert calibration.seen_NT.shape[0] == 2 and calibration.validation_NT.shape[0] == 2
    with pytest.raises(SlimError, match=r"gives 6\d tokens, 80 are needed"):
        read_calibration(str(text), tokenizer, length=40, seen=1, validation=1)


def test_a_missing_file(tokenizer: TokenizerWrapper, tmp_path: Path) -> None:
    with pytest.raises(SlimError, match="does not exist"):
        read_calibration(str(tmp_path / "no.txt"), tokenizer, length=16, seen=1, validation=1)
