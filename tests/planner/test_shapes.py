"""Shapes of a model under a recipe: counts and bytes that training has, exactly."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from mlx_slim.errors import SlimError
from mlx_slim.planner.shapes import training_shapes
from mlx_slim.planner.shipped_models import SHIPPED_CONFIGS
from mlx_slim.training.optim import Optimizer
from tests.support.planner import build, config_of, dora_layers, recipe
from tests.support.tiny import ARCHITECTURES

# model: parameters, LoRA r8 on q and v, LoRA r8 on all linears, 4-bit bytes / 1e9
PUBLISHED = {
    "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T": (
        *(1_100_048_384, 1_126_400, 6_307_840, 0.619),
    ),
    "microsoft/phi-2": (2_779_683_840, 2_621_440, 11_796_480, 1.565),
    "mistralai/Mistral-7B-v0.1": (7_241_732_096, 3_407_872, 20_971_520, 4.074),
    "meta-llama/Llama-2-7b-hf": (6_738_415_616, 4_194_304, 19_988_480, 3.791),
    "HuggingFaceTB/SmolLM2-135M-Instruct": (134_515_008, 460_800, 2_442_240, 0.076),
}


@pytest.mark.parametrize("model", PUBLISHED)
def test_counts_are_the_published_ones(model: str) -> None:
    parameters, q_and_v, all_linear, four_bit = PUBLISHED[model]
    config = SHIPPED_CONFIGS[model]
    prediction = training_shapes(config, recipe("qlora"), mx.bfloat16)
    assert prediction.parameters == parameters
    assert prediction.trainable_parameters == all_linear
    assert prediction.base_bytes / 1e9 == pytest.approx(four_bit, abs=5e-4)
    targets = {"targets": ["q_proj", "v_proj"]}
    prediction = training_shapes(config, recipe(adapter=targets), mx.bfloat16)
    assert prediction.trainable_parameters == q_and_v
    assert prediction.base_bytes == 2 * parameters


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
@pytest.mark.parametrize("method", ["full", "lora", "qlora", "dora"])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "muon"])
def test_static_bytes_are_exact(architecture: str, method: str, optimizer: str) -> None:
    config = ARCHITECTURES[architecture]
    plan = recipe(method, train={"optimizer": optimizer})
    model = build(config, plan)
    real = Optimizer(model, plan.train)
    prediction = training_shapes(config, plan, mx.float32)
    arrays = dict(tree_flatten(model.parameters()))
    cached = [v for k, v in arrays.items() if "_base_norm2" in k]
    assert prediction.base_bytes + prediction.adapter_bytes == sum(
        v.nbytes for v in arrays.values()
    ) + (
        0 if cached or method != "dora" else sum(m._base_norm2_O.nbytes for m in dora_layers(model))
    )
    assert prediction.optimizer_bytes == sum(value.nbytes for value in real.state().values())
    assert prediction.trainable == {
        path: value.shape
        for path, value in dict(tree_flatten(model.trainable_parameters())).items()
    }


def test_a_quantized_config_counts_as_quantized() -> None:
    config = config_of()
    packed = {**config, "quantization": {"group_size": 64, "bits": 4, "mode": "affine"}}
    fresh = training_shapes(config, recipe("qlora"), mx.float32)
    stored = training_shapes(packed, recipe("qlora"), mx.float32)
    assert stored.base_bytes == fresh.base_bytes
    assert stored.parameters == fresh.parameters
    with pytest.raises(SlimError, match="quantized"):
        training_shapes(packed, recipe("full"), mx.float32)


@pytest.mark.parametrize(
    "config",
    [{"model_type": "nonsense"}, {"model_type": "llama"}, config_of(num_attention_heads=0)],
)
def test_a_config_that_fits_no_model_is_one_clear_line(config: dict[str, Any]) -> None:
    with pytest.raises(SlimError, match="no model can be built"):
        training_shapes(config, recipe(), mx.float32)


def test_planning_leaves_the_random_numbers_alone() -> None:
    mx.random.seed(3)
    expected = mx.random.uniform(shape=(4,)).tolist()
    mx.random.seed(3)
    training_shapes(config_of(), recipe(), mx.float32)
    assert mx.random.uniform(shape=(4,)).tolist() == expected
