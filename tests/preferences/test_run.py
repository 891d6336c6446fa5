"""Whole preference runs on tiny models: what they learn, write, report, resume and validate."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_slim import events
from mlx_slim.artifacts import load_tensors
from mlx_slim.cli.main import run as command
from mlx_slim.errors import Interrupted, SlimError
from mlx_slim.finetuning.build import Tuned, prepare_data
from mlx_slim.finetuning.report import write_page
from mlx_slim.finetuning.run import finetune
from mlx_slim.models.load import load
from mlx_slim.preferences import strategy
from mlx_slim.preferences.run import train, validate_labels, validate_pairs
from tests.support.preferences import labelled, pairs, preference_recipe, write
from tests.support.runs import CtrlC, Recorder, losses, run_until_killed
from tests.support.tiny import TinyModels

REWARDS = {"rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("rows") / "pairs.jsonl", pairs())


@pytest.fixture(scope="module")
def labels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("rows") / "labels.jsonl", labelled())


@pytest.fixture(scope="module")
def complete(tiny: TinyModels, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DPO run in which a notice was taken down."""
    out = tmp_path_factory.mktemp("run") / "dpo"
    recorder = Recorder()
    train(preference_recipe(tiny("llama"), data), out, observer=recorder)
    notices = [e.message for e in recorder.events if isinstance(e, events.Notice)]
    (out.parent / "notices.txt").write_text("\n".join(notices))
    return out


def _events(out: Path, name: str) -> list[dict[str, Any]]:
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["event"] == name]


@pytest.mark.parametrize("method", ["full", "qlora", "dora"])
def test_the_reference_is_the_model_before_its_first_step(
    tiny: TinyModels, data: Path, tmp_path: Path, method: str
) -> None:
    out = tmp_path / "run"
    train(preference_recipe(tiny("llama"), data, method=method), out, observer=Recorder())
    steps = losses(out)
    assert steps[1] == pytest.approx(math.log(2), abs=2e-6)
    assert steps[4] < 0.65
    record = json.loads((out / "run.json").read_text())
    assert record["status"] == "complete"
    expected = {"loss": "sigmoid", "rows": "pairs", "train": 20, "validation": 4}
    assert record["preference"] == expected
    assert (out / "model").is_dir() == (method == "full")


@pytest.mark.parametrize("loss", ["ipo", "robust", "orpo", "simpo", "kto"])
def test_every_loss_falls_and_reports(
    tiny: TinyModels, data: Path, labels: Path, tmp_path: Path, loss: str
) -> None:
    out, rows = tmp_path / "run", labels if loss == "kto" else data
    train(preference_recipe(tiny("llama"), rows, loss, steps=6), out, observer=Recorder())
    steps, (validation,) = _events(out, "step"), _events(out, "validation")[-1:]
    more = {"kto": {"kl"}, "orpo": {"policy/accuracies", "nll_loss"}}
    expected = REWARDS | more.get(loss, {"policy/accuracies"})
    assert all(event["parts"].keys() == expected for event in steps)
    assert validation["parts"].keys() == expected
    assert steps[-1]["loss"] < steps[0]["loss"]
    assert steps[-1]["parts"]["rewards/margins"] > steps[0]["parts"]["rewards/margins"]
    assert (out / "reference").is_dir() == (loss not in ("orpo", "simpo"))


def test_what_the_run_says(complete: Path) -> None:
    notices = (complete.parent / "notices.txt").read_text()
    assert "fewer positions are computed" in notices
    assert "before training, the chosen answer has the higher mean log-probability in" in notices
    ledger = json.loads((complete / "data_ledger.json").read_text())
    assert ledger["split"]["train_rows"] == 20
    assert ledger["split"]["validation_rows"] == 4
    assert ledger["totals"]["rows_used"] == 24
    page = write_page(complete).read_text()
    for title in ("Loss, a pair", "Reward margin", "Rewards", "Accuracy: the chosen answer"):
        assert f"<h3>{title}" in page
    assert "preferences (sigmoid)" in page


