"""Sweeps of a tiny model: the whole, resumed, refused; what the folder and the page hold."""

from __future__ import annotations

import json
import shlex
import sqlite3
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

import mlx_slim
from mlx_slim.artifacts import read_json
from mlx_slim.cli.main import run as command
from mlx_slim.config.load import load_recipe
from mlx_slim.errors import Interrupted, SlimError
from mlx_slim.events import Notice
from mlx_slim.finetuning.run import finetune
from mlx_slim.sweeping import trial
from mlx_slim.sweeping.conclusion import point_text
from mlx_slim.sweeping.options import SweepOptions
from mlx_slim.sweeping.records import read_report
from mlx_slim.sweeping.report import render
from tests.support.imports import SLOW, imported_by
from tests.support.one_cpu import one_cpu
from tests.support.runs import CtrlC, Recorder, write_rows

SPACE = {"adapter.rank": [2, 4], "train.learning_rate": {"low": 1e-4, "high": 1e-1, "log": True}}
TRIALS = SweepOptions(trials=3, seeds=1)
_REPORT = "from mlx_slim.cli.main import run; print(run(['report', 'out']))"


def write_inputs(folder: Path, model: Path, **train: object) -> None:
    """Write rows, a recipe and a space into ``folder``."""
    write_rows(folder / "rows.jsonl", 16)
    values = {
        "model": str(model),
        "adapter": {"rank": 2},
        "data": {"path": "rows.jsonl", "validation": 4},
        "train": {
            "steps": 2,
            "batch_tokens": 256,
            "max_length": 128,
            "validate_every": 1,
            "save_every": 1,
            "learning_rate": 1e-3,
            **train,
        },
    }
    (folder / "base.yaml").write_text(yaml.safe_dump(values))
    (folder / "space.yaml").write_text(yaml.safe_dump(SPACE))


