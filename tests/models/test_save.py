"""Saved folders: stock mlx-lm reads them, the live model keeps its weights."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from mlx_slim.errors import ResourceError, SlimError
from mlx_slim.models import save, shards
from mlx_slim.models.load import load
from mlx_slim.models.save import quantization_of, save_model
from tests.support.stock import stock_load

IDS = mx.array([[5, 9, 200, 31, 77]])


@pytest.mark.parametrize("architecture", ["llama", "llama-tied", "mistral", "qwen2", "phi"])
def test_saved_model_loads_in_stock_mlx_lm(
    tiny: Callable[..., Path], tmp_path: Path, architecture: str
) -> None:
    ours = load(tiny(architecture))
    before = dict(tree_flatten(ours.model.parameters()))
    save_model(tmp_path / "out", ours.model, ours.tokenizer, ours.config)
    after = dict(tree_flatten(ours.model.parameters()))
    assert all(mx.array_equal(before[name], after[name]) for name in before)
    model, tokenizer = stock_load(str(tmp_path / "out"))
    # On a CPU ours goes through another, equal form of SwiGLU.
    assert mx.allclose(model(IDS), ours.model(IDS), rtol=1e-4, atol=1e-5)
    messages = [{"role": "user", "content": "hé"}]
    assert tokenizer.apply_chat_template(messages) == ours.tokenizer.apply_chat_template(messages)
    assert tokenizer.eos_token_ids == ours.tokenizer.eos_token_ids


def test_mixed_quantization_is_read_off_the_model(
    tiny: Callable[..., Path], tmp_path: Path
) -> None:
    ours = load(tiny("llama"))
    nn.quantize(
        ours.model,
        class_predicate=lambda path, module: (
            {"group_size": 32, "bits": 8}
            if path.endswith("lm_head")
            else {"group_size": 64, "bits": 4}
            if path.endswith(("q_proj", "v_proj"))
            else False
        ),
    )
    save_model(tmp_path / "out", ours.model, ours.tokenizer, ours.config)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization"]["bits"] == 4
    assert config["quantization"]["lm_head"] == {"group_size": 32, "bits": 8, "mode": "affine"}
    assert config["dtype"] == "float32"
    for model in (stock_load(str(tmp_path / "out"))[0], load(tmp_path / "out").model):
        assert quantization_of(model) == quantization_of(ours.model)
        assert mx.allclose(model(IDS), ours.model(IDS), atol=1e-4)  # ours multiplies through BLAS


def test_plain_model_loses_a_stale_quantization_entry(
    tiny: Callable[..., Path], tmp_path: Path
) -> None:
    ours = load(tiny("llama"))
    stale = {**ours.config, "quantization": {"group_size": 64, "bits": 4}}
    save_model(tmp_path / "out", ours.model, ours.tokenizer, stale)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization" not in config
    assert "quantization" in stale


def test_existing_output_is_refused(tiny: Callable[..., Path], tmp_path: Path) -> None:
    ours = load(tiny("llama"))
    with pytest.raises(SlimError, match="exists already"):
        save_model(tmp_path, ours.model, ours.tokenizer, ours.config)


def test_full_disk_is_said_before_writing(
    tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = load(tiny("llama"))
    usage = save.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(save.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(ResourceError, match=r"the disk has 1\.00 kB left"):
        save_model(tmp_path / "out", ours.model, ours.tokenizer, ours.config)
    assert not list(tmp_path.iterdir())


def test_failing_writer_leaves_nothing(
    tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = load(tiny("llama"))

    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shards.Shards, "write", fail)
    with pytest.raises(ResourceError, match="disk is full"):
        save_model(tmp_path / "out", ours.model, ours.tokenizer, ours.config)
    assert not list(tmp_path.iterdir())
