"""A run that keeps the step with the best figure of a task, on rows that are not its test."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlx_slim import events
from mlx_slim.artifacts import load_tensors
from mlx_slim.config.load import Resolved, from_values
from mlx_slim.errors import Interrupted, SlimError
from mlx_slim.evaluation.run import EvalOptions, evaluate
from mlx_slim.finetuning import task_metric
from mlx_slim.finetuning.report import render
from mlx_slim.finetuning.run import finetune
from mlx_slim.training import rotation
from tests.support.runs import CtrlC, Recorder, losses, recipe, write_rows
from tests.support.tiny import TinyModels


@pytest.fixture
def mirror(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """OpenBookQA: 12 scored questions, 10 of validation, of which 2 are scored ones too."""
    folder = tmp_path / "mirror" / "openbookqa"
    folder.mkdir(parents=True)

    def row(split: str, i: int) -> dict[str, Any]:
        return {
            "question_stem": f"The {split} question number {i} is about",
            "choices": {"text": [f"thing {i}", "nothing"], "label": ["A", "B"]},
            "answerKey": "AB"[i % 2],
        }

    splits = {
        "test": [row("test", i) for i in range(12)],
        "validation": [row("validation", i) for i in range(8)] + [row("test", i) for i in (3, 4)],
    }
    for split, rows in splits.items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    monkeypatch.setenv("MLX_SLIM_DATA", str(folder.parent))
    return folder


def followed(model: Path, data: Path | None, **train: Any) -> Resolved:
    """A recipe of ten steps that measures after every second one."""
    values = recipe(model, data or Path("x")).recipe.model_dump(mode="json", exclude_none=True)
    values["train"] |= {"validate_task": "openbookqa", "validate_every": 2, **train}
    if data is None:
        path = [{"path": "task:openbookqa", "split": "validation", "limit": 3}]
        values["data"] = {"path": path, "template": "plain", "validation": 0}
    return from_values(values, "followed", "test")


def measured(recorder: Recorder) -> dict[int, events.TaskValidated]:
    return {e.step: e for e in recorder.events if isinstance(e, events.TaskValidated)}


def figures(monkeypatch: pytest.MonkeyPatch, values: list[float]) -> None:
    """Let the task have these figures, one after the other, whatever the model answers."""
    left = iter(values)
    monkeypatch.setattr(task_metric.TaskJob, "running", lambda self, records: ("acc", next(left)))


def test_no_question_is_scored_or_trained_on(
    mirror: Path, tiny: TinyModels, tmp_path: Path
) -> None:
    seen, out = Recorder(), tmp_path / "run"
    result = finetune(followed(tiny("llama"), None, steps=2), out, observer=seen)
    (told,) = [
        e.message
        for e in seen.events
        if isinstance(e, events.Notice) and "validating on" in e.message
    ]
    assert told.startswith(
        "validating on 5 of 10 questions of openbookqa (validation): 2 are test questions, 3 are "
        "trained on"
    )
    (event,) = measured(seen).values()
    assert (event.questions, event.metric, event.best) == (5, "acc_norm", True)
    assert result.done.best_task == event.value
    rest = [json.loads(line) for line in (mirror / "validation.jsonl").read_text().splitlines()]
    file = mirror.parent.parent / "rest.jsonl"  # what eval says of the same five questions
    file.write_text("".join(json.dumps(row) + "\n" for row in rest[3:8]))
    (mirror / "test.jsonl").write_text(file.read_text())
    options = EvalOptions(adapter=out / "adapters", num_fewshot=0)
    (scored,) = evaluate(str(tiny("llama")), ["openbookqa"], tmp_path / "scored", options)
    value = scored["tasks"]["openbookqa"]["metrics"]["acc_norm"]["value"]
    assert event.value == pytest.approx(value)


def test_the_kept_step_and_early_stopping_follow_the_figure(
    mirror: Path, tiny: TinyModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures(monkeypatch, [0.2, 0.6, 0.6, 0.4, 0.9])
    seen, out = Recorder(), tmp_path / "run"
    data = write_rows(tmp_path / "rows.jsonl")
    result = finetune(followed(tiny("llama"), data, early_stopping=2), out, observer=seen)
    done = result.done
    assert (done.reason, done.step) == ("early_stopping", 8)
    assert (done.best_task, done.best_step, done.result_step) == (0.6, 4, 4)
    assert [e.best for e in measured(seen).values()] == [True, True, False, False]
    validated = [e for e in seen.events if isinstance(e, events.ValidationDone)]
    assert done.best_validation == min(e.loss for e in validated)
    saved = load_tensors(out / "adapters" / "adapters.safetensors")
    best = load_tensors(rotation.path_of(out / "checkpoints", 4) / "weights.safetensors")
    assert all(mx.array_equal(saved[name], best[name]).item() for name in saved)
    page = render(out)
    assert "60.0% at step 4, which is kept" in page
    assert "Task: openbookqa, acc" in page
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [r["value"] for r in lines if r["event"] == "task_validation"] == [0.2, 0.6, 0.6, 0.4]


def test_it_needs_no_validation_rows_and_resumes_bit_for_bit(
    mirror: Path, tiny: TinyModels, tmp_path: Path
) -> None:
    data = write_rows(tmp_path / "rows.jsonl")
    values = followed(tiny("llama"), data, validate_limit=4).recipe.model_dump(mode="json")
    values["data"]["validation"] = 0
    resolved = from_values(values, "followed", "test")
    straight, out = tmp_path / "straight", tmp_path / "killed"
    finetune(resolved, straight, observer=Recorder())
    with pytest.raises(Interrupted):
        finetune(resolved, out, observer=CtrlC())
    finetune(resolved, out, observer=Recorder(), resume=True)
    assert losses(out) == losses(straight)

    def figures_of(run: Path) -> list[tuple[int, float, bool]]:
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        lines = [line for line in lines if line["event"] == "task_validation"]
        return [(line["step"], line["value"], line["best"]) for line in lines]

    assert figures_of(out) == figures_of(straight)
    assert [step for step, *_ in figures_of(out)] == [2, 4, 6, 8, 10]
    with pytest.raises(Interrupted):
        finetune(resolved, tmp_path / "other", observer=CtrlC())
    rows = (mirror / "validation.jsonl").read_text().replace("thing", "matter")
    (mirror / "validation.jsonl").write_text(rows)
    with pytest.raises(SlimError, match=r"questions of train.validate_task=openbookqa are others"):
        finetune(resolved, tmp_path / "other", observer=Recorder(), resume=True)


@pytest.mark.parametrize(
    ("train", "match"),
    [
        ({"validate_split": "test"}, "validate_split=test holds the rows that openbookqa is score"),
        ({"validate_task": "openbokqa"}, "no task is called 'openbokqa'"),
        ({"validate_task": "wikitext"}, "validate_task=wikitext has texts, no questions"),
        ({"validate_task": "arc_easy"}, "no rows but those that it is scored on"),
    ],
)
def test_a_task_without_other_questions_is_refused(
    mirror: Path, tiny: TinyModels, tmp_path: Path, train: dict[str, Any], match: str
) -> None:
    (mirror.parent / "ai2_arc").mkdir()  # a folder of the mirror is never completed from the hub
    (mirror.parent / "arc_easy").mkdir()
    out = tmp_path / "run"
    resolved = followed(tiny("llama"), write_rows(tmp_path / "rows.jsonl"), **train)
    with pytest.raises(SlimError, match=match):
        finetune(resolved, out, observer=Recorder())
    assert not (out / "run.json").exists()


def test_a_split_without_its_task_is_refused(tiny: TinyModels, tmp_path: Path) -> None:
    with pytest.raises(SlimError, match="validate_split=train is of validate_task"):
        data = tmp_path / "rows.jsonl"
        values = recipe(tiny("llama"), data).recipe.model_dump(mode="json", exclude_none=True)
        values["train"]["validate_split"] = "train"
        from_values(values, "x", "test")
