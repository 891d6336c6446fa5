"""The study: proposals that a kill does not change, pruners, several objectives, any path."""

from __future__ import annotations

import math
import sqlite3
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from mlx_slim.errors import SlimError
from mlx_slim.sweeping.folder import STUDY_FILE
from mlx_slim.sweeping.options import SweepOptions, check
from mlx_slim.sweeping.records import PastTrial, TrialOutcome, TrialRequest
from mlx_slim.sweeping.space import Parameter, Point
from mlx_slim.sweeping.study import StudyPlan, SweepStudy, should_prune

PARAMETERS = (
    Parameter("adapter.rank", low=2, high=64, log=True, whole=True),
    Parameter("train.learning_rate", low=1e-4, high=1e-1, log=True),
    Parameter("adapter.targets", choices=("all-linear", ["q_proj"], None)),
)
STEPS = (2, 4, 6)


def plan_of(options: SweepOptions, queue: tuple[Point, ...] = ()) -> StudyPlan:
    return StudyPlan(PARAMETERS, options, queue, least_steps=2)


def trained(point: Point, past: Sequence[PastTrial], options: SweepOptions) -> TrialOutcome:
    """Return how a trial ends whose loss is a function of its values."""
    rate, rank = math.log10(point["train.learning_rate"]), point["adapter.rank"]
    if rate > -1.4:
        return TrialOutcome("diverged", why="step 3: loss nan")
    final = abs(rate + 2.5) + abs(math.log2(rank) - 3) / 4 + (point["adapter.targets"] is None)
    request = TrialRequest(options.pruner if options.prunes else "none", 2, list(past))
    curve = []
    for step in STEPS:
        curve.append((step, final + 2 / step))
        if step < STEPS[-1] and should_prune(request, curve):
            return TrialOutcome("pruned", loss=curve[-1][1], steps=step, curve=curve, why="pruned")
    return TrialOutcome("complete", curve[-1][1], 1000 * rank, 1010 * rank, 6, 1.0, 9, curve)


def run(
    file: Path, options: SweepOptions, trials: int, kills: tuple[int, ...] = ()
) -> list[tuple[int, Point, TrialOutcome]]:
    """Search; leave the study open in the middle of a trial as often as ``kills`` counts steps."""
    if not file.exists():
        SweepStudy.create(file, options)
    moments, outcome = 0, TrialOutcome("running")
    study = SweepStudy(file, plan_of(options))
    study.fail_running()
    while (proposal := study.next(trials)) is not None:
        for moment in ("begin", "train", "finish"):
            if moments in kills:  # another process opens the file as it is
                study = SweepStudy(file, plan_of(options))
                study.fail_running()
                kills = tuple(kill for kill in kills if kill != moments)
                break
            if moment == "begin":
                study.begin(proposal)
            elif moment == "train":
                outcome = trained(proposal.values, study.past(proposal.number), options)
            else:
                study.finish(proposal.number, outcome)
            moments += 1
    return [(row.number, row.values, row.outcome) for row in study.rows()]


@pytest.mark.parametrize("pruner", ["median", "hyperband"])
def test_a_killed_sweep_proposes_prunes_and_ends_as_the_undisturbed_one(
    tmp_path: Path, pruner: str
) -> None:
    options = SweepOptions(pruner=pruner, seed=3)  # pyright: ignore[reportArgumentType]
    expected = run(tmp_path / "whole.db", options, 13)
    assert [number for number, _, _ in expected] == list(range(13))
    states = {outcome.state for _, _, outcome in expected}
    assert states == {"complete", "pruned", "diverged"}
    kills = (1, 2, 10, 23, 24, 38)
    assert run(tmp_path / "killed.db", options, 13, kills) == expected
    attempts = [row.attempts for row in SweepStudy(tmp_path / "killed.db", plan_of(options)).rows()]
    assert max(attempts) > 1
    assert run(tmp_path / "other.db", replace(options, seed=4), 16) != expected
    # Later trials learned from earlier ones.
    losses = [outcome.loss if outcome.loss is not None else 9.0 for _, _, outcome in expected]
    assert min(losses[10:]) < sum(losses[:10]) / 10


def test_a_longer_sweep_begins_as_the_shorter_one(tmp_path: Path) -> None:
    options = SweepOptions(pruner="hyperband")
    short = run(tmp_path / "a.db", options, 5)
    assert run(tmp_path / "a.db", options, 11)[:5] == short
    assert run(tmp_path / "b.db", options, 11) == run(tmp_path / "a.db", options, 11)


