"""``mlx-slim distill`` with teachers that write: from rows to a student, killed and resumed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlx_slim.adapters.store import load_adapter
from mlx_slim.config.load import Resolved, from_values
from mlx_slim.distillation.run import distill
from mlx_slim.errors import Interrupted, SlimError
from mlx_slim.events import Event
from mlx_slim.finetuning.run import finetune
from mlx_slim.models.load import load
from tests.support.endpoint import answers, serving
from tests.support.runs import Recorder, losses, run_until_killed, write_rows
from tests.support.tiny import fixed_answer_model, tiny_model

FLOWS, MINE = "It flows.", "By me!"


def resolved(
    model: Path,
    rows: Path,
    teachers: list[dict[str, Any]],
    method: str = "rationales",
    steps: int = 6,
    **distill_keys: Any,
) -> Resolved:
    values = {
        "model": str(model),
        "adapter": {"dropout": 0.1},
        "data": {"path": str(rows), "validation": 3, "template": "plain"},
        "distill": {
            "method": method,
            "teachers": teachers,
            "ask": {"retries": 0, "max_tokens": 16},
            **distill_keys,
        },
        "train": {
            "steps": steps, "batch_tokens": 256, "max_length": 128, "save_every": 2,
            "learning_rate": 1e-2, "validate_every": 3,
        },
    }  # fmt: skip
    return from_values(values, "small", "test")


@pytest.fixture(scope="module")
def writing_teachers(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    folder = tmp_path_factory.mktemp("writing_teachers")
    return [
        {"model": str(fixed_answer_model(folder / "flows", FLOWS)), "weight": 2.0},
        {"model": str(fixed_answer_model(folder / "mine", MINE)), "weight": 0.5},
    ]


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "rows.jsonl", 12)


def notices(seen: Recorder) -> str:
    return "\n".join(getattr(event, "message", "") for event in seen.events)


def test_two_writing_teacherswith_rationales(
    tiny: Callable[..., Path], writing_teachers: list[dict[str, Any]], rows: Path, tmp_path: Path
) -> None:
    out, seen = tmp_path / "run", Recorder()
    recipe = resolved(tiny("llama"), rows, writing_teachers)
    distill(recipe, out, observer=seen)
    record = json.loads((out / "run.json").read_text())
    assert record["status"] == "complete"
    assert record["distill"]["method"] == "rationales"
    assert [t["weight"] for t in record["distill"]["teachers"]] == [2.0, 0.5]
    assert [t["used"] for t in record["distill"]["teachers"]] == [9, 9]
    lines = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
    assert [line["generation"] for line in lines] == [FLOWS] * 9 + [MINE] * 9
    assert sorted(losses(out)) == list(range(1, 7))
    ledger = json.loads((out / "data_ledger.json").read_text())
    assert [s["path"] for s in ledger["sources"]] == [
        "dataset/0-data.jsonl", "dataset/0-1-flows.jsonl", "dataset/0-2-mine.jsonl",
    ]  # fmt: skip
    assert "rows: 12 read, 9 for training (3 for validation)" in notices(seen)
    load_adapter(load(str(tiny("llama"))).model, out / "adapters")
    distill(recipe, out, observer=seen, resume=True)
    assert f"{out} is complete" in notices(seen)


def test_a_different_tokenizer_means_training_on_texts(
    tmp_path: Path, writing_teachers: list[dict[str, Any]], rows: Path
) -> None:
    student = tiny_model(tmp_path / "student")
    file = student / "tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    a, b = sorted(vocabulary)[:2]
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    file.write_text(json.dumps(content))
    seen = Recorder()
    recipe = resolved(student, rows, writing_teachers[:1], "auto", weight=1.0)
    distill(recipe, tmp_path / "run", observer=seen)
    assert "training on texts (distill.method=sequence)" in notices(seen)
    record = json.loads((tmp_path / "run" / "run.json").read_text())["distill"]
    assert (record["method"], record["answer_weight"]) == ("sequence", 0.0)
    dataset = (tmp_path / "run" / "dataset" / "0-1-flows.jsonl").read_text().splitlines()
    assert {json.loads(line)["completion"] for line in dataset} == {FLOWS}


def test_a_teacher_that_fails_leaves_its_answers_and_the_run_resumes(
    tiny: Callable[..., Path], rows: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    broken = {"after": 4}

    def script(number: int, body: dict[str, Any]):
        return (500, b"", {}) if number >= broken["after"] else answers(number, body)

    with serving(script) as served:
        teachers = [{"model": "m", "name": "t", "base_url": served.base_url}]
        recipe = resolved(tiny("llama"), rows, teachers, ask={"retries": 0, "concurrency": 1})
        with pytest.raises(SlimError, match="500 Internal Server Error"):
            distill(recipe, out, observer=Recorder())
        assert len((out / "answers.jsonl").read_text().splitlines()) == 4
        with pytest.raises(SlimError, match="holds a run already"):
            distill(recipe, out, observer=Recorder())
        broken["after"] = 10**6
        distill(recipe, out, observer=Recorder(), resume=True)
        assert len(served.requests) == 4 + 1 + 5
    assert (out / "run.json").exists()


def test_what_cannot_work_leaves_no_folder(
    tiny: Callable[..., Path], writing_teachers: list[dict[str, Any]], rows: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    for recipe, what in (
        (resolved(tmp_path / "none", rows, writing_teachers), "none"),
        (resolved(tiny("llama"), tmp_path / "none.jsonl", writing_teachers), "none.jsonl"),
        (resolved(tiny("llama"), rows, [{"model": str(tmp_path / "who")}]), "who"),
        (
            resolved(tiny("llama"), rows, [writing_teachers[0], writing_teachers[0]]),
            "give each a name",
        ),
    ):
        with pytest.raises(SlimError) as caught:
            distill(recipe, out, observer=Recorder())
        assert what in caught.value.message + caught.value.hint
        assert not out.exists()


class CtrlC(Recorder):
    """Raises what Ctrl-C raises when the second teacher is about to write."""

    def notify(self, event: Event) -> None:
        super().notify(event)
        if "teacher 2 of 2" in getattr(event, "message", ""):
            raise KeyboardInterrupt


def test_ctrl_c_while_writing_teacherswrite(
    tiny: Callable[..., Path], writing_teachers: list[dict[str, Any]], rows: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    recipe = resolved(tiny("llama"), rows, writing_teachers)
    with pytest.raises(Interrupted, match="those so far are saved") as caught:
        distill(recipe, out, observer=CtrlC())
    assert "mlx-slim distill" in caught.value.hint and "--resume" in caught.value.hint
    distill(recipe, out, observer=Recorder(), resume=True)
    assert (out / "run.json").exists()


KILLED = """
import os, signal, sys
from pathlib import Path
from mlx_slim.distillation import dataset
from mlx_slim.distillation.run import distill
from tests.distillation.test_text import resolved

