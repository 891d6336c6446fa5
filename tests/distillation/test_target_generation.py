"""Targets are computed of the rows that a run reads, and of no others."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from mlx_slim.config.load import Resolved
from mlx_slim.data.batches import Batcher
from mlx_slim.distillation.run import distill
from mlx_slim.distillation.target_cache import target_layout
from mlx_slim.distillation.target_generation import TargetSet
from mlx_slim.events import Notice
from tests.distillation.test_on_policy import small_recipe
from tests.distillation.test_run import recipe_with_teachers
from tests.support.rows import MemoryRows
from tests.support.runs import Recorder, losses, write_rows
from tests.support.tiny import VOCAB, TinyModels, tiny_model

ROWS = 40


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "rows.jsonl", count=ROWS + 4)


def run(resolved: Resolved, out: Path, *, resume: bool = False) -> list[str]:
    recorder = Recorder()
    distill(resolved, out, observer=recorder, resume=resume)
    return [event.message for event in recorder.events if isinstance(event, Notice)]


def computed(out: Path, rows: int = ROWS) -> int:
    """Return of how many of the training rows there are targets."""
    marks = [np.fromfile(file, np.uint8) for file in out.glob("targets/*/done.bin")]
    return sum(int(of_set.sum()) for of_set in marks if len(of_set) == rows)


@pytest.mark.parametrize("method", ["logits", "uld"])
def test_rows_that_no_step_reads_have_no_targets(
    tiny: TinyModels, rows: Path, tmp_path: Path, method: str
) -> None:
    teacher = {"model": str(tiny_model(tmp_path / "teacher", seed=3))}

    def steps(count: int) -> Resolved:
        train = {"steps": count, "schedule": "constant", "warmup": 1, "save_every": 1}
        return recipe_with_teachers(tiny("llama"), rows, [teacher], train=train, method=method)

    straight, out = tmp_path / "straight", tmp_path / "run"
    every = run(steps(20), straight)
    assert computed(straight) == ROWS and not any("no step reads" in text for text in every)
    few = run(steps(2), out)
    read = computed(out)
    assert 0 < read < ROWS
    assert any(f"none of {ROWS - read} rows that no step reads" in text for text in few)
    record = json.loads((out / "run.json").read_text())["distill"]
    whole = json.loads((straight / "run.json").read_text())["distill"]
    assert 0 < record["cache_bytes"] < whole["cache_bytes"]
    assert run(steps(2), out, resume=True)[-1].endswith("nothing to do")
    run(steps(20), out, resume=True)
    assert computed(out) == ROWS
    assert losses(out) == losses(straight)


def test_rows_are_numbered_among_those_of_the_data(tmp_path: Path) -> None:
    """A teacher of another tokenizer reads the aligned rows alone."""
    layout = target_layout(MemoryRows([5, 9]), 4, VOCAB)
    batches = Batcher(MemoryRows([5, 9]), 64, 32, "grouped", seed=0)
    targets = TargetSet(layout, {}, tmp_path, batches, among_N=np.array([True, False, True]))
    targets.need(np.array([False, True, True]))
    assert targets.needed_R is not None and targets.needed_R.tolist() == [False, True]
    targets.need(np.array([False, True, False]))
    assert targets.rows == targets.nbytes == 0 and targets.complete


def test_rows_that_answers_replace_have_no_targets(
    tiny: TinyModels, rows: Path, tmp_path: Path
) -> None:
    teacher = tiny_model(tmp_path / "teacher", seed=3)
    half = small_recipe(tiny("llama"), teacher, rows, on_policy_fraction=0.5)
    all_of_them = small_recipe(tiny("llama"), teacher, rows, on_policy_fraction=1.0)
    none = small_recipe(tiny("llama"), teacher, rows, on_policy_fraction=0)
    run(half, tmp_path / "half")
    run(all_of_them, tmp_path / "all")
    run(none, tmp_path / "none")
    counts = [computed(tmp_path / name, ROWS + 2) for name in ("all", "half", "none")]
    assert counts[0] == 0 and counts[1] > 0 and counts == sorted(counts)
    assert counts[1] < counts[2]
