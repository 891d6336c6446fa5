"""The table of shipped shapes is what the installed mlx-lm builds."""

from __future__ import annotations

import json

import mlx.core as mx
import pytest

from mlx_slim.adapters.inject import in_order
from mlx_slim.models.attention import attention_of
from mlx_slim.models.build import build
from mlx_slim.models.structure import blocks_path, has_candidates, is_capped
from mlx_slim.planner import skeleton
from mlx_slim.planner.shapes import leaves, training_shapes
from mlx_slim.planner.shipped_models import SHIPPED_CONFIGS
from tests.support.planner import recipe
from tests.support.tiny import ARCHITECTURES


@pytest.mark.parametrize("name", SHIPPED_CONFIGS)
def test_the_table_is_the_installed_mlx_lm(name: str) -> None:
    config = SHIPPED_CONFIGS[name]
    table = json.loads(skeleton.TABLE.read_text(encoding="utf-8"))
    assert list(table) == list(SHIPPED_CONFIGS)
    assert skeleton.record_of(config) == table[name], "run python -m mlx_slim.planner.skeleton"


@pytest.mark.parametrize("name", SHIPPED_CONFIGS)
def test_a_skeleton_has_the_layers_of_the_class_in_their_order(name: str) -> None:
    config = SHIPPED_CONFIGS[name]
    real = build(config)
    model, attention = skeleton.modules_of(config)
    assert type(model) is skeleton.Skeleton
    shapes = [[(path, v.shape) for path, v in leaves(one)] for one in (real, model)]
    assert shapes[0] == shapes[1]
    with_weights = [
        [(path, type(module)) for path, module in in_order(one) if "weight" in module]
        for one in (real, model)
    ]
    assert with_weights[0] == with_weights[1]
    assert attention == attention_of(real)
    assert blocks_path(model) == blocks_path(real)
    assert (has_candidates(model), is_capped(model)) == (has_candidates(real), is_capped(real))


def test_plans_from_the_table_are_those_from_the_class(monkeypatch: pytest.MonkeyPatch) -> None:
    config = SHIPPED_CONFIGS["HuggingFaceTB/SmolLM2-135M-Instruct"]
    recipes = [recipe(method) for method in ("full", "qlora", "dora")]
    from_table = [training_shapes(config, one, mx.bfloat16) for one in recipes]
    monkeypatch.setattr(skeleton, "SHIPPED_CONFIGS", {})
    assert [training_shapes(config, one, mx.bfloat16) for one in recipes] == from_table


def test_another_model_is_built_by_its_class() -> None:
    model, attention = skeleton.modules_of(ARCHITECTURES["qwen2"])
    assert type(model).__module__ == "mlx_lm.models.qwen2"
    assert len(attention) == len(model.layers)  # type: ignore[arg-type]


def test_a_model_whose_blocks_differ_has_no_entry() -> None:
    blocks = ARCHITECTURES["llama"]["num_hidden_layers"]
    one = {"heads": 2, "kv_heads": 1, "intermediate_size": 32}
    widths = [one] + [{**one, "intermediate_size": 16}] * (blocks - 1)
    config = {**ARCHITECTURES["llama"], "mlx_slim_widths": widths}
    with pytest.raises(ValueError, match="blocks of this model differ"):
        skeleton.record_of(config)


def test_making_a_skeleton_draws_no_random_number() -> None:
    config = SHIPPED_CONFIGS["HuggingFaceTB/SmolLM2-135M-Instruct"]
    mx.random.seed(3)
    expected = mx.random.uniform(shape=(4,)).tolist()
    mx.random.seed(3)
    skeleton.modules_of(config)
    assert mx.random.uniform(shape=(4,)).tolist() == expected
