"""Adapter folders: stock mlx-lm reads ours, we read stock's, and nothing that does not fit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import linear_to_lora_layers, load_adapters

from mlx_slim import artifacts, errors
from mlx_slim.adapters.inject import inject
from mlx_slim.adapters.store import load_adapter, save_adapter
from mlx_slim.artifacts import load_tensors
from mlx_slim.config.schema import AdapterConfig
from mlx_slim.errors import ResourceError, SlimError
from mlx_slim.runtime import to_float
from tests.adapters.support import IDS, shake, stock_model
from tests.support.stock import stock_load
from tests.support.tiny import TinyModels, tiny_model

CASES = {
    "lora": ("llama", {}, False),
    "lora-phi": ("phi", {}, False),
    "lora-mistral-quantized": ("mistral", {}, False, 4),
    "lora-tied-embedding": ("llama-tied", {"targets": ["all-linear", "embed_tokens"]}, False),
    "lora-quantized-embedding-head": ("llama", {"targets": ["embed_tokens", "lm_head"]}, False, 8),
    "rslora": ("llama", {"scaling": "rslora"}, False),
    "names": ("llama", {"targets": ["q_proj", "mlp.down_proj"]}, False),
    "regex": ("phi", {"targets": "re:fc[12]$"}, False),
    "last-two": ("llama", {"layers": 2}, False),
    "first-and-head": ("llama", {"layers": [0], "targets": ["v_proj", "lm_head"]}, False),
    "middle-quantized": ("llama", {"layers": [1]}, False, 4),
    "dora": ("llama", {}, True),
    "dora-phi": ("phi", {}, True),
    "dora-phi-quantized": ("phi", {}, True, 4),
    "dora-first": ("mistral", {"layers": [0, 1], "targets": "q_proj"}, True, 8),
    "pissa": ("llama", {"init": "pissa"}, False),
    "pissa-quantized": ("phi", {"init": "pissa"}, False, 4),
    "pissa-dora": ("llama", {"init": "pissa"}, True),
}


def trained(
    folder: Path, config: AdapterConfig, dora: bool = False, bits: int | None = None
) -> Any:
    model = stock_model(folder, bits)
    injected = inject(model, config, dora=dora)
    shake(model)
    return model, injected


@pytest.mark.parametrize("case", CASES)
def test_stock_mlx_lm_and_we_read_the_same_logits(
    case: str, tiny: TinyModels, tmp_path: Path
) -> None:
    architecture, settings, dora, *bits = CASES[case]
    bits = bits[0] if bits else None
    config = AdapterConfig(rank=4, alpha=8, **settings)
    model, injected = trained(tiny(architecture), config, dora, bits)
    expected = model(IDS)
    untouched = stock_model(tiny(architecture), bits)(IDS)
    assert to_float(mx.abs(expected - untouched).max()) > 1e-3

    folder = tmp_path / "adapters"
    save_adapter(folder, model, config, injected, dora=dora, base="tiny")
    assert mx.array_equal(model(IDS), expected)

    stock = stock_model(tiny(architecture), bits)
    load_adapters(stock, str(folder))
    stock.eval()
    assert mx.allclose(stock(IDS), expected, rtol=1e-4, atol=1e-5)
    if bits is None:
        whole, _ = stock_load(str(tiny(architecture)), adapter_path=str(folder))
        assert mx.allclose(whole(IDS), expected, rtol=1e-4, atol=1e-5)

    again = stock_model(tiny(architecture), bits)
    loaded = load_adapter(again, folder)
    assert loaded.paths == injected.paths
    assert loaded.scale == injected.scale
    assert mx.allclose(again(IDS), expected, rtol=1e-5, atol=1e-6)
    if config.init == "standard":
        assert mx.array_equal(again(IDS), expected)
        assert loaded.parameters == injected.parameters


def test_the_config_tells_people_and_tools_what_it_is(tiny: TinyModels, tmp_path: Path) -> None:
    config = AdapterConfig(rank=4, alpha=8, targets=["v_proj", "q_proj"], layers=2)
    model, injected = trained(tiny("llama"), config)
    save_adapter(tmp_path / "a", model, config, injected, dora=False, base="org/base")
    stored = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert stored["fine_tune_type"] == "lora"
    assert stored["num_layers"] == 2
    assert stored["lora_parameters"] == {
        "rank": 4,
        "scale": 2.0,
        "dropout": 0.0,
        "keys": ["self_attn.q_proj", "self_attn.v_proj"],
    }
    assert stored["model"] == "org/base"
    assert stored["alpha"] == 8
    assert stored["schema_version"] == 1
    assert stored["paths"] == injected.paths
    assert sorted(file.name for file in (tmp_path / "a").iterdir()) == [
        "adapter_config.json",
        "adapters.safetensors",
    ]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a"]


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize(
    "settings",
    [
        {"num_layers": -1},
        {"num_layers": 2},
        {"num_layers": 16},
        {"num_layers": 2, "keys": ["self_attn.q_proj"]},
        {"num_layers": 1, "keys": ["self_attn.q_proj", "lm_head"]},
    ],
)
def test_adapters_of_stock_mlx_lm_load_here(
    settings: dict[str, Any], dora: bool, tiny: TinyModels, tmp_path: Path
) -> None:
    stock = stock_model(tiny("llama"))
    stock.freeze()
    parameters: dict[str, Any] = {"rank": 4, "scale": 20.0, "dropout": 0.0}
    if "keys" in settings:
        parameters["keys"] = settings["keys"]
    linear_to_lora_layers(stock, settings["num_layers"], parameters, use_dora=dora)
    shake(stock)
    tensors = dict(tree_flatten(stock.trainable_parameters()))
    mx.save_safetensors(str(tmp_path / "adapters.safetensors"), tensors)
    config = {
        "fine_tune_type": "dora" if dora else "lora",
        "num_layers": settings["num_layers"],
        "lora_parameters": parameters,
    }
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    model = stock_model(tiny("llama"))
    loaded = load_adapter(model, tmp_path)
    assert loaded.scale == 20.0
    assert loaded.parameters == sum(tensor.size for tensor in tensors.values())
    assert mx.allclose(model(IDS), stock(IDS), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bits", [3, 5, 6])
def test_dora_over_3_5_and_6_bits_loads_here_where_mlx_lm_miscounts(
    bits: int, tiny: TinyModels, tmp_path: Path
) -> None:
    config = AdapterConfig(rank=4)
    model, injected = trained(tiny("llama"), config, dora=True, bits=bits)
    save_adapter(tmp_path / "a", model, config, injected, dora=True, base="tiny")
    with pytest.raises(ValueError, match="incompatible tensors"):
        load_adapters(stock_model(tiny("llama"), bits), str(tmp_path / "a"))
    again = stock_model(tiny("llama"), bits)
    load_adapter(again, tmp_path / "a")
    assert mx.array_equal(again(IDS), model(IDS))


def test_the_same_base_in_another_format_is_the_same_base(tiny: TinyModels, tmp_path: Path) -> None:
    config = AdapterConfig(rank=4)
    model, injected = trained(tiny("llama"), config)
    save_adapter(tmp_path / "a", model, config, injected, dora=False, base="tiny")
    for bits in (2, 3, 4, 8):
        load_adapter(stock_model(tiny("llama"), bits), tmp_path / "a")
    half = stock_model(tiny("llama"))
    half.set_dtype(mx.bfloat16)
    load_adapter(half, tmp_path / "a")
    assert half(IDS).dtype == mx.bfloat16


def test_dropout_sleeps_in_a_model_that_is_loaded_to_be_used(
    tiny: TinyModels, tmp_path: Path
) -> None:
    config = AdapterConfig(rank=4, dropout=0.5)
    model, injected = trained(tiny("llama"), config)
    save_adapter(tmp_path / "a", model, config, injected, dora=False, base="tiny")
    again = stock_model(tiny("llama"))
    again.eval()
    load_adapter(again, tmp_path / "a")
    assert mx.array_equal(again(IDS), again(IDS))
    again.train()
    assert not mx.array_equal(again(IDS), again(IDS))


@pytest.fixture
def stored(tiny: TinyModels, tmp_path: Path) -> Path:
    config = AdapterConfig(rank=4, targets=["q_proj", "v_proj"])
    model, injected = trained(tiny("llama"), config)
    save_adapter(tmp_path / "a", model, config, injected, dora=False, base="org/right")
    return tmp_path / "a"


def refused(folder: Path, model: Any) -> SlimError:
    names = [name for name, _ in tree_flatten(model.parameters())]
    with pytest.raises(SlimError) as caught:
        load_adapter(model, folder)
    assert "\n" not in str(caught.value)
    assert [name for name, _ in tree_flatten(model.parameters())] == names
    return caught.value


def change(folder: Path, edit: Callable[[dict[str, mx.array]], Any]) -> None:
    tensors = load_tensors(folder / "adapters.safetensors")
    edit(tensors)
    mx.eval(tensors)
    mx.save_safetensors(str(folder / "adapters.safetensors"), tensors)


def test_missing_extra_and_wrongly_shaped_tensors_come_in_one_error(
    stored: Path, tiny: TinyModels
) -> None:
    q, v = "model.layers.0.self_attn.q_proj", "model.layers.2.self_attn.v_proj"

    def edit(tensors: dict[str, mx.array]):
        del tensors[f"{q}.lora_b"]
        tensors["model.layers.9.mlp.up_proj.lora_a"] = mx.zeros((3, 2))
        tensors[f"{v}.lora_a"] = mx.zeros((64, 5))

    change(stored, edit)
    message = refused(stored, stock_model(tiny("llama"))).message
    assert f"missing {q}.lora_b (4, 64)" in message
    assert "not in the model model.layers.9.mlp.up_proj.lora_a (3, 2)" in message
    assert f"{v}.lora_a is (64, 5), expected (64, 4)" in message


def test_another_base_is_named(stored: Path, tiny: TinyModels, tmp_path: Path) -> None:
    error = refused(stored, stock_model(tiny("llama-mha")))
    assert "v_proj.lora_b is (4, 32), expected (4, 64)" in error.message
    assert "org/right" in error.hint
    other = tiny_model(tmp_path / "other", "llama", seed=1)
    error = refused(stored, stock_model(other))
    assert "another base of the same shape" in error.message
    assert "org/right" in error.hint


def test_unusable_folders(stored: Path, tiny: TinyModels, tmp_path: Path) -> None:
    model = stock_model(tiny("llama"))
    assert "not an adapter folder" in refused(tmp_path / "nowhere", model).message

    def broken(name: str) -> Path:
        shutil.copytree(stored, tmp_path / name)
        return tmp_path / name

    folder = broken("no-weights")
    (folder / "adapters.safetensors").unlink()
    assert "adapters.safetensors does not exist" in refused(folder, model).message
    folder = broken("cut")
    file = folder / "adapters.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert "truncated or corrupt" in refused(folder, model).message
    folder = broken("no-config")
    (folder / "adapter_config.json").unlink()
    assert "adapter_config.json does not exist" in refused(folder, model).message
    folder = broken("config")
    for text, expected in {
        "{": "cannot be read as JSON",
        "[]": "is not a JSON object",
        '{"r": 8, "lora_alpha": 16}': "no lora_parameters",
        '{"lora_parameters": {"rank": 4}, "num_layers": 1}': "'scale'",
        '{"lora_parameters": {"rank": "x", "scale": 1}, "num_layers": 1}': "rank is 'x', expected",
        '{"lora_parameters": {"rank": 4, "scale": 1}}': "num_layers",
        '{"fine_tune_type": "full", "lora_parameters": {}}': "fine_tune_type is 'full'",
    }.items():
        (folder / "adapter_config.json").write_text(text)
        assert expected in refused(folder, model).message


def test_saving_again_replaces_the_folder(stored: Path, tiny: TinyModels) -> None:
    config = AdapterConfig(rank=2)
    model, injected = trained(tiny("llama"), config)
    save_adapter(stored, model, config, injected, dora=False, base="tiny")
    again = stock_model(tiny("llama"))
    assert load_adapter(again, stored).parameters == injected.parameters
    assert [entry.name for entry in stored.parent.iterdir()] == ["a"]


def test_an_unwritable_place_is_one_line(tiny: TinyModels, tmp_path: Path) -> None:
    config = AdapterConfig(rank=2)
    model, injected = trained(tiny("llama"), config)
    (tmp_path / "file").write_text("")
    with pytest.raises(SlimError, match="cannot write"):
        save_adapter(tmp_path / "file" / "a", model, config, injected, dora=False, base="tiny")


def test_a_full_disk_is_one_line_and_keeps_the_former_adapter(
    stored: Path, tiny: TinyModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_args: object, **_kwargs: object) -> None:
        raise RuntimeError("[write] Unable to write 3900094 bytes to file.")

    config = AdapterConfig(rank=2)
    model, injected = trained(tiny("llama"), config)
    before = (stored / "adapters.safetensors").read_bytes()
    monkeypatch.setattr(mx, "save_safetensors", full)
    with pytest.raises(SlimError, match="Unable to write") as caught:
        save_adapter(stored, model, config, injected, dora=False, base="tiny")
    assert caught.value.exit_code == 2
    usage = shutil._ntuple_diskusage(10, 10, 0)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(ResourceError, match="disk is full"):
        save_adapter(stored, model, config, injected, dora=False, base="tiny")
    monkeypatch.setattr(artifacts, "file_size_limit", lambda: 512)
    monkeypatch.setattr(errors, "file_size_limit", lambda: 512)
    monkeypatch.setattr(
        shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1 << 40, 0, 1 << 40)
    )
    with pytest.raises(ResourceError, match="at most 512 bytes in this shell") as limited:
        save_adapter(stored, model, config, injected, dora=False, base="tiny")
    assert "ulimit -f" in limited.value.hint
    assert (stored / "adapters.safetensors").read_bytes() == before
    assert [entry.name for entry in stored.parent.iterdir()] == ["a"]


@pytest.mark.parametrize("bits", [None, 4])
def test_the_trained_tensors_are_all_that_a_checkpoint_needs(
    bits: int | None, tiny: TinyModels
) -> None:
    """PiSSA's frozen start is made again from the base, to the bit."""
    config = AdapterConfig(rank=4, init="pissa")
    model, _ = trained(tiny("llama"), config, bits=bits)
    state = tree_flatten(model.trainable_parameters())
    again = stock_model(tiny("llama"), bits)
    inject(again, config, dora=False)
    again.load_weights(state, strict=False)
    assert mx.array_equal(again(IDS), model(IDS))