def test_shared_prompts_change_no_loss(
    tiny: TinyModels, data: Path, complete: Path, tmp_path: Path
) -> None:
    out = tmp_path / "plain"
    plain = preference_recipe(tiny("llama"), data, prefix_sharing=False)
    train(plain, out, observer=Recorder())
    assert losses(out) == pytest.approx(losses(complete), rel=1e-5)
    computed = [sum(e["computed_tokens"] for e in _events(run, "step")) for run in (complete, out)]
    assert computed[0] < 0.75 * computed[1]


def _same_run(out: Path, straight: Path) -> None:
    assert losses(out) == losses(straight)
    for folder in ("adapters", "reference"):
        files = sorted((straight / folder).iterdir())
        assert [file.name for file in files] == sorted(f.name for f in (out / folder).iterdir())
        for file in files:
            if file.suffix == ".safetensors":
                ours, theirs = load_tensors(file), load_tensors(out / folder / file.name)
                assert all(mx.array_equal(ours[key], theirs[key]).item() for key in ours)
            elif file.suffix == ".bin":
                assert file.read_bytes() == (out / folder / file.name).read_bytes()


KILL = """
import os, signal, sys
from pathlib import Path
from mlx_slim.preferences import reference
from mlx_slim.preferences.run import train
from tests.support.preferences import preference_recipe

model, data, out, moment = sys.argv[1:5]

def die():
    os.kill(os.getpid(), signal.SIGKILL)

class Observer:
    def notify(self, event):
        if moment == "step" and event.name == "step" and event.step == 3:
            die()

if moment == "reference":
    write = reference.fsync
    calls = []
    def fsync(number):
        write(number)
        calls.append(number)
        if len(calls) == 2:
            die()
    reference.fsync = fsync
train(preference_recipe(Path(model), Path(data), batch_tokens=128, save_every=2), Path(out),
      observer=Observer(), resume=Path(out).exists())
"""


def test_killed_and_resumed_equals_uninterrupted(
    tiny: TinyModels, data: Path, tmp_path: Path
) -> None:
    small = preference_recipe(tiny("llama"), data, batch_tokens=128, save_every=2)
    straight, out = tmp_path / "straight", tmp_path / "killed"
    train(small, straight, observer=Recorder())
    run_until_killed(KILL, tiny("llama"), data, out, "reference")
    assert [file.suffix for file in (out / "reference").iterdir()] == [".part"]
    run_until_killed(KILL, tiny("llama"), data, out, "step")
    assert not (out / "run.json").exists()
    train(small, out, observer=Recorder(), resume=True)
    _same_run(out, straight)


@pytest.mark.parametrize("loss", ["orpo", "kto"])
def test_stopped_and_resumed_equals_uninterrupted(
    tiny: TinyModels, data: Path, labels: Path, tmp_path: Path, loss: str
) -> None:
    rows = labels if loss == "kto" else data
    adapter = {"dropout": 0.1}
    small = preference_recipe(tiny("llama"), rows, loss, save_every=2, adapter=adapter)
    straight, out = tmp_path / "straight", tmp_path / "stopped"
    train(small, straight, observer=Recorder())
    with pytest.raises(Interrupted, match="after step 2 of 4"):
        train(small, out, observer=CtrlC(2))
    train(small, out, observer=Recorder(), resume=True)
    if loss == "kto":
        _same_run(out, straight)
    assert losses(out) == losses(straight)


