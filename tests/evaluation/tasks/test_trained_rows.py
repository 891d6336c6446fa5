"""Training on a task's rows: never on the whole scored split, declared, and counted when scored."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mlx_slim.config.load import from_values
from mlx_slim.config.schema import QuantizeConfig, SourceConfig
from mlx_slim.errors import SlimError
from mlx_slim.evaluation.run import EvalOptions, evaluate
from mlx_slim.evaluation.tasks.spec import find_task
from mlx_slim.evaluation.tasks.training_rows import finder
from mlx_slim.events import Notice
from mlx_slim.export.fuse import FuseOptions, fuse
from mlx_slim.finetuning.run import finetune
from mlx_slim.models.lineage import trained_keys
from mlx_slim.pruning.options import PruneOptions
from mlx_slim.pruning.run import prune
from mlx_slim.quantization.run import CompressOptions, compress
from tests.support.evals import write_tasks
from tests.support.runs import Recorder


@pytest.fixture
def mirror(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """OpenBookQA with 12 scored and 8 training questions."""
    folder = tmp_path / "mirror" / "openbookqa"
    folder.mkdir(parents=True)
    for split, count in (("test", 12), ("train", 8)):
        rows = [
            {
                "question_stem": f"The {split} question number {i} is about",
                "choices": {"text": [f"thing {i}", "nothing"], "label": ["A", "B"]},
                "answerKey": "AB"[i % 2],
            }
            for i in range(count)
        ]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{split}.jsonl").write_text(text)
    monkeypatch.setenv("MLX_SLIM_DATA", str(folder.parent))
    return folder


def source(split: Any = "train", **more: Any) -> SourceConfig:
    return SourceConfig(path="task:openbookqa", split=split, **more)


def test_rows_are_written_once_and_declared(mirror: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    raw_rows = finder(out)(source(skip=2, limit=3))
    rows = [raw.value for raw in raw_rows]
    assert [row["prompt"] for row in rows] == [
        f"The train question number {i} is about" for i in (2, 3, 4)
    ]
    record = json.loads((out / "training_rows.json").read_text())["sources"][0]
    assert (record["task"], record["split"], record["rows"]) == ("openbookqa", "train", [2, 3, 4])
    assert record["scored_split"] is False
    assert record["keys"] == [row["key"] for row in rows]
    for file in mirror.iterdir():  # a resume needs them no more
        file.unlink()
    assert [raw.value for raw in finder(out)(source(skip=2, limit=3))] == rows
    with pytest.raises(SlimError):
        finder(out)(source(skip=2, limit=4))


def test_the_scored_split_is_not_taken_whole(mirror: Path, tmp_path: Path) -> None:
    with pytest.raises(SlimError, match="whose rows are scored") as caught:
        finder(tmp_path / "run")(source("test"))
    assert "skip: 250, limit: 50" in caught.value.hint
    assert not (tmp_path / "run").exists()
    assert len(list(finder(tmp_path / "run")(source("test", skip=9)))) == 3
    with pytest.raises(SlimError, match="leaves none of the 12 rows"):
        finder(tmp_path / "run")(source("test", skip=12))


def test_a_task_s_other_names_are_errors(mirror: Path, tmp_path: Path) -> None:
    with pytest.raises(SlimError, match="no task is called 'openbokqa'") as caught:
        finder(tmp_path)(SourceConfig(path="task:openbokqa"))
    assert "openbookqa" in caught.value.hint


def run(model: Any, tmp_path: Path, split: Any, method: Any = "lora", **more: Any) -> Path:
    values = {
        "model": str(model),
        "method": method,
        "data": {
            "path": [{"path": "task:openbookqa", "split": split, **more}],
            "template": "plain",
            "validation": 0,
        },
        "train": {"steps": 1, "batch_tokens": 128, "max_length": 64},
    }
    out = tmp_path / f"run-{split}"
    finetune(from_values(values, "small", "test"), out, observer=Recorder())
    return out


def test_scoring_counts_the_questions_that_were_trained_on(
    mirror: Path, tiny: Callable[..., Path], tmp_path: Path
) -> None:
    model = tiny("llama")
    out = run(model, tmp_path, "test", skip=8, limit=3)
    ledger = json.loads((out / "data_ledger.json").read_text())
    assert ledger["sources"][0]["path"] == "task:openbookqa"
    assert ledger["totals"]["rows_used"] == 3

    def score(name: str, **options: Any):
        seen = Recorder()
        (result,) = evaluate(
            model, "openbookqa", tmp_path / name, EvalOptions(**options), observer=seen
        )
        warnings = [
            e.message for e in seen.events if isinstance(e, Notice) and e.level == "warning"
        ]
        return result["tasks"]["openbookqa"], warnings

    section, warnings = score("all", adapter=out / "adapters")
    assert section["trained_on"] == {"questions": 3, "runs": ["run-test"]}
    assert warnings == [
        "openbookqa: 3 of the 12 questions were trained on in run-test",
    ]
    assert score("few", adapter=out / "adapters", limit=10)[0]["trained_on"]["questions"] == 2
    # Disjoint rows, and an untrained model, are not warned of.
    for section, warnings in (
        score("disjoint", adapter=out / "adapters", limit=8),
        score("base"),
    ):
        assert "trained_on" not in section
        assert warnings == []


def test_a_model_derived_from_a_trained_one_declares_its_rows(
    mirror: Path, tiny: Callable[..., Path], tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("to be or not to be that is the question\n" * 40)
    model = tiny("llama")
    adapters = run(model, tmp_path, "test", skip=8, limit=3) / "adapters"
    keys = trained_keys([adapters]).keys()
    assert len(keys) == 3
    models = {name: tmp_path / name for name in ("fused", "kept", "narrow", "rounded")}
    dense = FuseOptions(calibration=str(text), length=16)
    fuse(model, adapters, models["fused"], dense)
    fuse(model, adapters, models["kept"], replace(dense, mode="keep"))
    half = PruneOptions(ratio=0.5, method="l2", calibration=str(text), length=16, held_out=16)
    prune(models["fused"], models["narrow"], half)
    four_bit = CompressOptions(QuantizeConfig(group_size=32), fidelity_samples=0)
    compress(models["narrow"], models["rounded"], four_bit)
    again = run(models["fused"], tmp_path, "train", "full")
    for name in ("fused", "narrow", "rounded"):
        assert trained_keys([models[name]]).keys() == keys, name
    # Base and adapter side by side: it is the adapter that was trained on them.
    assert not trained_keys([models["kept"]])
    assert trained_keys([models["kept"] / "adapters"]).keys() == keys
    assert trained_keys([again / "model"]).keys() > keys
    assert not trained_keys([model])


def test_rows_of_the_training_split_are_none_of_the_scored_ones(
    mirror: Path, tiny: Callable[..., Path], tmp_path: Path
) -> None:
    out = run(tiny("llama"), tmp_path, "train")
    (result,) = evaluate(
        tiny("llama"), "openbookqa", tmp_path / "scores", EvalOptions(adapter=out / "adapters")
    )
    assert "trained_on" not in result["tasks"]["openbookqa"]
    assert len(trained_keys([out / "adapters"])) == 8


def test_a_resume_refuses_rows_that_were_changed(
    mirror: Path, tiny: Callable[..., Path], tmp_path: Path
) -> None:
    out = run(tiny("llama"), tmp_path, "train")
    (out / "run.json").unlink()
    file = next((out / "task_rows").iterdir())
    file.write_text(file.read_text().replace("thing 3", "thing 33"))
    recipe = json.loads((out / "recipe.json").read_text())["recipe"]
    with pytest.raises(SlimError, match=r"changed since it was started.*sha256"):
        finetune(from_values(recipe, "small", "test"), out, observer=Recorder(), resume=True)


def test_a_users_task_with_subtasks(tmp_path: Path, tiny: Callable[..., Path]) -> None:
    choice, _, _ = write_tasks(tmp_path / "tasks")
    raw_rows = finder(tmp_path / "run")(SourceConfig(path=f"task:{choice}", skip=20, limit=2))
    assert [raw.value["id"] for raw in raw_rows] == ["toy_choice/train/20", "toy_choice/train/21"]
    assert find_task(str(choice)).name == "toy_choice"
