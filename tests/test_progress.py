"""Stages of work: who hears of them, that they end, and that threads may advance them."""

from __future__ import annotations

import threading

import pytest

from mlx_slim.events import StageProgress
from mlx_slim.progress import listening, stage, tracked
from tests.support.runs import Recorder


def told(recorder: Recorder) -> list[tuple[str, float, bool]]:
    """Return name, work done and end of every event."""
    events = [event for event in recorder.events if isinstance(event, StageProgress)]
    assert len(events) == len(recorder.events)
    return [(event.stage, event.done, event.finished) for event in events]


def test_a_stage_begins_advances_and_ends() -> None:
    recorder = Recorder()
    with listening(recorder), stage("reading", 4, "rows") as reading:
        reading.advance()
        reading.reach(3.5)
    assert told(recorder) == [
        *[("reading", 0, False), ("reading", 1, False), ("reading", 3.5, False)],
        ("reading", 3.5, True),
    ]


def test_a_stage_ends_by_an_error_too() -> None:
    recorder = Recorder()
    with listening(recorder), pytest.raises(ValueError, match="x"), stage("reading"):
        raise ValueError("x")
    assert told(recorder)[-1] == ("reading", 0, True)


def test_nobody_hears_outside_of_the_block_and_an_inner_listener_hears_alone() -> None:
    outer, inner = Recorder(), Recorder()
    with listening(outer):
        with listening(inner), stage("inner"):
            pass
        with listening(None), stage("silent"):
            pass
    with stage("later"):
        pass
    assert (outer.events, told(inner)) == ([], [("inner", 0, False), ("inner", 0, True)])


def test_tracked_yields_everything_and_counts_it() -> None:
    recorder = Recorder()
    with listening(recorder):
        assert list(tracked("abc", "reading", "letters")) == ["a", "b", "c"]
    assert [done for _, done, _ in told(recorder)] == [0, 1, 2, 3, 3]
    assert recorder.events[0].total == 3  # type: ignore[attr-defined]


def test_threads_lose_no_step() -> None:
    recorder = Recorder()
    with listening(recorder), stage("reading", 400, "rows") as reading:
        threads = [
            threading.Thread(target=lambda: [reading.advance() for _ in range(100)])
            for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert reading.done == 400
    assert sorted(done for _, done, _ in told(recorder))[-1] == 400
