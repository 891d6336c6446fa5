"""What mlx-slim 0.1 wrote still resumes, loads, reports and runs.

The files of ``tests/fixtures/v0_1`` were made once by that version (its README says how), with the
losses that 0.1 computed for the same runs without an interruption.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm import load as stock_load

from mlx_slim import children
from mlx_slim.adapters.store import load_adapter
from mlx_slim.api import distill, finetune
from mlx_slim.cli.main import run as command
from mlx_slim.errors import SlimError
from mlx_slim.models.load import load
from tests.support.kill_commands import Here
from tests.support.runs import Recorder, losses

FIXTURES = Path(__file__).parent / "fixtures" / "v0_1"
REFERENCE = json.loads((FIXTURES / "reference.json").read_text())
DISTILLED = ("logits", "rationales")
# 0.1 decayed every parameter; since then norms and biases are spared unless a recipe says so.
AS_0_1 = {"qat": {"train.decay_all": True}}


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the fixtures as the working folder: recipes name their files relative to it."""
    folder = tmp_path / "v0_1"
    shutil.copytree(FIXTURES, folder)
    monkeypatch.chdir(folder)
    return folder


def messages(seen: Recorder) -> list[str]:
    """Return the notices."""
    return [text for event in seen.events if (text := getattr(event, "message", None))]


def close(name: str) -> dict[int, Any]:
    """Return step -> loss as 0.1 computed it, up to the rounding of another processor's kernels."""
    return {int(step): pytest.approx(loss, rel=5e-5) for step, loss in REFERENCE[name].items()}


@pytest.mark.parametrize("name", REFERENCE)
def test_an_interrupted_run_resumes_to_the_losses_of_0_1(files: Path, name: str) -> None:
    run = Path("stopped") / name
    learn = distill if name in DISTILLED else finetune
    recorder = Recorder()
    result = learn(f"{name}.yaml", run, overrides=AS_0_1.get(name), resume=True, observer=recorder)
    assert result.done.reason == "complete" and result.done.step == 6
    assert losses(run) == close(name)
    assert json.loads((run / "run.json").read_text())["status"] == "complete"
    notices = messages(recorder)
    assert len(notices) == len(set(notices)), notices


def test_weight_decay_of_0_1_is_named(files: Path) -> None:
    with pytest.raises(SlimError, match=r"train\.decay_all: True → False"):
        finetune("qat.yaml", Path("stopped") / "qat", resume=True)


def test_rows_that_this_version_reads_otherwise_are_refused(files: Path) -> None:
    run = Path("stopped") / "forgetting"
    ids = run / "tokens" / "rows" / "ids.bin"
    before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    data = bytearray(before[ids])
    data[0] ^= 1
    ids.write_bytes(data)
    with pytest.raises(SlimError, match=r"older version .* tokenizes or masks"):
        finetune("forgetting.yaml", run, resume=True)
    after = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    assert {name for name in before if after[name] != before[name]} == {ids}
    assert after.keys() - before.keys() <= {run / ".lock"}


@pytest.mark.parametrize("name", REFERENCE)
def test_a_recipe_of_0_1_runs(files: Path, name: str) -> None:
    if name == "rationales":
        pytest.skip("its teacher is a server; the resumed run reads its texts")
    learn = distill if name in DISTILLED else finetune
    learn(f"{name}.yaml", Path("again"), overrides=AS_0_1.get(name), observer=Recorder())
    assert losses(Path("again")) == close(name)


def test_an_adapter_loads_here_and_in_stock_mlx_lm(files: Path) -> None:
    tokens_BT = mx.arange(16)[None]
    loaded = load("model")
    bare = loaded.model(tokens_BT)
    load_adapter(loaded.model, Path("adapter"))
    ours = loaded.model(tokens_BT)
    stock = stock_load("model", adapter_path="adapter")[0](tokens_BT)
    assert mx.abs(ours - bare).max() > 20 * mx.abs(ours - stock).max()


def test_scores_compare_with_those_of_today(files: Path, capsys: pytest.CaptureFixture) -> None:
    assert command(["eval", "model", "--task", "./toytask.yaml", "-o", "now"]) == 0
    capsys.readouterr()
    assert command(["eval", "--compare", "scores", "now"]) == 0
    assert "toytask" in capsys.readouterr().out
    for before, after in zip(
        (files / "scores" / "samples_toytask.jsonl").read_text().splitlines(),
        (files / "now" / "samples_toytask.jsonl").read_text().splitlines(),
        strict=True,
    ):
        old, new = json.loads(before), json.loads(after)
        assert new["prediction"] == old["prediction"]
        assert new["loglikelihoods"] == pytest.approx(old["loglikelihoods"], abs=1e-3)


def scores(files: Path) -> list[dict]:
    """Return the scores that a matrix publishes."""
    rows = json.loads((files / "matrix" / "results.json").read_text())["rows"]
    return [row["scores"] for row in rows]


def test_a_matrix_reports_resumes_and_verifies(
    files: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    cells = SimpleNamespace(Popen=Here, PIPE=None)  # in this process: a start takes seconds
    monkeypatch.setattr(children, "subprocess", cells)
    published = scores(files)
    assert command(["report", "matrix"]) == 0
    assert scores(files) == published
    capsys.readouterr()
    assert command(["report", "matrix", "--verify"]) == 2
    text = capsys.readouterr().err
    assert "lacks the requests" in text and "mlx-slim compare MATRIX -o matrix --resume" in text
    assert command(["compare", "toy.yaml", "-o", "matrix", "--resume"]) == 0
    text = capsys.readouterr().err
    assert text.count("held_out (toy.yaml:32) is called forgetting now") == 1
    assert scores(files) == published
    assert command(["report", "matrix", "--verify"]) == 0
