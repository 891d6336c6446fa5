"""Work side by side: what a failure and an interrupt leave undone."""

from __future__ import annotations

import threading
import time
from concurrent.futures import CancelledError

import mlx.core as mx
import pytest

from mlx_slim.data.collate import TokenNode
from mlx_slim.errors import SlimError
from mlx_slim.models.load import load
from mlx_slim.models.token_list import TokenList, token_lists
from mlx_slim.threads import check_awaited, run_in_threads
from tests.support.tiny import TinyModels


def test_threads_leave_the_rest_when_one_fails() -> None:
    begun: list[int] = []

    def work(number: int) -> None:
        begun.append(number)
        if number == 1:
            raise SlimError("one failed")
        time.sleep(0.01)

    with pytest.raises(SlimError, match="one failed"):
        run_in_threads(work, [(number,) for number in range(200)], 2)
    assert len(begun) < 100


def test_work_that_nobody_waits_for_ends_between_two_steps() -> None:
    ended = threading.Event()

    def work(fails: bool) -> None:
        if fails:
            raise SlimError("one failed")
        try:
            for _ in range(10_000):
                check_awaited()
                time.sleep(0.01)
        except CancelledError:
            ended.set()
            raise

    with pytest.raises(SlimError, match="one failed"):
        run_in_threads(work, [(False,), (True,)], 2)
    assert ended.is_set()
    check_awaited()  # a thread without work, and one whose work goes on, are not ended
    assert run_in_threads(lambda: check_awaited(), [(), ()], 2) == [None, None]


def test_a_list_of_tokens_ends_at_its_next_layer(tiny: TinyModels) -> None:
    model = load(tiny(), dtype=mx.float32).model
    begun, layers = threading.Event(), []

    def work(fails: bool) -> None:
        if fails:
            assert begun.wait(60)
            raise SlimError("one failed")
        for _ in range(10_000):
            with token_lists(), TokenList([TokenNode(0, 8, 0, ())]).computed():
                mx.eval(model(mx.arange(8)[None]))  # type: ignore[operator]
            layers.append(1)
            begun.set()

    with pytest.raises(SlimError, match="one failed"):
        run_in_threads(work, [(False,), (True,)], 2)
    assert 0 < len(layers) < 10_000