def test_stopped_while_the_reference_is_scored(
    tiny: TinyModels,
    data: Path,
    complete: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Stopped(strategy.StopRequest):
        @property
        def requested(self) -> bool:
            return True

        @requested.setter
        def requested(self, value: bool) -> None:
            """Stay requested."""

    small = preference_recipe(tiny("llama"), data)
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(strategy, "StopRequest", Stopped)
        with pytest.raises(Interrupted, match="the targets so far are saved"):
            train(small, out, observer=Recorder())
    train(small, out, observer=Recorder(), resume=True)
    _same_run(out, complete)


def test_validate_tells_how_many_pairs_a_model_has_the_right_way_round(
    tiny: TinyModels, data: Path, complete: Path, tmp_path: Path, capsys: Any
) -> None:
    resolved = preference_recipe(tiny("llama"), data)
    accuracy = validate_pairs(resolved.recipe)
    assert accuracy.pairs == 4
    counted = f"{accuracy.accuracy:.1%} of 4 validation pairs"
    assert counted in (complete.parent / "notices.txt").read_text()
    recipe = tmp_path / "small.yaml"
    recipe.write_text(json.dumps(resolved.recipe.model_dump(mode="json", exclude_unset=True)))
    capsys.readouterr()
    assert command(["train", str(recipe), "--validate"]) == 0
    assert counted in capsys.readouterr().out
    assert command(["train", str(recipe), "--validate", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["accuracy"] == accuracy.accuracy
    with pytest.raises(SlimError, match="no validation rows"):
        validate_pairs(preference_recipe(tiny("llama"), data, data={"validation": 0}).recipe)


def test_validate_tells_desirable_rows_from_the_others(
    tiny: TinyModels, labels: Path, tmp_path: Path, capsys: Any
) -> None:
    recipe = preference_recipe(tiny("llama"), labels, "kto", data={"validation": 9}).recipe
    separated = validate_labels(recipe)
    loaded = load(tiny("llama"), dtype=mx.float32)
    rows = prepare_data(recipe, Tuned(loaded, loaded.config, None, 0), tmp_path, unchanged=False)
    assert rows.validation is not None and rows.validation.labels is not None
    means = []
    for number in range(9):
        ids_T, supervised_T = rows.validation.row(number)
        logits_TV = np.array(loaded.model(mx.array(ids_T[None]))[0], np.float64)
        logs_TV = logits_TV - np.logaddexp.reduce(logits_TV, axis=-1, keepdims=True)
        at = np.flatnonzero(supervised_T)
        means.append(logs_TV[at - 1, ids_T[at]].mean())
    desirable = [m for m, label in zip(means, rows.validation.labels, strict=True) if label]
    others = [m for m, label in zip(means, rows.validation.labels, strict=True) if not label]
    assert (separated.desirable, separated.undesirable) == (len(desirable), len(others))
    right = [one > other for one in desirable for other in others]
    assert separated.accuracy == pytest.approx(np.mean(right))
    assert separated.margin == pytest.approx(np.mean(desirable) - np.mean(others), abs=1e-4)
    file = tmp_path / "small.yaml"
    file.write_text(json.dumps(recipe.model_dump(mode="json", exclude_unset=True)))
    capsys.readouterr()
    assert command(["train", str(file), "--validate"]) == 0
    assert f"in {separated.accuracy:.1%} of {len(right)} comparisons" in capsys.readouterr().out
    (tmp_path / "one.jsonl").write_text('{"prompt": "a", "completion": "b", "label": true}\n')
    alike = {"validation": str(tmp_path / "one.jsonl")}
    one = preference_recipe(tiny("llama"), labels, "kto", data=alike)
    with pytest.raises(SlimError, match="1 validation rows have label true and 0 have false"):
        validate_labels(one.recipe)
    with pytest.raises(SlimError, match="there is 1 validation row"):  # no answer of another one
        train(one, tmp_path / "run", observer=Recorder())


def test_the_adapter_alone_makes_the_difference(
    tiny: TinyModels, data: Path, complete: Path, tmp_path: Path
) -> None:
    """A longer run prefers the chosen answers of pairs that it has not seen."""
    out = tmp_path / "run"
    small = preference_recipe(tiny("llama"), data, steps=12, learning_rate=3e-3)
    train(small, out, observer=Recorder())
    metrics = _events(out, "validation")[-1]["parts"]
    assert metrics["rewards/accuracies"] == 1
    assert metrics["policy/accuracies"] == 1
    assert np.isfinite(metrics["rewards/margins"])


def test_plain_fine_tuning_refuses_the_section(
    tiny: TinyModels, data: Path, tmp_path: Path
) -> None:
    with pytest.raises(SlimError, match="compares answers") as refused:
        finetune(preference_recipe(tiny("llama"), data), tmp_path / "run", observer=Recorder())
    assert "mlx-slim train" in refused.value.hint
    assert not (tmp_path / "run").exists()
