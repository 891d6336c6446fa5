"""Spaces: what a file may hold, and one line for each thing that it may not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from mlx_slim.config.load import Resolved, from_values, load_recipe
from mlx_slim.errors import SlimError
from mlx_slim.sweeping.space import SweepSpace, load_space

BASE = {"model": "toy", "adapter": {"rank": 4, "alpha": 16}, "train": {"max_length": 128}}


def space_of(folder: Path, content: Any, base: Resolved | None = None) -> SweepSpace:
    text = content if isinstance(content, str) else yaml.safe_dump(content, sort_keys=False)
    (folder / "space.yaml").write_text(text)
    return load_space(str(folder / "space.yaml"), base or from_values(BASE, "toy", "test"))


def test_a_point_is_a_recipe_and_kinds_follow_from_keys(tmp_path: Path) -> None:
    space = space_of(
        tmp_path,
        {
            "adapter.rank": {"low": 2, "high": 16, "log": True},
            "adapter.scale": {"low": 1, "high": 4},  # instead of the recipe's alpha
            "adapter.targets": ["all-linear", ["q_proj", "v_proj"]],
            "train.steps": {"low": 4, "high": 12, "step": 4},
            "adapter.adaptive": [None, {"target_rank": 2}],
            "train.compile": [True, "auto"],
        },
    )
    whole = {one.key: one.whole for one in space.parameters if one.choices is None}
    assert whole == {"adapter.rank": True, "adapter.scale": False, "train.steps": True}
    point = {
        "adapter.rank": 8,
        "adapter.scale": 2.0,
        "adapter.targets": ["q_proj", "v_proj"],
        "train.steps": 8,
        "adapter.adaptive": None,
        "train.compile": "auto",
    }
    recipe = space.recipe(point).recipe
    assert recipe.adapter.rank == 8 and recipe.adapter.targets == ["q_proj", "v_proj"]
    assert recipe.adapter.scale == 2 and recipe.adapter.alpha is None
    assert recipe.train.max_length == 128 and recipe.train.steps == 8
    assert space.baseline_point() is None  # it has no scale


def test_the_recipes_own_values_are_a_point_if_they_are_in_the_space(tmp_path: Path) -> None:
    inside = space_of(tmp_path, {"adapter.rank": [4, 8], "adapter.alpha": {"low": 8, "high": 32}})
    assert inside.baseline_point() == {"adapter.rank": 4, "adapter.alpha": 16.0}
    for content in ({"adapter.rank": [2, 8]}, {"adapter.rank": {"low": 1, "high": 9, "step": 4}}):
        assert space_of(tmp_path, content).baseline_point() is None


def test_the_shipped_space_fits_the_shipped_recipe() -> None:
    space = load_space("space-smollm2-lora", load_recipe("sweep-smollm2-lora"))
    assert space.keys == [
        "adapter.rank",
        "adapter.alpha",
        "adapter.targets",
        "train.learning_rate",
    ]
    assert space.baseline_point() is not None


BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 10)}]\n"
    for old, new in zip("abcdef", "bcdefg", strict=True)
)
HOSTILE: list[tuple[Any, str]] = [
    (
        {"adapter.rnk": [1, 2]},
        r"adapter.rnk \(space.yaml:1\) is not a key: did you mean 'adapter.r",
    ),
    ({"adaptr.rank": [1, 2]}, "did you mean 'adapter.rank'"),
    ({"rank": [1, 2]}, "did you mean 'adapter.rank'"),
    ({"adapter.rank.x": {"low": 1, "high": 2}}, "adapter.rank.x"),
    ({"..": [1, 2]}, "is not a key"),
    ({"adapter": {"rank": [1, 2]}}, r"adapter \(space.yaml:1\) is a section of keys"),
    ({"adapter.rank": 8}, "is 8: write a list of choices, or"),
    ({"adapter.rank": None}, "is None: write a list"),
    ({"adapter.rank": []}, "has 0 choices"),
    ({"adapter.rank": [4]}, "has 1 choices"),
    ({"adapter.rank": [4, 8, 4]}, "4 is given twice"),
    ({"adapter.rank": [4, "many"]}, "adapter.rank .* is 'many': expected a whole number"),
    ({"adapter.rank": [4, 0]}, "adapter.rank .* is 0: expected a whole number .at least 1"),
    ({"adapter.rank": [True, 4]}, "adapter.rank .* is true: expected a whole number"),
    ({"adapter.rank": {"low": 1}}, "has no high"),
    (
        {"adapter.rank": {"low": 1, "hihg": 2}},
        "'hihg' is not a key of a range: did you mean 'high'",
    ),
    ({"adapter.rank": {"low": 1.5, "high": 4}}, "low is 1.5, expected a whole number"),
    ({"adapter.rank": {"low": "1", "high": 4}}, "low is '1', expected a whole number"),
    ({"adapter.rank": {"low": 1, "high": True}}, "high is True, expected a whole number"),
    ({"adapter.rank": {"low": 8, "high": 4}}, "low 8 is above high 4"),
    ({"adapter.rank": {"low": 4, "high": 4}}, "low and high are both 4"),
    ({"adapter.rank": {"low": 0, "high": 4}}, "adapter.rank .* is 0: expected"),
    ({"train.weight_decay": {"low": 0, "high": 1, "log": True}}, "low is 0, and log needs"),
    ({"train.weight_decay": {"low": -1, "high": 1, "log": True}}, "low is -1, and log needs"),
    ({"train.weight_decay": {"low": 0, "high": float("inf")}}, "high is inf, expected a number"),
    ({"train.weight_decay": {"low": float("nan"), "high": 1}}, "low is nan, expected a number"),
    ({"train.learning_rate": {"low": 1, "high": 20}}, "is 20.0: expected a number .*below 10"),
    ({"train.learning_rate": {"low": 1, "high": 2, "log": "yes"}}, "log is 'yes'"),
    ({"adapter.rank": {"low": 1, "high": 9, "log": True, "step": 2}}, "has log and a step"),
    ({"adapter.rank": {"low": 1, "high": 8, "step": 2}}, "set high to 7"),
    ({"adapter.rank": {"low": 1, "high": 8, "step": 0}}, "step is 0, expected from 7e-09 to 7"),
    (
        {"train.learning_rate": {"low": 1e-4, "high": 1.0, "step": 1e-320}},
        "step is 9.99989e-321, expected from",
    ),
    ({"adapter.targets": {"low": 1, "high": 2}}, "holds no numbers"),
    ({"method": ["lora", "loar"]}, "method .* is 'loar': expected one of"),
    ({"train.seed": [0, 1]}, "train.seed .* cannot be searched: the best trial"),
    ({"data.validation": [4, 8]}, "cannot be searched: losses are compared"),
    ({"memory.budget": ["8GB", "9GB"]}, "cannot be searched: it does not change"),
    ({"adapter.alpha": [8, 16], "adapter.scale": [1, 2]}, "are both in the space: keep one"),
    ("adapter.rank: [1, 2]\nadapter.rank: [3, 4]\n", "key adapter.rank is given twice"),
    ({"quantize.aware": [True, False], "quantize.qat": [False, True]}, "is given already"),
    ("", "is empty"),
    ("{}", "names no key"),
    ("[1, 2]", "holds a list"),
    ("adapter.rank: [1, 2", "is not valid YAML"),
    ("adapter.rank: !!python/object:os.system [1]", "is not read here"),
    ("? [a, b]\n: [1, 2]", "a key must be a plain word"),
    (BOMB, "values, those behind aliases included"),
]


@pytest.mark.parametrize(("content", "line"), HOSTILE, ids=[line[:30] for _, line in HOSTILE])
def test_what_is_wrong_is_one_line(tmp_path: Path, content: Any, line: str) -> None:
    with pytest.raises(SlimError, match=line) as caught:
        space_of(tmp_path, content)
    assert "\n" not in caught.value.message and not caught.value.details


def test_several_problems_are_counted_and_listed(tmp_path: Path) -> None:
    with pytest.raises(SlimError, match="2 problems") as caught:
        space_of(tmp_path, {"adapter.rnk": [1, 2], "adapter.rank": [4]})
    assert len(caught.value.details) == 2
    with pytest.raises(SlimError, match="no space is called"):
        load_space("smollm2", from_values(BASE, "toy", "test"))


def test_a_key_of_the_command_line_is_not_searched(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(BASE))
    base = load_recipe(str(tmp_path / "base.yaml"), ["adapter.rank=2"])
    with pytest.raises(SlimError, match="is searched, and set on the command line"):
        space_of(tmp_path, {"adapter.rank": [4, 8]}, base)
