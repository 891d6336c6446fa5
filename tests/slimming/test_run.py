"""A whole search on a tiny model: what it chooses, claims and refuses; every phase killed."""

from __future__ import annotations

import json
import shutil
import signal
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mlx_slim.artifacts import read_json
from mlx_slim.cli.main import run
from mlx_slim.errors import SlimError, TimeLimitError
from mlx_slim.events import Notice
from mlx_slim.models.load import read_config
from mlx_slim.reading import JsonObject
from mlx_slim.slimming import recovery
from mlx_slim.slimming.folder import REPORT_FILE
from mlx_slim.slimming.options import SlimOptions
from mlx_slim.slimming.questions import ModelAnswers
from mlx_slim.slimming.records import SlimReport, read_report
from mlx_slim.slimming.report import write_page
from mlx_slim.slimming.run import slim
from mlx_slim.slimming.search import Search
from mlx_slim.slimming.verify import verify
from tests.slimming.conftest import Setting
from tests.support.runs import Recorder, run_script


def test_the_best_within_a_budget(
    setting: Setting, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (model, options), out = setting, finished
    report = read_report(out)
    assert report == SlimReport.from_json(read_json(out / REPORT_FILE))
    kinds = {row.candidate.kind for row in report.rows}
    assert kinds == {"bits", "mixed", "depth", "width"}
    assert all(row.candidate.cost.disk_bytes <= 150_000 for row in report.rows)
    scored = [row for row in report.rows if row.selection is not None]
    best = max(row.selection.second for row in scored if row.selection)
    winner = next(row for row in report.rows if row.candidate.key == report.winner)
    assert winner.selection and winner.selection.second == best
    assert winner.disk_bytes and winner.disk_bytes <= 150_000
    assert report.questions == {"toy_choice": (12, 8)}
    assert report.claim and report.claim.n == 8 and report.demand_met is None
    assert "quantization" in read_config(out / "model")
    assert not any("over the budget" in row.verdict for row in report.rows)
    assert not list(out.glob("candidates/*/model")) and not (out / "targets").exists()
    assert verify(out).candidates == len(scored)
    assert run(["report", str(out)]) == 0
    page = (out / "report.html").read_text()
    assert report.headline in capsys.readouterr().out and winner.name in page
    heard = Recorder()
    assert slim(model, out, options, heard, resume=True) == report
    assert any(isinstance(e, Notice) and e.message.endswith("nothing to do") for e in heard.events)
    with pytest.raises(SlimError, match=r"other demands: limit: 24 → 20"):
        slim(model, out, replace(options, limit=20), Recorder(), resume=True)


def test_what_cannot_be_recovered_in_time_is_left_out_and_blocks_of_a_mix_are_trained(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def choose(*_words: Any, **settings: Any) -> None:
        assert settings["time"]
        raise TimeLimitError("--time 9s is enough for 1 step", "give it about 2 min")

    monkeypatch.setattr(recovery, "choose", choose)
    (model, options), out, heard = setting, tmp_path / "out", Recorder()
    report = slim(model, out, replace(options, disk=105_000, time=3600.0), heard)
    rows = {row.candidate.kind: row for row in report.rows if row.verdict[:3] != "not"}
    assert rows["mixed"].candidate.bits_per_weight and report.winner == rows["mixed"].candidate.key
    assert rows["mixed"].candidate.bits_per_weight < 5 and rows["mixed"].recovered == "blocks"
    late = [row for kind, row in rows.items() if kind != "mixed"]
    assert late and {row.verdict for row in late} == {"--time leaves too little to recover it"}
    notices = [event.message for event in heard.events if isinstance(event, Notice)]
    assert any(text.endswith("is left out: give it about 2 min") for text in notices)
    (again,) = report.commands
    assert again[again.index("--method") + 1] == "blockwise" and "--calibration" in again
    assert ">blocks<" in write_page(out).read_text() and verify(out).candidates == 1


def test_a_changed_report_is_refused(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    report = read_report(out)
    values = report.as_json()
    values["claim"]["second"] += 0.125
    (out / REPORT_FILE).write_text(json.dumps(values))
    with pytest.raises(SlimError, match=r"claim is .* counted again it is"):
        verify(out)
    for changed, message in (
        (_changed(report, "headline", value="smaller and better"), "headline is smaller and"),
        (_changed(report, "provable", value=0.999), "largest share that can be shown"),
        (_changed(report, "rows", 0, "kl", value=0.0), "distance of"),
        (_changed(report, "rows", 0, "candidate", "cost", "cache_bytes", value=1), "cost of"),
        (_changed(report, "options", "disk", value=10**9), "demanded disk"),
        (_changed(report, "winner", value=None), "winner is None"),
        (_changed(report, "options", "questions", value={}), r"slim\.json is damaged: KeyError"),
    ):
        (out / REPORT_FILE).write_text(json.dumps(changed))
        with pytest.raises(SlimError, match=message):
            verify(out)
    (out / REPORT_FILE).write_text(json.dumps(report.as_json()))
    samples = next((out / "scores" / "original").glob("*/samples_*.jsonl"))
    samples.write_text(samples.read_text().replace('"acc": 1', '"acc": 0', 1))
    with pytest.raises(SlimError, match=r"differs from its results\.json"):
        verify(out)


def _changed(report: SlimReport, *path: str | int, value: object) -> JsonObject:
    values: Any = report.as_json()
    place = values
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return values


def test_costs_are_left_out_without_the_original(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    request = read_json(out / "request.json")
    (out / "request.json").write_text(json.dumps({**request, "source": str(tmp_path / "gone")}))
    assert run(["report", str(out), "--verify"]) == 0
    assert "the original is not here" in capsys.readouterr().err
    assert verify(finished).costs


def test_keep_all_returns_the_original(whole_score: Path) -> None:
    report = read_report(whole_score)
    assert report.winner is None and report.demand_met is False and report.claim is None
    assert "is shown to keep 100%" in report.headline and "the original stays" in report.headline
    assert not (whole_score / "model").exists()
    assert verify(whole_score).numbers > 0


def test_a_speed_is_measured_and_what_is_slower_falls(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Models without a layer write 2.5 times as fast here, all others 1.2 times."""

    def speed(source: str, _revision: str | None) -> tuple[float, float]:
        if Path(source) == setting[0]:
            return 400.0, 10.0
        layers = read_config(Path(source))["num_hidden_layers"]
        return 500.0, 25.0 if layers < read_config(setting[0])["num_hidden_layers"] else 12.0

    monkeypatch.setattr("mlx_slim.slimming.build._speed", speed)
    out = tmp_path / "out"
    report = slim(setting[0], out, replace(setting[1], speed=1.5), Recorder())
    measured = [row for row in report.rows if row.speed]
    assert len(measured) > 1
    for row in measured:
        assert row.speed and row.speed.prefill_ratio == 1.25
        fast = row.candidate.kind == "depth"
        assert row.speed.generation_ratio == (2.5 if fast else 1.2)
        assert fast == (row.verdict != "1.20 x the original's speed")
    winner = next(row for row in report.rows if row.candidate.key == report.winner)
    assert winner.candidate.kind == "depth" and verify(out).candidates == len(measured)
    assert run(["report", str(out)]) == 0
    assert "Score and speed" in (out / "report.html").read_text()


def test_a_share_that_cannot_be_shown_is_refused(setting: Setting, tmp_path: Path) -> None:
    model, options = setting
    with pytest.raises(SlimError, match=r"--keep 99 cannot be shown with 8 claim questions") as no:
        slim(model, tmp_path / "out", replace(options, keep=99.0), Recorder())
    assert "--limit" in no.value.hint and "--keep" not in no.value.hint  # 0 is none


@pytest.mark.parametrize(
    ("right", "message", "hint"),
    [
        (0, "answers none of the selection questions right", "choose a task that it can do"),
        (1, "--keep 50 cannot be shown with 4 claim questions", "in a new folder"),
    ],
)
def test_hints_to_a_share_are_possible(right: int, message: str, hint: str) -> None:
    """Where nothing can be shown, no smaller share is offered."""
    right_N = np.arange(8) < right
    answers = [ModelAnswers("toy", "acc", right_N.astype(np.int8), np.arange(8) < 4, 0.25)]
    search: Any = SimpleNamespace(
        space=SimpleNamespace(candidate=lambda *_: None),
        tasks=[SimpleNamespace(name="toy", claim=4)],
        base=answers,
        scored=lambda _: answers,
        options=SlimOptions(keep=50.0),
        say=lambda *_: None,
    )
    with pytest.raises(SlimError, match=message) as refused:
        Search._provable(search)
    assert hint in refused.value.hint and "--keep 0" not in refused.value.hint


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--disk", "1KB"], "no smaller model meets --disk 1.00 kB: the nearest is 2 bits"),
        (["--disk", "150KB", "--task", "no_such"], "no_such"),
        (["--speed", "fast"], "--speed 'fast' is not a factor"),
        ([], "nothing is demanded"),
    ],
)
def test_one_line_and_nothing_left(
    setting: Setting,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    message: str,
) -> None:
    model, options = setting
    task = [] if "--task" in words else ["--task", options.tasks[0]]
    out = tmp_path / "out"
    data = ["--data", str(options.data)]
    assert run(["slim", str(model), "-o", str(out), *data, *task, *words]) == 2
    assert message in capsys.readouterr().err and not out.exists()


def test_dry_run_lists_and_writes_nothing(
    setting: Setting, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, options = setting
    words = ["slim", str(model), "--disk", "150KB", "--task", options.tasks[0], "--dry-run"]
    assert run(words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("the original") and any(
        line.startswith("8 bits, 2 of 3 layers") for line in lines
    )
    assert run([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["bits"] is None


KILL_SCRIPT = """
import json, os, signal, sys
from pathlib import Path
from mlx_slim.distillation import logits
from mlx_slim.slimming import build, run as whole, search
from mlx_slim.slimming.options import SlimOptions
from tests.support.kills import run_forked

model, out, options, moments = sys.argv[1:5]
options = {k: tuple(v) if isinstance(v, list) else v for k, v in json.loads(options).items()}

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

def after(function, count):
    calls = []
    def counting(*words, **named):
        calls.append(0)
        if len(calls) > count:
            die()
        return function(*words, **named)
    return counting

class Observer:
    def __init__(self, moment):
        self.moment = moment
    def notify(self, event):
        if self.moment == "recovering" and event.name == "step" and event.step == 3:
            die()

def run(moment, resume):
    if moment == "original":
        search.answer = after(search.answer, 0)
    if moment == "ranking":
        build.distance = after(build.distance, 1)
    if moment == "cut":
        build.prune = die
    if moment == "scoring":
        search.answer = after(search.answer, 3)
    if moment == "claim":
        whole.conclude = die
    if moment == "written":
        whole.finish = die
    whole.slim(model, Path(out), SlimOptions(**options), Observer(moment), resume=resume)

ends = []
for number, moment in enumerate(json.loads(moments)):
    end = run_forked(lambda: run(moment, number > 0))
    ends.append([moment, end, (Path(out) / "slim.json").exists()])
print(json.dumps(ends))
"""


def test_killed_in_every_phase_the_page_is_the_same(
    setting: Setting, finished: Path, tmp_path: Path
) -> None:
    model, options = setting
    values: dict[str, Any] = {k: v for k, v in asdict(options).items() if v is not None}
    moments = ["original", "ranking", "cut", "recovering", "scoring", "claim", "written", "none"]
    words = [str(model), str(tmp_path / "killed"), json.dumps(values), json.dumps(moments)]
    done = run_script(KILL_SCRIPT, *words)
    ends = json.loads(done.stdout.splitlines()[-1])
    killed = -signal.SIGKILL
    assert [end[1] for end in ends] == [killed] * (len(moments) - 1) + [0]
    assert [end[2] for end in ends] == [False] * (len(moments) - 2) + [True, True]
    whole, resumed = read_report(finished), read_report(tmp_path / "killed")
    # A tokenizer's file says whether the hub was off: it was in the killed process.
    pages = [
        replace(page, commands=[], rows=[replace(row, disk_bytes=None) for row in page.rows])
        for page in (whole, resumed)
    ]
    for row, again in zip(pages[0].rows, pages[1].rows, strict=True):
        assert row == again
    assert pages[0] == pages[1]
    weights = "model/model.safetensors"
    assert (finished / weights).read_bytes() == (tmp_path / "killed" / weights).read_bytes()
