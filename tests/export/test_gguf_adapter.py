"""GGUF adapters: base file + (alpha / rank) · BA is the file of the fused model, names and rows."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader

from mlx_slim.adapters.merge import merge
from mlx_slim.adapters.store import load_adapter
from mlx_slim.cli.main import run
from mlx_slim.errors import SlimError
from mlx_slim.export import gguf_adapter
from mlx_slim.export.gguf_adapter import export_gguf_adapter
from mlx_slim.models.load import load
from mlx_slim.models.save import save_model
from tests.support.adapters import write_adapter, write_quantized
from tests.support.gguf_files import family_model, write_family
from tests.support.tiny import tiny_model

CASES = [
    ("mistral", {"scaling": "rslora", "alpha": 8}),
    ("mistral", {"targets": ["q_proj", "embed_tokens", "lm_head"], "init": "pissa"}),
    ("mixtral", {"targets": ["q_proj", "gate"], "layers": [1]}),
    ("qwen3moe", {"targets": ["k_proj", "mlp.gate"]}),
    ("phi3", {}),
    ("gemma2", {"targets": ["k_proj", "gate_proj", "down_proj"]}),
    ("gemma3", {"layers": 2}),
]


def tensors_of(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a GGUF file, float64."""
    return {one.name: np.array(one.data, np.float64) for one in GGUFReader(path).tensors}


@pytest.mark.parametrize(("family", "settings"), CASES)
def test_the_base_with_its_adapter_is_the_fused_model(
    tmp_path: Path, family: str, settings: dict[str, Any]
) -> None:
    base = family_model(tmp_path / "hf", family)
    adapter = write_adapter(tmp_path / "run" / "adapters", base, **settings)
    fused = load(base)
    load_adapter(fused.model, adapter)
    merge(fused.model)
    save_model(tmp_path / "fused", fused.model, fused.tokenizer, fused.config)
    for name in ("hf", "fused"):
        write_family(tmp_path / f"{name}.gguf", tmp_path / name, family)
    done = export_gguf_adapter(tmp_path / "run", tmp_path / "out")
    assert "every factor equal" in done.facts[-1]
    reader = GGUFReader(tmp_path / "out" / "run-lora.gguf")
    facts = {key: one.contents() for key, one in reader.fields.items()}
    assert (facts["general.type"], facts["adapter.type"]) == ("adapter", "lora")
    expected, changed = tensors_of(tmp_path / "fused.gguf"), tensors_of(tmp_path / "hf.gguf")
    factors = {one.name: np.array(one.data, np.float64) for one in reader.tensors}
    names = {name.removesuffix(".lora_a") for name in factors if name.endswith(".lora_a")}
    assert 2 * len(names) == len(factors) > 0
    for name in names:
        a, b = factors[f"{name}.lora_a"], factors[f"{name}.lora_b"]
        change = (a @ b.T) if name == "token_embd.weight" else b @ a
        changed[name] = changed[name] + facts["adapter.lora.alpha"] / b.shape[-1] * change
    for name, value in expected.items():
        assert np.allclose(changed[name], value, atol=1e-6), name
    assert all(value.dtype == np.float32 for value in (one.data for one in reader.tensors))
    card = (tmp_path / "out" / "README.md").read_text()
    assert "--lora run-lora.gguf" in card and str(tmp_path) not in card


REFUSED = [
    ("phi", {"targets": ["q_proj"]}, "no place of their own in GGUF", "mlx-slim fuse"),
    ("llama-tied", {"targets": ["embed_tokens"]}, "head of this model too", "mlx-slim fuse"),
    ("olmoe", {"targets": ["q_proj"]}, "olmoe models cannot be exported", "fuse it"),
]


@pytest.mark.parametrize(("architecture", "settings", "says", "hint"), REFUSED)
def test_what_llama_cpp_cannot_add_is_one_line(
    tiny: Callable[..., Path],
    tmp_path: Path,
    architecture: str,
    settings: dict[str, Any],
    says: str,
    hint: str,
) -> None:
    base = tiny_model(tmp_path / "b", architecture) if architecture == "olmoe" else None
    adapter = write_adapter(tmp_path / "a", base or tiny(architecture), **settings)
    with pytest.raises(SlimError, match=says) as caught:
        export_gguf_adapter(adapter, tmp_path / "out")
    assert hint in caught.value.hint
    assert not (tmp_path / "out").exists()


def test_the_command_and_its_refusals(
    tiny: Callable[..., Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    base = write_quantized(tmp_path / "q", tiny("llama"))
    adapter = write_adapter(tmp_path / "a", base)
    dora = write_adapter(tmp_path / "d", base, dora=True)
    base.rename(tmp_path / "moved")
    out, moved = str(tmp_path / "out"), str(tmp_path / "moved")
    for words, says in (
        ([adapter, "-o", out], "cannot be loaded"),
        ([adapter, "-o", out, "--type", "q8_0"], "--type is not used with --to gguf-adapter"),
        ([adapter, "-o", f"{out}.gguf", "--model", moved], "names a file"),
        ([dora, "-o", out, "--model", moved], "is a DoRA"),
        ([moved, "-o", out], "is not an adapter folder"),
    ):
        assert run(["export", *map(str, words), "--to", "gguf-adapter"]) == 2
        error = capfd.readouterr().err
        assert says in error and error.count("error:") == 1
    assert not (tmp_path / "out").exists()
    words = ["export", str(adapter), "--to", "gguf-adapter", "-o", out, "--model", moved]
    assert run(words) == 0
    printed = capfd.readouterr().out
    assert "trained over a quantized base" in printed and "--lora" in printed
    assert "alpha 16, F32" in printed
    (file,) = Path(out).glob("*.gguf")
    assert run(["convert", str(file), "-o", str(tmp_path / "model")]) == 2
    assert "is an adapter, not a model" in capfd.readouterr().err


def test_another_row_order_is_not_kept(
    tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = write_adapter(tmp_path / "a", tiny("llama"))
    honest = gguf_adapter._tensors

    def swapped(*args: Any):
        tensors = honest(*args)
        name = "blk.1.attn_k.weight.lora_b"
        return {**tensors, name: tensors[name][::-1].copy()}

    monkeypatch.setattr(gguf_adapter, "_tensors", swapped)
    with pytest.raises(SlimError, match=r"blk.1.attn_k.weight.lora_b"):
        export_gguf_adapter(adapter, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]


def test_another_base_and_a_scale_of_zero_are_refused(
    tiny: Callable[..., Path], tmp_path: Path
) -> None:
    adapter = write_adapter(tmp_path / "a", tiny("llama"))
    settings = json.loads((adapter / "adapter_config.json").read_text())
    still = {"lora_parameters": {**settings["lora_parameters"], "scale": 0.0}}
    wide = {"model": str(tiny_model(tmp_path / "wide", intermediate_size=96))}
    for change, says in ((wide, "does not fit this model"), (still, "has the scale 0")):
        (adapter / "adapter_config.json").write_text(json.dumps({**settings, **change}))
        with pytest.raises(SlimError, match=says):
            export_gguf_adapter(adapter, tmp_path / "out")
