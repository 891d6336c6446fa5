"""The advice on ranks: where it applies, once, and nowhere else."""

from __future__ import annotations

from pathlib import Path

import pytest

from mlx_slim import events
from mlx_slim.adapters.advice import rank_advice
from mlx_slim.config.schema import AdapterConfig, Recipe
from mlx_slim.config.values import Method
from mlx_slim.finetuning.run import finetune
from tests.support.runs import Recorder, recipe, write_rows
from tests.support.tiny import TinyModels


@pytest.mark.parametrize(
    ("method", "rank", "steps", "applies"),
    [
        ("lora", 8, None, False),  # not known to be long
        ("lora", 8, 1000, True),
        ("lora", 8, 400, False),  # the demo: 0 intruders were counted after it
        ("qlora", 15, 1000, True),
        ("lora", 16, 1000, False),
        ("dora", 8, 999, False),
        ("full", 8, 1000, False),
    ],
)
def test_where_it_applies(method: Method, rank: int, steps: int | None, applies: bool) -> None:
    text = rank_advice(Recipe(model="m", method=method, adapter=AdapterConfig(rank=rank)), steps)
    assert bool(text) == applies
    assert "\n" not in text


def test_a_run_says_it_once(
    tiny: TinyModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlx_slim.adapters.advice.STEPS", 2)
    data, recorder = write_rows(tmp_path / "rows.jsonl"), Recorder()
    finetune(recipe(tiny("llama"), data, steps=3), tmp_path / "run", observer=recorder)
    notices = [e.message for e in recorder.events if isinstance(e, events.Notice)]
    assert [text for text in notices if "adapter.rank=16" in text] == notices
    assert len(notices) == 1
