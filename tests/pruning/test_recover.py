"""Prune, recover, score in one folder: what the report says; every phase killed and resumed."""

from __future__ import annotations

import html
import json
import os
import shlex
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_slim.adapters.store import load_adapter
from mlx_slim.artifacts import read_json
from mlx_slim.cli.main import run
from mlx_slim.errors import Interrupted, SlimError
from mlx_slim.events import Event, Notice, StepDone
from mlx_slim.models.load import load
from mlx_slim.pruning.facts import report_lines
from mlx_slim.pruning.options import PruneOptions
from mlx_slim.pruning.records import RecoveryReport
from mlx_slim.pruning.recover import RecoverOptions, prune_and_recover
from tests.support.evals import write_tasks
from tests.support.runs import Recorder, losses, run_script, write_rows
from tests.support.tiny import tiny_model


@pytest.fixture
def setting(tiny: Callable[..., Path], tmp_path: Path) -> tuple[Path, PruneOptions, RecoverOptions]:
    """A model, a recipe of ten steps, tasks, and the options that prune and recover it."""
    rows = write_rows(tmp_path / "rows.jsonl")
    choice, _, text = write_tasks(tmp_path / "tasks", 9)
    recipe = tmp_path / "small.yaml"
    recipe.write_text(
        f"model: replaced\nmethod: lora\ndata: {{path: {rows}, validation: 4}}\n"
        "train: {steps: 6, batch_tokens: 256, max_length: 128, save_every: 2}\n"
    )
    options = PruneOptions(ratio=0.5, samples=4, length=32, held_out=128, calibration=str(text))
    after = RecoverOptions(str(recipe), ("train.seed=1",), (str(choice),), limit=3)
    return tiny(), options, after


# Does what the command does, once for each moment, in a fork that kills itself there: everything
# is imported once. Prints after each how the fork ended and what the folder holds.
KILL_SCRIPT = """
import json, os, signal, sys
from pathlib import Path
from mlx_slim.evaluation import results
from mlx_slim.pruning import importance
from mlx_slim.models import verified_save
from mlx_slim.pruning import report
from mlx_slim.pruning import cutting
from mlx_slim.pruning.options import PruneOptions
from mlx_slim.pruning.recover import RecoverOptions, prune_and_recover
from tests.support.kills import run_forked

model, out, options, after, moments = sys.argv[1:6]

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

class Observer:
    def __init__(self, moment):
        self.moment = moment
    def notify(self, event):
        if self.moment == "step" and event.name == "step" and event.step == 5:
            die()

after = json.loads(after)
after = {k: tuple(v) if isinstance(v, list) else v for k, v in after.items()}

def run(moment, resume):
    if moment == "importance":
        importance._block_gradients = die
    if moment == "cutting":
        cutting.cut = die
    if moment == "saving":
        verified_save._same = die
    if moment == "scoring":
        append, calls = results.Folder.append, []
        def killing(self, task, data, **measured):
            calls.append(task)
            if len(calls) == 2:  # the pruned model's
                die()
            return append(self, task, data, **measured)
        results.Folder.append = killing
    if moment == "report":
        report._compare = die
    options_, after_ = PruneOptions(**json.loads(options)), RecoverOptions(**after)
    prune_and_recover(model, Path(out), options_, after_, Observer(moment), resume=resume)

ends = []
for number, moment in enumerate(json.loads(moments)):
    end = run_forked(lambda: run(moment, number > 0))
    names = ("report.json", "prune_scores.safetensors", "model")
    ends.append([moment, end, *((Path(out) / name).exists() for name in names)])
print(json.dumps(ends))
"""


def _report(out: Path) -> dict:
    report = read_json(out / "report.json")
    report["recipe"]["model"] = report["prune"]["options"] = None
    return report


