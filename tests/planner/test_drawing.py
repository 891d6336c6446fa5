"""What answers cost that a run draws: the planned batch, its bytes, the tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mlx_slim.config.load import from_values
from mlx_slim.config.schema import Recipe
from mlx_slim.evaluation.scoring.footprint import planned_footprint
from mlx_slim.planner.drawing import ANSWERS, batch_of_answers, drawing_bytes, with_answers
from mlx_slim.planner.work import TrainingWork
from mlx_slim.reading import read_object
from mlx_slim.rewards.run import train
from tests.support.memory import peak_of
from tests.support.planner import config_of, recipe
from tests.support.runs import Recorder, write_rows
from tests.support.tiny import TinyModels

REWARD = """\
def length(prompts, completion_ids, **fields):
    return [len(ids) for ids in completion_ids]
"""


def draws(**values: Any) -> Recipe:
    return recipe("lora", reward={"group_size": 4}, **values)


@pytest.mark.parametrize("count", [1, 2, 7, 32])
def test_so_many_bytes_are_room_for_so_many_answers(count: int) -> None:
    footprint = planned_footprint(config_of(), 4)
    needed = footprint.batch_bytes(count, 300)
    assert footprint.answers(needed, 300, 0, False) == count
    assert count == 1 or footprint.answers(needed - 1024, 300, 0, False) == count - 1


def test_the_planned_batch_is_halved_until_it_fits() -> None:
    config, plan = config_of(), draws(train={"max_length": 1024})
    footprint = planned_footprint(config, 4)
    ample = drawing_bytes(config, plan, 4, None, 1 << 50)
    assert batch_of_answers(footprint, ample, 1024, ANSWERS) == ANSWERS
    little = drawing_bytes(config, plan, 4, None, ample * 6 // 10)
    assert batch_of_answers(footprint, little, 1024, ANSWERS) == ANSWERS // 2
    assert little <= ample * 6 // 10
    assert drawing_bytes(config, plan, 4, None, 0) == drawing_bytes(config, plan, 4, None, 1)
    assert drawing_bytes(config, plan, 4, [20, 30], 1 << 50) < ample  # shorter rows
    assert drawing_bytes(config, recipe("lora"), 4, None, 1 << 50) == 0


def test_every_answer_is_learned_from_and_drawn() -> None:
    work = TrainingWork(1000, 500, 50, "rows", supervised=0.4)
    assert with_answers(recipe("lora"), work) is work
    rewarded = with_answers(draws(), work)
    assert (rewarded.tokens, rewarded.drawn) == (4000, 1600)
    distill = {"method": "on-policy", "on_policy_fraction": 0.25, "teachers": [{"model": "x/y"}]}
    distilled = with_answers(recipe("lora", distill=distill), work)
    assert (distilled.tokens, distilled.drawn) == (1000, 100)


def test_a_plan_holds_what_is_drawn(tiny: TinyModels, tmp_path: Path) -> None:
    """Drawing is most of the peak here: 240 answers of up to 200 tokens."""
    (tmp_path / "score.py").write_text(REWARD)
    values: dict[str, Any] = {
        "model": str(tiny("llama")),
        "data": {"path": str(write_rows(tmp_path / "rows.jsonl", 12)), "validation": 0},
        "rounds": {"steps": 1, "max_tokens": 200},
        "reward": {"group_size": 20},
        "report_answers": 0,
        "train": {"steps": 1, "batch_tokens": 256, "max_length": 256, "warmup": 0},
    }
    out, reward = tmp_path / "run", f"{tmp_path / 'score.py'}:length"
    resolved = from_values(values, "small", "test")
    recorder = Recorder()
    _, peak = peak_of(lambda: train(resolved, out, observer=recorder, reward=reward))
    record = next(one.as_record() for one in recorder.events if one.name == "predicted")
    predicted = record["predicted_peak_bytes"]
    batch = read_object(out / "rounds" / "batch.json", batch_size=int)["batch_size"]
    assert batch >= ANSWERS
    assert peak < predicted, (peak, predicted)