if sys.argv[6:] == ["0.1"]:  # the names of the files then
    dataset.FOLDER, dataset.RECORD = dataset.OLD_FOLDER, dataset.OLD_RECORD

class Observer:
    def notify(self, event):
        if event.name == "step" and event.step == 3:
            os.kill(os.getpid(), signal.SIGKILL)

model, rows, first, second, out = sys.argv[1:6]
teachers = [{"model": first, "weight": 2.0}, {"model": second, "weight": 0.5}]
distill(resolved(model, rows, teachers), Path(out), observer=Observer())
"""


@pytest.fixture(scope="module")
def straight(
    tiny: Callable[..., Path],
    writing_teachers: list[dict[str, Any]],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, Path]:
    """Rows, and the folder of a run over them that was not interrupted."""
    folder = tmp_path_factory.mktemp("straight")
    rows = write_rows(folder / "rows.jsonl", 12)
    distill(resolved(tiny("llama"), rows, writing_teachers), folder / "run", observer=Recorder())
    return rows, folder / "run"


@pytest.mark.parametrize("version", ["now", "0.1"])
def test_killed_in_training_and_resumed_is_the_same_to_the_bit(
    tiny: Callable[..., Path],
    writing_teachers: list[dict[str, Any]],
    straight: tuple[Path, Path],
    tmp_path: Path,
    version: str,
) -> None:
    rows, uninterrupted = straight
    out, seen = tmp_path / "killed", Recorder()
    models = [teacher["model"] for teacher in writing_teachers]
    run_until_killed(KILLED, tiny("llama"), rows, *models, out, version)
    old = version == "0.1"
    assert (out / "taught" / "0-data.jsonl").is_file() is old
    assert (out / "teaching.json").is_file() is old
    distill(resolved(tiny("llama"), rows, writing_teachers), out, observer=seen, resume=True)
    assert losses(out) == losses(uninterrupted)
    stored = [folder / "answers.jsonl" for folder in (out, uninterrupted)]
    assert stored[0].read_bytes() == stored[1].read_bytes()
    assert notices(seen).count("are names of mlx-slim 0.1 and still read") == old
    assert (out / "dataset").exists() is not old


def test_an_edit_after_training_began_is_refused(
    tiny: Callable[..., Path], writing_teachers: list[dict[str, Any]], rows: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    recipe = resolved(tiny("llama"), rows, writing_teachers)
    distill(recipe, out, observer=Recorder())
    (out / "run.json").unlink()
    file = out / "answers.jsonl"
    file.write_text(file.read_text().replace(FLOWS, "It goes.", 1))
    with pytest.raises(SlimError, match="changed since it was started"):
        distill(recipe, out, observer=Recorder(), resume=True)


def test_train_refuses_a_recipe_with_teachers(
    tiny: Callable[..., Path], writing_teachers: list[dict[str, Any]], rows: Path, tmp_path: Path
) -> None:
    with pytest.raises(SlimError, match="has teachers") as caught:
        finetune(
            resolved(tiny("llama"), rows, writing_teachers), tmp_path / "x", observer=Recorder()
        )
    assert "mlx-slim distill" in caught.value.hint
