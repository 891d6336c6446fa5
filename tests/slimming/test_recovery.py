"""How a candidate recovers: chosen from shapes, before anything is cut."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from mlx_slim.errors import ResourceError, TimeLimitError
from mlx_slim.models.load import read_config
from mlx_slim.pruning.run import prune
from mlx_slim.slimming import recovery
from mlx_slim.slimming.candidate import Cut
from mlx_slim.slimming.material import Material
from mlx_slim.slimming.recovery import (
    RECIPE,
    dense_of,
    peak_bytes,
    recipe_of,
    recovers,
    write_recipe,
)
from mlx_slim.slimming.request import space_of
from tests.slimming.conftest import Setting


def test_what_is_cut_or_has_few_bits_recovers(setting: Setting) -> None:
    space = space_of(*setting)
    assert [recovers(space.candidate(bits, ())) for bits in (8, 5, 4, 2)] == [0, 0, 1, 1]
    assert recovers(space.candidate(None, (Cut("depth", layers=1),)))
    assert not recovers(replace(space.candidate(4, ()), bits_per_weight=4.5))


def test_a_recipe_from_shapes_is_that_of_the_cut_model(setting: Setting, tmp_path: Path) -> None:
    """Its config says the same as that of the folder that ``prune`` makes; no weight is read."""
    (model, options), cut = setting, Cut("depth", layers=1)
    space = space_of(model, options)
    one = space.candidate(4, (cut,))
    material = Material(str(model), None, options.data, tmp_path, tmp_path / "targets")
    config = space.config_of(one.cuts)
    write_recipe(material, one, tmp_path, config)
    assert sorted(path.name for path in tmp_path.iterdir()) == [RECIPE]
    recipe = recipe_of(tmp_path).recipe
    assert recipe.model == dense_of(material, one, tmp_path) == str(tmp_path / "pruned-1")
    assert recipe.method == "full" and recipe.memory.budget == "auto"
    assert recipe.distill is not None and recipe.distill.cache is None
    assert recipe.distill.teachers[0].model == str(model)
    prune(str(model), tmp_path / "pruned-1", cut.options(space.original.layers, options.data, None))
    real = read_config(tmp_path / "pruned-1")
    assert {key: real.get(key) for key in config} == config
    assert peak_bytes(tmp_path, real) == peak_bytes(tmp_path, config) > 0
    with pytest.raises(ResourceError):
        write_recipe(material, one, tmp_path, config, budget=1000)


def test_a_limit_that_is_too_short_gives_way_to_the_next(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (model, options), cut = setting, Cut("depth", layers=1)
    space = space_of(model, options)
    one = space.candidate(4, (cut,))
    material = Material(str(model), None, options.data, tmp_path, tmp_path / "targets")
    seen, real = [], recovery.choose

    def choose(*words: Any, **settings: Any) -> Any:
        seen.append(settings["time"])
        if settings["time"] in ("1s", "20s"):
            raise TimeLimitError("too short", "give it about 30 s")
        return real(*words, **settings)

    monkeypatch.setattr(recovery, "choose", choose)
    write = partial(write_recipe, material, one, tmp_path, space.config_of(one.cuts))
    with pytest.raises(TimeLimitError, match="too short"):
        write(limits=[0.0, 20.0])
    assert seen == ["1s", "20s"] and not (tmp_path / RECIPE).exists()
    write(limits=[20.0, 3600.0])
    assert seen[2:] == ["20s", "3600s"] and (tmp_path / RECIPE).exists()