def test_a_report_of_three_rows(
    setting: tuple[Path, PruneOptions, RecoverOptions],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model, options, after = setting
    out = tmp_path / "run"
    record = prune_and_recover(model, out, options, after, Recorder())
    report = record.as_json()
    assert report == json.loads(json.dumps(report)) == read_json(out / "report.json")
    assert RecoveryReport.from_json(report) == record
    original, pruned, recovered = report["rows"]
    assert [row["name"] for row in report["rows"]] == ["original", "pruned", "recovered"]
    assert original["parameters"] > pruned["parameters"] == recovered["parameters"]
    assert recovered["adapter_parameters"] > 0 == pruned["adapter_parameters"]
    assert original["kl"] == 0 < pruned["kl"]
    assert original["perplexity"] != pruned["perplexity"] != recovered["perplexity"]
    assert report["held_out"]["text"] == "the recipe's validation rows"
    assert report["recipe"]["model"] == str(out / "model")
    assert report["recipe"]["train"]["seed"] == 1
    for row in report["rows"]:
        figures = row["tasks"]["toy_choice"]
        assert figures["n"] == 6 and 0.25 <= figures["chance"] <= 0.5
        assert set(figures["recovery"]) == set(figures["metrics"])
    assert (out / "scores" / "recovered" / "samples_toy_choice.jsonl").exists()
    assert read_json(out / "prune.json") == read_json(out / "model" / "prune.json")
    lines = report_lines(record)
    assert len(lines) == 5 and "above chance" in lines[0] and lines[3].startswith("recovered")
    assert run(["report", str(out)]) == 0
    text = capsys.readouterr().out
    page = (out / "recover" / "report.html").read_text()
    for fact in (f"{original['parameters']:,} -> {pruned['parameters']:,}", lines[2]):
        assert fact in text and fact in html.unescape(page)
    assert run(["report", str(out / "model")]) == 0
    assert f"-> {pruned['parameters']:,}" in capsys.readouterr().out
    adapted = load(out / "model").model
    load_adapter(adapted, out / "recover" / "adapters")
    again = Recorder()
    assert prune_and_recover(model, out, options, after, again, resume=True) == record
    assert [e.message for e in again.events if isinstance(e, Notice)][-1].endswith("nothing to do")


def test_validation_rows_are_not_trained_on(
    setting: tuple[Path, PruneOptions, RecoverOptions], tmp_path: Path
) -> None:
    from mlx_slim.data.store import TokenStore

    model, options, after = setting
    out = tmp_path / "run"
    prune_and_recover(model, out, options, RecoverOptions(after.recipe), Recorder())
    tokens = out / "recover" / "tokens"
    validation = TokenStore(tokens / "rows", index=np.load(tokens / "validation.npy"))
    trained = set(np.load(tokens / "train.npy").tolist())
    assert len(validation) == 4 and not trained & set(np.load(tokens / "validation.npy").tolist())
    total = min(int(validation.lengths.sum()), options.held_out)
    assert read_json(out / "report.json")["held_out"]["tokens"] == total
    heard = Recorder()
    none = RecoverOptions(after.recipe, ("data.validation=0", "train.steps=1"))
    report = prune_and_recover(model, tmp_path / "b", options, none, heard)
    assert report.validation.text == "calibration text"
    warnings = [e for e in heard.events if isinstance(e, Notice) and e.level == "warning"]
    assert any("which may be in its training data" in event.message for event in warnings)


@pytest.mark.parametrize("method", ["full", "qlora"])
def test_other_ways_to_recover(
    setting: tuple[Path, PruneOptions, RecoverOptions], tmp_path: Path, method: str
) -> None:
    model, options, after = setting
    overrides = (f"method={method}", "quantize.group_size=32", "train.steps=2")
    report = prune_and_recover(
        model, tmp_path / "run", options, RecoverOptions(after.recipe, overrides), Recorder()
    )
    _, pruned, recovered = report.rows
    assert pruned.text and recovered.text
    assert recovered.text.perplexity != pruned.text.perplexity
    assert (recovered.adapter_parameters == 0) is (method == "full")


def test_the_original_teaches_where_no_other_teacher_is_named(
    setting: tuple[Path, PruneOptions, RecoverOptions], tmp_path: Path
) -> None:
    model, options, after = setting
    distilled = RecoverOptions(after.recipe, ("distill.weight=1.0", "train.steps=4"))
    out = tmp_path / "run"
    report = prune_and_recover(model, out, options, distilled, Recorder())
    assert report.recipe is not None
    (teacher,) = report.recipe["distill"]["teachers"]
    assert teacher["model"] == str(model)
    _, pruned, recovered = report.rows
    assert pruned.text and recovered.text and recovered.text.kl < pruned.text.kl


def test_killed_in_every_phase_and_resumed_equals_uninterrupted(
    setting: tuple[Path, PruneOptions, RecoverOptions], tmp_path: Path
) -> None:
    model, options, after = setting
    straight, out = tmp_path / "straight", tmp_path / "killed"
    prune_and_recover(model, straight, options, after, Recorder())
    moments = ["importance", "cutting", "saving", "step", "scoring", "report"]
    words = [model, out, json.dumps(vars(options)), json.dumps(vars(after)), json.dumps(moments)]
    done = run_script(KILL_SCRIPT, *words)
    # moment, how it ended, whether the report, the scores of importance and the model are there
    assert json.loads(done.stdout.splitlines()[-1]) == [
        [moment, -signal.SIGKILL, False, moment != "importance", number > 2]
        for number, moment in enumerate(moments)
    ]
    heard = Recorder()
    prune_and_recover(model, out, options, after, heard, resume=True)
    assert not any(isinstance(event, StepDone) for event in heard.events)  # it was complete
    assert losses(out / "recover") == losses(straight / "recover")
    assert _report(out) == _report(straight)
    for folder in ("model", "recover/adapters"):
        for file in (straight / folder).glob("*.safetensors"):
            ours, theirs = mx.load(str(out / folder / file.name)), mx.load(str(file))
            assert all(mx.array_equal(ours[key], theirs[key]) for key in theirs)  # pyright: ignore
    assert {p.name for p in out.iterdir()} == {p.name for p in straight.iterdir()}


class CtrlC(Recorder):
    """Sends this process SIGINT at the first event that fits."""

    def __init__(self, when: Callable[[Event], bool]) -> None:
        super().__init__()
        self.when = when

    def notify(self, event: Event) -> None:
        super().notify(event)
        if self.when(event):
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("phase", ["measuring", "step"])
def test_ctrl_c_prints_the_command_that_goes_on(
    setting: tuple[Path, PruneOptions, RecoverOptions],
    tmp_path: Path,
    phase: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model, options, after = setting
    out = tmp_path / "my run"
    watcher = CtrlC(
        (lambda e: isinstance(e, StepDone) and e.step == 3)
        if phase == "step"
        else (lambda e: isinstance(e, Notice) and e.message.startswith("measuring"))
    )
    with pytest.raises(Interrupted) as caught:
        prune_and_recover(model, out, options, after, watcher)
    words = shlex.split(caught.value.hint.removeprefix("resume with: "))
    assert words[:2] == ["mlx-slim", "prune"] and words[-1] == "--resume"
    assert run(words[1:]) == 0
    assert "recovered" in capsys.readouterr().out
    assert sorted(losses(out / "recover")) == list(range(1, 7))


def test_another_pruning_is_refused_with_the_difference(
    setting: tuple[Path, PruneOptions, RecoverOptions], tmp_path: Path
) -> None:
    model, options, after = setting
    out = tmp_path / "run"
    with pytest.raises(Interrupted):
        prune_and_recover(
            model, out, options, after, CtrlC(lambda e: isinstance(e, StepDone) and e.step == 3)
        )
    other = PruneOptions(**{**vars(options), "ratio": 0.6})
    with pytest.raises(SlimError, match=r"ratio: 0.5 → 0.6"):
        prune_and_recover(model, out, other, after, Recorder(), resume=True)
    changed = RecoverOptions(after.recipe, ("train.seed=2",))
    with pytest.raises(SlimError, match=r"train.seed: 1 → 2"):
        prune_and_recover(model, out, options, changed, Recorder(), resume=True)
    with pytest.raises(SlimError, match="holds a run already"):
        prune_and_recover(model, out, options, after, Recorder())


def test_a_text_that_is_too_short_leaves_nothing(
    setting: tuple[Path, PruneOptions, RecoverOptions], tmp_path: Path
) -> None:
    model, options, after = setting
    empty = tmp_path / "empty.txt"
    empty.write_text("too short")
    wrong = PruneOptions(**{**vars(options), "calibration": str(empty)})
    with pytest.raises(SlimError, match="tokens"):
        prune_and_recover(model, tmp_path / "deep" / "run", wrong, after, Recorder())
    assert not (tmp_path / "deep").exists()


@pytest.mark.parametrize(
    ("architecture", "changes", "cut", "line"),
    [
        ("llama", {"hidden_size": 128}, {"hidden_size": 64}, "all layers 128 -> 64 channels"),
        ("mixtral", {}, {"method": "reap", "experts": 3}, "layer   1  4 -> 3 experts"),
    ],
)
def test_a_model_with_fewer_channels_or_experts_recovers(
    setting: tuple[Path, PruneOptions, RecoverOptions],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    architecture: str,
    changes: dict[str, Any],
    cut: dict[str, Any],
    line: str,
) -> None:
    _, options, after = setting
    source = tiny_model(tmp_path / "source", architecture, **changes)
    recover = RecoverOptions(after.recipe, ("train.steps=2",))
    out = tmp_path / "run"
    report = prune_and_recover(
        source, out, replace(options, ratio=None, **cut), recover, Recorder()
    )
    original, pruned, recovered = report.rows
    assert original.parameters > pruned.parameters == recovered.parameters
    assert pruned.text and recovered.text
    assert recovered.text.perplexity != pruned.text.perplexity
    assert report.prune["method"] in ("activation", "reap")
    assert run(["report", str(out)]) == 0
    assert line in capsys.readouterr().out


def test_a_run_of_a_version_without_an_option_is_resumed(
    setting: tuple[Path, PruneOptions, RecoverOptions], tmp_path: Path
) -> None:
    model, options, _ = setting
    out = tmp_path / "run"
    prune_and_recover(model, out, options, RecoverOptions(), Recorder())
    request = read_json(out / "request.json")
    del request["hidden"], request["experts"]
    (out / "request.json").write_text(json.dumps(request))
    (out / "report.json").unlink()
    prune_and_recover(model, out, options, RecoverOptions(), Recorder(), resume=True)
    with pytest.raises(SlimError, match="other pruning options: hidden: False → True"):
        wider = replace(options, hidden=True)
        prune_and_recover(model, out, wider, RecoverOptions(), Recorder(), resume=True)
