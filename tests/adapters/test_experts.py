"""LoRA on the experts of a mixture: mlx-lm's numbers and files, merged and trained exactly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten, tree_map
from mlx_lm.models.switch_layers import SwitchLinear
from mlx_lm.tuner.lora import LoRASwitchLinear as StockLoRA
from mlx_lm.tuner.utils import linear_to_lora_layers
from mlx_lm.tuner.utils import load_adapters as stock_load_adapters

from mlx_slim.adapters.experts import LoRASwitchLinear
from mlx_slim.adapters.inject import adapters_of, inject
from mlx_slim.adapters.merge import merge
from mlx_slim.adapters.stack import load_adapters, parse_adapters
from mlx_slim.adapters.store import load_adapter
from mlx_slim.analyze.intruders import adapter_pairs
from mlx_slim.config.schema import AdapterConfig
from mlx_slim.errors import SlimError
from mlx_slim.export.fuse import FuseOptions, fuse
from mlx_slim.export.peft import export_peft
from mlx_slim.models.load import load
from mlx_slim.training.optim import trainable
from tests.adapters.support import dense, relative_error, shake
from tests.support.adapters import tuned_logits, write_adapter, write_quantized
from tests.support.stock import stock_load
from tests.support.tiny import VOCAB, TinyModels, tiny_model

LONG = mx.random.randint(0, VOCAB, (1, 60), key=mx.random.key(1))  # sorted by expert
SHORT = LONG[:, :5]
GPT_OSS: dict[str, Any] = {
    "model_type": "gpt_oss",
    "num_hidden_layers": 2,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "head_dim": 16,
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention"],
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},  # else transformers' yarn
}
NAMES = ["mixtral", "qwen3_moe", "olmoe", "gpt_oss"]


@pytest.fixture
def mixture(tiny: TinyModels, tmp_path: Path) -> Any:
    """Return a function: name -> folder of a tiny mixture, dense or quantized."""

    def get(name: str, bits: int | None = None) -> Path:
        folder = tiny_model(tmp_path / name, **GPT_OSS) if name == "gpt_oss" else tiny(name)
        return write_quantized(tmp_path / f"{name}-{bits}", folder, bits) if bits else folder

    return get


def layer(bits: int | None, bias: bool = True) -> Any:
    mx.random.seed(0)
    module = SwitchLinear(64, 32, 3, bias)
    return module.to_quantized(32, bits) if bits else module


@pytest.mark.parametrize("bits", [None, 4, 3])
@pytest.mark.parametrize("sort", [False, True])
def test_a_layer_computes_what_mlx_lm_s_does(bits: int | None, sort: bool) -> None:
    base = layer(bits)
    ours = LoRASwitchLinear(base, 4, 2.5)
    stock = StockLoRA.from_base(base, r=4, scale=2.5)
    x = mx.random.normal((9, 1, 64))
    indices = mx.array([0, 0, 0, 1, 1, 2, 2, 2, 2] if sort else [2, 0, 1, 2, 2, 0, 1, 0, 2])
    assert mx.array_equal(ours(x, indices, sort), base(x, indices, sort))
    assert ours.lora_a.shape == stock.lora_a.shape and ours.lora_b.shape == stock.lora_b.shape
    shake(ours, 0.3)
    stock.lora_a, stock.lora_b = ours.lora_a, ours.lora_b
    assert relative_error(ours(x, indices, sort), stock(x, indices, sort)) < 1e-6

    def loss(module: Any):
        return (module(x, indices, sort) ** 2).sum()

    for module in (ours, stock):
        module.freeze()
        module.unfreeze(keys=["lora_a", "lora_b"], recurse=False)
    one = nn.value_and_grad(ours, loss)(ours)[1]
    other = nn.value_and_grad(stock, loss)(stock)[1]
    for name in ("lora_a", "lora_b"):
        assert relative_error(one[name], other[name]) < 1e-5
    weight = dense(base).astype(mx.float32) + 2.5 * ours.lora_b @ ours.lora_a
    assert mx.allclose(ours.merged_weight(), weight, atol=1e-6)
    assert mx.allclose(ours.fake_quantize(weight), dense(base), atol=1e-6)


def test_half_precision_computes_in_it() -> None:
    """Looked at only: MLX has no half-precision product of experts on a CPU."""
    base = layer(None)
    base.update(tree_map(lambda v: v.astype(mx.bfloat16), base.parameters()))
    base.freeze()
    adapter = LoRASwitchLinear(base, 4, 1.0, dropout=0.5)
    shake(adapter)
    x = mx.random.normal((70, 1, 64)).astype(mx.bfloat16)
    indices = mx.sort(mx.arange(70) % 3)
    assert adapter(x, indices, True).dtype == mx.bfloat16
    assert adapter.lora_a.dtype == mx.float32


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("name", NAMES)
def test_folders_are_mlx_lm_s_both_ways(
    mixture: Any, tmp_path: Path, name: str, bits: int | None
) -> None:
    folder = mixture(name, bits)
    adapter = write_adapter(tmp_path / "a", folder, size=0.1, targets=["all-linear"])
    model = load(folder).model
    injected = load_adapter(model, adapter)
    experts = [path for path, one in adapters_of(model) if isinstance(one, LoRASwitchLinear)]
    assert len(experts) >= 3 and set(experts) < set(injected.paths)
    stock, _ = stock_load(str(folder), adapter_path=str(adapter))
    for ids in (SHORT, LONG):
        expected = stock(ids)
        assert mx.abs(model.eval()(ids) - expected).max() < 2e-4 * mx.abs(expected).max()
    # and back: an adapter that mlx-lm made is read here
    theirs, _ = stock_load(str(folder))
    linear_to_lora_layers(theirs, 2, {"rank": 4, "scale": 2.0, "dropout": 0.0})
    assert any(isinstance(one, StockLoRA) for one in theirs.modules())
    (tmp_path / "b").mkdir()
    parameters: Any = tree_flatten(theirs.parameters())
    tensors = {
        path: mx.random.normal(value.shape, key=mx.random.key(len(path))) * 0.1
        for path, value in parameters
        if ".lora_" in path
    }
    mx.save_safetensors(str(tmp_path / "b" / "adapters.safetensors"), tensors)
    (tmp_path / "b" / "adapter_config.json").write_text(
        '{"fine_tune_type": "lora", "num_layers": 2, '
        '"lora_parameters": {"rank": 4, "scale": 2.0, "dropout": 0.0}}'
    )
    other, _ = stock_load(str(folder))
    expected = stock_load_adapters(other, str(tmp_path / "b")).eval()(SHORT)
    again = load(folder).model
    load_adapter(again, tmp_path / "b")
    assert mx.abs(again.eval()(SHORT) - expected).max() < 2e-4 * mx.abs(expected).max()


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("name", NAMES)
def test_a_fused_mixture_answers_as_base_and_adapter(
    mixture: Any, tmp_path: Path, name: str, bits: int | None
) -> None:
    folder = mixture(name, bits)
    adapter = write_adapter(tmp_path / "a", folder, size=0.1, targets=["all-linear"])
    model = load(folder).model
    load_adapter(model, adapter)
    done = fuse(folder, adapter, tmp_path / "fused", FuseOptions(samples=1, length=32))
    assert done.effect.retained > 0.999
    expected = model.eval()(LONG)
    for fused in (load(tmp_path / "fused").model, stock_load(str(tmp_path / "fused"))[0]):
        assert "scales" not in dict(fused.named_modules())[adapters_of(model)[0][0]]
        assert mx.abs(fused(LONG) - expected).max() < 5e-3 * mx.abs(expected).max()


def test_a_sum_and_a_merge_are_exact(mixture: Any, tmp_path: Path) -> None:
    folder = mixture("qwen3_moe")
    one = write_adapter(tmp_path / "a", folder, size=0.1, targets=["gate_proj", "q_proj"])
    other = write_adapter(tmp_path / "b", folder, rank=2, targets=["down_proj", "gate_proj"])
    stack = parse_adapters([f"{one}=0.7", f"{other}=-0.4"])
    model = load(folder).model
    load_adapters(model, stack)
    expected = {path: base.weight for path, base in named(load(folder).model).items()}
    for weight, adapter in ((0.7, one), (-0.4, other)):
        single = load(folder).model
        load_adapter(single, adapter)
        for path, module in adapters_of(single):
            change = module.merged_weight() - module.base["weight"]
            expected[path] = expected[path] + weight * change
    logits = model.eval()(LONG)
    merge(model)
    assert not adapters_of(model)
    assert mx.abs(model(LONG) - logits).max() < 1e-4
    for path, module in named(model).items():
        assert mx.allclose(module.weight, expected[path], atol=1e-5), path
    pairs = list(adapter_pairs(str(folder), one)[1])
    assert sum("switch_mlp" in pair.path for pair in pairs) == 2 * 4  # layers x experts
    assert mx.allclose(tuned_logits(folder, one), tuned_logits(folder, one))


def named(model: nn.Module) -> dict[str, Any]:
    """Return the layers of ``model`` that have a weight matrix, by path."""
    return {p: m for p, m in model.named_modules() if "weight" in m and m["weight"].ndim > 1}


@pytest.mark.parametrize(
    ("settings", "dora", "says"),
    [
        ({}, True, "DoRA works on linear layers"),
        ({"init": "pissa"}, False, "PiSSA has no start for"),
        ({"rank": 65}, False, "above the smaller side of"),
    ],
)
def test_what_experts_cannot_carry_is_one_line(
    mixture: Any, settings: dict[str, Any], dora: bool, says: str
) -> None:
    model = load(mixture("mixtral")).model
    config = AdapterConfig(**{"targets": ["gate_proj"], **settings})
    with pytest.raises(SlimError, match=says):
        inject(model, config, dora=dora)
    assert not adapters_of(model)


def test_peft_has_no_place_for_experts(mixture: Any, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "a", mixture("olmoe"), targets=["gate_proj"])
    with pytest.raises(SlimError, match="no place for this adapter") as caught:
        export_peft(adapter, tmp_path / "out")
    assert "gguf-adapter" in caught.value.hint and not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_the_planner_counts_what_is_trained(mixture: Any, method: str) -> None:
    from mlx_slim.planner.shapes import training_shapes
    from tests.support.runs import recipe

    folder = mixture("qwen3_moe")
    plan = recipe(folder, folder, method)
    loaded = load(folder)
    values = plan.recipe.model_copy(update={"adapter": AdapterConfig(rank=4)})
    shapes = training_shapes(loaded.config, values, mx.float32)
    inject(loaded.model, values.adapter, dora=False)
    counted = {path: value.shape for path, value in trainable(loaded.model).items()}
    assert shapes.trainable == counted
    assert shapes.trainable_parameters == sum(v.size for v in trainable(loaded.model).values())
    assert any(len(shape) == 3 for shape in counted.values())
    # two experts a token in blocks 0 and 2, none in block 1
    assert [block.routed for block in shapes.blocks] == [2 * 64, 0, 2 * 64]
