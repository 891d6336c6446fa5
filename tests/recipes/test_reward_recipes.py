"""Recipes that learn from rewards: true to their headers, and two steps with a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mlx_slim.cli import plan
from mlx_slim.config import library
from mlx_slim.config.load import load_recipe
from mlx_slim.errors import SlimError
from mlx_slim.planner.shipped_models import SHIPPED_CONFIGS
from mlx_slim.rewards.reward import reward_of
from mlx_slim.rewards.run import train
from tests.support.runs import Recorder
from tests.support.tiny import TinyModels

NAMES = ["qwen-coder-grpo", "smollm2-grpo"]
SMALL = [
    "train.steps=2",
    "train.batch_tokens=600",
    "train.max_length=600",
    "rounds={steps: 1, max_tokens: 4}",
    "reward.group_size=2",
    "data.max_rows=6",
    "data.validation=2",
]


@pytest.mark.parametrize("name", NAMES)
def test_header_planner_and_reward_agree(name: str) -> None:
    assert [one for one in library.names("recipes") if one.endswith("-grpo")] == NAMES
    text = library.find("recipes", name).read_text(encoding="utf-8")
    assert plan.cost_header(name) in text, f"the header should say:\n{plan.cost_header(name)}"
    recipe = load_recipe(name).recipe
    assert recipe.model in SHIPPED_CONFIGS and recipe.reward is not None
    task = reward_of(recipe.reward, None).tasks[0].name
    assert f"--task {task}" in text and f"mlx-slim train {name}" in text


@pytest.mark.parametrize("name", NAMES)
def test_two_steps_end_to_end(
    name: str, tiny: TinyModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "mirror" / "gsm8k"
    folder.mkdir(parents=True)
    for split in ("train", "test"):
        rows = [{"question": f"{split} {i}?", "answer": f"So {i}.\n#### {i}"} for i in range(8)]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{split}.jsonl").write_text(text)
    monkeypatch.setenv("MLX_SLIM_DATA", str(tmp_path / "mirror"))
    overrides = [f"model={tiny('llama-tied')}", "revision=null", *SMALL]
    recorder, out = Recorder(), tmp_path / "run"
    result = train(load_recipe(name, overrides), out, observer=recorder)
    assert result.done.step == 2
    assert [one.name for one in recorder.events].count("round") == 2
    if name == "qwen-coder-grpo":  # a question of the test split among the rows
        (folder / "train.jsonl").write_text((folder / "test.jsonl").read_text())
        with pytest.raises(SlimError, match=r"its question is one that gsm8k is scored on"):
            train(load_recipe(name, overrides), tmp_path / "other", observer=Recorder())
        assert not (tmp_path / "other").exists()
