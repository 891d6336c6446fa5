"""Loading: the config traps are mended, and everything that is off is one clear line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest

from mlx_slim.artifacts import load_tensors
from mlx_slim.errors import SlimError
from mlx_slim.models.load import load, read_config, resolve
from mlx_slim.models.normalize import normalize_config
from mlx_slim.models.tensors import folder_tensors
from tests.support.tiny import CHATML, VOCAB, tiny_model

IDS = mx.array([[5, 9, 200, 31, 77]])


@pytest.fixture
def broken(tiny: Callable[..., Path], tmp_path: Path) -> Any:
    """A copy of a tiny llama to break."""
    return Path(shutil.copytree(tiny("llama"), tmp_path / "model"))


def edit(folder: Path, *remove: str, **changes: Any) -> Path:
    config = json.loads((folder / "config.json").read_text())
    for key in remove:
        del config[key]
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return folder


def refused(source: Any) -> str:
    """The one line that loading ``source`` fails with."""
    with pytest.raises(SlimError) as caught:
        load(source)
    text = str(caught.value)
    assert "\n" not in text
    return text


# the config traps


@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "phi"])
def test_rope_parameters_give_the_same_logits_as_rope_theta(
    tmp_path: Path, architecture: str
) -> None:
    old = tiny_model(tmp_path / "old", architecture, rope_theta=100000.0)
    new = Path(shutil.copytree(old, tmp_path / "new"))
    rope = {"rope_theta": 100000.0, "rope_type": "default"}
    remove = ["rope_theta", "torch_dtype"]
    if architecture == "phi":
        rope["partial_rotary_factor"] = 0.5
        remove.append("partial_rotary_factor")
    edit(new, *remove, rope_parameters=rope, dtype="float32")
    loaded = load(new)
    assert loaded.config["rope_theta"] == 100000.0
    assert loaded.config["torch_dtype"] == "float32"
    assert "rope_theta 100000 taken from rope_parameters" in loaded.notes
    assert mx.array_equal(loaded.model(IDS), load(old).model(IDS))


def test_scaled_rope_parameters_reach_the_model(tmp_path: Path) -> None:
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    old = tiny_model(tmp_path / "old", rope_theta=500000.0, rope_scaling=scaling)
    new = Path(shutil.copytree(old, tmp_path / "new"))
    edit(new, "rope_theta", "rope_scaling", rope_parameters={"rope_theta": 500000.0, **scaling})
    plain = load(tiny_model(tmp_path / "plain", rope_theta=500000.0)).model(IDS)
    assert mx.array_equal(load(new).model(IDS), load(old).model(IDS))
    assert not mx.allclose(load(new).model(IDS), plain, atol=1e-6)


def test_untied_head_without_the_key_is_used(tiny: Callable[..., Path], broken: Any) -> None:
    edit(broken, "tie_word_embeddings")
    loaded = load(broken)
    assert loaded.config["tie_word_embeddings"] is False
    assert mx.array_equal(loaded.model(IDS), load(tiny("llama")).model(IDS))


def test_tied_model_without_the_key_is_tied(tiny: Callable[..., Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny("llama-tied"), tmp_path / "m"))
    edit(folder, tie_word_embeddings=False)
    assert load(folder).config["tie_word_embeddings"] is True


def test_tied_head_that_repeats_the_embedding_stays_tied(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "m", "llama-tied", shards=1)
    file = folder / "model-00001-of-00001.safetensors"
    weights = load_tensors(file)
    mx.eval(weights)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"] + 0
    mx.save_safetensors(str(file), weights)
    assert load(folder).config["tie_word_embeddings"] is True
    weights["lm_head.weight"] = weights["lm_head.weight"] + 1
    mx.save_safetensors(str(file), weights)
    assert load(folder).config["tie_word_embeddings"] is False


@pytest.mark.parametrize(
    ("architecture", "rope", "word"),
    [
        ("llama", {"rope_theta": 1e4, "rope_type": "spiral", "factor": 2.0}, "'spiral'"),
        ("llama", {"rope_theta": 1e4, "partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        (
            "llama",
            {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}},
            "differ by layer type",
        ),
    ],
)
def test_rope_that_the_class_cannot_do_is_refused(
    tiny: Callable[..., Path], tmp_path: Path, architecture: str, rope: dict[str, Any], word: str
) -> None:
    folder = Path(shutil.copytree(tiny(architecture), tmp_path / "m"))
    text = refused(edit(folder, rope_parameters=rope))
    assert word in text and "wrong logits" in text


def test_classes_that_read_rope_parameters_keep_them() -> None:
    config = {"model_type": "qwen3", "rope_parameters": {"rope_theta": 5e6, "rope_type": "default"}}
    normalized = normalize_config(config)
    assert normalized.config["rope_parameters"] == config["rope_parameters"]


def test_sliding_layers_keep_their_own_theta() -> None:
    config = {
        "model_type": "gemma3_text",
        "rope_parameters": {
            "full_attention": {"rope_theta": 1e6, "rope_type": "linear", "factor": 8.0},
            "sliding_attention": {"rope_theta": 1e4, "rope_type": "default"},
        },
    }
    actual = normalize_config(config).config
    assert (actual["rope_theta"], actual["rope_local_base_freq"]) == (1e6, 1e4)
    assert actual["rope_scaling"]["factor"] == 8.0
    assert "rope_parameters" in config


# what loads


def test_dtype_casts_floats_and_scales_but_not_codes(
    tiny: Callable[..., Path], tmp_path: Path
) -> None:
    from mlx_slim.models.save import save_model

    ours = load(tiny("llama"))
    nn.quantize(ours.model, 32, 4)
    save_model(tmp_path / "q", ours.model, ours.tokenizer, ours.config)
    model: Any = load(tmp_path / "q", dtype=mx.bfloat16).model
    layer = model.layers[0].self_attn.q_proj
    assert layer.weight.dtype == mx.uint32
    assert layer.scales.dtype == layer.biases.dtype == mx.bfloat16
    assert model.model.norm.weight.dtype == mx.bfloat16
    assert model(IDS).dtype == mx.bfloat16


def test_chat_template_in_its_own_file_survives(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "m", chat_template=None)
    (folder / "chat_template.jinja").write_text(CHATML)
    text = load(folder).tokenizer.apply_chat_template(
        [{"role": "user", "content": "a"}], tokenize=False
    )
    assert text == "<|im_start|>user\na<|im_end|>\n"


def test_read_config_needs_no_weights(broken: Any) -> None:
    for file in broken.glob("*.safetensors"):
        file.unlink()
    edit(broken, "tie_word_embeddings")
    assert read_config(broken)["tie_word_embeddings"] is False


# what is refused


def test_unknown_model_type_suggests_a_close_one(broken: Any) -> None:
    text = refused(edit(broken, model_type="llamma"))
    assert "unknown model type 'llamma'" in text and "'llama'" in text


def test_absent_model_type(broken: Any) -> None:
    assert "no model_type" in refused(edit(broken, "model_type"))


def test_config_that_is_no_json(broken: Any) -> None:
    (broken / "config.json").write_text("{")
    text = refused(broken)
    assert "config.json" in text and "JSON" in text


def test_folder_without_config(tmp_path: Path) -> None:
    assert "has no config.json" in refused(tmp_path)


def test_config_that_lacks_a_key(broken: Any) -> None:
    text = refused(edit(broken, "hidden_size"))
    assert "does not fit" in text and "hidden_size" in text


def test_config_that_disagrees_with_the_shapes(broken: Any) -> None:
    text = refused(edit(broken, intermediate_size=96))
    assert "wrong shapes" in text and "expected [96, 64]" in text and "and 6 more" in text


def test_missing_and_extra_tensors_are_listed_together(broken: Any) -> None:
    (broken / "model.safetensors.index.json").unlink()
    file = broken / "model-00001-of-00002.safetensors"
    weights = load_tensors(file)
    mx.eval(weights)
    name = next(name for name in weights if "down_proj" in name)
    weights["model.stray.weight"] = weights.pop(name)
    mx.save_safetensors(str(file), weights)
    text = refused(broken)
    assert f"1 missing tensors ({name})" in text
    assert "1 unexpected tensors (model.stray.weight)" in text


def test_absent_shard(broken: Any) -> None:
    (broken / "model-00002-of-00002.safetensors").unlink()
    assert "lacks model-00002-of-00002.safetensors" in refused(broken)


def test_tensor_promised_by_the_index_but_in_no_file(broken: Any) -> None:
    index = json.loads((broken / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.ghost"] = "model-00001-of-00002.safetensors"
    (broken / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "lacks model.ghost" in refused(broken)


def test_tensor_in_two_files(broken: Any) -> None:
    shutil.copy(broken / "model-00001-of-00002.safetensors", broken / "model.safetensors")
    assert "both hold" in refused(broken)


@pytest.mark.parametrize("keep", [0, 5, 100, -10])
def test_truncated_safetensors(broken: Any, keep: int) -> None:
    file = broken / "model-00001-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    assert "model-00001-of-00002.safetensors is" in refused(broken)


def test_garbage_instead_of_safetensors(broken: Any) -> None:
    (broken / "model-00001-of-00002.safetensors").write_bytes(b"<html>not found</html>" * 50)
    assert "corrupt" in refused(broken)


def test_header_shapes_are_read_without_weights(tiny: Callable[..., Path]) -> None:
    tensors = folder_tensors(tiny("llama"))
    assert tensors["model.embed_tokens.weight"].shape == (VOCAB, 64)
    assert tensors["model.embed_tokens.weight"].nbytes == VOCAB * 64 * 4


def test_pickled_weights_are_refused(broken: Any) -> None:
    for file in broken.glob("model*"):
        file.unlink()
    (broken / "pytorch_model.bin").write_bytes(b"x")
    text = refused(broken)
    assert "pickle" in text and "save_pretrained" in text


def test_no_weights_at_all(broken: Any) -> None:
    for file in broken.glob("model*"):
        file.unlink()
    assert "has no model*.safetensors" in refused(broken)


def test_no_tokenizer(broken: Any) -> None:
    (broken / "tokenizer.json").unlink()
    (broken / "tokenizer_config.json").unlink()
    assert "no tokenizer files" in refused(broken)


def test_broken_tokenizer(broken: Any) -> None:
    (broken / "tokenizer.json").write_text("{")
    assert "tokenizer" in refused(broken)


def test_own_code_is_not_run_unasked(broken: Any, tmp_path: Path) -> None:
    (broken / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    text = refused(edit(broken, model_file="evil.py"))
    assert "own model code" in text and "--trust-remote-code" in text
    assert not (tmp_path / "ran").exists()


# paths and the hub


def test_folder_typo_suggests_the_neighbour(broken: Any) -> None:
    text = refused(broken.parent / "modle")
    assert "does not exist" in text and "did you mean" in text and "model?" in text
    assert "did you mean" in refused(str(broken.parent / "modle"))


def test_file_instead_of_folder(broken: Any) -> None:
    text = refused(broken / "config.json")
    assert "is a file" in text and "folder" in text
    (broken / "a.gguf").write_bytes(b"GGUF")
    assert "mlx-slim convert" in refused(broken / "a.gguf")


def test_offline_hub_id(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    text = refused("someone/no-such-model-here")
    assert "HF_HUB_OFFLINE is set" in text and "give the folder" in text


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("GatedRepoError", ["gated", "access"]),
        ("RepositoryNotFoundError", ["neither a folder nor a model on the hub"]),
        ("RevisionNotFoundError", ["at revision v9"]),
        ("LocalEntryNotFoundError", ["the hub cannot be reached", "give the folder"]),
        ("HfHubHTTPError", ["cannot be downloaded", "502"]),
    ],
)
def test_hub_failures_are_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, words: Any
) -> None:
    from huggingface_hub import errors

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    kind = getattr(errors, name)

    def fail(*args: Any, **kwargs: Any) -> None:
        if name == "LocalEntryNotFoundError":
            raise kind("ConnectError:\nname not known")
        raise kind("502 Bad Gateway\nmore", response=SimpleNamespace(headers={}, request=None))

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(SlimError) as caught:
        resolve("someone/model", "v9")
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_pickle_is_never_asked_of_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    requested = {}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda *a, **k: requested.update(k) or str(tmp_path)
    )
    assert resolve("someone/model") == tmp_path
    assert not any(p.endswith((".bin", ".pt", ".pth", ".py")) for p in requested["allow_patterns"])
