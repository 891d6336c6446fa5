"""The ``distill`` section: absent by default, checked like every other when it is there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mlx_slim.config.load import Resolved, load_recipe, render
from mlx_slim.errors import SlimError


@pytest.fixture
def load(tmp_path: Path) -> Any:
    def run(text: str, *overrides: str) -> Resolved:
        path = tmp_path / "r.yaml"
        path.write_text(text, encoding="utf-8")
        return load_recipe(str(path), overrides)

    return run


def test_a_recipe_without_the_section_is_a_fine_tune(load: Any) -> None:
    resolved = load("model: x\n")
    assert resolved.recipe.distill is None
    assert "distill: null" in render(resolved)


def test_overrides_reach_into_the_section_and_its_list(load: Any) -> None:
    text = "model: x\ndistill:\n  teachers: [{model: a}]\n  temperature: 4\n"
    teachers = "distill.teachers=[{model: b, weight: 2}, {model: c, base_url: 'http://d/v1'}]"
    resolved = load(text, teachers, "distill.weight=1", "distill.top_k=all")
    distill = resolved.recipe.distill
    assert distill is not None
    assert [(t.model, t.weight, t.base_url) for t in distill.teachers] == [
        ("b", 2.0, None),
        ("c", 1.0, "http://d/v1"),
    ]
    assert (distill.temperature, distill.weight, distill.top_k) == (4.0, 1.0, "all")
    assert resolved.origins["distill.temperature"] == "r.yaml:4"
    assert resolved.origins["distill.teachers"] == "command line"
    assert resolved.origins["distill.method"] == "default"
    assert 'teachers: [{"model": "b", "weight": 2.0}' in render(resolved)


def test_one_override_makes_the_section_with_the_students_own_origin_as_teacher(load: Any) -> None:
    distill = load("model: x\n", "distill.temperature=2").recipe.distill
    assert distill is not None
    assert [teacher.model for teacher in distill.teachers] == [None]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("distill.temprature=2", "not a key: did you mean 'distill.temperature'"),
        ("divergence=reverse", "not a key: did you mean 'distill.divergence'"),
        ("distill.teachers=[{modle: a}]", "did you mean 'distill.teachers.0.model'"),
        ("distill.teachers=[]", "expected a list of at least 1"),
        ("distill.teachers=[{weight: 0}]", "expected a number .above 0."),
        ("distill.weight=1.5", "expected a number .at least 0 and at most 1."),
        ("distill.temperature=0", "expected a number .above 0"),
        ("distill.top_k=some", "expected all or a whole number"),
        ("distill.method=logit", "expected one of auto, logits, sequence, rationales"),
        ("distill.teachers=[{model: a, api_key_env: K}]", "api_key_env=K needs base_url"),
        ("distill.teachers=[{base_url: u}]", "base_url=u needs model=NAME"),
        ("distill.teachers=[{model: a, base_url: u, adapter: d}]", "adapter=d are both set"),
        (
            "distill={method: mutual, teachers: [{model: a}, {model: b}]}",
            "has 2 teachers: expected one",
        ),
        ("distill={method: mutual, teachers: [{model: a, adapter: d}]}", "without base_url"),
    ],
)
def test_wrong_values(load: Any, override: str, message: str) -> None:
    with pytest.raises(SlimError, match=message):
        load("model: x\n", override)
