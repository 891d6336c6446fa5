"""The ``preference`` section: absent by default; what is set has an effect, or is refused."""

from __future__ import annotations

from typing import Any

import pytest

from mlx_slim.config.load import from_values, load_recipe, render
from mlx_slim.config.preference import loss_unit
from mlx_slim.errors import SlimError


def test_a_recipe_without_the_section_learns_its_rows() -> None:
    resolved = load_recipe("smollm2-lora", [])
    assert resolved.recipe.preference is None
    assert resolved.recipe.preference_rows is None
    assert "preference: null" in render(resolved)
    assert loss_unit(None) == "nats/token"


def test_an_override_adds_it() -> None:
    recipe = load_recipe("smollm2-lora", ["preference.loss=kto", "preference.beta=0.3"]).recipe
    assert recipe.preference is not None
    assert (recipe.preference.loss, recipe.preference.beta) == ("kto", 0.3)
    assert recipe.preference_rows == "labels"
    assert recipe.preference.has_reference
    pairs = load_recipe("smollm2-lora", ["preference={}"]).recipe
    assert pairs.preference_rows == "pairs"
    orpo = load_recipe("smollm2-lora", ["preference.loss=orpo"]).recipe
    assert orpo.preference is not None
    assert not orpo.preference.has_reference


@pytest.mark.parametrize(
    ("preference", "expected"),
    [
        ({"loss": "dpo"}, "preference.loss"),
        ({"beta": 0}, "preference.beta"),
        ({"label_smoothing": 0.5}, "preference.label_smoothing"),
        ({"loss": "ipo", "label_smoothing": 0.1}, "label_smoothing=0.1 is for loss=sigmoid or"),
        ({"simpo_gamma": 1.0}, "simpo_gamma=1.0 is for loss=simpo"),
        ({"nll": "all"}, "nll=all is for loss=orpo"),
        ({"desirable_weight": 2}, "desirable_weight=2.0 is for loss=kto"),
        ({"loss": "robust"}, "label_smoothing=0 is loss=sigmoid"),
        ({"betta": 1}, "betta"),
    ],
)
def test_what_has_no_effect_is_refused(preference: dict[str, Any], expected: str) -> None:
    with pytest.raises(SlimError, match=expected):
        from_values({"model": "x", "preference": preference}, "small", "test")


@pytest.mark.parametrize(
    "other",
    [
        {"distill": {}},
        {"data": {"split": True}},
        {"data": {"mask_prompt": False}},
        {"data": {"learn": "last"}},
        {"data": {"format": "chat"}},
        {"data": {"path": [{"path": "a", "format": "text"}]}},
        {"train": {"batching": "packed"}},
    ],
)
def test_what_does_not_go_with_a_comparison_is_refused(other: dict[str, Any]) -> None:
    with pytest.raises(SlimError, match="preference compares whole answers"):
        from_values({"model": "x", "preference": {}, **other}, "small", "test")
