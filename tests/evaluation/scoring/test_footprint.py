"""What a plan counts for the caches of answers is what the loaded model stores."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from mlx_slim.errors import SlimError
from mlx_slim.evaluation.scoring import footprint as module
from mlx_slim.evaluation.scoring.answer_cache import footprint
from mlx_slim.evaluation.scoring.footprint import Footprint, planned_footprint
from mlx_slim.models.load import load
from mlx_slim.planner.shipped_models import SHIPPED_CONFIGS
from tests.support.tiny import ARCHITECTURES, MIXTURES, TinyModels, tiny_model


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, *MIXTURES])
def test_planned_is_what_the_model_stores(tiny: TinyModels, architecture: str) -> None:
    loaded = load(tiny(architecture))
    planned = planned_footprint(loaded.config, 4)
    assert planned == footprint(loaded.model)
    assert planned.layers and planned.vocabulary


def test_widths_that_a_config_leaves_to_its_class(tmp_path: Path) -> None:
    # Qwen2's class has no head_dim; a Llama's may differ from width / heads, in windows too.
    changes = {"head_dim": 32, "layer_types": ["sliding_attention", "full_attention"] * 2}
    changes |= {"num_hidden_layers": 4, "sliding_window": 16}
    for architecture in ("llama", "qwen2"):
        loaded = load(tiny_model(tmp_path / architecture, architecture, **changes))
        planned = planned_footprint(loaded.config, 4)
        assert planned == footprint(loaded.model)
        assert {window for _, window in planned.layers} == (
            {None} if architecture == "qwen2" else {16, None}
        )


@pytest.mark.parametrize("name", SHIPPED_CONFIGS)
def test_shipped_models_are_counted_as_their_class_counts_them(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from_keys = planned_footprint(SHIPPED_CONFIGS[name], 2)
    monkeypatch.setattr(module, "_PLAIN", set())
    assert planned_footprint(SHIPPED_CONFIGS[name], 2) == from_keys


def test_a_shipped_model_needs_no_class(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlx_slim.models.build", None)
    for config in SHIPPED_CONFIGS.values():
        assert planned_footprint(config, 2).cache_bytes(1) > 0


def test_a_class_that_the_model_brings_is_counted_from_the_keys() -> None:
    config = {"model_type": "of_its_own", "hidden_size": 64, "num_attention_heads": 4}
    config |= {"num_hidden_layers": 3, "vocab_size": 10}
    with pytest.raises(SlimError, match="of_its_own"):
        planned_footprint(config, 4)
    with_code = planned_footprint({**config, "model_file": "model.py"}, 4)
    assert with_code == Footprint(((2 * 64 * 4, None),) * 3, 0, 10)
