"""The watch on a held-out text: limits, patience, which step is kept, what a resume remembers."""

from __future__ import annotations

import pytest

from mlx_slim import events
from mlx_slim.config.schema import HeldOutConfig
from mlx_slim.errors import SlimError
from mlx_slim.finetuning.forgetting import REASON, HeldOut
from mlx_slim.training.callbacks import SAVE
from mlx_slim.training.state import TrainState
from tests.support.runs import Recorder


def _watch(values: list[float], **settings) -> tuple[HeldOut, Recorder]:
    config = HeldOutConfig(path="text", every=2, max_rise=0.1, **settings)
    recorder, waiting = Recorder(), iter(values)
    return HeldOut(config, lambda: next(waiting), recorder, "00ff"), recorder


def _run(watch: HeldOut, steps: int) -> tuple[TrainState, list[str]]:
    at, answers = TrainState(), []
    assert watch.begin(at) == ""
    for at.step in range(1, steps + 1):
        answers.append(watch.after(at, at.step == steps))
        if answers[-1] not in ("", SAVE):
            break
    return at, answers


def test_it_stops_above_the_limit_and_keeps_the_newest_within():
    watch, recorder = _watch([1.0, 0.9, 1.0999, 1.1001])
    at, answers = _run(watch, 20)
    assert answers == ["", SAVE, "", SAVE, "", REASON]
    assert (at.step, at.held_out_step, at.held_out_start) == (6, 4, 1.0)
    assert watch.begin(at) == REASON  # a resume does not go on
    heard = [e for e in recorder.events if isinstance(e, events.HeldOutDone)]
    assert [(e.step, e.within) for e in heard] == [(0, True), (2, True), (4, True), (6, False)]
    assert heard[1].rise == pytest.approx(-0.1)


def test_patience_counts_measurements_in_a_row_and_the_end_has_none():
    watch, _ = _watch([1.0, 1.0, 1.2, 1.0, 1.2, 1.2], patience=2)
    at, answers = _run(watch, 20)
    assert answers[-1] == REASON and at.step == 10 and at.held_out_step == 6
    watch, _ = _watch([1.0, 1.0, 1.2], patience=2)
    at, answers = _run(watch, 3)
    assert answers == ["", SAVE, REASON] and at.held_out_step == 2
    assert watch.begin(at) == REASON


def test_a_run_that_never_was_within_says_so():
    watch, _ = _watch([1.0, 1.5])
    with pytest.raises(SlimError, match=r"50.0% more bits after step 2 .limit 10.0%.") as caught:
        _run(watch, 20)
    assert "learning_rate" in caught.value.hint


def test_what_is_no_number_is_not_within():
    watch, _ = _watch([1.0, 1.0, float("nan")])
    assert _run(watch, 20)[1][-1] == REASON


def test_another_text_on_resume_is_refused():
    watch, _ = _watch([])
    watch.load_state(watch.state())
    other = HeldOut(watch.config, float, Recorder(), "00fe")
    with pytest.raises(SlimError, match="another text"):
        other.load_state(watch.state())


@pytest.mark.parametrize(
    ("best", "within", "reason", "kept"),
    [
        (None, None, "complete", 9),
        (7, 8, "complete", 7),
        (7, 8, "held_out", 7),
        (8, 6, "held_out", 6),
        (None, 6, "held_out", 6),
    ],
)
def test_which_step_is_the_result(best, within, reason, kept):
    done = events.Done(9, reason, 1, 1.0, 1, best_step=best, held_out_step=within)
    assert done.kept_step == kept
