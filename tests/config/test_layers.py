"""Recipe files laid over each other, without a schema."""

from __future__ import annotations

from pathlib import Path

import pytest

from mlx_slim.config import library
from mlx_slim.config.layers import read_files
from mlx_slim.config.load import load_recipe
from mlx_slim.errors import SlimError


@pytest.mark.parametrize("name", library.names("recipes"))
def test_what_is_listed_of_a_recipe_is_what_it_trains(name: str) -> None:
    values, recipe = read_files(name, "recipes").values, load_recipe(name).recipe
    assert (values["model"], values["method"]) == (recipe.model, recipe.method)


def test_values_know_their_lines_and_nothing_is_checked(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("model: a\nnonsense: {x: 1, y: 2}\n")
    (tmp_path / "mine.yaml").write_text("extends: base\nnonsense: {y: 3}\n")
    layers = read_files(str(tmp_path / "mine.yaml"), "recipes")
    assert layers.values == {"model": "a", "nonsense": {"x": 1, "y": 3}}
    assert layers.origins["nonsense", "x"] == "base.yaml:2"
    assert layers.origins["nonsense", "y"] == "mine.yaml:2"


def test_a_circle_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("extends: b\n")
    (tmp_path / "b.yaml").write_text("extends: a\n")
    with pytest.raises(SlimError, match="in a circle"):
        read_files(str(tmp_path / "a.yaml"), "recipes")
