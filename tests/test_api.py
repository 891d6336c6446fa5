"""The functions: lazy imports, names that are packages too."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import mlx_slim
from mlx_slim.config.load import load_recipe
from mlx_slim.errors import SlimError

ROOT = Path(__file__).parents[1]


def test_the_guide_shows_every_function() -> None:
    """Its examples run in ``tests/docs/test_blocks.py``."""
    text = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    for name in ("choose", "distill", "evaluate", "finetune", "plan", "prune", "quantize", "slim"):
        assert f"{name}(" in text, name


def test_importing_the_package_brings_nothing_heavy() -> None:
    code = (
        "import sys, mlx_slim\n"
        "heavy = {'mlx.core', 'mlx_lm', 'numpy', 'click', 'mlx_slim.api'} & set(sys.modules)\n"
        "print(sorted(heavy))\n"
        "from mlx_slim import distill, evaluate, prune, quantize\n"
        "print(callable(distill), callable(evaluate), callable(prune), callable(quantize))\n"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, check=True, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines() == ["[]", "True True True True"]


def test_a_recipe_may_be_a_name_a_file_values_or_resolved(
    tiny: Callable[..., Path], tmp_path: Path
) -> None:
    plan = mlx_slim.plan
    values = {"model": str(tiny("llama")), "data": {"path": "x"}, "train": {"batch_tokens": 1024}}
    changed = {"train.batch_tokens": 512, "method": "qlora", "quantize.group_size": 32}
    (tmp_path / "mine.yaml").write_text(json.dumps(values))
    actual = [
        plan(recipe, overrides=changed, budget="1GB")
        for recipe in (values, tmp_path / "mine.yaml", load_recipe(str(tmp_path / "mine.yaml")))
    ]
    assert len({f.predicted_peak_bytes for f in actual}) == 1
    assert actual[0].predicted_peak_bytes < plan(values, budget="1GB").predicted_peak_bytes
    assert actual[0].budget_bytes == 10**9
    assert values["train"] == {"batch_tokens": 1024}  # the caller's values stay
    assert plan("tinyllama-lora", mac="M2 16GB").fits


def test_errors_are_those_of_the_commands(tmp_path: Path) -> None:
    with pytest.raises(SlimError, match="no Mac 'm9'"):
        mlx_slim.plan("tinyllama-lora", mac="m9")
    with pytest.raises(SlimError, match="stepz"):
        mlx_slim.plan("tinyllama-lora", overrides={"train.stepz": 3})
    with pytest.raises(SlimError):
        mlx_slim.quantize(tmp_path / "absent", tmp_path / "out")
    with pytest.raises(AttributeError, match="no attribute 'finetunes'"):
        mlx_slim.finetunes  # noqa: B018
