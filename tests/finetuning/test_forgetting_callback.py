"""The forgetting callback: limit, patience, which step is the result, what a resume remembers."""

from __future__ import annotations

import pytest

from mlx_slim import events
from mlx_slim.config.schema import ForgettingConfig
from mlx_slim.errors import SlimError
from mlx_slim.finetuning.forgetting import Forgetting, Limit
from mlx_slim.training.callbacks import Action, CallbackState, Verdict
from tests.support.runs import Recorder

CONTINUE, SAVE = Verdict(), Verdict(Action.SAVE)


def _forgetting(values: list[float], **settings: int) -> tuple[Forgetting, Recorder]:
    config = ForgettingConfig(path="text", every=2, max_rise=0.1, **settings)
    recorder, waiting = Recorder(), iter(values)
    return Forgetting(config, lambda: next(waiting), recorder, "00ff"), recorder


def _run(forgetting: Forgetting, steps: int) -> tuple[int, list[Verdict]]:
    """Return the last step, and the verdict after each."""
    verdicts: list[Verdict] = []
    assert forgetting.begin(0) == CONTINUE
    for step in range(1, steps + 1):
        verdicts.append(forgetting.after(step, step == steps))
        if verdicts[-1].action is Action.STOP:
            break
    return len(verdicts), verdicts


def _stop(step: int) -> Verdict:
    return Verdict(Action.STOP, "forgetting", step)


def test_it_stops_above_the_limit_and_the_result_is_the_newest_within() -> None:
    forgetting, recorder = _forgetting([1.0, 0.9, 1.0999, 1.1001])
    step, verdicts = _run(forgetting, 20)
    assert verdicts == [CONTINUE, SAVE, CONTINUE, SAVE, CONTINUE, _stop(4)]
    assert (step, forgetting.latest, forgetting.start) == (6, Limit(4, 1), 1.0)
    assert forgetting.required_steps() == {4}
    assert forgetting.begin(6) == _stop(4)  # a resume does not continue
    measured = [e for e in recorder.events if isinstance(e, events.ForgettingMeasured)]
    assert [(e.step, e.within) for e in measured] == [(0, True), (2, True), (4, True), (6, False)]
    assert measured[1].rise == pytest.approx(-0.1)


def test_patience_counts_measurements_in_a_row_and_the_end_has_none() -> None:
    forgetting, _ = _forgetting([1.0, 1.0, 1.2, 1.0, 1.2, 1.2], patience=2)
    step, verdicts = _run(forgetting, 20)
    assert [i for i, verdict in enumerate(verdicts, 1) if verdict == SAVE] == [2, 6]
    assert (step, verdicts[-1]) == (10, _stop(6))
    forgetting, _ = _forgetting([1.0, 1.0, 1.2], patience=2)
    assert _run(forgetting, 3) == (3, [CONTINUE, SAVE, _stop(2)])
    assert forgetting.begin(3) == _stop(2)


def test_a_run_that_never_was_within_the_limit_is_an_error() -> None:
    forgetting, _ = _forgetting([1.0, 1.5])
    with pytest.raises(
        SlimError, match=r"50.0% more bits per byte after step 2 .limit 10.0%."
    ) as caught:
        _run(forgetting, 20)
    assert "learning_rate" in caught.value.hint


def test_nan_is_not_within_the_limit() -> None:
    forgetting, _ = _forgetting([1.0, 1.0, float("nan")])
    assert _run(forgetting, 20)[1][-1] == _stop(2)


@pytest.mark.parametrize(("undo", "latest"), [(True, Limit(2, 0)), (False, Limit(3, 0))])
def test_a_longer_run_has_not_made_the_measurement_of_the_end(undo: bool, latest: Limit) -> None:
    forgetting, _ = _forgetting([1.0, 1.0, 1.0])
    _run(forgetting, 3)
    assert forgetting.required_steps() == {2, 3}
    restored, _ = _forgetting([])
    restored.load_state(forgetting.state())
    assert restored.reopen(undo) == ({"forgetting", "held_out"} if undo else set())
    assert restored.latest == latest
    assert restored.required_steps() == {latest.step}


def test_a_resume_restores_everything_and_refuses_another_text() -> None:
    forgetting, _ = _forgetting([1.25, 1.25])
    forgetting.begin(0)
    forgetting.after(2, False)
    same, _ = _forgetting([])
    same.load_state(forgetting.state())
    assert (same.start, same.latest, same.state()) == (1.25, Limit(2, 0), forgetting.state())
    other = Forgetting(forgetting.config, float, Recorder(), "00fe")
    with pytest.raises(SlimError, match="another text"):
        other.load_state(forgetting.state())
    damaged = CallbackState(values={**forgetting.state().values, "over": "two"})
    with pytest.raises(SlimError, match="over is 'two', expected a whole number"):
        same.load_state(damaged)
