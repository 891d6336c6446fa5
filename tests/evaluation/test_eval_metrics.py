"""A task may keep any of its metrics, alone or first: scored, watched, compared, reported."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from mlx_slim.compare.store import load_answers
from mlx_slim.evaluation import jobs
from mlx_slim.evaluation.comparison import compare
from mlx_slim.evaluation.run import EvalOptions, evaluate
from mlx_slim.events import EvalProgress
from mlx_slim.pruning.records import ModelRow
from mlx_slim.pruning.report import task_figures, with_recovery
from tests.support.evals import CHUNK, samples_of, write_tasks
from tests.support.runs import Recorder


def _task(folder: Path, metrics: list[str], grouped: bool) -> Path:
    file = write_tasks(folder)[0]
    spec = yaml.safe_load(file.read_text())
    if not grouped:
        del spec["subgroups"]
    file.write_text(yaml.safe_dump({**spec, "metrics": metrics}))
    return file


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize(
    ("metrics", "first", "paired"),
    [
        (["macro_f1"], "macro_f1", ["acc"]),
        (["macro_f1", "acc"], "acc", ["acc"]),
        (["acc_norm", "macro_f1"], "acc_norm", ["acc_norm"]),
    ],
)
def test_any_metric_alone_or_first(
    tiny: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    metrics: Any,
    first: str,
    paired: Any,
    grouped: bool,
) -> None:
    monkeypatch.setattr(jobs, "CHOICE_CHUNK", CHUNK)
    task = _task(tmp_path / "task", metrics, grouped)
    recorder = Recorder()
    outs = [tmp_path / "out0", tmp_path / "out1"]
    for out, model in zip(outs, ("llama", "mistral"), strict=True):
        evaluate(tiny(model), [str(task)], out, EvalOptions(), observer=recorder)
    out = outs[-1]
    section = json.loads((out / "results.json").read_text())["tasks"]["toy_choice"]
    assert list(section["metrics"]) == metrics
    seen = [event for event in recorder.events if isinstance(event, EvalProgress)]
    assert {event.metric for event in seen} == {first}
    assert seen[-1].value == pytest.approx(section["metrics"][first]["value"])
    rows = compare(*outs).rows
    assert [row.metric for row in rows] == paired
    assert rows[0].verdict
    right_N = load_answers(out, "toy_choice").right_N
    assert list(right_N) == paired
    assert right_N[paired[0]].tolist() == [s[paired[0]] for s in samples_of(out, "toy_choice")]
    figures = task_figures(json.loads((out / "results.json").read_text()), out)
    (row,) = with_recovery([ModelRow("original", 1, 1, 0, figures)])
    assert set(row.tasks["toy_choice"].recovery) == set(metrics)
