"""Every preference recipe: true to its header, and it trains a tiny model of its architecture."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from click.testing import CliRunner
from mlx_lm import load

from mlx_slim.cli import plan, train
from mlx_slim.config import library
from mlx_slim.config.load import load_recipe
from mlx_slim.planner.shipped_models import SHIPPED_CONFIGS
from tests.support.preferences import labelled, pairs, write
from tests.support.tiny import TinyModels

NAMES = ["smollm2-dpo", "smollm2-orpo", "smollm2-kto", "tinyllama-dpo", "mistral-dpo"]
ARCHITECTURE = {"tinyllama": "llama", "mistral": "mistral", "smollm2": "llama-tied"}


def test_the_promised_recipes_exist() -> None:
    ends = ("-dpo", "-orpo", "-kto")
    assert sorted(NAMES) == [n for n in library.names("recipes") if n.endswith(ends)]


@pytest.mark.parametrize("name", NAMES)
def test_header_pins_and_loss(name: str) -> None:
    text = library.find("recipes", name).read_text(encoding="utf-8")
    assert plan.cost_header(name) in text, f"the header should say:\n{plan.cost_header(name)}"
    assert f"mlx-slim train {name}" in text
    recipe = load_recipe(name).recipe
    assert recipe.preference is not None
    expected = {"dpo": "sigmoid", "orpo": "orpo", "kto": "kto"}[name.rsplit("-", 1)[1]]
    assert recipe.preference.loss == expected
    assert recipe.method == ("qlora" if name == "mistral-dpo" else "lora")
    assert re.fullmatch(r"[0-9a-f]{40}", recipe.revision or "")
    assert recipe.model in SHIPPED_CONFIGS
    assert recipe.train.batch_tokens >= 2 * recipe.train.max_length  # the longest pair fits
    assert recipe.adapter.dropout == 0  # so that both answers share their prompt


@pytest.mark.parametrize("name", NAMES)
def test_two_steps_through_the_command(name: str, tiny: TinyModels, tmp_path: Path) -> None:
    model, out = tiny(ARCHITECTURE[name.split("-")[0]]), tmp_path / "run"
    rows = write(tmp_path / "rows.jsonl", labelled(12) if name.endswith("kto") else pairs(12))
    words = [
        name,
        *(f"model={model}", "revision=null", f"data.path={rows}", "data.validation=4"),
        *("train.steps=2", "train.accumulate=2", "train.max_length=128", "report_answers=0"),
        *("train.batch_tokens=256", "quantize.group_size=32", "-o", str(out), "--quiet"),
    ]
    assert CliRunner().invoke(train.command, words, catch_exceptions=False).exit_code == 0
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    steps = [line for line in lines if line["event"] == "step"]
    assert [line["step"] for line in steps] == [1, 2]
    assert "rewards/margins" in steps[0]["parts"]
    base = out / "base" if name == "mistral-dpo" else model
    load(str(base), adapter_path=str(out / "adapters"))