@pytest.fixture
def inputs(tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_inputs(tmp_path, tiny())
    monkeypatch.chdir(tmp_path)
    return tmp_path


def notices(recorder: Recorder) -> str:
    return "\n".join(event.message for event in recorder.events if isinstance(event, Notice))


def test_a_sweep_from_its_first_trial_to_the_recipe_of_the_best(
    inputs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recorder = Recorder()
    report = mlx_slim.sweep("base.yaml", "space.yaml", "out", TRIALS, observer=recorder)
    out = inputs / "out"
    assert [row.number for row in report.rows] == [0, 1, 2]
    # The recipe's own values are the first trial; each trial is a run that train would make.
    assert report.baseline == 0 and report.rows[0].values == {
        "adapter.rank": 2,
        "train.learning_rate": 1e-3,
    }
    again = finetune(load_recipe("out/trials/000/recipe.yaml"), inputs / "0", observer=Recorder())
    assert again.done.best_validation == report.rows[0].outcome.loss
    best = min(report.rows, key=lambda row: row.outcome.loss or 9.0)
    assert report.best == best.number and f"trial {best.number} of 3" in report.headline
    assert point_text(best.values) in report.headline
    for row in report.rows:
        present = (out / f"trials/{row.number:03d}/run/adapters/adapters.safetensors").exists()
        assert present == (row.number == report.best)
        assert not (out / f"trials/{row.number:03d}/run/checkpoints").exists()
    assert "# Run:  mlx-slim train out/winner.yaml -o RUN" in (out / "winner.yaml").read_text()
    winner = load_recipe("out/winner.yaml").recipe
    assert winner.adapter.rank == best.values["adapter.rank"]
    assert winner.train.learning_rate == best.values["train.learning_rate"]
    assert winner.report_answers == 3  # as the recipe says, not as its trials
    # On another seed: other weights, the same validation rows.
    (seeded,) = report.seeds
    recipe = load_recipe(f"out/seeds/{best.number:03d}-seed-1/recipe.yaml").recipe
    assert (recipe.train.seed, recipe.data.seed) == (1, 0)
    assert seeded.outcome.loss not in (None, best.outcome.loss)
    assert seeded.outcome.validated_tokens == best.outcome.validated_tokens
    # The study is Optuna's, to be read by its tools.
    with sqlite3.connect(out / "study.db") as connection:
        assert connection.execute("select count(*) from trials").fetchone() == (3,)
    assert read_json(out / "sweep.json")["best"] == report.best == read_report(out).best

    page = (out / "report.html").read_text()
    for text in ("History", "Parallel coordinates", "All trials", "winner.yaml", "On other seeds"):
        assert text in page
    assert "Importances" not in page  # of three trials
    assert command(["report", "out"]) == command(["report", "out", "--verify"]) == 0
    printed = capsys.readouterr().out
    assert report.headline in printed and "3 trials follows from their records" in printed
    printed, heavy = imported_by(_REPORT)
    assert printed.endswith("0\n") and not {*SLOW, "mlx.core", "optuna"} & set(heavy.split("'"))
    (out / "sweep.json").unlink()  # of one that is not finished
    printed, heavy = imported_by(_REPORT)
    assert printed.endswith("0\n") and not SLOW & set(heavy.split("'")), heavy
    assert (out / "report.html").read_text() == page

    # Resumed with more trials, then with nothing left to do, then with fewer.
    more = mlx_slim.sweep(
        "base.yaml", "space.yaml", "out", SweepOptions(trials=4, seeds=0), resume=True
    )
    assert more.rows[:3] == report.rows and len(more.rows) == 4
    recorder = Recorder()
    mlx_slim.sweep(
        "base.yaml",
        "space.yaml",
        "out",
        SweepOptions(trials=4, seeds=0),
        resume=True,
        observer=recorder,
    )
    assert "is complete: nothing to do" in notices(recorder)
    with pytest.raises(SlimError, match="has 4 trials, --trials 3 are fewer"):
        mlx_slim.sweep("base.yaml", "space.yaml", "out", TRIALS, resume=True)


def test_a_page_with_importances_and_several_objectives(inputs: Path) -> None:
    recorder = Recorder()
    options = SweepOptions(
        trials=2, seeds=0, objective=("validation_loss", "peak_memory"), pruner="hyperband"
    )
    report = mlx_slim.sweep("base.yaml", "space.yaml", "out", options, observer=recorder)
    assert notices(recorder).count("Optuna has no pruner for several objectives") == 1
    assert report.pruner == "none" and set(report.front) <= {0, 1}
    assert all(row.outcome.predicted_peak_bytes for row in report.rows)
    page = render(report, "out")
    assert "The front" in page and "no pruner for several objectives" in page
    many = replace(report, importances={"adapter.rank": 0.25, "train.learning_rate": 0.75})
    assert "Importances" in render(many, "out")


def test_the_pruner_ends_a_trial_and_what_diverges_ends_no_sweep(
    inputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the pruner of Optuna decides, test_study.py tests; here it says yes to the second."""
    decisions: list[tuple[int, int]] = []

    def decide(request: trial.TrialRequest, curve: trial.Curve) -> bool:
        decisions.append((len(request.past), len(curve)))
        return len(request.past) == 1

    monkeypatch.setattr("mlx_slim.sweeping.study.should_prune", decide)
    real = trial.train

    def train(resolved: object, run: Path, observer: object) -> object:
        if run.parent.name == "002":
            raise trial.DivergedError("step 1: loss nan")
        return real(resolved, run, observer)  # type: ignore[arg-type]

    monkeypatch.setattr(trial, "train", train)
    report = mlx_slim.sweep("base.yaml", "space.yaml", "out", SweepOptions(trials=4, seeds=0))
    states = [row.outcome.state for row in report.rows]
    assert states == ["complete", "pruned", "diverged", "complete"]
    assert decisions == [(0, 1), (1, 1), (3, 1)]  # never after the last step
    pruned = report.rows[1].outcome
    assert pruned.steps == 1 and pruned.why == "pruned after step 1" and pruned.loss is not None
    assert any("1 of 4 trials were pruned" in note for note in report.notes)


def test_ctrl_c_keeps_the_step_and_prints_the_command_that_resumes(inputs: Path) -> None:
    class Stop(CtrlC):
        """Ctrl-C after the first step of the second trial."""

        def notify(self, event: object) -> None:
            begun = (inputs / "out/trials/001/run").exists()
            self._step = 1 if begun else 99
            super().notify(event)  # type: ignore[arg-type]

    with pytest.raises(Interrupted) as caught:
        mlx_slim.sweep("base.yaml", "space.yaml", "out", TRIALS, observer=Stop())
    words = shlex.split(caught.value.hint.removeprefix("resume with: "))
    assert words[:5] == ["mlx-slim", "sweep", "base.yaml", "--space", "space.yaml"]
    assert words[-1] == "--resume" and "--trials" in words
    resumed = mlx_slim.sweep("base.yaml", "space.yaml", "out", TRIALS, resume=True)
    whole = mlx_slim.sweep("base.yaml", "space.yaml", "whole", TRIALS)
    losses = [(row.values, row.outcome.loss) for row in resumed.rows]
    assert losses == [(row.values, row.outcome.loss) for row in whole.rows]
    assert resumed.best == whole.best and resumed.rows[1].attempts == 2
    # The step before Ctrl-C was not taken again.
    run = inputs / "out/trials/001/run/metrics.jsonl"
    kinds = [json.loads(line)["event"] for line in run.read_text().splitlines()]
    assert "resumed" in kinds

    # A resume with other values names them.
    (inputs / "space.yaml").write_text(yaml.safe_dump({**SPACE, "adapter.rank": [2, 8]}))
    with pytest.raises(SlimError, match=r"space adapter.rank: '2, 4' → '2, 8'"):
        mlx_slim.sweep("base.yaml", "space.yaml", "out", TRIALS, resume=True)
    (inputs / "space.yaml").write_text(yaml.safe_dump(SPACE))
    write_rows(inputs / "rows.jsonl", 17)
    with pytest.raises(SlimError, match="the rows have changed"):
        mlx_slim.sweep("base.yaml", "space.yaml", "out", TRIALS, resume=True)
    with pytest.raises(SlimError, match="holds a sweep already"):
        mlx_slim.sweep("base.yaml", "space.yaml", "out", TRIALS)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["base.yaml"], "no space to search"),
        (["base.yaml", "--space", "gone.yaml"], "gone.yaml"),
        (["base.yaml", "--space", "spaces"], "no space is called 'spaces'"),
        (["base.yaml", "--space", "space.yaml", "data.validation=0"], "data.validation is 0"),
        (["base.yaml", "--space", "space.yaml", "data.path=gone.jsonl"], "gone.jsonl"),
        (["base.yaml", "--space", "space.yaml", "model=gone"], "gone"),
        (["base.yaml", "--space", "space.yaml", "adapter.rank=4"], "set on the command line"),
        (["base.yaml", "--space", "space.yaml", "--objective", "loss"], "known: peak"),
        (["base.yaml", "--space", "space.yaml", "--trials", "0"], "--trials"),
        (["base.yaml", "--space", "space.yaml", "--pruner", "best"], "--pruner"),
        (
            [
                *("base.yaml", "--space", "space.yaml"),
                "data.path=[{path: 'task:hellaswag', split: validation, limit: 9}]",
            ],
            "a sweep would choose by it",
        ),
        (["--only", "trials/000"], "holds no trial"),
    ],
    ids=lambda value: value[:24] if isinstance(value, str) else "",
)
def test_bad_input_is_one_line_and_leaves_nothing(
    inputs: Path, capsys: pytest.CaptureFixture[str], words: list[str], line: str
) -> None:
    assert command(["sweep", *words, "-o", "out"]) == 2
    error, *hint = capsys.readouterr().err.splitlines()
    assert error.startswith("error: ") and len(hint) < 2
    assert line in " ".join([error, *hint])
    assert not (inputs / "out").exists()


def test_no_choice_of_rows_is_what_a_task_is_scored_on(inputs: Path) -> None:
    (inputs / "space.yaml").write_text(
        'data.path: [rows.jsonl, [{path: "task:hellaswag", split: validation, limit: 9}]]'
    )
    with pytest.raises(SlimError, match="a sweep would choose by it"):
        mlx_slim.sweep("base.yaml", "space.yaml", "out", TRIALS)
    assert not (inputs / "out").exists()


def test_what_the_first_trial_cannot_use_ends_the_sweep_and_leaves_nothing(
    inputs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In this process, as a trial's own process would write it down."""
    (inputs / "space.yaml").write_text(yaml.safe_dump({"adapter.targets": [["nope"], ["none"]]}))
    with pytest.raises(SlimError, match=r"nope|none"):
        mlx_slim.sweep("base.yaml", "space.yaml", "out", TRIALS)
    assert not (inputs / "out").exists()


def test_the_command_lists_spaces_and_runs_trials_in_processes(
    inputs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert command(["sweep"]) == 0
    assert "space-smollm2-lora" in capsys.readouterr().out
    started: list[list[str]] = []

    class Here:
        """Runs the process of a trial in this one."""

        stdin = None

        def __init__(self, words: list[str], **_: object) -> None:
            started.append(words[words.index("mlx_slim") + 1 :])

        def poll(self) -> int:
            return command(started[-1])

    processes = type("processes", (), {"Popen": Here, "PIPE": None})
    monkeypatch.setattr("mlx_slim.children.subprocess", processes)
    words = ["base.yaml", "--space", "space.yaml", "-o", "out", "--trials", "1", "--seeds", "1"]
    assert command(["sweep", *words, "--json"]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["best"] == 0 and len(report["seeds"]) == 1
    assert [one[1:3] for one in started] == [
        ["--only", "trials/000"],
        ["--only", "seeds/000-seed-1"],
    ]


def test_optuna_is_imported_by_a_sweep_alone() -> None:
    _, heavy = imported_by(
        "import mlx_slim.api, mlx_slim.cli.sweep, mlx_slim.cli.report, mlx_slim.compare.cell"
    )
    assert "'mlx.core'" in heavy and "optuna" not in heavy


def test_trials_of_workers_that_do_not_see_the_folder_come_back(
    inputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("distributed", reason="pip install 'mlx-slim[cluster]'")
    with one_cpu():  # as each of two jobs on two cores has
        alone = mlx_slim.sweep(
            "base.yaml", "space.yaml", "alone", replace(TRIALS, trials=1, seeds=0)
        )
    monkeypatch.setenv("MLX_SLIM_CACHE", str(inputs / "cache"))
    monkeypatch.setattr("mlx_slim.cluster.worker.sees_output", lambda request: False)
    options = replace(TRIALS, trials=2, seeds=0, workers=2)
    with one_cpu():
        report = mlx_slim.sweep("base.yaml", "space.yaml", "out", options)
    assert report.workers == 2 and len(report.rows) == 2
    assert report.rows[0].outcome.curve == alone.rows[0].outcome.curve
    assert (inputs / f"out/trials/{report.best:03d}/run/adapters/adapters.safetensors").exists()
    assert list((inputs / "cache").glob("cluster/*/out/trials/001/outcome.json"))
    jobs_of_two = read_json(inputs / "out" / "sweep.json")["notes"]
    assert any("Up to 2 trials ran at a time" in line for line in jobs_of_two)
