"""Modules trained in full beside an adapter: stored, loaded, merged, given back, and in PEFT."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from mlx_slim.adapters.inject import inject, remove_adapters, without_adapters
from mlx_slim.adapters.peft import write_peft
from mlx_slim.adapters.peft_rules import read_folder
from mlx_slim.adapters.saved import saved_tensors
from mlx_slim.adapters.stack import load_adapters, parse_adapters
from mlx_slim.adapters.store import load_adapter, save_adapter
from mlx_slim.artifacts import load_tensors, save_tensors
from mlx_slim.config.load import load_recipe
from mlx_slim.config.schema import AdapterConfig
from mlx_slim.errors import Interrupted, SlimError
from mlx_slim.export.fuse import fuse
from mlx_slim.export.options import FuseOptions
from mlx_slim.finetuning.run import finetune
from mlx_slim.models.load import load
from mlx_slim.planner.shapes import training_shapes
from mlx_slim.training.optim import trainable
from tests.adapters.support import IDS, relative_error, shake, stock_model
from tests.support.adapters import write_quantized
from tests.support.runs import CtrlC, Recorder, losses, write_rows
from tests.support.stock import stock_load
from tests.support.tiny import TinyModels

WHOLE = {
    "llama": ["embed_tokens", "lm_head", "norm"],
    "llama-tied": ["embed_tokens", "post_attention_layernorm"],
    "phi": ["lm_head", "input_layernorm"],  # both have a bias
}


def trained(folder: Path, names: list[str], bits: int | None = None) -> tuple[Any, Any, Any]:
    model, config = stock_model(folder, bits), AdapterConfig(modules_to_save=names)
    injected = inject(model, config, dora=False)
    shake(model)
    return model, config, injected


def stored(tmp_path: Path, folder: Path, names: list[str], bits: int | None = None) -> mx.array:
    model, config, injected = trained(folder, names, bits)
    save_adapter(tmp_path, model, config, injected, dora=False, base=str(folder))
    return model(IDS)


@pytest.mark.parametrize("architecture", WHOLE)
def test_they_load_here_and_stock_mlx_lm_refuses_them_by_name(
    tiny: TinyModels, tmp_path: Path, architecture: str
) -> None:
    folder = tiny(architecture)
    logits = stored(tmp_path / "a", folder, WHOLE[architecture])
    with pytest.raises(ValueError, match="not an adapter parameter in the model"):
        stock_load(str(folder), adapter_path=str(tmp_path / "a"))
    ours = stock_model(folder)
    load_adapter(ours, tmp_path / "a")
    assert mx.array_equal(ours(IDS), logits).item()


def test_only_they_and_the_adapters_are_trained(tiny: TinyModels) -> None:
    model, _, injected = trained(tiny("llama"), WHOLE["llama"])
    whole = {"model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"}
    others = {path for path in trainable(model) if ".lora_" not in path}
    assert others == whole == set(saved_tensors(model))
    assert injected.saved == ["model.embed_tokens", "model.norm", "lm_head"]
    assert injected.parameters == sum(value.size for value in trainable(model).values())


def test_over_a_quantized_base_they_are_dense_and_the_base_is_there_again(
    tiny: TinyModels, tmp_path: Path
) -> None:
    folder = tiny("llama-tied")
    before = stock_model(folder, 4)(IDS)
    logits = stored(tmp_path / "a", folder, WHOLE["llama-tied"], 4)
    model = stock_model(folder, 4)
    load_adapter(model, tmp_path / "a")
    assert "scales" not in model.model.embed_tokens
    assert mx.array_equal(model(IDS), logits).item()
    with without_adapters(model):
        assert mx.array_equal(model(IDS), before).item()
    assert mx.array_equal(model(IDS), logits).item()
    remove_adapters(model)
    assert mx.array_equal(model(IDS), before).item()
    untrained = inject(model, AdapterConfig(modules_to_save=["embed_tokens"]), dora=False)
    assert untrained.saved == ["model.embed_tokens"]
    assert mx.allclose(model(IDS), before, atol=1e-5).item()  # dense, of the same values


@pytest.mark.parametrize(
    ("names", "match"),
    [
        (["embed_token"], r"modules_to_save: 'embed_token' matches no module.*embed_tokens"),
        (["lm_head"], r"'lm_head' matches no module.*its head is the embedding: name embed_tokens"),
        (["q_proj"], r"modules_to_save and adapter.targets both name model.layers.0"),
    ],
)
def test_a_name_that_cannot_be_trained_is_refused(
    tiny: TinyModels, names: list[str], match: str
) -> None:
    model = stock_model(tiny("llama-tied"))
    with pytest.raises(SlimError, match=match):
        inject(model, AdapterConfig(modules_to_save=names), dora=False)
    assert not [path for path, _ in tree_flatten(model.parameters()) if "lora" in path]


def test_combinations_that_make_no_sense_are_refused(tmp_path: Path, tiny: TinyModels) -> None:
    recipe, names = tmp_path / "r.yaml", "adapter.modules_to_save=[embed_tokens]"
    recipe.write_text("model: x\n")
    for other, match in {
        "adapter.pooled=true": "pooled folds into the biases",
        "adapter.on=[a]": "on adds updates up",
        "quantize.qat=true": "quantize.qat rounds the weights",
        "method=full": r"adapter.modules_to_save is set, and method=full",
    }.items():
        with pytest.raises(SlimError, match=match):
            load_recipe(str(recipe), [names, other])
    folder = tiny("llama")
    stored(tmp_path / "a", folder, ["norm"])
    with pytest.raises(SlimError, match=r"trained in full .*cannot be added to others or weighted"):
        load_adapters(stock_model(folder), parse_adapters(f"{tmp_path / 'a'}=0.5"))


def test_a_file_without_one_of_them_is_refused(tiny: TinyModels, tmp_path: Path) -> None:
    stored(tmp_path / "a", tiny("llama"), ["norm"])
    file = tmp_path / "a" / "adapters.safetensors"
    tensors = load_tensors(file)
    save_tensors(file, {k: v for k, v in tensors.items() if k != "model.norm.weight"})
    with pytest.raises(SlimError, match=r"missing model\.norm\.weight"):
        load_adapter(stock_model(tiny("llama")), tmp_path / "a")


@pytest.mark.parametrize("mode", ["auto", "keep", "requantize"])
def test_a_fused_model_has_them(tiny: TinyModels, tmp_path: Path, mode: Any) -> None:
    folder, bits = tiny("llama"), 8 if mode == "requantize" else None
    if bits:
        folder = write_quantized(tmp_path / "q", folder, bits)
    model = load(folder).model
    config = AdapterConfig(modules_to_save=WHOLE["llama"])
    injected = inject(model, config, dora=False)
    shake(model)
    save_adapter(tmp_path / "a", model, config, injected, dora=False, base=str(folder))
    expected = model(IDS)
    fused = fuse(folder, tmp_path / "a", tmp_path / "out", FuseOptions(mode=mode, force=True))
    assert fused.saved == 3
    again = load(tmp_path / "out").model
    if mode == "keep":
        assert mx.array_equal(again(IDS), load(folder).model(IDS)).item()
        load_adapter(again, tmp_path / "out" / "adapters")
    assert relative_error(again(IDS), expected) < (0.03 if bits else 1e-5)
    assert ("scales" in dict(again.named_modules())["model.embed_tokens"]) == bool(bits)


def test_peft_has_its_own_layout_and_comes_back(tiny: TinyModels, tmp_path: Path) -> None:
    """What real PEFT computes with it, tests/parity shows."""
    for architecture, tied in (("llama", False), ("llama-tied", True)):
        folder, out = tiny(architecture), tmp_path / architecture
        model, _, injected = trained(folder, WHOLE[architecture])
        out.mkdir()
        write_peft(out, model, injected, base="x", tied=tied)
        settings = json.loads((out / "adapter_config.json").read_text())
        assert settings["modules_to_save"] == injected.saved
        assert settings.get("ensure_weight_tying", False) == tied
        tensors = load_tensors(out / "adapter_model.safetensors")
        names = {f"base_model.model.{name}" for name in saved_tensors(model)}
        names |= {"base_model.model.lm_head.weight"}
        assert {name for name in tensors if "lora" not in name} == names
        back = read_folder(out, stock_model(folder), tied=tied)
        assert back.saved.keys() == saved_tensors(model).keys()
        for name, value in saved_tensors(model).items():
            assert mx.array_equal(back.saved[name], value).item()
    del tensors["base_model.model.lm_head.weight"]  # as PEFT without ensure_weight_tying
    save_tensors(out / "adapter_model.safetensors", tensors)
    with pytest.raises(SlimError, match="trains one of embedding and head in full"):
        read_folder(out, stock_model(folder), tied=True)


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_a_run_trains_them_and_resumes_bit_for_bit(
    tiny: TinyModels, tmp_path: Path, method: str
) -> None:
    model, data = tiny("llama"), write_rows(tmp_path / "rows.jsonl")
    file = tmp_path / "r.yaml"
    file.write_text(
        f"model: {model}\nmethod: {method}\n"
        "adapter: {rank: 4, targets: [q_proj], modules_to_save: [embed_tokens, lm_head]}\n"
        "quantize: {bits: 4, group_size: 32}\n"
        f"data: {{path: {data}, validation: 4}}\nreport_answers: 0\n"
        "train: {steps: 6, batch_tokens: 256, max_length: 128, learning_rate: 1.0e-3,"
        " save_every: 2, validate_every: 3}\n"
    )
    resolved = load_recipe(str(file))
    straight, out = tmp_path / "straight", tmp_path / "killed"
    finetune(resolved, straight, observer=Recorder())
    with pytest.raises(Interrupted):
        finetune(resolved, out, observer=CtrlC())
    finetune(resolved, out, observer=Recorder(), resume=True)
    assert losses(out) == losses(straight)
    tensors = [load_tensors(run / "adapters" / "adapters.safetensors") for run in (straight, out)]
    assert all(mx.array_equal(tensors[0][name], tensors[1][name]).item() for name in tensors[0])
    start = dict(tree_flatten(load(model).model.parameters()))
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert tensors[0][name].shape == start[name].shape
        assert relative_error(tensors[0][name], start[name]) > 1e-3
    if method == "qlora":  # the base is saved as it was quantized, and stays quantized
        base = load_tensors(next((straight / "base").glob("*.safetensors")))
        assert "model.embed_tokens.scales" in base


def test_the_planner_counts_them(tiny: TinyModels) -> None:
    folder = tiny("llama")
    file = folder.parent / "plan.yaml"
    file.write_text(f"model: {folder}\nmethod: lora\ntrain: {{batch_tokens: 512}}\n")
    config = json.loads((folder / "config.json").read_text())
    plain, whole = (
        training_shapes(config, load_recipe(str(file), words).recipe, mx.bfloat16)
        for words in ([], ["adapter.modules_to_save=[embed_tokens,lm_head]"])
    )
    numbers = 2 * plain.vocabulary * plain.width
    assert whole.trainable_parameters == plain.trainable_parameters + numbers
    assert whole.gradient_bytes == plain.gradient_bytes + 4 * numbers
    assert whole.optimizer_bytes - plain.optimizer_bytes >= 12 * numbers  # two moments, masters
    assert whole.base_bytes + whole.adapter_bytes == plain.base_bytes + plain.adapter_bytes
    assert (plain.head_trains, whole.head_trains) == (False, True)
