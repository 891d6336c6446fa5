"""GGUF files written here with the ``gguf`` package: they must come back as the model they were."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner
from gguf import GGMLQuantizationType, GGUFWriter, quantize
from mlx.utils import tree_flatten

from mlx_slim.cli.convert import command
from mlx_slim.errors import SlimError
from mlx_slim.models.convert import convert
from mlx_slim.models.gguf.file import read_gguf
from mlx_slim.models.gguf.load import import_gguf
from mlx_slim.models.gguf.tokenizer import build_tokenizer
from mlx_slim.models.load import load
from mlx_slim.models.save import quantization_of
from tests.support.stock import stock_load

IDS = mx.array([[5, 9, 200, 31, 77, 3, 250, 12]])
HEADS = {"llama": (4, 2), "llama-tied": (4, 2), "qwen2": (4, 2), "phi": (4, 4)}
BACK = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "model.final_layernorm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.dense": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.fc1": "ffn_up",
    "mlp.fc2": "ffn_down",
}


def interleave(rows: np.ndarray, heads: int) -> np.ndarray:
    """The row order of llama's q and k in GGUF."""
    halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def write_gguf(
    path: Path, source: Path, architecture: str, kinds: dict[str, str] | None = None, **meta: Any
) -> dict[str, np.ndarray]:
    """Write the tiny model of ``source``; return the weights as the file rounds them, HF names.

    ``kinds`` maps the last part of a module name, or ``*``, to a block format.
    """
    loaded = load(source)
    config = loaded.config
    name = {"llama-tied": "llama", "phi": "phi2"}.get(architecture, architecture)
    writer = GGUFWriter(path, name)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_eps(1e-5) if name == "phi2" else writer.add_layer_norm_rms_eps(1e-5)
    if name == "phi2":
        writer.add_rope_dimension_count(8)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(meta.pop("pre", "gpt-2"))
    vocab = loaded.tokenizer.get_vocab()
    tokens = sorted(vocab, key=lambda token: vocab[token])
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token.startswith("<|") else 1 for token in tokens])
    writer.add_token_merges(["Ġ Ġ"] if "Ġ" in vocab and "ĠĠ" in vocab else [])
    writer.add_bos_token_id(vocab["<|im_start|>"])
    writer.add_eos_token_id(vocab["<|im_end|>"])
    writer.add_chat_template(loaded.tokenizer.chat_template)
    for key, value in meta.items():
        name = key.replace("__", ".")
        if isinstance(value, str):
            writer.add_string(name, value)
        else:
            writer.add_uint32(name, value)
    kinds = kinds or {}
    rounded = {}
    heads, kv_heads = HEADS[architecture]
    fused: dict[str, dict[str, np.ndarray]] = {}
    for full, value in tree_flatten(loaded.model.parameters()):
        array = np.array(value, np.float32)
        module, leaf = full.rsplit(".", 1)
        kind = GGMLQuantizationType[
            kinds.get(module.rsplit(".", 1)[-1], kinds.get("*", "F32"))
            if array.ndim == 2
            else "F32"
        ]
        if kind == GGMLQuantizationType.F16:
            array = array.astype(np.float16)
        elif kind != GGMLQuantizationType.F32:
            from gguf import dequantize

            array = dequantize(quantize(array, kind), kind)
        rounded[full] = array.astype(np.float32)
        block, _, short = module.removeprefix("model.layers.").partition(".")
        is_block = module.startswith("model.layers.")
        prefix, short = (f"blk.{block}.", short) if is_block else ("", module)
        if name == "phi2" and short.endswith(("q_proj", "k_proj", "v_proj")):
            fused.setdefault(f"{prefix}attn_qkv.{leaf}", {})[short[-6]] = array
            continue
        if name == "llama" and short.endswith(("q_proj", "k_proj")):
            array = interleave(array, heads if short.endswith("q_proj") else kv_heads)
        _add(writer, f"{prefix}{BACK[short]}.{leaf}", array, kind)
    for target, shards in fused.items():
        joined = np.concatenate([shards["q"], shards["k"], shards["v"]])
        _add(writer, target, joined, GGMLQuantizationType.F32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return rounded


def _add(writer: GGUFWriter, name: str, array: np.ndarray, kind: GGMLQuantizationType) -> None:
    if kind in (GGMLQuantizationType.F32, GGMLQuantizationType.F16):
        writer.add_tensor(name, array)
    else:
        writer.add_tensor(name, quantize(array.astype(np.float32), kind), raw_dtype=kind)


@pytest.mark.parametrize("architecture", ["llama", "llama-tied", "qwen2", "phi"])
def test_float_files_give_the_same_logits(
    tiny: Callable[..., Path], tmp_path: Path, architecture: str
) -> None:
    pre = "qwen2" if architecture == "qwen2" else "gpt-2"
    write_gguf(tmp_path / "m.gguf", tiny(architecture), architecture, pre=pre)
    report = convert(tmp_path / "m.gguf", tmp_path / "out")
    assert report.exact
    expected = load(tiny(architecture))
    model, tokenizer = stock_load(str(tmp_path / "out"))
    # On a CPU ours goes through another, equal form of SwiGLU.
    assert mx.allclose(model(IDS), expected.model(IDS), rtol=1e-4, atol=1e-5)
    text = "Hé <|im_start|>x 12"
    assert tokenizer.encode(text) == expected.tokenizer.encode(text)
    assert tokenizer.eos_token_ids == expected.tokenizer.eos_token_ids
    messages = [{"role": "user", "content": "hi"}]
    again = expected.tokenizer.apply_chat_template(messages)
    assert tokenizer.apply_chat_template(messages) == again


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0", "F16"])
def test_blocks_stay_code_for_code(tiny: Callable[..., Path], tmp_path: Path, kind: str) -> None:
    path = tmp_path / "m.gguf"
    rounded = write_gguf(path, tiny("llama"), "llama", {"*": kind})
    loaded: Any = mx.load(str(path), return_metadata=True)
    stored: dict[str, mx.array] = loaded[0]
    file = read_gguf(path)
    for name in file.tensors:
        for part, value in file.read(name).items():
            theirs = stored[name if part == "weight" else name.replace("weight", part)]
            assert value.dtype == theirs.dtype
            assert mx.array_equal(value, theirs)
    model = import_gguf(path).model
    for layer in ("model.layers.1.self_attn.q_proj", "model.layers.2.mlp.down_proj"):
        module = dict(model.named_modules())[layer]
        dense = module.weight
        if kind != "F16":
            dense = mx.dequantize(
                module.weight, module.scales.astype(mx.float32), module.biases.astype(mx.float32),
                group_size=32, bits=module.bits,
            )  # fmt: skip
        assert np.allclose(
            np.array(dense.astype(mx.float32)), rounded[f"{layer}.weight"], atol=1e-6
        )


def test_mixed_formats_are_written_per_layer(tiny: Callable[..., Path], tmp_path: Path) -> None:
    kinds = {"*": "Q4_0", "embed_tokens": "Q8_0", "lm_head": "F16", "down_proj": "Q8_0"}
    write_gguf(tmp_path / "m.gguf", tiny("llama"), "llama", kinds)
    report = convert(tmp_path / "m.gguf", tmp_path / "out")
    assert report.exact
    read: list[Any] = [stock_load(str(tmp_path / "out"))[0], load(tmp_path / "out").model]
    for model in read:
        quantization = quantization_of(model)
        assert quantization is not None
        assert (quantization["bits"], quantization["group_size"]) == (4, 32)
        assert quantization["model.embed_tokens"]["bits"] == 8
        assert quantization["model.layers.0.mlp.down_proj"]["bits"] == 8
        assert "scales" not in model.lm_head


def test_other_blocks_are_dequantized_and_said(tiny: Callable[..., Path], tmp_path: Path) -> None:
    rounded = write_gguf(tmp_path / "m.gguf", tiny("llama"), "llama", {"down_proj": "Q5_1"})
    imported = import_gguf(tmp_path / "m.gguf")
    assert "Q5_1 tensors dequantized to float16" in imported.notes
    model: Any = imported.model
    weight = np.array(model.layers[0].mlp.down_proj.weight)
    assert weight.dtype == np.float16
    assert np.allclose(weight, rounded["model.layers.0.mlp.down_proj.weight"], atol=1e-3)


def test_dequantize_writes_dense_weights(tiny: Callable[..., Path], tmp_path: Path) -> None:
    rounded = write_gguf(tmp_path / "m.gguf", tiny("llama"), "llama", {"*": "Q4_1"})
    report = convert(tmp_path / "m.gguf", tmp_path / "out", dequantize=True, dtype=mx.float32)
    assert report.dtype == "float32"
    model = load(tmp_path / "out").model
    assert quantization_of(model) is None
    for name, value in tree_flatten(model.parameters()):
        assert np.allclose(np.array(value), rounded[name], atol=1e-6), name


def test_converted_tiny_model_keeps_codes_under_a_dtype(
    tiny: Callable[..., Path], tmp_path: Path
) -> None:
    write_gguf(tmp_path / "m.gguf", tiny("llama"), "llama", {"*": "Q4_0"})
    report = convert(tmp_path / "m.gguf", tmp_path / "out", dtype=mx.float32)
    model: Any = load(tmp_path / "out").model
    layer = model.layers[0].self_attn.q_proj
    assert (report.dtype, layer.weight.dtype, layer.scales.dtype) == (
        "float32",
        mx.uint32,
        mx.float32,
    )


# what is refused


def one_line(path: Path) -> str:
    """What importing ``path`` fails with."""
    with pytest.raises(SlimError) as caught:
        import_gguf(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_foreign_and_truncated_files(tiny: Callable[..., Path], tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    assert "does not exist" in one_line(path)
    path.write_bytes(b"PK\x03\x04 not this" * 9)
    assert "not a GGUF file" in one_line(path)
    path.write_bytes(b"GGUF" + (9).to_bytes(4, "little") + bytes(64))
    assert "version 9" in one_line(path)
    write_gguf(path, tiny("llama"), "llama")
    whole = path.read_bytes()
    for size in (30, 200, 2000, len(whole) // 2, len(whole) - 4096):
        path.write_bytes(whole[:size])
        assert "truncated" in one_line(path)


def test_unknown_architecture_and_pre_tokenizer(tiny: Callable[..., Path], tmp_path: Path) -> None:
    writer = GGUFWriter(tmp_path / "a.gguf", "lama")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    text = one_line(tmp_path / "a.gguf")
    assert "architecture 'lama'" in text and "did you mean 'llama'?" in text
    write_gguf(tmp_path / "b.gguf", tiny("llama"), "llama", pre="qwen3-odd")
    assert "pre-tokenizer 'qwen3-odd'" in one_line(tmp_path / "b.gguf")


@pytest.mark.parametrize(
    ("meta", "word"),
    [
        ({"llama__expert_count": 8, "llama__expert_used_count": 2}, "mixtral model has no place"),
        ({"split__count": 3}, "one of 3 shards"),
        ({"llama__rope__scaling__type": "longrope"}, "'longrope'"),
        ({"llama__rope__dimension_count": 8}, "rotates 8 of 16"),
    ],
)
def test_what_the_class_cannot_do_is_refused(
    tiny: Callable[..., Path], tmp_path: Path, meta: dict[str, Any], word: str
) -> None:
    write_gguf(tmp_path / "m.gguf", tiny("llama"), "llama", **meta)
    assert word in one_line(tmp_path / "m.gguf")


# the tokenizers


def test_sentencepiece_tokens_follow_the_scores() -> None:
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁a", "ab", "▁ab", "▁", "a", "b", "c"]
    scores = [0.0] * 259 + [-1.0, -0.5, -2.0, -9.0, -9.0, -9.0, -9.0]
    metadata = {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": pieces,
        "tokenizer.ggml.scores": np.array(scores, np.float32),
        "tokenizer.ggml.token_type": np.array([2, 3, 3] + [6] * 256 + [1] * 7),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }
    tokenizer = build_tokenizer(metadata, [])
    # "ab" scores best, so ▁ab is made of ▁ and ab; é has no piece and becomes two bytes.
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("ab cé")) == [
        "<s>", "▁ab", "▁", "c", "<0xC3>", "<0xA9>",
    ]  # fmt: skip
    assert tokenizer.decode(tokenizer.encode("ab cé"), skip_special_tokens=True) == "ab cé"


def test_unknown_tokenizer_type() -> None:
    with pytest.raises(SlimError, match="type 'bert'"):
        build_tokenizer({"tokenizer.ggml.model": "bert", "tokenizer.ggml.tokens": ["a"]}, [])


# the command


def test_command_prints_a_summary_and_refuses_existing_output(
    tiny: Callable[..., Path], tmp_path: Path
) -> None:
    out = str(tmp_path / "out")
    done = CliRunner().invoke(command, [str(tiny("llama")), "-o", out, "--dtype", "float32"])
    assert done.exit_code == 0, done.output
    assert "32.00 bits per weight, float32" in done.output
    assert "bit for bit" in done.output
    again = CliRunner().invoke(command, [str(tiny("llama")), "-o", out])
    assert isinstance(again.exception, SlimError)
    assert "exists already" in again.exception.message


def test_a_wrong_output_is_not_kept(
    tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlx_slim.models import convert as module

    def spoiled(folder: Any, model: Any, *args: Any, **kwargs: Any) -> None:
        model.model.norm.weight = model.model.norm.weight * 3
        save(folder, model, *args, **kwargs)

    save = module.save_model
    monkeypatch.setattr(module, "save_model", spoiled)
    with pytest.raises(SlimError, match="differs from"):
        convert(tiny("llama"), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_rounding_to_bfloat16_passes_the_check(tiny: Callable[..., Path], tmp_path: Path) -> None:
    report = convert(tiny("llama"), tmp_path / "out", dtype=mx.bfloat16)
    assert report.dtype == "bfloat16"
    assert not report.exact
    assert 0 < report.kl < 0.1
