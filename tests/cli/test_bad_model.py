"""A damaged model or an unreachable hub: one clear line, and nothing left behind."""

from __future__ import annotations

import json
import os
import shutil
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlx_slim.artifacts import load_tensors


def _copy(model: Path, target: Path) -> Path:
    shutil.copytree(model, target)
    return target


# ------------------------------ model


def _edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def test_an_unknown_model_type(
    fails: Callable[..., str], small: Path, tiny: Callable[..., Path], tmp_path: Path
) -> None:
    model = _copy(tiny("llama"), tmp_path / "model")
    _edit_config(model, model_type="lama")
    text = fails("train", small, f"model={model}", "-o", tmp_path / "run")
    assert "'lama'" in text
    assert "did you mean 'llama'" in text


def _drop_tensor(model: Path) -> None:
    import mlx.core as mx

    shard = sorted(model.glob("*.safetensors"))[0]
    tensors = load_tensors(shard)
    name = sorted(tensors)[0]
    mx.save_safetensors(str(shard), {k: v for k, v in tensors.items() if k != name})


def _truncate(model: Path) -> None:
    shard = sorted(model.glob("*.safetensors"))[0]
    os.truncate(shard, shard.stat().st_size // 2)


def _scramble(model: Path) -> None:
    sorted(model.glob("*.safetensors"))[0].write_bytes(b"\xff" * 500)


def _lose_shard(model: Path) -> None:
    sorted(model.glob("*.safetensors"))[1].unlink()


def _pickle_only(model: Path) -> None:
    for path in model.glob("*.safetensors*"):
        path.unlink()
    (model / "pytorch_model.bin").write_bytes(b"x")


def _lose_tokenizer(model: Path) -> None:
    for path in model.glob("tokenizer*"):
        path.unlink()


def _break_tokenizer(model: Path) -> None:
    (model / "tokenizer.json").write_text('{"version": "1.0", "model": {}}')


def _lose_config(model: Path) -> None:
    (model / "config.json").unlink()


def _break_config(model: Path) -> None:
    (model / "config.json").write_text('{"model_type": "llama", ')


def _wrong_shape(model: Path) -> None:
    _edit_config(model, intermediate_size=96)


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (_drop_tensor, ["weight"]),
        (_truncate, [".safetensors"]),
        (_scramble, [".safetensors", "corrupt"]),
        (_lose_shard, ["model-00002-of-00002.safetensors"]),
        (_pickle_only, ["pytorch_model.bin", "safetensors"]),
        (_lose_tokenizer, ["tokenizer"]),
        (_break_tokenizer, ["tokenizer"]),
        (_lose_config, ["config.json"]),
        (_break_config, ["config.json"]),
        (_wrong_shape, ["96"]),
    ],
    ids=lambda value: value.__name__[1:] if callable(value) else "",
)
@pytest.mark.parametrize("command", ["train", "quantize", "generate", "convert"])
def test_a_damaged_model(
    fails: Callable[..., str],
    small: Path,
    rows: Path,
    tiny: Callable[..., Path],
    tmp_path: Path,
    damage: Any,
    expected: Any,
    command: str,
) -> None:
    model = _copy(tiny("llama"), tmp_path / "model")
    damage(model)
    out = tmp_path / "out"
    words = {
        "train": ["train", small, f"model={model}", "-o", out],
        "quantize": ["quantize", model, "-o", out, "--calibration", rows],
        "generate": ["generate", model, "--prompt", "a"],
        "convert": ["convert", model, "-o", out],
    }[command]
    text = fails(*words)
    assert all(word in text for word in expected), text


def test_a_folder_without_a_model(fails: Callable[..., str], small: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "config.json" in fails("train", small, f"model={tmp_path}/empty", "-o", tmp_path / "run")
    assert "does not exist" in fails("train", small, f"model={tmp_path}/no", "-o", tmp_path / "run")


# ------------------------------ hub


@pytest.mark.parametrize("command", ["train", "generate", "convert", "quantize", "plan"])
def test_the_hub_is_off_limits(
    fails: Callable[..., str],
    small: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: str,
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    out = tmp_path / "out"
    words = {
        "train": ["train", small, "model=nobody/nothing", "-o", out],
        "quantize": ["quantize", "nobody/nothing", "-o", out],
        "generate": ["generate", "nobody/nothing", "--prompt", "a"],
        "convert": ["convert", "nobody/nothing", "-o", out],
        "plan": ["plan", small, "model=nobody/nothing"],
    }[command]
    text = fails(*words)
    assert "HF_HUB_OFFLINE" in text
    assert "folder" in text


def test_data_on_the_hub_is_off_limits(
    fails: Callable[..., str], small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("MLX_SLIM_DATA", raising=False)
    text = fails("train", small, "data.path=nobody/nothing", "-o", tmp_path / "run")
    assert "nobody/nothing" in text
    assert "HF_HUB_OFFLINE" in text


@pytest.mark.parametrize("what", ["model", "data.path"])
def test_the_hub_cannot_be_reached(
    fails: Callable[..., str],
    small: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    what: str,
) -> None:
    """One short try, not half a minute of retries."""
    from huggingface_hub import constants

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.delenv("MLX_SLIM_DATA", raising=False)
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{port}")
    import datasets  # noqa: F401  # its import takes seconds and is not what is timed

    began = time.perf_counter()
    text = fails("train", small, f"{what}=nobody/nothing", "-o", tmp_path / "run")
    assert time.perf_counter() - began < 5
    assert "nobody/nothing" in text
    assert "folder" in text or "local path" in text
