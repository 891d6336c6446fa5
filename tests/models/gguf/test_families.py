"""Files of every architecture as llama.cpp's converter names them: mlx-lm's logits come back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from gguf import GGUFReader, GGUFWriter
from mlx.utils import tree_flatten

from mlx_slim.errors import SlimError
from mlx_slim.models.convert import convert
from mlx_slim.models.gguf.load import import_gguf
from mlx_slim.models.load import load
from mlx_slim.models.row_limits import row_limit
from tests.support.gguf_files import FAMILIES, family_model, write_family
from tests.support.stock import stock_load

IDS = mx.array([[5, 9, 200, 31, 77, 3, 250, 12, 1, 40]])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_comes_back_as_the_model_it_was(tmp_path: Path, family: str) -> None:
    source = family_model(tmp_path / "hf", family)
    write_family(tmp_path / "m.gguf", source, family)
    report = convert(tmp_path / "m.gguf", tmp_path / "out")
    assert report.exact
    expected = load(source)
    again = load(tmp_path / "out")
    scale = mx.abs(expected.model(IDS)).max()
    assert mx.abs(again.model(IDS) - expected.model(IDS)).max() < 1e-5 * scale
    stock, _ = stock_load(str(tmp_path / "out"))
    if family != "phi3-long":  # stock mlx-lm computes its RoPE otherwise; the note of load says so
        assert mx.abs(stock(IDS) - expected.model(IDS)).max() < 1e-4 * scale
    one, other = (row_limit(config) for config in (expected.config, again.config))
    assert (one and one.tokens) == (other and other.tokens)


@pytest.mark.parametrize("family", ["qwen3moe", "mixtral", "gemma3"])
def test_blocks_of_experts_and_of_gemma_stay_code_for_code(tmp_path: Path, family: str) -> None:
    source = family_model(tmp_path / "hf", family)
    write_family(tmp_path / "m.gguf", source, family, "Q4_0")
    convert(tmp_path / "m.gguf", tmp_path / "out")
    model = load(tmp_path / "out").model
    modules: dict[str, Any] = dict(model.named_modules())
    rounded = 0
    parameters: Any = tree_flatten(load(source).model.parameters())
    for path, expected in parameters:
        layer = modules[path.rsplit(".", 1)[0]]
        if "scales" not in layer:
            assert mx.allclose(layer[path.rsplit(".", 1)[1]], expected, atol=1e-6)
            continue
        rounded += 1
        weight = mx.dequantize(
            layer.weight, layer.scales, layer.biases, group_size=32, bits=4, dtype=mx.float32
        )
        blocks = np.array(expected).reshape(-1, 32)
        step = np.abs(blocks).max(axis=1, keepdims=True) / 8  # Q4_0: d = max / -8
        error = np.abs(np.array(weight).reshape(-1, 32) - blocks)
        assert (error <= 1.01 * step).all(), path  # the largest of the other sign is cut to 7 steps
    assert rounded > 10


def changed(path: Path, meta: dict[str, Any]) -> str:
    """What importing the file at ``path`` with other metadata fails with."""
    reader = GGUFReader(path)
    name = str(reader.fields["general.architecture"].contents())
    writer = GGUFWriter(path.with_name("changed.gguf"), name)
    for key, one in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture" and key not in meta:
            kind = one.types[0]
            sub = one.types[-1] if len(one.types) > 1 else None
            writer.add_key_value(key, one.contents(), kind, sub)
    for key, value in meta.items():
        if isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif value is not None:
            writer.add_string(key, value)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, np.array(tensor.data))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(SlimError) as caught:
        import_gguf(path.with_name("changed.gguf"))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("family", "meta", "says"),
    [
        ("gemma3", {"gemma3.final_logit_softcapping": 30.0}, "caps its logits"),
        ("gemma2", {"gemma2.rope.scaling.type": "linear"}, "gemma2 class does not support"),
        ("qwen3moe", {"qwen3moe.expert_used_count": None}, "qwen3moe.expert_used_count"),
        ("qwen3", {"qwen3.expert_count": 4}, "mixture of experts"),
        ("phi3-long", {"phi3.rope.scaling.original_context_length": None}, "RoPE factors"),
        ("phi3", {"phi3.attention.key_length": 32}, "phi3 needs 16"),
    ],
)
def test_what_a_class_cannot_do_is_one_line(
    tmp_path: Path, family: str, meta: dict[str, Any], says: str
) -> None:
    source = family_model(tmp_path / "hf", family)
    write_family(tmp_path / "m.gguf", source, family)
    assert says in changed(tmp_path / "m.gguf", meta)


def test_the_softmax_of_the_largest_gemmas_is_theirs() -> None:
    from mlx_slim.models.gguf.settings import softmax_width

    shape = {"hidden_size": 4608, "num_attention_heads": 32, "head_dim": 128}
    assert softmax_width({"model_type": "gemma2", "num_hidden_layers": 46, **shape}) == 144
    assert softmax_width({"model_type": "gemma2", "num_hidden_layers": 42, **shape}) == 128
    shape = {"hidden_size": 5376, "num_attention_heads": 32, "head_dim": 128}
    assert softmax_width({"model_type": "gemma3_text", "num_hidden_layers": 62, **shape}) == 168
