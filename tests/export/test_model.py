"""What leaves for other toolkits reads back as it was, and bad input leaves nothing behind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from gguf import GGUFReader, dequantize
from mlx.utils import tree_flatten

from mlx_slim.adapters import peft_rules
from mlx_slim.adapters.store import load_adapter
from mlx_slim.artifacts import load_tensors, save_tensors
from mlx_slim.cli.main import run
from mlx_slim.errors import SlimError
from mlx_slim.export.card import Card
from mlx_slim.export.model import export_gguf, export_hf
from mlx_slim.export.peft import export_peft, import_peft
from mlx_slim.models.convert import convert
from mlx_slim.models.gguf.load import import_gguf
from mlx_slim.models.load import load
from tests.adapters.support import IDS
from tests.support.adapters import tuned_logits, write_adapter, write_quantized
from tests.support.tiny import tiny_model

CASES = [
    ("llama", {"scaling": "rslora", "alpha": 8}, False),
    ("phi", {}, True),
    ("llama", {"targets": ["all-linear", "embed_tokens", "lm_head"]}, False),
    ("mistral", {"init": "pissa"}, False),
    ("qwen2", {"targets": ["q_proj"], "layers": [0, 2]}, True),
]


@pytest.mark.parametrize(("architecture", "settings", "dora"), CASES)
def test_peft_and_back_is_the_same_adapter(
    tiny: Callable[..., Path], tmp_path: Path, architecture: Any, settings: Any, dora: Any
) -> None:
    base = tiny(architecture)
    adapter = write_adapter(tmp_path / "a", base, dora=dora, **settings)
    export_peft(adapter, tmp_path / "peft")
    config_on_disk = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert config_on_disk["use_dora"] is dora
    assert config_on_disk["use_rslora"] is (settings.get("scaling") == "rslora")
    assert config_on_disk["base_model_name_or_path"] == str(base)
    import_peft(tmp_path / "peft", tmp_path / "back")
    assert mx.allclose(tuned_logits(base, tmp_path / "back"), tuned_logits(base, adapter))
    ours = load_tensors(adapter / "adapters.safetensors")
    again = load_tensors(tmp_path / "back" / "adapters.safetensors")
    assert ours.keys() == again.keys()
    assert all(mx.array_equal(ours[name], again[name]).item() for name in ours)
    card = (tmp_path / "peft" / "README.md").read_text()
    assert "PeftModel.from_pretrained" in card and str(tmp_path) not in card


def test_one_name_for_one_layer_and_full_paths_for_a_choice(
    tiny: Callable[..., Path], tmp_path: Path
) -> None:
    write_adapter(tmp_path / "a", tiny("llama"), targets=["q_proj"])
    write_adapter(tmp_path / "b", tiny("llama"), targets=["q_proj"], layers=[1])
    targets = []
    for name in "ab":
        export_peft(tmp_path / name, tmp_path / f"peft-{name}")
        targets.append(peft_rules.read_settings(tmp_path / f"peft-{name}")["target_modules"])
    assert targets == [["q_proj"], ["model.layers.1.self_attn.q_proj"]]


def test_ranks_and_alphas_of_single_layers_become_one(
    tiny: Callable[..., Path], tmp_path: Path
) -> None:
    export_peft(
        write_adapter(tmp_path / "a", tiny("llama"), targets=["q_proj", "v_proj"]), tmp_path / "p"
    )
    expected = tuned_logits(tiny("llama"), tmp_path / "a")
    tensors = load_tensors(tmp_path / "p" / peft_rules.WEIGHTS)
    for name, value in tensors.items():
        # v_proj: rank 6 with two empty columns, alpha 48 instead of 16 and B a third of it
        if "v_proj.lora_A" in name:
            tensors[name] = mx.pad(value, [(0, 2), (0, 0)])
        elif "v_proj.lora_B" in name:
            tensors[name] = mx.pad(value, [(0, 0), (0, 2)]) * (16 / 4) / (48 / 6)
    mx.eval(tensors)
    save_tensors(tmp_path / "p" / peft_rules.WEIGHTS, tensors)
    settings = peft_rules.read_settings(tmp_path / "p")
    settings |= {"rank_pattern": {"v_proj": 6}, "alpha_pattern": {"v_proj": 48}}
    (tmp_path / "p" / peft_rules.CONFIG).write_text(json.dumps(settings))
    done = import_peft(tmp_path / "p", tmp_path / "back")
    assert mx.allclose(tuned_logits(tiny("llama"), tmp_path / "back"), expected, atol=1e-5)
    assert sum("note" in line for line in done.lines()) == 2


def test_an_adapted_tied_head_is_refused(tiny: Callable[..., Path], tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "a", tiny("llama-tied"), targets=["embed_tokens"])
    with pytest.raises(SlimError, match="tied to the output head") as caught:
        export_peft(adapter, tmp_path / "out")
    assert "mlx-slim fuse" in caught.value.hint
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is ['lm_head']"),
        ({"r": 0}, "r is 0"),
        ({"lora_alpha": "x"}, "lora_alpha is 'x'"),
    ],
)
def test_what_peft_can_and_we_cannot_is_refused(
    tiny: Callable[..., Path], tmp_path: Path, change: Any, says: str
) -> None:
    export_peft(write_adapter(tmp_path / "a", tiny("llama")), tmp_path / "p")
    settings = peft_rules.read_settings(tmp_path / "p")
    (tmp_path / "p" / peft_rules.CONFIG).write_text(json.dumps({**settings, **change}))
    with pytest.raises(SlimError) as caught:
        import_peft(tmp_path / "p", tmp_path / "out")
    assert says in caught.value.message and not (tmp_path / "out").exists()


def test_an_adapter_of_another_base_lists_names_and_shapes(
    tiny: Callable[..., Path], tmp_path: Path
) -> None:
    wide = tiny_model(tmp_path / "wide", intermediate_size=96)
    export_peft(write_adapter(tmp_path / "a", wide), tmp_path / "p")
    with pytest.raises(SlimError, match="does not fit this model") as caught:
        import_peft(tmp_path / "p", tmp_path / "out", base=str(tiny("llama")))
    assert "mlp.down_proj: A is (4, 96), expected (4, 128)" in caught.value.message
    assert str(wide) in caught.value.hint
    tensors = load_tensors(tmp_path / "p" / peft_rules.WEIGHTS)
    mx.eval(tensors)
    tensors.pop("base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight")
    save_tensors(tmp_path / "p" / peft_rules.WEIGHTS, tensors)
    with pytest.raises(SlimError, match=r"q_proj has \['a'\] of its factors"):
        import_peft(tmp_path / "p", tmp_path / "out")
    tensors["base_model.model.odd.lora_C.weight"] = mx.zeros((2, 2))
    save_tensors(tmp_path / "p" / peft_rules.WEIGHTS, tensors)
    with pytest.raises(SlimError, match="do not belong to a LoRA"):
        import_peft(tmp_path / "p", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_copy_of_a_base_layer_must_be_the_base_s(
    tiny: Callable[..., Path], tmp_path: Path
) -> None:
    export_peft(write_adapter(tmp_path / "a", tiny("llama"), targets=["lm_head"]), tmp_path / "p")
    model: Any = load(tiny("llama")).model
    weight = model.lm_head.weight
    tensors = load_tensors(tmp_path / "p" / peft_rules.WEIGHTS)
    mx.eval(tensors)
    tensors["base_model.model.lm_head.base_layer.weight"] = weight.astype(mx.bfloat16)
    save_tensors(tmp_path / "p" / peft_rules.WEIGHTS, tensors)
    import_peft(tmp_path / "p", tmp_path / "back")
    expected = tuned_logits(tiny("llama"), tmp_path / "a")
    assert mx.allclose(tuned_logits(tiny("llama"), tmp_path / "back"), expected)
    tensors["base_model.model.lm_head.base_layer.weight"] = weight * 1.1
    save_tensors(tmp_path / "p" / peft_rules.WEIGHTS, tensors)
    with pytest.raises(SlimError, match="contains lm_head"):
        import_peft(tmp_path / "p", tmp_path / "other")


def test_a_base_that_moved_is_one_line(
    tiny: Callable[..., Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    base = Path(shutil.copytree(tiny("llama"), tmp_path / "base"))
    adapter = write_adapter(tmp_path / "a", base)
    export_peft(adapter, tmp_path / "p")
    base.rename(tmp_path / "moved")
    for words in (["export", adapter, "--to", "peft"], ["import", tmp_path / "p"]):
        assert run([*map(str, words), "-o", str(tmp_path / "out")]) == 2
        error = capfd.readouterr().err
        assert "cannot be loaded" in error and "--model" in error and error.count("error:") == 1
        assert not (tmp_path / "out").exists()
    moved = str(tmp_path / "moved")
    words = ["export", str(adapter), "--to", "peft", "-o", str(tmp_path / "out"), "--model", moved]
    assert run([*words, "--base-name", "me/base"]) == 0
    config_on_disk = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config_on_disk["base_model_name_or_path"] == "me/base"
    assert 'base_model: "me/base"' in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("architecture", ["llama", "phi", "llama-tied"])
@pytest.mark.parametrize("bits", [None, 4])
def test_hf_folders_are_dense_and_say_rope_both_ways(
    tiny: Callable[..., Path], tmp_path: Path, architecture: str, bits: int | None
) -> None:
    source = tiny(architecture)
    source = write_quantized(tmp_path / "q", source, bits) if bits else source
    export_hf(source, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization" not in config and "quantization_config" not in config
    assert config["architectures"][0].endswith("ForCausalLM")
    assert config["rope_parameters"]["rope_theta"] == config["rope_theta"] == 10000.0
    expected, logits = load(source).model(IDS), load(tmp_path / "out").model(IDS)
    assert mx.allclose(logits, expected, rtol=1e-4, atol=1e-5)
    assert "from_pretrained" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("architecture", ["llama", "llama-tied", "mistral", "qwen2"])
@pytest.mark.parametrize("kind", ["f32", "f16", "q8_0", "q4_0", "q4_1"])
def test_gguf_reads_back_here_and_with_the_reader_of_gguf(
    tiny: Callable[..., Path], tmp_path: Path, architecture: str, kind: str
) -> None:
    source = load(tiny(architecture))
    done = export_gguf(tiny(architecture), tmp_path / "out", kind=kind)
    file = tmp_path / "out" / f"{tiny(architecture).name}-{kind}.gguf"
    report = convert(file, tmp_path / "mlx")
    assert report.exact
    again = load(tmp_path / "mlx")
    expected = source.model(IDS)
    limit = {"f32": 1e-5, "f16": 0.002, "q8_0": 0.03}.get(kind, 0.6)
    assert mx.abs(again.model(IDS) - expected).max() < limit * mx.abs(expected).max()
    assert again.config["rope_theta"] == source.config["rope_theta"]
    assert again.tokenizer.chat_template == source.tokenizer.chat_template
    text = "<|im_start|>user\nHé 12's\n\n2"
    assert again.tokenizer.encode(text) == source.tokenizer.encode(text)
    reader = {tensor.name: tensor for tensor in GGUFReader(file).tensors}
    down = reader["blk.1.ffn_down.weight"]
    assert down.tensor_type.name == kind.upper()
    model: Any = source.model
    weight = np.array(model.layers[1].mlp.down_proj.weight)
    value = dequantize(down.data, down.tensor_type)
    error = np.linalg.norm(value - weight) / np.linalg.norm(weight)
    assert error < {"f32": 1e-7, "f16": 0.001, "q8_0": 0.01}.get(kind, 0.12)
    assert (tmp_path / "out" / "Modelfile").read_text() == f"FROM ./{file.name}\n"
    assert f"llama-cli -m {file} -p 'Hello'" in done.commands[0]
    assert "ollama create" in done.commands[1]


@pytest.mark.parametrize("kind", ["q4_0", "q4_1", "q8_0"])
def test_blocks_go_there_and_back_bit_for_bit(
    tiny: Callable[..., Path], tmp_path: Path, kind: str
) -> None:
    export_gguf(tiny("llama"), tmp_path / "first", kind=kind)
    first = tmp_path / "first" / f"llama-{kind}.gguf"
    convert(first, tmp_path / "mlx")
    export_gguf(tmp_path / "mlx", tmp_path / "second", kind=kind)
    one, other = (
        {tensor.name: tensor.data for tensor in GGUFReader(file).tensors}
        for file in (first, tmp_path / "second" / f"mlx-{kind}.gguf")
    )
    assert one.keys() == other.keys()
    assert all(np.array_equal(one[name], other[name]) for name in one)


def test_gguf_of_a_quantized_model_and_of_scaled_rope(
    tiny: Callable[..., Path], tmp_path: Path
) -> None:
    source = write_quantized(tmp_path / "q", tiny("llama"), 8)
    export_gguf(source, tmp_path / "out", kind="f16")
    again = import_gguf(tmp_path / "out" / "q-f16.gguf").model
    expected = load(source).model(IDS)
    assert mx.abs(again(IDS) - expected).max() < 0.003 * mx.abs(expected).max()
    scaling = {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip
    for name, rope in (("l3", scaling), ("linear", {"rope_type": "linear", "factor": 4.0})):
        scaled = tiny_model(tmp_path / name, rope_scaling=rope, head_dim=16)
        export_gguf(scaled, tmp_path / f"{name}-out")
        imported = import_gguf(tmp_path / f"{name}-out" / f"{name}-f16.gguf")
        assert imported.config["rope_scaling"]["factor"] == rope["factor"]
        expected = load(scaled).model(IDS)
        assert mx.abs(imported.model(IDS) - expected).max() < 0.003 * mx.abs(expected).max()


def test_a_wrong_row_order_is_refused_before_the_folder_appears(
    tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlx_slim.models.gguf import write as gguf_write

    honest = gguf_write._array

    def swapped(model: Any, full: Any, *rest: Any):
        array = honest(model, full, *rest)
        return array[::-1].copy() if full.endswith("1.self_attn.k_proj.weight") else array

    monkeypatch.setattr(gguf_write, "_array", swapped)
    with pytest.raises(SlimError, match=r"1.self_attn.k_proj.weight reads back"):
        export_gguf(tiny("llama"), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("target", ["peft", "hf", "gguf"])
def test_an_interrupted_export_leaves_nothing(
    tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str
) -> None:
    adapter = write_adapter(tmp_path / "a", tiny("llama"))

    def stop(*_args: Any, **_kwargs: Any):
        raise KeyboardInterrupt

    monkeypatch.setattr(Card, "write", stop)
    source = adapter if target == "peft" else tiny("llama")
    assert run(["export", str(source), "--to", target, "-o", str(tmp_path / "deep" / "out")]) == 130
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["{phi}", "--to", "gguf"], "phi models cannot be exported to GGUF"),
        (["{llama}", "--to", "gguf", "--type", "q3_k"], "unknown GGUF type 'q3_k'"),
        (["{llama}", "--to", "hf", "--type", "q8_0"], "--type is not used with --to hf"),
        (["{adapter}", "--to", "hf"], "is an adapter, not a model"),
        (["{adapter}", "--to", "gguf"], "is an adapter, not a model"),
        (["{llama}", "--to", "peft"], "is not an adapter folder"),
        (["{nowhere}", "--to", "hf"], "does not exist"),
    ],
)
def test_what_cannot_be_exported_is_one_line(
    tiny: Callable[..., Path],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    words: Any,
    says: str,
) -> None:
    places = {
        "llama": tiny("llama"),
        "phi": tiny("phi"),
        "adapter": write_adapter(tmp_path / "a", tiny("llama")),
        "nowhere": tmp_path / "nowhere",
    }
    words = [word.format(**places) for word in words]
    assert run(["export", *words, "-o", str(tmp_path / "out")]) == 2
    error = capfd.readouterr().err
    assert error.count("error: ") == 1 and says in error
    assert not (tmp_path / "out").exists()


def test_an_output_named_like_a_file_is_refused(tiny: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(SlimError, match="the output is a folder") as caught:
        export_gguf(tiny("llama"), tmp_path / "model.gguf")
    assert caught.value.hint == f"use -o {tmp_path / 'model'}"


def test_an_adapter_of_peft_is_sent_to_import(tiny: Callable[..., Path], tmp_path: Path) -> None:
    export_peft(write_adapter(tmp_path / "a", tiny("llama")), tmp_path / "p")
    with pytest.raises(SlimError, match="is an adapter of PEFT") as caught:
        load_adapter(load(tiny("llama")).model, tmp_path / "p")
    assert f"mlx-slim import {tmp_path / 'p'}" in caught.value.hint


def test_an_architecture_with_other_names_is_refused(
    tiny: Callable[..., Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny("llama"), tmp_path / "m"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "mixtral"}))
    with pytest.raises(SlimError, match="cannot be exported to the Hugging Face format"):
        export_hf(folder, tmp_path / "out")
    with pytest.raises(SlimError, match="mixtral models cannot be exported to GGUF"):
        export_gguf(folder, tmp_path / "out")


def test_a_tokenizer_that_does_not_read_back_is_refused(
    tiny: Callable[..., Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny("llama"), tmp_path / "m"))
    content = json.loads((folder / "tokenizer.json").read_text())
    content["normalizer"] = {"type": "Lowercase"}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(SlimError, match="tokenizer cannot be stored in GGUF"):
        export_gguf(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_every_parameter_is_written(tiny: Callable[..., Path], tmp_path: Path) -> None:
    export_gguf(tiny("llama"), tmp_path / "out", kind="f16")
    names = {name for name, _ in tree_flatten(load(tiny("llama")).model.parameters())}
    again = import_gguf(tmp_path / "out" / "llama-f16.gguf").model
    assert {name for name, _ in tree_flatten(again.parameters())} == names
