"""Gemma 3 as GGUF: what the converter of llama.cpp writes, and what it cannot read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from gguf import GGUFReader

from mlx_slim.errors import SlimError
from mlx_slim.export.gguf_adapter import export_gguf_adapter
from mlx_slim.export.model import export_gguf
from mlx_slim.models.convert import convert
from mlx_slim.models.load import load
from tests.adapters.support import IDS
from tests.support.adapters import write_adapter
from tests.support.gguf_files import FAMILIES, family_model, write_family
from tests.support.tiny import tiny_model


def wrapped_model(folder: Path) -> Path:
    """Write the tiny Gemma 3 in the form of those that see pictures, without that part."""
    text = {**FAMILIES["gemma3"][1], "vocab_size": 264, "hidden_size": 64}
    text |= {"intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    return tiny_model(folder, model_type="gemma3", text_config=text, tie_word_embeddings=True)


@pytest.mark.parametrize("kind", ["f32", "q8_0"])
def test_it_is_what_the_converter_writes(tmp_path: Path, kind: str) -> None:
    source = family_model(tmp_path / "hf", "gemma3")
    write_family(tmp_path / "theirs.gguf", source, "gemma3", kind.upper())
    export_gguf(source, tmp_path / "out", kind=kind)
    ours = GGUFReader(tmp_path / "out" / f"hf-{kind}.gguf")
    theirs = GGUFReader(tmp_path / "theirs.gguf")
    one, other = ({t.name: t.data for t in reader.tensors} for reader in (ours, theirs))
    assert one.keys() == other.keys()
    assert all(np.array_equal(one[name], other[name]) for name in one)
    for key, field in theirs.fields.items():
        if key.startswith("gemma3."):
            assert ours.fields[key].contents() == field.contents(), key
    convert(tmp_path / "out" / f"hf-{kind}.gguf", tmp_path / "again")
    expected, logits = load(source).model(IDS), load(tmp_path / "again").model(IDS)
    limit = 1e-5 if kind == "f32" else 0.2
    assert mx.abs(logits - expected).max() < limit * mx.abs(expected).max()


def test_the_language_model_of_one_that_sees(tmp_path: Path) -> None:
    source = wrapped_model(tmp_path / "hf")
    export_gguf(source, tmp_path / "out", kind="f32")
    convert(tmp_path / "out" / "hf-f32.gguf", tmp_path / "again")
    again = load(tmp_path / "again")
    assert again.config["model_type"] == "gemma3_text"
    expected = load(source).model(IDS)
    assert mx.abs(again.model(IDS) - expected).max() < 1e-5 * mx.abs(expected).max()
    adapter = write_adapter(tmp_path / "a", source, targets=["q_proj", "down_proj"])
    export_gguf_adapter(adapter, tmp_path / "lora")
    names = {t.name for t in GGUFReader(tmp_path / "lora" / "a-lora.gguf").tensors}
    assert "blk.6.attn_q.weight.lora_a" in names and len(names) == 2 * 2 * 7


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"query_pre_attn_scalar": 64}, "query_pre_attn_scalar 64"),
        ({"sliding_window_pattern": 2}, "sliding_window_pattern 2"),
        ({"rope_local_base_freq": 5000.0}, "rope_local_base_freq 5000.0"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "RoPE scaling 'yarn'"),
    ],
)
def test_what_llama_cpp_has_no_key_for_is_one_line(
    tmp_path: Path, changes: dict[str, Any], says: str
) -> None:
    source = family_model(tmp_path / "hf", "gemma3", **changes)
    with pytest.raises(SlimError, match=says):
        export_gguf(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
