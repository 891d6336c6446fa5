"""Verdicts combine by their action; a checkpoint gives each callback its own state back."""

from __future__ import annotations

from typing import ClassVar, final

import mlx.core as mx
import pytest

from mlx_slim.training.callbacks import (
    Action,
    CallbackState,
    StatefulCallback,
    Verdict,
    collect_states,
    combine,
    restore_states,
)


@final
class Counter(StatefulCallback):
    """Remembers one number."""

    name: ClassVar[str] = "counter"

    def __init__(self, count: int) -> None:
        self.count = count

    def state(self) -> CallbackState:
        return CallbackState({"count": mx.array(self.count)}, {"count": self.count})

    def load_state(self, state: CallbackState) -> None:
        self.count = state.values["count"]


def test_the_greatest_action_counts_and_of_equal_ones_the_first_reason() -> None:
    assert combine([]) == Verdict(Action.CONTINUE)
    assert combine([Verdict(Action.SAVE), Verdict()]).action is Action.SAVE
    stops = [Verdict(Action.STOP, "z", 6), Verdict(Action.SAVE), Verdict(Action.STOP, "a", 4)]
    assert combine(stops) == Verdict(Action.STOP, "z", 4)  # within the limits of both
    assert combine([Verdict(Action.STOP, "z"), Verdict(Action.SAVE, "", 1)]).latest_step is None


def test_states_are_restored_by_name_and_others_are_refused() -> None:
    states = collect_states([Counter(7)])
    fresh = Counter(0)
    restore_states([fresh], states)
    assert fresh.count == 7
    with pytest.raises(KeyError, match="counter"):
        restore_states([], states)
    with pytest.raises(KeyError, match="counter"):
        restore_states([fresh], {})


def test_a_hook_without_its_methods_cannot_be_made() -> None:
    class Incomplete(StatefulCallback):
        name = "incomplete"

    with pytest.raises(TypeError, match="abstract"):
        Incomplete()  # type: ignore[abstract]