def test_several_objectives_are_minimised_without_a_pruner(tmp_path: Path) -> None:
    options = SweepOptions(objective=("validation_loss", "peak_memory"))
    assert not options.prunes
    rows = run(tmp_path / "both.db", options, 12)
    assert {outcome.state for _, _, outcome in rows} <= {"complete", "diverged"}
    study = SweepStudy(tmp_path / "both.db", plan_of(options))
    assert len(study.past(12)[-1].values) in (0, 2)
    assert sum(study.importances().values()) == pytest.approx(1)
    killed = run(tmp_path / "killed.db", options, 12, (4, 32))
    assert killed == rows


def test_running_trials_are_not_proposed_again(tmp_path: Path) -> None:
    options = SweepOptions(workers=3)
    SweepStudy.create(tmp_path / STUDY_FILE, options)
    study = SweepStudy(tmp_path / STUDY_FILE, plan_of(options))
    proposals = []
    for _ in range(3):
        proposal = study.next(4)
        assert proposal is not None
        study.begin(proposal)
        proposals.append(proposal)
    assert [one.number for one in proposals] == [0, 1, 2]
    study.finish(1, trained(proposals[1].values, study.past(1), options))
    assert study.workers() == 3
    # The two others were killed: their own parameters are queued again, in their order.
    study = SweepStudy(tmp_path / STUDY_FILE, plan_of(options))
    assert study.fail_running() == [0, 2]
    again = study.next(4)
    assert again is not None and (again.number, again.attempt) == (0, 1)
    assert again.values == proposals[0].values


def test_queued_points_come_first(tmp_path: Path) -> None:
    point = {"adapter.rank": 4, "train.learning_rate": 0.01, "adapter.targets": ["q_proj"]}
    SweepStudy.create(tmp_path / STUDY_FILE, SweepOptions())
    study = SweepStudy(tmp_path / STUDY_FILE, plan_of(SweepOptions(), (point,)))
    proposal = study.next(2)
    assert proposal is not None and proposal.values == point
    study.begin(proposal)
    study.finish(0, TrialOutcome("complete", 1.0, 1, 1, curve=[(1, 1.0)]))
    assert study.rows()[0].values == point


def test_a_folder_may_have_any_name_and_a_damaged_study_is_one_line(tmp_path: Path) -> None:
    folder = tmp_path / "a b?c#d%41&=é"
    folder.mkdir()
    assert len(run(folder / STUDY_FILE, SweepOptions(pruner="none"), 2)) == 2
    assert [path.name for path in folder.iterdir()] == [STUDY_FILE]
    file = folder / STUDY_FILE
    file.write_bytes(b"no database" * 100)
    with pytest.raises(SlimError, match="is damaged") as caught:
        SweepStudy(file, plan_of(SweepOptions()))
    assert "\n" not in caught.value.message
    file.unlink()
    with pytest.raises(SlimError, match="is missing"):
        SweepStudy(file, plan_of(SweepOptions()))


def test_an_edited_study_is_one_line_and_a_locked_one_is_not_called_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path / STUDY_FILE, SweepOptions(), 2)
    whole = (tmp_path / STUDY_FILE).read_bytes()
    attribute = "update trial_user_attributes set value_json = '{}' where key = '{}'"
    for edit in (
        attribute.format('"x"', "trial"),
        attribute.format("-1", "trial"),
        attribute.format('{"state": "complete"}', "outcome"),
        "delete from trial_user_attributes where key = 'outcome'",
        "update trial_params set param_name = 'train.steps' where param_name = 'adapter.rank'",
    ):
        (tmp_path / STUDY_FILE).write_bytes(whole)
        connection = sqlite3.connect(tmp_path / STUDY_FILE)
        connection.execute(edit)
        connection.commit()
        connection.close()
        with pytest.raises(SlimError, match="damaged") as caught:
            SweepStudy(tmp_path / STUDY_FILE, plan_of(SweepOptions())).rows()
        assert caught.value.hint == "start a new sweep", edit
    (tmp_path / STUDY_FILE).write_bytes(whole)
    other = sqlite3.connect(tmp_path / STUDY_FILE)
    other.execute("begin exclusive")
    connect = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda file: connect(file, timeout=0.01))
    with pytest.raises(SlimError, match="is in use by another program"):
        SweepStudy(tmp_path / STUDY_FILE, plan_of(SweepOptions())).rows()
    other.close()


@pytest.mark.parametrize(
    ("names", "line"),
    [
        (("validation_lose",), "did you mean 'validation_loss'"),
        (("validation_loss", "validation_loss"), "is given twice"),
        (("peak_memory",), "without validation_loss"),
    ],
)
def test_objectives_are_known_and_one_is_the_loss(names: tuple[str, ...], line: str) -> None:
    with pytest.raises(SlimError) as caught:
        check(SweepOptions(objective=names))
    assert line in str(caught.value)
