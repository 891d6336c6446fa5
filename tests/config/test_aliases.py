"""Keys of version 0.1: read under their old name, with one notice, from every place."""

from __future__ import annotations

from pathlib import Path

import pytest

from mlx_slim.config.aliases import RECIPE, current_path, rename
from mlx_slim.config.load import from_values, load_recipe, render
from mlx_slim.errors import SlimError

OLD = {"model": "m", "held_out": {"path": "text.txt"}, "quantize": {"bits": 3, "aware": True}}


def test_old_keys_are_read_and_each_has_one_notice() -> None:
    resolved = from_values(OLD, "old", "test")
    assert resolved.recipe.forgetting is not None and resolved.recipe.quantize.qat
    assert resolved.notices == (
        "held_out (test) is called forgetting now; the old name is still read",
        "quantize.aware (test) is called quantize.qat now; the old name is still read",
    )
    assert render(resolved).startswith("# held_out (test) is called forgetting now")
    assert resolved.origins["quantize.qat"] == "test"


def test_a_file_and_the_command_line_are_layers_of_one_key(tmp_path: Path) -> None:
    file = tmp_path / "old.yaml"
    file.write_text("model: m\nquantize:\n  bits: 3\n  aware: true\nheld_out: {path: a.txt}\n")
    resolved = load_recipe(str(file), ["quantize.qat=false", "held_out.rows=3", "held_out.every=2"])
    recipe = resolved.recipe
    assert recipe.forgetting is not None
    assert (recipe.quantize.qat, recipe.forgetting.path, recipe.forgetting.rows) == (
        False,
        "a.txt",
        3,
    )
    assert resolved.origins["quantize.qat"] == resolved.origins["forgetting.rows"] == "command line"
    assert resolved.origins["forgetting.path"] == "old.yaml:5"
    assert [notice.split(" is ")[0] for notice in resolved.notices] == [
        "held_out (old.yaml:5)",
        "quantize.aware (old.yaml:4)",
        "held_out (command line)",
    ]


def test_both_names_in_one_place_and_unknown_keys_are_errors() -> None:
    with pytest.raises(SlimError, match=r"held_out \(test\) and forgetting are the same key"):
        from_values({**OLD, "forgetting": {"path": "b"}}, "old", "test")
    with pytest.raises(SlimError, match=r"held_outt.path .* is not a key"):
        from_values({"model": "m", "held_outt": {"path": "b"}}, "old", "test")
    with pytest.raises(SlimError, match=r"quantize.awar .* is not a key"):
        from_values({"model": "m", "quantize": {"awar": True}}, "old", "test")


@pytest.mark.parametrize("values", [{"quantize": 4}, {"quantize": None}, {}])
def test_a_section_that_is_none_is_left_to_the_schema(values: dict) -> None:
    assert rename(values, RECIPE) == (values, [])


def test_paths_below_a_renamed_key() -> None:
    assert current_path(("held_out", "path"), RECIPE) == ("forgetting", "path")
    assert current_path(("quantize", "aware"), RECIPE) == ("quantize", "qat")
    assert current_path(("quantize", "bits"), RECIPE) == ("quantize", "bits")
