"""Ranks that are killed, stopped, late or ended: each of the others names the right one and ends.

The ranks are real, on the ring of this machine, and are asked one by one.
"""

from __future__ import annotations

import re
import signal
import threading
from pathlib import Path

import pytest

from mlx_slim.ranks import watch
from mlx_slim.runtime import world
from tests.support.ranks import ended, started_ranks, wait_for
from tests.support.runs import run_script

# Each rank sums until the file ``act`` is there: then rank 1 does what it is told.
RANK = """
import os, sys, time
from pathlib import Path
import mlx.core as mx
from mlx_slim.ranks import watch
from mlx_slim.ranks.state import resumed_by, state
from mlx_slim.runtime import all_sum, true_on_all_ranks, world

folder, act, timeout = Path(sys.argv[1]), sys.argv[2], float(sys.argv[3])
watch.set_timeout(timeout)
rank = world().rank()
with resumed_by(lambda: "mlx-slim train small --resume"):
    for number in range(1_000_000):
        told = all_sum(mx.array(int((folder / "act").exists())))
        (folder / f"{rank}.ready").touch()
        if told.item() and rank == 1:
            if act == "sleep":
                time.sleep(600)
            if act == "exit":
                watch.leave(3)
                os._exit(3)
            if act == "alone":  # longer than the others wait for what has a limit
                time.sleep(2 * timeout)
        if told.item() and act == "alone":
            true_on_all_ranks()
            break
        time.sleep(0.02)
watch.leave(0)
"""
RESUME = "; resume with: mlx-slim train small --resume"


@pytest.mark.parametrize("lost", [0, 1])
def test_a_killed_rank_is_named_by_the_others(tmp_path: Path, lost: int) -> None:
    with started_ranks(tmp_path, 3, RANK, tmp_path, "none", 60) as processes:
        for rank in range(3):
            wait_for(tmp_path / f"{rank}.ready", *processes)
        processes[lost].send_signal(signal.SIGKILL)
        for rank in {0, 1, 2} - {lost}:
            line = (
                f"error: rank {lost} of 3 ended without a word: killed, crashed, or out of memory"
            )
            assert ended(processes[rank]) == (1, [line + RESUME])


@pytest.mark.parametrize("lost", [0, 1])
def test_a_stopped_rank_is_named_by_the_others(tmp_path: Path, lost: int) -> None:
    with started_ranks(tmp_path, 3, RANK, tmp_path, "none", 4) as processes:
        for rank in range(3):
            wait_for(tmp_path / f"{rank}.ready", *processes)
        processes[lost].send_signal(signal.SIGSTOP)
        for rank in {0, 1, 2} - {lost}:
            code, (line,) = ended(processes[rank])
            assert code == 1
            assert line.startswith(f"error: rank {lost} of 3 has sent no heartbeat for ")
            assert line.endswith("s: it is stopped or asleep, or its link is cut" + RESUME)
        processes[lost].send_signal(signal.SIGCONT)  # it learns that the others are gone
        code, lines = ended(processes[lost])
        assert (code, len(lines)) == (1, 1)


def test_a_late_rank_is_told_from_one_that_ended_and_one_that_may_work_alone(
    tmp_path: Path,
) -> None:
    for act in ("sleep", "exit", "alone"):
        folder = tmp_path / act
        folder.mkdir()
        with started_ranks(folder, 2, RANK, folder, act, 4) as processes:
            for rank in range(2):
                wait_for(folder / f"{rank}.ready", *processes)
            (folder / "act").touch()
            ends = [ended(process) for process in processes]
        ends = [
            (code, [re.sub(r"is \d+ s", "is N s", one) for one in lines]) for code, lines in ends
        ]
        what = {
            "sleep": "lives, and is N s late at a collective that the others wait in",
            "exit": "ended with exit code 3; its message says why",
        }
        named = f"rank 1 of 2 {what.get(act)}{RESUME}"
        abandoned = (1, [f"error: the others gave this rank up: {named}"])
        assert (
            ends
            == {
                "sleep": [(1, [f"error: {named}"]), abandoned],
                "exit": [(1, [f"error: {named}"]), (3, [])],
                "alone": [(0, []), (0, [])],
            }[act]
        )


def test_one_rank_listens_nowhere_and_starts_no_thread() -> None:
    assert world().size() == 1
    assert not watch.watching()
    assert "ranks" not in {thread.name for thread in threading.enumerate()}


def test_under_the_launcher_the_others_print_the_same_line(tmp_path: Path) -> None:
    """The launcher ends the survivors a second after a death, and returns 0 whatever happened.

    On a busy machine that second may be over before the second survivor has printed.
    """
    script = RANK.replace("if told.item() and rank == 1:", "if number == 20 and rank == 1:")
    script = script.replace('if act == "sleep":', "os.kill(os.getpid(), 9)\n            if False:")
    done = run_script(script, tmp_path, "none", 60, ranks=3)
    line = "error: rank 1 of 3 ended without a word: killed, crashed, or out of memory" + RESUME
    lines = [one for one in done.stderr.splitlines() if one.startswith("error: ")]
    assert set(lines) == {line}
    assert done.returncode == 0
